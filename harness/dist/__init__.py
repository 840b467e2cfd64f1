"""Ranks, process groups, and the only collectives outside the gradient hooks."""

from harness.dist.agreement import all_reduce_sum, from_main, together
from harness.dist.hostgroup import HostGroup
from harness.dist.parallel import distribute, gradient_sync, plain
from harness.dist.word import has_group, leave_word, word_of_main
from harness.dist.world import World, open_world

__all__ = [
    "HostGroup",
    "World",
    "all_reduce_sum",
    "distribute",
    "from_main",
    "gradient_sync",
    "has_group",
    "leave_word",
    "open_world",
    "plain",
    "together",
    "word_of_main",
]

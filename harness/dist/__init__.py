"""Ranks, process groups, and the only collectives outside the gradient hooks."""

from harness.dist.agreement import (
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_from_main,
    from_main,
    gather,
    on_all_ranks,
    report_once,
)
from harness.dist.connections import Connections
from harness.dist.deferred import Deferred
from harness.dist.flight_recorder import keep_flight_records, write_flight_records
from harness.dist.heartbeats import Heartbeats
from harness.dist.hostgroup import HostGroup
from harness.dist.mesh import REPLICATE, SHARD, open_mesh
from harness.dist.parallel import compile_model, distribute, gradient_sync, hands_out_buffers, plain
from harness.dist.ras import write_ras_report
from harness.dist.sharded_muon import ShardedMuon
from harness.dist.shards import local_part
from harness.dist.store import has_group, set_from_main, wait_for_main
from harness.dist.threads import use_threads
from harness.dist.unused import UnusedParameters
from harness.dist.waiting import time_collectives
from harness.dist.world import World, open_world

__all__ = [
    "REPLICATE",
    "SHARD",
    "Connections",
    "Deferred",
    "Heartbeats",
    "HostGroup",
    "ShardedMuon",
    "UnusedParameters",
    "World",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_from_main",
    "compile_model",
    "distribute",
    "from_main",
    "gather",
    "gradient_sync",
    "hands_out_buffers",
    "has_group",
    "keep_flight_records",
    "local_part",
    "on_all_ranks",
    "open_mesh",
    "open_world",
    "plain",
    "report_once",
    "set_from_main",
    "time_collectives",
    "use_threads",
    "wait_for_main",
    "write_flight_records",
    "write_ras_report",
]

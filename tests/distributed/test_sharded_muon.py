"""Muon over matrices that FSDP2 shards is Muon over the whole ones."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from harness.dist import ShardedMuon
from tests.support.distributed import run_ranks

SHAPES = ((6, 4), (5, 9), (1, 7), (3, 3))
"""Evenly and unevenly sharded, and one of which a rank holds nothing."""


def step_both(rank: int, world_size: int, mesh_shape: tuple[int, ...], nesterov: bool) -> list[str]:
    """What differs in a bit after three steps of both."""
    mesh = torch.distributed.init_device_mesh("cpu", mesh_shape)
    placements = [*([Replicate()] * (len(mesh_shape) - 1)), Shard(0)]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    parts = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in whole]
    settings = {"lr": 0.1, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = ShardedMuon(parts, **settings), torch.optim.Muon(whole, **settings)
    for _ in range(3):
        for one, other in zip(parts, whole, strict=True):
            other.grad = torch.randn(other.shape, generator=generator)
            one.grad = distribute_tensor(other.grad, mesh, placements)
        ours.step()
        theirs.step()
    wrong = [str(p.shape) for p, q in zip(parts, whole, strict=True) if not torch.equal(p.full_tensor(), q)]
    for one, other in zip(parts, whole, strict=True):
        momentum = ours.state[one]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        if not torch.equal(momentum.full_tensor(), theirs.state[other]["momentum_buffer"]):
            wrong.append(f"momentum of {one.shape}")
    return wrong


def test_sharded_muon_gives_the_bits_of_torchs_own_over_whole_matrices() -> None:
    assert run_ranks(step_both, 2, (2,), True) == [[], []]
    assert run_ranks(step_both, 2, (2,), False) == [[], []]


def test_replicas_of_shards_too() -> None:
    assert run_ranks(step_both, 2, (1, 2), True) == [[], []]
    assert run_ranks(step_both, 2, (2, 1), True) == [[], []]

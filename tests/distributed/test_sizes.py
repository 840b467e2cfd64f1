"""What models of real size take, alone and together, computes what one process computes: HSDP, activation
checkpointing, compilation by blocks, initialisation that is put off, going on from one to the other."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.cli.train import run as run_program
from harness.config import LoopConfig, ModelConfig, ParallelConfig
from harness.dist import Deferred, World, distribute
from harness.dist.mesh import open_mesh
from harness.models import build_model
from harness.runlog.reader import open_run
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.launch import launch
from tests.support.runs import tiny

COMPILED = {"compile": True, "compile_unit": "block", "compile_backend": "aot_eager"}
COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hsdp": ({"replicate": 2, "shard": 2, "activation_checkpointing": "full"}, {}),
    "hsdp, put off": ({"replicate": 2, "meta_init": True, "activation_checkpointing": "selective"}, {}),
    "bf16": ({"replicate": 2, "param_dtype": "bf16"}, {}),
}
ALL = ParallelConfig(strategy="fsdp", activation_checkpointing="full", meta_init=True)
NUM_STEPS, BATCH, LENGTH = 3, 8, 8


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(num_layers=2, dim=16, num_heads=2), sequence_length=LENGTH)


def losses(rank: int, world_size: int, parallel: ParallelConfig | None, loop: LoopConfig) -> list[float]:
    """Losses over the global batch of some steps."""
    deferred = Deferred() if parallel is not None and parallel.meta_init else None
    with nullcontext() if deferred is None else deferred:
        model = decoder()
    if parallel is not None:
        world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
        model = distribute(model, parallel, world, loop=loop, deferred=deferred)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    is_bf16 = parallel is not None and parallel.param_dtype == "bf16"
    guard = StepGuard(model, optimizer)
    for step in range(NUM_STEPS):
        tokens = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(world_size)[rank]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            logits = model(mine).float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, mine.flatten())
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
    records = guard.drain(wait=True)
    assert [record.reason for record in records] == [None] * NUM_STEPS
    return [record.loss for record in records]


def all_losses(rank: int, world_size: int) -> dict[str, list[float]]:
    found = {}
    for name, (parallel, loop) in COMBINATIONS.items():
        found[name] = losses(
            rank, world_size, ParallelConfig(strategy="fsdp", **parallel), LoopConfig(**loop)
        )
    return found


def test_four_ranks_train_as_one_process_does_in_every_combination() -> None:
    expected = losses(0, 1, None, LoopConfig())
    for found in run_ranks(all_losses, 4, timeout_s=150):
        for name, values in found.items():
            # Sums in another order: some units in the last place of fp32, which AdamW's first steps magnify.
            # bf16 has 8 bits, and rounds weights and activations.
            np.testing.assert_allclose(values, expected, rtol=2e-2 if name == "bf16" else 1e-5, err_msg=name)


def test_compiled_blocks_that_are_computed_again_train_as_one_process_does() -> None:
    expected = losses(0, 1, None, LoopConfig())
    for found in run_ranks(losses, 2, ALL, LoopConfig(**COMPILED), timeout_s=150):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def timeouts_s(rank: int, world_size: int, parallel: ParallelConfig) -> list[float]:
    """Of the groups of the mesh, along `replicate` and `shard`."""
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    groups: list[Any] = open_mesh(parallel, world).get_all_groups()
    return [g._get_backend(world.device).options._timeout.total_seconds() for g in groups]


def test_groups_of_a_mesh_wait_as_long_as_the_run_does() -> None:
    parallel = ParallelConfig(strategy="fsdp", replicate=2, timeout_s=77)
    assert run_ranks(timeouts_s, 4, parallel) == [[77, 77]] * 4


def peak_bytes(rank: int, world_size: int, put_off: bool) -> tuple[int, int]:
    """By how much a rank's resident memory grew at most while its model was made, and the model's bytes."""
    made(rank, world_size, put_off, num_layers=1)  # what is imported and set up once
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    model = made(rank, world_size, put_off, num_layers=16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return _status("VmHWM") - before, size


def made(rank: int, world_size: int, put_off: bool, *, num_layers: int) -> nn.Module:
    deferred = Deferred() if put_off else None
    with nullcontext() if deferred is None else deferred:
        model = Wide(num_layers)
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    return distribute(model, ParallelConfig(strategy="fsdp", meta_init=put_off), world, deferred=deferred)


class Wide(nn.Module):
    """Layers of 4 MiB."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(num_layers))
        self.apply(lambda module: nn.init.normal_(module.weight) if isinstance(module, nn.Linear) else None)


def _status(key: str) -> int:
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024


def test_a_rank_needs_its_shards_and_one_layer_while_a_model_is_made() -> None:
    for peak, size in run_ranks(peak_bytes, 4, True):
        # A quarter of the model, two layers at a time (drawn, and overwritten), what the program takes.
        assert peak < size / 4 + size / 8 + (12 << 20)
    for peak, size in run_ranks(peak_bytes, 4, False):
        assert peak > size


def test_a_run_goes_on_on_another_mesh_as_if_it_had_been_one(tmp_path: Path) -> None:
    base = ("--loop.eval_every=0", "--schedule.steps=9", "--guard.replicas_every=3", "--name=sizes")
    first = ("--parallel.replicate=2", "--parallel.meta_init", "--parallel.activation_checkpointing=full")
    second = ("--loop.compile", "--loop.compile_unit=block", "--loop.compile_backend=aot_eager")
    fsdp = "--parallel.strategy=fsdp"
    code, said = launch(tiny(tmp_path, *base, "--loop.steps=4", fsdp, *first), world_size=4)
    assert code == 0, said
    more = ("--parallel.activation_checkpointing=selective", "--parallel.meta_init", *second)
    code, said = launch(tiny(tmp_path, *base, "--loop.steps=7", fsdp, *more), world_size=2)
    assert code == 0, said
    assert run_program(tiny(tmp_path, *base, "--loop.steps=9")) == 0
    assert run_program(tiny(tmp_path, *base, "--loop.steps=9", "--name=one")) == 0
    found, expected = (
        open_run(tmp_path / "runs" / name).scalars("train/loss").values for name in ("sizes", "one")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)

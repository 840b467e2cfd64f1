"""The whole program on a GPU: a NaN is left out and named, and a run in two parts is the run in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.data import Batch, LossSum
from harness.dist import World
from harness.runlog.reader import open_run
from harness.training.evaluate import evaluate
from tests.support.own_tasks import own_config, points_task, squared_error
from tests.support.runs import program, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "fp16"), ("fsdp", "bf16")])
def test_a_nan_is_left_out_and_its_parameter_named(strategy: str, precision: str, tmp_path: Path) -> None:
    settings = [f"--parallel.strategy={strategy}", f"--loop.precision={precision}", "--parallel.device=cuda"]
    code, output = program(tiny(tmp_path, *settings, "--faults=[{step: 5, kind: nan}]"))
    assert code == 0, output
    run = open_run(tmp_path / "runs/tiny")
    assert run.state() == "finished"
    # In fp16 the first steps may overflow too: the loss scale is being found.
    (incident,) = (event for event in run.events("incident") if event.step == 5)
    assert incident.details["parameter"]
    losses = run.scalars("train/loss").values
    assert len(losses) == 12
    assert torch.tensor(losses).isfinite().all()


def test_a_run_in_two_parts_is_the_run_in_one_bit_for_bit(tmp_path: Path) -> None:
    common = [
        "--schedule.kind=constant",
        "--deterministic=true",
        "--model.dropout=0.1",
        "--loop.precision=bf16",
    ]
    for folder, lengths in (("whole", (12,)), ("parts", (5, 12))):
        for steps in lengths:
            settings = [f"--runs_dir={tmp_path / folder}", f"--loop.steps={steps}"]
            code, output = program(tiny(tmp_path, *common, *settings))
            assert code == 0, output
    whole, parts = (
        open_run(tmp_path / folder / "tiny").scalars("train/loss") for folder in ("whole", "parts")
    )
    assert whole.values.tolist() == parts.values.tolist()


def host_counts(model: torch.nn.Module, batch: Batch) -> LossSum:
    """Draws on the GPU, and counts where people count: on the host."""
    noisy = batch["x"] + torch.rand_like(batch["x"])
    loss = squared_error(model, {**batch, "x": noisy})
    return LossSum(loss.total, torch.tensor(len(noisy)), correct=1)


def test_an_evaluation_takes_counts_from_the_host_and_leaves_the_gpus_generator_alone(tmp_path: Path) -> None:
    task = points_task(loss=host_counts)
    model = task.model.cuda()
    config = own_config(tmp_path, points_task)
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
    before = torch.cuda.get_rng_state()
    first = evaluate(model, task, config, world, precision="fp32")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(99)
    assert evaluate(model, task, config, world, precision="fp32") == first

"""Incidents run again on the spot, and steps computed twice: what they say, and that nothing stays of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import deterministic

from harness.config import TrainConfig
from harness.data import Task
from harness.errors import ConfigError
from harness.records import Culprit, RankRow, StepRecord, Verdict
from harness.runlog.events import Incident
from harness.runlog.incident_files import read_rank
from harness.runlog.names import EventName
from harness.runlog.paths import incident_dir
from harness.runlog.reader import open_run
from harness.training import Callback
from harness.training.callbacks import Training
from harness.training.loop import Run
from harness.training.progress import Phase
from harness.training.rerun import (
    AGAIN,
    FILLED,
    PRECISE,
    RerunArm,
    _num_updates_since,
    _variations,
    _was_bad,
    what_it_says,
)
from tests.support import broken_tasks
from tests.support.own_tasks import own_config, points_task, run_loop

FAULT = "--faults=[{step: 3, rank: 0, kind: nan, target: activation, parameter: blocks.0.norm}]"
SETTINGS = ("--loop.steps=6", "--loop.micro_batch=4", "--optim.name=adamw")


def state(run: Run) -> dict[str, torch.Tensor]:
    return {**run.model.state_dict(), "rng": torch.get_rng_state()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("more", ["--incidents.rerun=on", "--incidents.recompute_every=1"])
def test_a_second_pass_leaves_nothing_behind(more: str, tmp_path: Path) -> None:
    """Dropout, an optimizer with moments, and an incident on the way: the same bits as without."""
    settings = (*SETTINGS, FAULT)
    plain = state(run_loop(own_config(tmp_path / "plain", broken_tasks.sound, *settings)))
    assert_same(state(run_loop(own_config(tmp_path / "more", broken_tasks.sound, *settings, more))), plain)


def test_an_incident_is_run_again_on_the_spot(tmp_path: Path) -> None:
    run_loop(own_config(tmp_path, broken_tasks.poisoned, *SETTINGS, "--incidents.rerun=on"))
    directory = tmp_path / "runs" / "own"
    step = next(e.step for e in open_run(directory).events(EventName.INCIDENT) if e.step is not None)
    says, *arms = read_rank(incident_dir(directory, step), 0).rerun
    assert says.endswith("not finite again, in every variation: data or model, and no glitch")
    assert [arm for arm in arms if "not finite" not in arm] == []
    assert len(arms) == 5


def test_arithmetic_that_is_wrong_once_is_seen(tmp_path: Path) -> None:
    settings = (*SETTINGS, "--incidents.recompute_every=1")
    run_loop(own_config(tmp_path / "sound", broken_tasks.sound, *settings))
    assert list(open_run(tmp_path / "sound" / "runs" / "own").events(EventName.INCIDENT)) == []
    run_loop(own_config(tmp_path / "bad", broken_tasks.sound, *settings, FAULT))
    events = open_run(tmp_path / "bad" / "runs" / "own").events(EventName.INCIDENT)
    assert [event.step for event in events] == [3]
    (event,) = events
    assert isinstance(event.what, Incident)
    assert event.what.rank == 0


def test_neither_is_for_sharded_models(tmp_path: Path) -> None:
    for more in ("--incidents.rerun=on", "--incidents.recompute_every=5"):
        with pytest.raises(ConfigError, match="incidents"):
            own_config(tmp_path, broken_tasks.sound, "--parallel.strategy=fsdp", more)


def arm(name: str, *, is_bad: bool, bits: int = 1) -> RerunArm:
    return RerunArm(name=name, loss=math.nan if is_bad else 1.0, is_bad=is_bad, bits=bits)


@pytest.mark.parametrize(
    ("arms", "steps_later", "expected"),
    [
        ([arm(AGAIN, is_bad=True), arm(AGAIN, is_bad=False)], 0, "races"),
        ([arm(AGAIN, is_bad=False), arm(AGAIN, is_bad=False, bits=2)], 2, "races"),
        ([arm(AGAIN, is_bad=False), arm(FILLED, is_bad=True)], 2, "nobody has written"),
        ([arm(AGAIN, is_bad=False)], 0, "finite now: hardware"),
        ([arm(AGAIN, is_bad=False)], 2, "leaves it open"),
        ([arm(AGAIN, is_bad=True), arm(PRECISE, is_bad=False)], 2, "the precision"),
        ([arm(AGAIN, is_bad=True), arm("not compiled", is_bad=False)], 2, "a kernel"),
        ([arm(AGAIN, is_bad=True), arm(PRECISE, is_bad=True)], 2, "data or model"),
    ],
)
def test_only_what_is_sound_with_these_weights_is_said(
    arms: list[RerunArm], steps_later: int, expected: str
) -> None:
    assert expected in what_it_says(arms, steps_later=steps_later, was_bad=True, is_same_pass=True)


@pytest.mark.parametrize(("was_bad", "is_same_pass"), [(False, True), (True, False)])
def test_hardware_is_blamed_only_for_the_same_pass_that_was_bad(*, was_bad: bool, is_same_pass: bool) -> None:
    finite = [arm(AGAIN, is_bad=False)]
    says = what_it_says(finite, steps_later=0, was_bad=was_bad, is_same_pass=is_same_pass)
    assert "hardware" not in says


class Growing(nn.Module):
    """Dropout, a buffer that grows with each forward pass, one that cannot be written to, and new ones. Where
    memory is filled it fails forward, and with deterministic algorithms backward."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("expanded", torch.zeros(1).expand(3))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().sum().view(1)])
        self.register_buffer(f"of_pass_{len(self.seen)}", torch.zeros(2))
        out: Tensor = self.last(self.drop(x))
        if torch.are_deterministic_algorithms_enabled():
            if deterministic.fill_uninitialized_memory:
                raise MemoryError("no memory")
            out.register_hook(_refuse)
        return out


def _refuse(gradient: Tensor) -> Tensor:
    raise LookupError("no such kernel")


def growing(config: TrainConfig) -> Task:
    return points_task(model=Growing())


NAN = "--faults=[{{step: 3, rank: 0, kind: nan, target: activation, parameter: last, micro_batch: {}}}]"


class Phases(Callback):
    """Notes in which phase records are handled."""

    def __init__(self) -> None:
        self.seen: set[Phase] = set()

    def on_step(self, run: Training, record: StepRecord) -> None:
        assert isinstance(run, Run)
        self.seen.add(run.progress.at.phase)


def rerun_of_step_3(run: Run) -> tuple[str, ...]:
    folder = incident_dir(run.directory, 3)
    return read_rank(folder, 0).rerun


def test_a_variation_that_fails_ends_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = (*SETTINGS, NAN.format(0))
    want = run_loop(own_config(tmp_path / "plain", growing, *settings))
    phases = Phases()
    more = own_config(tmp_path / "more", growing, *settings, "--incidents.rerun=on")
    have = run_loop(more, callbacks=[phases])
    assert_same(state(have), state(want))
    assert phases.seen == {Phase.RECORDS}
    problems = [arm for arm in rerun_of_step_3(have) if "could not be run" in arm]
    assert len(problems) == 2
    assert "no memory" in problems[0]
    assert "no such kernel" in problems[1]


def test_a_step_with_buffers_of_any_kind_is_computed_twice(tmp_path: Path) -> None:
    want = run_loop(own_config(tmp_path / "plain", growing, *SETTINGS))
    have = run_loop(own_config(tmp_path / "more", growing, *SETTINGS, "--incidents.recompute_every=1"))
    assert_same(state(have), state(want))
    assert list(open_run(have.directory).events(EventName.INCIDENT)) == []


@pytest.mark.parametrize(("micro_batch", "is_blamed"), [(0, True), (1, False)])
def test_hardware_is_blamed_where_the_random_numbers_are_known(
    micro_batch: int, *, is_blamed: bool, tmp_path: Path
) -> None:
    """What struck once is gone when it is run again; of a later micro-batch dropout draws others."""
    settings = (*SETTINGS, NAN.format(micro_batch), "--guard.lag_steps=0", "--incidents.rerun=on")
    says = rerun_of_step_3(run_loop(own_config(tmp_path, growing, *settings)))[0]
    assert ("hardware" in says) is is_blamed


def test_overflows_of_the_loss_scale_are_not_run_again(tmp_path: Path) -> None:
    fp16 = ("--loop.precision=fp16", "--guard.init_loss_scale=1e30", "--incidents.rerun=on")
    run = run_loop(own_config(tmp_path, broken_tasks.sound, *SETTINGS, *fp16))
    (first, *_) = list(open_run(run.directory).events(EventName.INCIDENT))
    assert isinstance(first.what, Incident)
    assert first.what.kind == "fp16 overflow"
    assert read_rank(incident_dir(run.directory, 0), 0).rerun == ()


def record(*, verdict: Verdict, bad_rank: int, micro_batch: int) -> StepRecord:
    rows = [
        RankRow(
            rank=rank, loss=1.0, num_tokens=8, grad_norm=1.0, max_abs=1.0, num_nan=num, num_inf=0, num_zero=0
        )
        for rank, num in ((0, int(bad_rank == 0)), (1, int(bad_rank == 1)))
    ]
    culprits = (Culprit(rank=bad_rank, micro_batch=micro_batch),)
    return StepRecord(step=3, verdict=verdict, loss=1.0, grad_norm=1.0, per_rank=rows, culprits=culprits)


def test_a_rank_asks_what_its_own_micro_batch_was() -> None:
    of_rank_1 = record(verdict="skip", bad_rank=1, micro_batch=2)
    asked = [(0, 2), (1, 2), (1, 0)]
    assert [_was_bad(of_rank_1, rank, number) for rank, number in asked] == [False, True, False]


def test_an_applied_step_moves_the_weights_by_itself() -> None:
    verdicts: tuple[Verdict, ...] = ("skip", "apply")
    records = [record(verdict=verdict, bad_rank=0, micro_batch=0) for verdict in verdicts]
    assert [_num_updates_since(one, 4) for one in records] == [0, 1]


def test_variations_of_a_compiled_model_compile_nothing(tmp_path: Path) -> None:
    num_compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    twice = torch.compile(lambda x: x * 2, backend=backend)
    x = torch.ones(3)
    twice(x)
    assert num_compiled == 1
    config = own_config(tmp_path, broken_tasks.sound, "--loop.compile=true")
    for _, within, _ in _variations(config, "fp32"):
        with within():
            twice(x)
    assert num_compiled == 1

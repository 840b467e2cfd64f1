"""Incidents run again on the spot, and steps computed twice: what they say, and that nothing stays of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from harness.errors import ConfigError
from harness.runlog.events import Incident
from harness.runlog.incident_files import read_rank
from harness.runlog.names import EventName
from harness.runlog.paths import incident_dir
from harness.runlog.reader import open_run
from harness.training.loop import Run
from harness.training.rerun import AGAIN, FILLED, PRECISE, RerunArm, what_it_says
from tests.support import broken_tasks
from tests.support.own_tasks import own_config, run_loop

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
    assert expected in what_it_says(arms, steps_later=steps_later, was_bad=True)

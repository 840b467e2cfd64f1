"""Whose fault an incident was: a few causes of `scripts/trial_causes.py`, and what decides between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.replay.arms import AGAIN, DETERMINISTIC, Arm
from harness.replay.compare import Parting
from harness.replay.judgement import has_diverged, judge_sound, judge_sum
from tests.support.causes import CASES, replayed, train_cause


@pytest.mark.parametrize(
    "name",
    [
        "unwritten-2",
        "bit of a parameter-0",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bad samples-2", "learning rate-0", "attention backward-0")
        ),
    ],
)
def test_the_class_is_the_causes(name: str, tmp_path: Path) -> None:
    train_cause(0, 1, str(tmp_path), name)
    judgement = replayed(tmp_path / "runs" / "own", name).judgement
    assert judgement is not None
    assert judgement.kind == CASES[name].truth, judgement


@pytest.mark.parametrize(
    ("series", "diverged"),
    [
        ([1.0, 1.1, 0.9, 12.0, 40.0], True),
        ([1.0, 1.1, 0.9, 1.0, 40.0], False),
        ([50.0, 5.0, 1.0, 0.9, 1.2, 1.1], False),
        ([1.0], False),
        ([], False),
    ],
)
def test_training_has_diverged_where_it_stays_off_its_course(series: list[float], diverged: bool) -> None:
    assert bool(has_diverged([("loss", series)])) is diverged


def arms(*, num_bad: int = 0, again_same: bool = True, fixed_same: bool = True) -> list[Arm]:
    again = Arm(name=AGAIN, is_bad=num_bad > 0, same=again_same, num_runs=8, num_bad=num_bad)
    fixed = Arm(name=DETERMINISTIC, is_bad=False, same=fixed_same)
    return [
        Arm(**{**_fields(again), "is_repeatable": again_same}),
        Arm(**{**_fields(fixed), "is_repeatable": fixed_same}),
    ]


def _fields(arm: Arm) -> dict[str, object]:
    return {name: getattr(arm, name) for name in arm.__dataclass_fields__}


def test_torchs_own_kernels_that_add_in_any_order_are_not_blamed() -> None:
    """Atomics on a GPU: other bits each time, and the same ones with deterministic algorithms."""
    way = Parting(num_steps=3, num_same_bits=3, largest=0.0, step=None)
    benign = judge_sound([], way=way, notes=[], arms=arms(again_same=False))
    racing = judge_sound([], way=way, notes=[], arms=arms(again_same=False, fixed_same=False))
    mixed = judge_sound([], way=way, notes=[], arms=arms(num_bad=3))
    assert (benign.kind, racing.kind, mixed.kind) == ("hardware", "kernel", "kernel")


@pytest.mark.parametrize(
    ("first_other", "step", "num_same", "kind"),
    [(5, 5, 4, "hardware"), (3, 5, 2, "unknown"), (1, 1, 0, "unknown"), (3, None, 2, "unknown")],
)
def test_a_run_that_leaves_the_replay_all_at_once_was_changed(
    first_other: int, step: int | None, num_same: int, kind: str
) -> None:
    """Rounding that adds up over the steps is another machine's; a jump after equal bits is not."""
    way = Parting(num_steps=8, num_same_bits=num_same, largest=0.5, step=step, first_other=first_other)
    assert judge_sound([], way=way, notes=[], arms=arms()).kind == kind


def test_only_a_sum_that_comes_again_is_a_matter_of_precision() -> None:
    assert judge_sum([], arms(), reproduced=True).kind == "precision"
    assert judge_sum([], arms(), reproduced=False).kind == "kernel"
    assert judge_sum([], arms(num_bad=2), reproduced=True).kind == "kernel"

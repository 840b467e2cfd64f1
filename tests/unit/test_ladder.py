"""The ladder's rungs: what it bears, when it rolls back, when it ends the run, and what it says then."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from harness.config import GuardConfig
from harness.errors import InstabilityError
from harness.records import Culprit, ParameterRow, StepRecord
from harness.stability import Incident, Ladder


def _record(step: int, verdict: Any = "apply", **values: Any) -> StepRecord:
    bad = verdict in ("skip", "stop")
    settings = {"reason": "3 NaN and 0 Inf in the gradient of rank 1", "rank": 1, "parameter": "head.weight"}
    settings |= {"micro_batch": 2, "num_nan": 3}
    return StepRecord(
        **{
            "step": step,
            "verdict": verdict,
            "loss": 1.0,
            "grad_norm": 1.0,
            **(settings if bad else {}),
            **values,
        }
    )


def _run(ladder: Ladder, verdicts: str, first: int = 0) -> list[str]:
    """Feeds a record per letter: s(kip) or a(pply)."""
    names = {"s": "skip", "a": "apply"}
    return [ladder.observe(_record(first + i, names[v])) for i, v in enumerate(verdicts)]


def test_as_many_skips_in_a_row_as_configured_are_borne_and_one_more_ends_the_run() -> None:
    ladder = Ladder(GuardConfig(max_consecutive_skips=3))
    assert _run(ladder, "sssasss") == ["go_on"] * 7
    with pytest.raises(InstabilityError, match="4 steps in a row were skipped") as caught:
        ladder.observe(_record(7, "skip"))
    assert "step 7 skipped: 3 NaN and 0 Inf in the gradient of rank 1 (micro-batch 2, head.weight)" in str(
        caught.value
    )
    assert caught.value.exit_code == 3


def test_skips_that_are_never_in_a_row_end_the_run_too() -> None:
    ladder = Ladder(GuardConfig(max_skip_frac=0.25))
    assert set(_run(ladder, "saa" * 33)) == {"go_on"}
    with pytest.raises(InstabilityError, match="34 of the last 100 steps"):
        ladder.observe(_record(99, "skip"))


def test_fp16_overflow_is_not_counted_until_the_scale_is_spent() -> None:
    ladder = Ladder(GuardConfig(max_consecutive_skips=1))
    for step in range(16):
        assert ladder.observe(_record(step, "skip", loss_scale=2.0 ** (16 - step))) == "go_on"
    assert ladder.observe(_record(16, "skip", loss_scale=1.0)) == "go_on"
    with pytest.raises(InstabilityError):
        ladder.observe(_record(17, "skip", loss_scale=1.0))


def test_a_nan_loss_is_counted_whatever_the_scale() -> None:
    ladder = Ladder(GuardConfig(max_consecutive_skips=1))
    ladder.observe(_record(0, "skip", loss_scale=65536.0, loss=math.nan))
    with pytest.raises(InstabilityError):
        ladder.observe(_record(1, "skip", loss_scale=65536.0, loss=math.nan))


def test_stop_and_differing_replicas_end_the_run_at_once_where_configured() -> None:
    with pytest.raises(InstabilityError, match="nonfinite is 'stop'"):
        Ladder(GuardConfig()).observe(_record(0, "stop"))
    differing = _record(0, reason="rank 2 differs in head.weight", replicas_differ=True, rank=2)
    assert Ladder(GuardConfig()).observe(differing) == "go_on"
    with pytest.raises(InstabilityError, match="rank 2 differs in head"):
        Ladder(GuardConfig(replicas="stop")).observe(differing)


def test_rollbacks_are_bounded_and_cooled_down() -> None:
    rolled_back: list[int] = []

    def rollback(record: StepRecord) -> bool:
        rolled_back.append(record.step)
        return True

    config = GuardConfig(max_consecutive_skips=1, max_rollbacks=2, rollback_cooldown_steps=3)
    ladder = Ladder(config, rollback=rollback)
    assert _run(ladder, "ss") == ["go_on", "rollback"]
    assert _run(ladder, "aaass") == ["go_on"] * 4 + ["rollback"]
    assert rolled_back == [1, 4]
    with pytest.raises(InstabilityError, match="after 2 rollbacks"):
        _run(ladder, "aaass")
    soon = Ladder(config, rollback=rollback)
    with pytest.raises(InstabilityError, match="2 steps after a rollback"):
        _run(soon, "ssaass")


def test_without_a_healthy_checkpoint_the_run_ends() -> None:
    ladder = Ladder(GuardConfig(max_consecutive_skips=1), rollback=lambda record: False)
    with pytest.raises(InstabilityError, match="no healthy checkpoint"):
        _run(ladder, "ss")


def test_the_ladder_goes_on_counting_after_a_restart() -> None:
    ladder = Ladder(GuardConfig(max_consecutive_skips=2))
    _run(ladder, "ass")
    resumed = Ladder(GuardConfig(max_consecutive_skips=2))
    resumed.load_state_dict(ladder.state_dict())
    assert resumed.num_skips == 2
    with pytest.raises(InstabilityError, match="3 steps in a row"):
        resumed.observe(_record(3, "skip"))


def test_every_incident_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ladder = Ladder(GuardConfig())
    with caplog.at_level(logging.WARNING, logger="harness"):
        _run(ladder, "asa")
    assert [r.message for r in caplog.records] == [
        "step 1 skipped: 3 NaN and 0 Inf in the gradient of rank 1 (micro-batch 2, head.weight)"
    ]


def test_what_was_not_done_because_of_an_incident_does_not_read_as_if_it_were() -> None:
    differing = {"reason": "rank 2 differs in head.weight", "replicas_differ": True}
    applied, clipped = (
        Incident.of(_record(5, verdict, clip_coef=0.25, grad_norm=4.0, **differing))
        for verdict in ("apply", "clip")
    )
    assert applied is not None
    assert clipped is not None
    assert applied.summary() == "step 5: rank 2 differs in head.weight; applied"
    assert clipped.summary() == "step 5: rank 2 differs in head.weight; clipped to 1 as every step is"


def test_an_outlier_batch_is_nothing_to_the_ladder(caplog: pytest.LogCaptureFixture) -> None:
    ladder = Ladder(GuardConfig())
    record = _record(3, "clip", note="outlier batch: loss 3", is_outlier=True)
    with caplog.at_level(logging.INFO, logger="harness"):
        assert ladder.observe(record) == "go_on"
    assert not caplog.records
    assert Incident.of(record) is None


def test_an_incident_names_the_module_all_bad_parameters_and_the_samples() -> None:
    row = {"grad_norm": 1.0, "max_abs": 1.0, "num_inf": 0, "num_zero": 0, "num_elements": 4}
    rows = {name: ParameterRow(num_nan=bad, **row) for name, bad in (("a.b", 1), ("a.c", 0), ("d", 2))}
    record = _record(
        5, "skip", parameter="a.b", per_parameter=rows, culprits=(Culprit(rank=1, micro_batch=2),)
    )
    incident = Incident.of(record, samples_of=lambda rank, micro_batch: [7, 3, rank, micro_batch])
    assert incident is not None
    assert (incident.module, incident.bad_parameters) == ("a", ("a.b", "d"))
    assert incident.summary().endswith("(micro-batch 2, a.b, 2 parameters in all, samples 7, 3, 1, 2)")
    assert Incident.of(_record(5)) is None

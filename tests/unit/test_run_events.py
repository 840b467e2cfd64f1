"""Events are written and read as values of their kind."""

import dataclasses
import json
from pathlib import Path

import pytest

from harness.runlog import events
from harness.runlog.events import LoggedEvent, read_event
from harness.runlog.names import EventName
from harness.runlog.reader import open_run
from harness.runlog.writer import RunLog

WRITTEN = [
    events.Incident(summary="step 3 skipped", kind="non-finite gradient", rank=1, num_nan=2, num_inf=0,
                    culprits=({"rank": 1, "micro_batch": 0, "samples": [4, 5]},), sample_indices=(4, 5)),
    events.Outlier(kind="outlier batch", is_outlier=True, grad_norm=float("inf")),
    events.Finding(summary="w is stale", check="cleared", problem="w is stale", remedy="clear it", rank=1,
                   parameter="w"),
    events.Checkpoint(num_steps=100, size_bytes=5, blocked_s=0.5, seconds=1.0),
    events.CheckpointFailed(epoch=2, nonfinite=("a", "b"), error="the disk is full"),
    events.Resume(checkpoint=100),
    events.Rollback(failed_step=7, reason="nan", skipped_samples=16),
    events.Stop(reason="too many"),
    events.Fault(what="nan at step 5"),
    events.Alert(rule="nonfinite", metric="*", message="train/loss is nan", level="warning"),
]  # fmt: skip


def test_every_kind_of_event_has_a_value_of_its_own() -> None:
    names = {value for name, value in vars(EventName).items() if name.isupper()}
    assert {event.NAME for event in WRITTEN} == names


def test_an_event_comes_back_from_the_log_as_it_was_written(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for event in WRITTEN:
            log.write("event", event.to_values(), step=3)
    assert [event.what for event in open_run(tmp_path).events()] == WRITTEN


@pytest.mark.parametrize("event", WRITTEN, ids=lambda event: event.NAME)
def test_a_field_of_another_type_is_left_out(event: LoggedEvent) -> None:
    for field in dataclasses.fields(event):
        values = {**json.loads(json.dumps(event.to_values())), field.name: {"of": "another type"}}
        read = read_event(values)
        assert read == dataclasses.replace(event, **{field.name: field.default})


def test_an_event_of_somebodys_own_is_read_as_it_is(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("event", {"name": "data changed", "to": "more"}, step=3)
    [event] = open_run(tmp_path).events()
    assert (event.what, event.details, event.text) == (None, {"to": "more"}, "to more")

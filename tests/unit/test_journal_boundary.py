"""The trainer's journal ends no training, whatever fails in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.config import TrainConfig
from harness.records import StepRecord
from harness.runlog.events import Checkpoint
from harness.tracking import open_run, recorder
from harness.tracking.mirrors import MirrorHandle
from harness.training.callbacks import InFlight
from harness.training.counters import Counters
from harness.training.journal import MainJournal
from harness.training.progress import Progress
from harness.training.summary import Ending
from tests.support.own_tasks import points_task


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MainJournal:
    monkeypatch.setattr(recorder, "start_mirrors", lambda *_, **__: MirrorHandle(None))
    return MainJournal(
        tmp_path,
        TrainConfig(),
        first_step=0,
        about={},
        utilisation=None,
        step_indices=lambda *_: [],
        progress=Progress(),
    )


def test_no_method_of_the_journal_raises(
    journal: MainJournal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd: Any = object()
    for name in (name for name in vars(MainJournal) if not name.startswith("_") and name != "close"):
        getattr(journal, name)(odd)
        getattr(journal, name)(odd, odd)
    journal.on_eval(None, 0, {"val/loss": odd})
    journal.histograms(0, torch.nn.LazyLinear(2))
    journal.event(Checkpoint(size_bytes=odd), 1)
    journal.on_eval(None, 1, {"val/loss": 2.0})
    assert caplog.text.count("on_eval failed") == 2  # once for each kind of error
    journal.close(Ending(status="finished"))
    run = open_run(tmp_path)
    assert (run.scalars("val/loss").values.tolist(), run.state()) == ([2.0], "finished")


def test_a_restart_before_the_first_checkpoint_rewinds_to_the_beginning(
    journal: MainJournal, tmp_path: Path
) -> None:
    for step in range(5):
        journal.on_eval(None, step, {"val/loss": 1.0})
    journal.close(Ending(status="crashed"))
    again = MainJournal(
        tmp_path,
        TrainConfig(),
        first_step=0,
        about={},
        utilisation=None,
        step_indices=lambda *_: [],
        progress=Progress(),
    )
    again.on_eval(None, 0, {"val/loss": 2.0})
    again.close("finished")
    assert open_run(tmp_path).scalars("val/loss").values.tolist() == [2.0]


def test_an_incident_whose_samples_cannot_be_told_is_logged_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step_indices(*_: Any) -> list[int]:
        raise OSError("the order of the data cannot be read")

    monkeypatch.setattr(recorder, "start_mirrors", lambda *_, **__: MirrorHandle(None))
    journal = MainJournal(
        tmp_path,
        TrainConfig(),
        first_step=0,
        about={},
        utilisation=None,
        step_indices=step_indices,
        progress=Progress(),
    )
    record = StepRecord(step=3, verdict="skip", loss=1.0, grad_norm=1.0, reason="3 NaN", num_nan=3)
    run: Any = SimpleNamespace(
        counters=Counters(),
        in_flight={3: InFlight(step_s=1.0, samples=(0, 4))},
        learning_rate=lambda step: 0.1,
        task=points_task(),
    )
    journal.on_step(run, record)
    journal.close(Ending(status="finished"))
    [event] = open_run(tmp_path).events("incident")
    assert event.step == 3
    assert "cannot be read" in caplog.text

"""The tracker's checkpoints: found by the whole name, all kept, true to what was saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import CheckpointError, TrackingError
from harness.tracking import open_run
from harness.tracking.tracker_checkpoints import TrackerCheckpoints
from tests.support.trackers import alone


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def value_in(data: dict[str, Any]) -> float:
    return float(data["model_state_dict"]["weight"])


def test_a_name_is_checked_whole_and_no_save_replaces_another(tmp_path: Path) -> None:
    """Steps that begin again with each epoch, as many loops count them."""
    with alone(tmp_path) as tracker:
        for epoch in range(3):
            for step in (0, 100, 50):
                tracker.save_checkpoint(model_of(10.0 * epoch + step), epoch=epoch, step=step)
        for epoch in range(3):
            for step in (0, 50, 100):
                for suffix in (".pt", ""):
                    data = tracker.load_checkpoint(f"checkpoint_epoch_{epoch}_step_{step}{suffix}")
                    assert (data["epoch"], data["step"], value_in(data)) == (epoch, step, 10.0 * epoch + step)
        assert value_in(tracker.load_checkpoint()) == 70.0  # the last one saved
        for wrong in ("checkpoint_epoch_3_step_100", "checkpoint_epoch_1_step_1"):
            with pytest.raises(CheckpointError, match=f"no {wrong}.pt in .*resume_run"):
                tracker.load_checkpoint(wrong)
        for wrong in ("step_100", "checkpoint_epoch_1_step_100.pt.bak", "xcheckpoint_epoch_1_step_100", ""):
            with pytest.raises(TrackingError, match="no checkpoint's name"):
                tracker.load_checkpoint(wrong)


def test_a_checkpoint_is_found_by_path_in_this_run_and_in_another(tmp_path: Path) -> None:
    with alone(tmp_path, run_name="one") as tracker:
        name = tracker.save_checkpoint(model_of(1.0), epoch=1, step=100)
        models = Path(tracker.config.model_save_dir)
        for path in (models / name, models / "one" / name, models / "one" / "step-00000100"):
            assert (
                value_in(tracker.load_checkpoint(path)) == value_in(tracker.load_checkpoint(str(path))) == 1.0
            )
    with alone(tmp_path, run_name="two") as other:
        for path in (models / "one" / name, models / "one" / "step-00000100", models / "one"):
            assert value_in(other.load_checkpoint(path)) == 1.0
        with pytest.raises(CheckpointError, match=r"nothing is saved there.*resume_run=True, run_id"):
            other.load_checkpoint(name)
        with pytest.raises(CheckpointError, match="resume_run"):
            other.load_checkpoint()


def test_what_is_saved_comes_back_as_it_was(tmp_path: Path) -> None:
    model = model_of(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    metrics = {
        "best": math.inf,
        0: 0.5,
        "deep": [{"nan": math.nan}],
        "odd": torch.device("cpu"),
        "t": torch.eye(2),
        "shape": (1, (2.0, frozenset({"a"}))),
        "seen": {1, 2},
        "pairs": {(1, torch.device("cpu"))},
    }
    with alone(tmp_path) as tracker:
        for loss in (math.nan, -math.inf, torch.tensor([math.nan]), 0.25):
            tracker.save_checkpoint(model, optimizer, loss=loss, metrics=metrics, scheduler=scheduler)
            data = tracker.load_checkpoint()
            assert str(data["loss"]) == str(float(loss))
    assert data["scheduler_state_dict"]["best"] == math.inf
    assert (data["metrics"]["best"], data["metrics"][0], data["metrics"]["odd"]) == (math.inf, 0.5, "cpu")
    assert math.isnan(data["metrics"]["deep"][0]["nan"])
    assert torch.equal(data["metrics"]["t"], torch.eye(2))
    for name in ("shape", "seen"):
        assert data["metrics"][name] == metrics[name]
        assert type(data["metrics"][name]) is type(metrics[name])
    assert data["metrics"]["pairs"] == {(1, "cpu")}


def test_a_model_that_is_not_finite_is_saved_with_a_word_and_is_not_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(tmp_path) as tracker:
        tracker.save_checkpoint(model_of(1.0), step=1)
        name = tracker.save_checkpoint(model_of(math.nan), step=2)
        assert "step 2 is not finite: model_state_dict/weight" in caplog.text
        assert value_in(tracker.load_checkpoint()) == 1.0
        assert math.isnan(value_in(tracker.load_checkpoint(name)))


class Own(torch.nn.Module):
    """Its own child is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(2, 2)


def wrapped() -> dict[str, torch.nn.Module]:
    parallel, own = torch.nn.DataParallel, Own()
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), Own())
    return {
        "plain": net,
        "compiled": torch.compile(net),
        "parallel": parallel(net),
        "compiled parallel": torch.compile(parallel(net)),
        "parallel compiled": parallel(torch.compile(net)),
        "inside": torch.nn.Sequential(parallel(net[0]), torch.compile(net[1])),
        "of its own": own,
        "of its own, parallel": parallel(own),
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("name", list(wrapped()))
def test_wrappers_leave_no_trace_in_a_checkpoint_and_it_loads_into_a_wrapped_model_too(
    name: str, tmp_path: Path
) -> None:
    model = wrapped()[name]
    bare = wrapped()["of its own" if name.startswith("of its own") else "plain"]
    with alone(tmp_path) as tracker:
        tracker.save_checkpoint(model)
        data = tracker.load_checkpoint()
        assert list(data["model_state_dict"]) == list(bare.state_dict())
        bare.load_state_dict(data["model_state_dict"])
        other = wrapped()[name]
        other.load_state_dict(tracker.load_checkpoint(model=other)["model_state_dict"])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_old_checkpoint_with_the_wrappers_names_loads_into_the_bare_model(tmp_path: Path) -> None:
    model = model_of(3.0)
    store = TrackerCheckpoints(tmp_path / "models" / "one")
    state = {"model_state_dict": {"module._orig_mod.weight": model.weight}, "epoch": 1, "step": 5}
    store.save(5, lambda: state)
    store.close()
    with alone(tmp_path, run_name="one") as tracker:
        assert value_in(tracker.load_checkpoint("checkpoint_epoch_1_step_5")) == 3.0
        wrapped_model = torch.nn.DataParallel(model_of(0.0))
        wrapped_model.load_state_dict(tracker.load_checkpoint(model=wrapped_model)["model_state_dict"])
    assert wrapped_model.module.weight.item() == 3.0


def test_a_save_that_fails_is_said_and_noted_and_the_next_one_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
            raise RuntimeError("no state")

    with alone(tmp_path) as tracker:
        assert tracker.save_checkpoint(Broken(), step=1) == "checkpoint_epoch_0_step_1.pt"
        assert "save_checkpoint failed" in caplog.text
        tracker.save_checkpoint(model_of(2.0), step=2)
        assert value_in(tracker.load_checkpoint()) == 2.0


def test_the_log_tells_of_a_checkpoint_once_it_is_there_and_of_each_that_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(tmp_path, run_name="one") as tracker:
        folder = Path(tracker.config.model_save_dir) / "one"
        for step in range(3):
            tracker.save_checkpoint(model_of(1.0), epoch=1, step=step)
        tracker.load_checkpoint()
        folder.rename(tmp_path / "gone")
        folder.write_text("no folder")
        for step in range(3, 6):
            tracker.save_checkpoint(model_of(1.0), epoch=1, step=step)
    events = [event for event in open_run(tracker.run_dir).events() if event.name.startswith("checkpoint")]
    assert [(event.name, event.step) for event in events] == [
        *(("checkpoint", step) for step in range(3)),
        *(("checkpoint_failed", step) for step in range(3, 6)),
    ]
    assert all(event.details["epoch"] == 1 for event in events)
    assert all(("error" in event.details) == (event.name == "checkpoint_failed") for event in events)
    # As the trainer tells of one.
    told = {"num_steps", "blocked_s", "seconds", "size_bytes"}
    assert all(told <= set(event.details) for event in events if event.name == "checkpoint")


def test_every_save_that_fails_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
            raise RuntimeError("no state")

    with alone(tmp_path) as tracker:
        for step in range(3):
            tracker.save_checkpoint(Broken(), step=step)
    assert caplog.text.count("save_checkpoint failed") == 3
    assert [event.step for event in open_run(tracker.run_dir).events("checkpoint_failed")] == [0, 1, 2]

"""Saving goes on beside training, is all or nothing, and never fails in silence."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import Checkpointer, writer
from harness.errors import CheckpointError
from tests.support.checkpoints import TinyRun, digest


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every shard back until it is set: a slow disk."""
    opened = threading.Event()
    write = writer.write_shard

    def slow(*args: Any) -> Any:
        assert opened.wait(20)
        return write(*args)

    monkeypatch.setattr(writer, "write_shard", slow)
    yield opened
    opened.set()


def test_what_is_saved_is_the_state_of_the_call_though_training_goes_on(
    tmp_path: Path, gate: threading.Event
) -> None:
    run = TinyRun("plain")
    run.train(2)
    with Checkpointer(tmp_path) as checkpointer:
        expected = digest(run)
        checkpointer.save(run.step, run.state())
        run.train(3)
        assert not any(tmp_path.glob("step-*"))
        gate.set()
        checkpointer.wait()
        resumed = TinyRun("plain", seed=1)
        assert checkpointer.load(resumed.state()) == 2
    assert digest(resumed) == expected


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, {"x": torch.ones(2)})
        threading.Timer(0.2, gate.set).start()
        assert checkpointer.save(2, {"x": torch.ones(2)})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]


def test_a_second_save_is_dropped_if_asked_and_says_so(
    tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path, when_busy="drop") as checkpointer:
        assert checkpointer.save(1, {"x": torch.ones(2)})
        assert not checkpointer.save(2, {"x": torch.ones(2)})
        assert "step 2 is not saved" in caplog.text
        gate.set()
        checkpointer.wait()
        assert checkpointer.save(3, {"x": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_leaving_the_context_commits_the_save_under_way(tmp_path: Path, gate: threading.Event) -> None:
    threading.Timer(0.2, gate.set).start()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(2)})
    assert os.listdir(tmp_path) == ["step-00000001"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of more than 64 KiB cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_write_that_fails_is_loud_leaves_nothing_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, {"x": torch.ones(100_000)})
        with pytest.raises(CheckpointError, match="File too large"):
            checkpointer.wait()
        assert "step 1 was not saved" in caplog.text
        assert os.listdir(tmp_path) == []
        assert checkpointer.save(2, {"x": torch.ones(10)})
        checkpointer.wait()
        first, second = checkpointer.outcomes()
    assert "File too large" in str(first.error)
    assert first.path is None
    assert second.error is None
    assert second.path == tmp_path / "step-00000002"


def test_a_failed_save_stops_no_training_until_it_has_failed_for_too_long(tmp_path: Path) -> None:
    blocked = tmp_path / "not-a-folder"
    blocked.touch()
    checkpointer = Checkpointer(blocked / "checkpoints", give_up_after_s=1.0)
    assert checkpointer.save(1, {"x": 1})
    assert checkpointer.save(2, {"x": 1})
    checkpointer._writer.join()
    threading.Event().wait(1.1)
    with pytest.raises(CheckpointError, match=r"nothing could be saved for 1 s: .*Not a directory"):
        checkpointer.save(3, {"x": 1})
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpointer.close()


def test_a_folder_that_vanishes_fails_the_save_and_the_next_one_works_when_it_is_back(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    with Checkpointer(run_directory / "checkpoints") as checkpointer:
        checkpointer.save(1, {"x": 1})
        checkpointer.wait()
        shutil.rmtree(run_directory)
        checkpointer.save(2, {"x": 1})
        with pytest.raises(CheckpointError, match="No such file"):
            checkpointer.wait()
        run_directory.mkdir()
        checkpointer.save(3, {"x": 1})
        checkpointer.wait()
        assert checkpointer.steps() == [3]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["parameter", "moment"])
def test_non_finite_state_is_never_committed(tmp_path: Path, poison: float, where: str) -> None:
    run = TinyRun("plain")
    run.train(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, run.state())
        checkpointer.wait()
        weight = run.model.blocks[1].weight
        struck = weight if where == "parameter" else run.optimizer.state[weight]["exp_avg_sq"]
        with torch.no_grad():
            struck.view(-1)[-1] = poison
        checkpointer.save(2, run.state())
        with pytest.raises(CheckpointError, match=r"blocks.1.weight\S* holds NaN or infinite values"):
            checkpointer.wait()
        assert checkpointer.steps() == [1]


def test_infinite_buffers_are_state_like_any_other(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    other = torch.nn.Linear(2, 2)
    other.register_buffer("mask", torch.zeros(2, 2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        checkpointer.load({"model": other})
    assert torch.equal(other.mask, model.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_a_model_with_a_nan_in_a_buffer_is_never_committed(tmp_path: Path, dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model.register_buffer("extra", torch.ones(5).to(dtype))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        checkpointer.wait()
        model.get_buffer("extra").copy_(torch.tensor([0, 1, 2, 3, float("nan")]).to(dtype))
        checkpointer.save(2, {"model": model})
        with pytest.raises(CheckpointError, match="extra holds NaN"):
            checkpointer.wait()
        assert checkpointer.steps() == [1]


def test_leftovers_of_dead_saves_are_removed_at_the_first_save_and_never_loaded(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(2)})
    leftover = tmp_path / ".saving-00000009-abc"
    shutil.copytree(tmp_path / "step-00000001", leftover)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.load({"x": None}) == 1
        assert leftover.exists()  # who only reads removes nothing
        checkpointer.save(2, {"x": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


def test_the_manifest_says_what_was_saved(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, {"x": torch.ones(2)}, meta={"config": "abc"}, metric=0.5)
    manifest = json.loads((tmp_path / "step-00000007" / "manifest.json").read_bytes())["manifest"]
    assert (manifest["step"], manifest["world_size"], manifest["metric"]) == (7, 1, 0.5)
    assert manifest["meta"] == {"config": "abc"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert list(manifest["files"]) == ["rank-00000.safetensors"]


def test_saving_waits_for_no_more_than_a_copy(tmp_path: Path, gate: threading.Event) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(1000)})
        gate.set()
        checkpointer.wait()
        (outcome,) = checkpointer.outcomes()
    assert outcome.blocked_s <= outcome.seconds
    assert outcome.size_bytes >= 4000


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"x/a/1 is a range, which cannot be saved"):
            checkpointer.save(1, {"x": {"a": [1, range(2)]}})
        stray = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        with pytest.raises(CheckpointError, match=r"shape \(3,\) that no module has"):
            checkpointer.save(1, {"optimizer": stray})
        with pytest.raises(CheckpointError, match="meta/t is a tensor"):
            checkpointer.save(1, {"x": 1}, meta={"t": torch.ones(1)})


def test_a_save_that_ends_while_outcomes_are_taken_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    with Checkpointer(tmp_path) as checkpointer:
        outcome = writer.SaveOutcome

        def taken_meanwhile(**parts: Any) -> Any:
            taken.extend(checkpointer.outcomes())
            return outcome(**parts)

        monkeypatch.setattr(writer, "SaveOutcome", taken_meanwhile)
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": torch.ones(2)})
        checkpointer.wait()
        taken.extend(checkpointer.outcomes())
    assert [save.step for save in taken] == [1, 2, 3]

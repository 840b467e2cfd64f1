"""Nothing that is handed to a tracker ends a training, and one odd value costs itself alone."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import errno
import inspect
import logging
import math
import multiprocessing
import os
import pickle
import random
import shutil
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch

from harness import ExperimentTracker
from harness.errors import TrackingError
from harness.runlog import log_follower
from harness.runlog.digest import Digest
from harness.runlog.preview import open_digest
from harness.tracking import TrainingMetrics, open_run, places, shared_place
from tests.support.trackers import alone


class Evil:
    """Every way of looking at it fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__

    def __float__(self) -> float:
        raise OverflowError

    def __index__(self) -> int:
        raise ZeroDivisionError

    def __bool__(self) -> bool:
        raise RuntimeError


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Nested:
    lr: float = 0.1
    parent: Any = None


def odd_values() -> list[Any]:
    cyclic: dict[str, Any] = {"a": 1.0}
    cyclic.update(self=cyclic, again=cyclic, more=[cyclic, cyclic])
    nested = Nested()
    nested.parent = [nested, nested]
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    broken = torch.nn.Linear(2, 2)
    broken.forward = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    return [
        None, True, 0, -1, 3, 2**62, 2**63, 10**400, 0.5, 3.0, -0.5, 1e400, math.nan, math.inf, "text", "",
        "x" * 10_000, "a/b c\nü😀\0", "\ud800", b"bytes", 1j, Decimal("0.1"), Decimal("sNaN"), Fraction(1, 3),
        Colour.RED, int, print, len, lambda: 0, Evil(), Evil, object(), nested, cyclic, {}, {1: 2},
        {"v": {"l": 1}}, {Evil(): Evil()}, [], [1.0], (1, 2), {1, 2}, range(3), iter([1]),
        argparse.Namespace(lr=0.1, d=Evil()),
        SimpleNamespace(a=1), collections.Counter("ab"), collections.namedtuple("P", "x y")(1, 2),
        np.float32(0.5), np.int64(3), np.longdouble(0.5), np.array([0.5]), np.zeros((3, 3)), np.array(["a"]),
        np.datetime64("2020-01-01"), np.ma.masked, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(3),
        torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), torch.zeros(3), torch.empty(0),
        torch.zeros(2, 3, 4, 4, requires_grad=True), [torch.zeros(3, 4, 4), torch.zeros(3, 5, 6)],
        torch.tensor(1.0, device="meta"), embedding.weight.grad, torch.device("cpu"), torch.float32,
        torch.nn.Linear(2, 2), torch.nn.LazyLinear(3), embedding, broken, Path("/none"),
        TrainingMetrics(loss=1.0),
        TrainingMetrics(loss=torch.zeros(3), training_time=torch.zeros(2)),  # type: ignore[arg-type]
    ]  # fmt: skip


METHODS = [
    "log_training_step", "log_epoch", "log_custom_metric", "log_metrics_batch", "log_hyperparameters",
    "log_model_architecture", "log_gradients", "log_images", "log_text", "log_event", "should_save",
]  # fmt: skip
QUERIES = {
    "create_visualization": dict,
    "get_experiment_summary": dict,
    "get_system_status": dict,
    "get_resource_usage": dict,
    "should_save": bool,
}


def call_oddly(tracker: ExperimentTracker, draw: random.Random, values: list[Any], name: str) -> None:
    parameters = list(inspect.signature(getattr(tracker, name)).parameters)
    given = [draw.choice(values) for _ in range(draw.randint(0, min(3, len(parameters))))]
    more = {
        draw.choice([*parameters, "mine", "name", "self"]): draw.choice(values)
        for _ in range(draw.randint(0, 2))
    }
    assert getattr(tracker, name)(*given, **more) in (None, True, False)


@pytest.mark.parametrize("seed", range(3))
def test_no_odd_call_raises_and_what_is_sound_is_logged_all_the_same(seed: int, tmp_path: Path) -> None:
    draw, values = random.Random(seed), odd_values()
    tracker = alone(tmp_path, run_name="one", log_images=True)
    for _ in range(20):
        call_oddly(tracker, draw, values, "rewind")
    for number in range(300):
        call_oddly(tracker, draw, values, draw.choice(METHODS))
        tracker.metrics_queue.put(draw.choice(values), block=False)
        tracker.log_training_step(mark=float(number), step=1000 + number, odd=draw.choice(values))
    tracker.config.log_images = False
    tracker.close()
    marks = open_run(tracker.run_dir).scalars("train/mark")
    assert set(range(300)) <= set(marks.values.tolist())
    assert open_run(tracker.run_dir).state() == "finished"


def test_one_odd_value_costs_itself_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(tmp_path) as tracker:
        for number in range(3):
            tracker.log_training_step(loss=torch.tensor([1.0 + number]), odd=torch.device("cpu"), lr=0.1)
            tracker.log_metrics_batch({"a": 1, "text": "b", "val": {"loss": 2.0, "deep": {"er": 3}}})
            tracker.log_hyperparameters(argparse.Namespace(lr=0.1, device=torch.device("cpu"), evil=Evil()))
            tracker.log_training_step(loss=1.0, step=-1)
            tracker.log_training_step(loss=1.0, step=2.5)  # type: ignore[arg-type]
            tracker.log_training_step(loss=1.0, step=torch.tensor(50 + number))  # type: ignore[arg-type]
    run = open_run(tracker.run_dir)
    assert run.scalars("train/loss").values.tolist()[:3] == [1.0, 1.0, 1.0]
    assert {50, 51, 52} <= set(run.scalars("train/loss").steps.tolist())
    assert run.scalars("train/lr").values.tolist() == [0.1] * 3
    assert [run.last(name) for name in ("a", "val/loss", "val/deep/er")] == [1.0, 2.0, 3.0]
    assert run.hparams == {"lr": 0.1, "device": "cpu", "evil": "(Evil)"}
    assert caplog.text.count("leaves out 'odd'") == caplog.text.count("leaves out 'text'") == 1
    assert caplog.text.count("the step is") == 1


def test_a_step_that_goes_back_sets_no_count_back_and_a_rewind_does(tmp_path: Path) -> None:
    with alone(tmp_path) as tracker:
        for _ in range(5):
            tracker.log_training_step(loss=0.0)
        tracker.log_training_step(loss=-1.0, step=1)
        tracker.log_training_step(loss=5.0)
        assert open_run(tracker.run_dir).scalars("train/loss").steps.tolist() == [0, 1, 2, 3, 4, 5]
        tracker.rewind(3)
        tracker.log_training_step(loss=7.0)
    series = open_run(tracker.run_dir).scalars("train/loss")
    assert (series.steps.tolist(), series.values.tolist()) == ([0, 1, 2, 3], [0.0, -1.0, 0.0, 7.0])


def test_gradients_that_are_sparse_lazy_or_unusual_cost_no_others(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(2, 2)
            self.sparse = torch.nn.Embedding(4, 2, sparse=True)
            self.lazy = torch.nn.LazyLinear(3)
            self.complex = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.meta = torch.nn.Linear(2, 2, device="meta")
            self.eight = torch.nn.Parameter(torch.ones(2, dtype=torch.float8_e4m3fn), requires_grad=False)

    model = Odd()
    model.dense(model.sparse(torch.tensor([1, 3]))).sum().backward()
    with alone(tmp_path) as tracker:
        tracker.log_gradients(model)
        tracker.log_model_architecture(model, torch.zeros(1))
    run = open_run(tracker.run_dir)
    [histogram] = run.records["histogram"]
    assert {"gradients/dense.weight", "gradients/sparse.weight", "parameters/complex"} <= set(
        histogram.values
    )
    assert histogram.values["gradients/sparse.weight"]["num"] == 4
    assert "model/architecture" in run.records["text"][0].values
    assert run.info["model"] == "Odd"


def test_tracing_leaves_every_modules_mode_and_the_generators_as_they_were(tmp_path: Path) -> None:
    class Fails(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.nn.BatchNorm1d(2).eval()
            self.live = torch.nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(3)
            raise KeyError("no graph")

    model, state = Fails(), torch.get_rng_state()
    with alone(tmp_path) as tracker:
        tracker.log_model_architecture(model, torch.zeros(1, 2))
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_different_sizes_and_with_gradients_become_one_picture(tmp_path: Path) -> None:
    ragged = [torch.rand(3, 4, 4, requires_grad=True), np.zeros((6, 5)), torch.rand(1, 2, 2)]
    with alone(tmp_path, log_images=True) as tracker:
        tracker.log_images({"ragged": ragged, "broken": object(), "fine": np.zeros((2, 2))})
        tracker.config.log_images = False
    [record] = open_run(tracker.run_dir).records["image"]
    assert set(record.values) == {"ragged", "fine"}
    assert (record.values["ragged"]["width"], record.values["ragged"]["height"]) == (11, 13)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_method_gives_an_answer_of_its_kind_on_every_rank(rank: int, tmp_path: Path) -> None:
    tracker = alone(tmp_path, rank=rank)
    for name, kind in QUERIES.items():
        assert isinstance(getattr(tracker, name)(), kind), name
    assert tracker.get_experiment_summary()["num_steps"] == 0
    assert isinstance(tracker.create_visualization(tmp_path / "x.png")["figure"], matplotlib.figure.Figure)
    assert tracker.save_config("a.json") == tmp_path / "configs" / "a.json"
    assert tracker.save_checkpoint(torch.nn.Linear(1, 1), step=3) == "checkpoint_epoch_0_step_3.pt"
    for _ in range(2):
        tracker.close()
    assert (tmp_path / "x.png").exists() == (tmp_path / "models").exists() == (rank == 0)
    tracker.log_training_step(loss=1.0)
    for name, kind in QUERIES.items():
        assert isinstance(getattr(tracker, name)(), kind), name


def test_what_is_no_error_passes_through(tmp_path: Path) -> None:
    class Interrupts:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with alone(tmp_path) as tracker, pytest.raises(KeyboardInterrupt):
        tracker.log_text("a", Interrupts())  # type: ignore[arg-type]


def test_what_is_logged_after_the_end_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = alone(tmp_path)
    tracker.close()
    for _ in range(3):
        tracker.log_training_step(loss=1.0)
    assert caplog.text.count("logged after close() is lost") == 1


def test_a_copy_in_another_process_is_silent_and_the_run_goes_on(tmp_path: Path) -> None:
    tracker = alone(tmp_path)
    assert copy.deepcopy(tracker) is tracker
    child = multiprocessing.get_context("fork").Process(target=_log_and_close, args=(tracker,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    _log_and_close(pickle.loads(pickle.dumps(tracker)))
    tracker.log_training_step(loss=1.0)
    tracker.close()
    run = open_run(tracker.run_dir)
    assert (run.scalars("train/loss").values.tolist(), run.state()) == ([1.0], "finished")
    assert not (tracker.run_dir / "x.png").exists()


def _log_and_close(tracker: ExperimentTracker) -> None:
    tracker.log_training_step(loss=5.0)
    assert tracker.create_visualization(tracker.run_dir / "x.png")["path"] is None
    assert tracker.get_system_status()["logging"] is False
    tracker.close()


def test_terminal_lines_come_every_so_many_steps_or_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for interval, lines in ((0, 0), (2, 2)):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "harness.tracking.tracker"),
            alone(tmp_path, log_interval=interval, save_interval=interval) as tracker,
        ):
            for _ in range(4):
                tracker.log_training_step(loss=1.0)
            assert tracker.should_save() == (interval == 2)
        assert caplog.text.count("train/loss") == lines


def test_a_value_alone_is_the_loss_of_a_step_whatever_its_type(tmp_path: Path) -> None:
    values = [torch.tensor(1.0), torch.tensor([1.0]), np.float32(1.0), np.array([1.0]), 1.0, Fraction(1)]
    with alone(tmp_path) as tracker:
        for value in values:
            tracker.log_training_step(value)  # type: ignore[arg-type]
            tracker.metrics_queue.put(value)
        tracker.log_training_step(SimpleNamespace(loss=1.0, item=len))  # type: ignore[arg-type]
    assert open_run(tracker.run_dir).scalars("train/loss").values.tolist() == [1.0] * (2 * len(values) + 1)


@pytest.mark.parametrize("kind", ["mapping", "dataclass", "list"])
def test_hyperparameters_are_kept_as_deep_as_a_log_holds_them(kind: str, tmp_path: Path) -> None:
    def nested(depth: int) -> Any:
        inner: Any = 1.0 if depth == 0 else nested(depth - 1)
        return {"mapping": {"v": inner}, "list": [inner], "dataclass": Nested(parent=inner)}[kind]

    with alone(tmp_path) as tracker:
        for depth in range(20):
            tracker.log_hyperparameters({f"deep{depth}": nested(depth)})
    told = open_run(tracker.run_dir).hparams
    assert set(told) == {f"deep{depth}" for depth in range(20)}
    whole = [depth for depth in range(20) if "(" not in str(told[f"deep{depth}"])]
    assert whole == list(range(15))  # with the record's own values 16 levels


def test_names_that_are_made_up_at_every_step_silence_no_other_method(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(tmp_path) as tracker:
        for number in range(500):
            tracker.log_metrics_batch({f"odd{number}": object()})
        assert 100 <= len(caplog.records) <= 101
        assert caplog.text.count("the others are not shown") == 1
        tracker.log_images("broken", object())
        tracker.config.log_images = True
        tracker.log_images("broken", object())
        tracker.config.log_images = False
    assert "log_images leaves out 'broken'" in caplog.text


def test_answers_need_no_disk_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    tracker = alone(tmp_path, run_name="one")
    keys = tracker.get_experiment_summary().keys()
    with monkeypatch.context() as patched:
        patched.setattr(log_follower, "node_folders", fails)
        assert tracker.get_experiment_summary().keys() == keys
        assert tracker.create_visualization()["metrics_summary"].keys() == keys
        tracker.config.log_images = True
        tracker.log_training_step(loss=1.0)
        tracker.close()
    assert "Stale file handle" in caplog.text
    assert open_run(tracker.run_dir).state() == "finished"


def test_an_interrupted_last_picture_leaves_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupts(*_: Any) -> Any:
        raise KeyboardInterrupt

    tracker = alone(tmp_path, log_images=True)
    tracker.log_training_step(loss=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(type(tracker), "_save_figure", interrupts)
        with pytest.raises(KeyboardInterrupt):
            tracker.close()
    assert open_run(tracker.run_dir).state() == "finished"


@pytest.mark.parametrize(
    "epoch", [math.nan, math.inf, -math.inf, None, "one", torch.tensor(math.nan), "evil"]
)
def test_an_odd_epoch_costs_no_checkpoint(epoch: Any, tmp_path: Path) -> None:
    with alone(tmp_path) as tracker:
        name = tracker.save_checkpoint(
            torch.nn.Linear(1, 1), epoch=Evil() if epoch == "evil" else epoch, step=3
        )
        assert name == "checkpoint_epoch_0_step_3.pt"
        assert tracker.load_checkpoint(name)["epoch"] == 0


@pytest.mark.parametrize("path", [None, b"x.json", 3, "evil", "", "a\0b.json"])
def test_a_configuration_that_cannot_be_saved_ends_no_training(path: Any, tmp_path: Path) -> None:
    with alone(tmp_path) as tracker:
        assert isinstance(tracker.save_config(Evil() if path == "evil" else path), Path)


def test_a_run_is_resumed_whatever_lies_beside_it(tmp_path: Path) -> None:
    with alone(tmp_path, run_name="mine") as tracker:
        tracker.log_training_step(loss=1.0)
    for name, content in {"text": b"an-id", "odd": b"\xff\xfe", "long": bytes(10_000)}.items():
        other = tracker.run_dir.parent / name
        shutil.copytree(tracker.run_dir, other)
        (other / "log" / "mirrors").mkdir()
        (other / "log" / "mirrors" / "wandb-run-id").write_bytes(content)
    (tracker.run_dir.parent / "pipe" / "log").mkdir(parents=True)
    os.mkfifo(tracker.run_dir.parent / "pipe" / "log" / "00000000.jsonl")
    with alone(tmp_path, resume_run=True, run_name="mine") as again:
        assert (again.run_dir, again.step) == (tracker.run_dir, 1)
    with alone(tmp_path, resume_run=True, run_id="an-id") as again:
        assert again.run_dir.name == "text"
    with alone(tmp_path, resume_run=True) as again:
        assert again.run_dir.name == "text"  # the one that logged last


def test_a_run_that_cannot_be_read_is_not_in_the_way_of_the_one_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("bad", "good"):
        with alone(tmp_path, run_name=name) as tracker:
            tracker.log_training_step(loss=1.0)

    def read(run_dir: Path, **given: Any) -> Digest:
        if run_dir.name == "bad":
            raise OSError(errno.EIO, "Input/output error")
        return open_digest(run_dir, **given)

    monkeypatch.setattr(places, "open_digest", read)
    with alone(tmp_path, resume_run=True) as again:
        assert again.run_dir.name == "good"
    assert "Input/output error" in caplog.text


def test_a_run_whose_last_step_is_the_last_there_is_can_be_resumed(tmp_path: Path) -> None:
    with alone(tmp_path, run_name="one") as tracker:
        tracker.log_training_step(loss=1.0, step=2**63 - 1)
    with alone(tmp_path, run_name="one", resume_run=True) as again:
        assert again.step == 2**63 - 1
        again.log_training_step(loss=2.0)
    assert open_run(tracker.run_dir).scalars("train/loss").values.tolist() == [2.0]


def test_whatever_keeps_rank_0_from_its_run_is_told_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    left: list[dict[str, Any]] = []
    monkeypatch.setattr(shared_place, "find_place", fails)
    monkeypatch.setattr(shared_place.SharedPlace, "_leave", lambda _, said: left.append(said))
    with pytest.raises(TrackingError, match="Stale file handle"):
        alone(tmp_path)
    assert "Stale file handle" in left[0]["error"][0]

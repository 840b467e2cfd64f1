"""In a TrainJob whose Trainer takes reports, a run's progress stands in the TrainJob's status."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from harness.runlog.codec import Record
from harness.tracking.kubeflow import TrainJobMirror
from harness.tracking.mirror import MirroredRun
from harness.tracking.registry import mirrors_of
from harness.tracking.settings import MirrorSettings


@dataclass
class Trainer:
    """Kubeflow's end: what it was told, and how it answers."""

    token: Path
    told: list[dict[str, Any]] = field(default_factory=list)
    answer: int = 200


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    kubeflow = Trainer(tmp_path / "token")
    kubeflow.token.write_text("secret\n")

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {kubeflow.token.read_text().strip()}"
            kubeflow.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(kubeflow.answer)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/apis/trainer.kubeflow.org/v1alpha1/status"
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", address)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(kubeflow.token))
        yield kubeflow
        server.shutdown()


def record(kind: str, values: dict[str, Any], step: int | None = None) -> Record:
    return Record(kind=kind, attempt=0, step=step, time=0.0, values=values)


def mirror(tmp_path: Path, state: dict[str, Any] | None = None) -> TrainJobMirror:
    return TrainJobMirror(MirroredRun(tmp_path, MirrorSettings()), state or {})


def test_progress_time_left_and_the_last_metrics_are_reported(tmp_path: Path, trainer: Trainer) -> None:
    shown = mirror(tmp_path)
    shown.take(record("run", {"config": {"loop": {"steps": 40}}}))
    for step in range(10):
        shown.take(record("step", {"train/loss": 4.0 - step / 10, "time/step_s": 2.0, "train/x": 1.0}, step))
    shown.take(record("eval", {"val/loss": float("nan")}, 9))
    state = shown.commit()
    status = trainer.told[-1]["trainerStatus"]
    assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (25, 60)
    assert status["metrics"] == [{"name": "train/loss", "value": "3.1"}, {"name": "val/loss", "value": "nan"}]
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is missing")
    request = models.TrainerV1alpha1UpdateTrainJobStatusRequest
    assert request.from_dict(trainer.told[-1]) is not None
    json.dumps(state, allow_nan=False)


def test_reports_are_seldom_and_the_last_one_is_made_in_any_case(tmp_path: Path, trainer: Trainer) -> None:
    shown = mirror(tmp_path, {"total": 2})
    for step in range(2):
        shown.take(record("step", {}, step))
        shown.commit()
    assert [each["trainerStatus"]["progressPercentage"] for each in trainer.told] == [50]
    shown.close({})
    assert trainer.told[-1]["trainerStatus"]["progressPercentage"] == 100


def test_a_rollback_takes_progress_back_and_a_new_attempt_goes_on(tmp_path: Path, trainer: Trainer) -> None:
    shown = mirror(tmp_path, {"total": 10, "done": 8})
    shown.take(record("rewind", {"step": 5}))
    assert mirror(tmp_path, shown.commit()).close({})["done"] == 5


def test_a_report_that_is_refused_is_a_trouble_that_is_said_and_tried_again(
    tmp_path: Path, trainer: Trainer
) -> None:
    trainer.answer = 503
    shown = mirror(tmp_path, {"total": 10})
    shown.take(record("step", {}, 0))
    with pytest.raises(HTTPError):
        shown.commit()
    trainer.answer = 200
    shown.commit()
    assert len(trainer.told) == 2


def test_it_is_there_in_such_a_train_job_alone(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with_endpoint = mirrors_of(MirrorSettings())
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL")
    assert [name for name in with_endpoint if name not in mirrors_of(MirrorSettings())] == [
        "harness.tracking.kubeflow:TrainJobMirror"
    ]

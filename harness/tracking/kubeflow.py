"""The progress of a run in its TrainJob's status, where Kubeflow Trainer offers an endpoint for it.

The Trainer (2.2, feature gate TrainJobStatus) gives the pods an address, a token and a certificate in
variables; what is sent there is `kubectl get trainjob NAME -o yaml`'s `status.trainerStatus`. Described in
https://github.com/kubeflow/trainer/tree/master/docs/proposals/2779-trainjob-progress.
"""

from __future__ import annotations

import math
import ssl
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from harness import env
from harness.errors import TrackingError
from harness.runlog.codec import Record
from harness.runlog.names import Metric
from harness.tracking.mirror import Mirror, MirroredRun

__all__ = ["TrainJobMirror"]

_EVERY_S = 10.0
"""Each report is a write to the cluster's API server."""
_TIMEOUT_S = 5.0
_SHOWN = (Metric.TRAIN_LOSS, Metric.VAL_LOSS, Metric.GRAD_NORM, Metric.LR, Metric.TOKENS_PER_S)
_SMOOTHING_STEPS = 20


class TrainJobMirror(Mirror):
    """Reports steps done, time left and the last metrics; it keeps no history."""

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        endpoint = env.train_job_endpoint()
        if endpoint is None:
            raise TrackingError("this process runs in no TrainJob whose Trainer takes reports of progress")
        self._endpoint = endpoint
        self._total: int = state.get("total", 0)
        self._done: int = state.get("done", 0)
        self._step_s: float = state.get("step_s", 0.0)
        self._metrics: dict[str, float] = dict(state.get("metrics", {}))
        self._has_news = False
        self._next = 0.0

    def take(self, record: Record) -> None:
        self._has_news = True
        if record.kind == "run":
            config = record.values.get("config") or {}
            self._total = int((config.get("loop") or {}).get("steps") or self._total)
        elif record.kind == "rewind":
            self._done = int(record.values["step"])
        elif record.kind == "step" and record.step is not None:
            self._done = max(self._done, record.step + 1)
            self._learn_pace(record.values.get(Metric.STEP_S))
        if record.kind in ("step", "eval"):
            self._metrics |= {
                name: record.values[name] for name in _SHOWN if _is_number(record.values.get(name))
            }

    def commit(self) -> dict[str, Any]:
        self.idle()
        return {
            "total": self._total,
            "done": self._done,
            "step_s": self._step_s,
            "metrics": {name: value for name, value in self._metrics.items() if math.isfinite(value)},
        }

    def idle(self) -> None:
        if self._has_news and time.monotonic() >= self._next:
            self._report()

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        self._report()
        return self.commit()

    def _learn_pace(self, step_s: float | None) -> None:
        if step_s is not None and math.isfinite(step_s):
            pace = self._step_s or step_s
            self._step_s = pace + (step_s - pace) / _SMOOTHING_STEPS

    def _report(self) -> None:
        """Sends what is known; raises what urllib does."""
        status: dict[str, Any] = {
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in self._metrics.items()],
        }
        if self._total:
            status["progressPercentage"] = min(100, 100 * self._done // self._total)
            if self._step_s:
                left = max(0, self._total - self._done)
                status["estimatedRemainingSeconds"] = int(left * self._step_s)
        request = urllib.request.Request(
            self._endpoint.url,
            data=orjson.dumps({"trainerStatus": status}),
            headers={"Authorization": f"Bearer {self._token()}", "Content-Type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._trusted()):
            self._has_news, self._next = False, time.monotonic() + _EVERY_S

    def _token(self) -> str:
        """Read each time: Kubernetes replaces it before it is too old."""
        return Path(self._endpoint.token_file).read_text(encoding="utf-8").strip()

    def _trusted(self) -> ssl.SSLContext | None:
        authority = self._endpoint.authority_file
        return ssl.create_default_context(cafile=authority) if authority else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)

"""The metrics endpoint: a run's newest numbers over HTTP, for Prometheus to scrape.

It is a mirror like the others, so it lives in the side process, is fed by the log, and has its counters again
after whatever was killed. The text format 0.0.4 is written here; no library is needed.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from harness.files import file_status, list_folder
from harness.runlog.codec import Record
from harness.runlog.events import Checkpoint, CheckpointFailed, Incident, Outlier, Rollback, read_event
from harness.runlog.ledger import Ledger
from harness.runlog.names import Metric
from harness.runlog.paths import HEALTHY, MANIFEST, checkpoint_of, checkpoints_dir
from harness.tracking.mirror import Mirror, MirroredRun

__all__ = ["CONTENT_TYPE", "PrometheusMirror"]

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_KINDS = 50
"""Kinds of incidents that are told apart."""

_GAUGES = {
    Metric.TRAIN_LOSS: ("train_loss", "Training loss of the newest step."),
    Metric.VAL_LOSS: ("val_loss", "Held-out loss of the newest evaluation."),
    Metric.GRAD_NORM: ("grad_norm", "L2 norm of the gradient before clipping."),
    Metric.LR: ("learning_rate", "Learning rate of the newest step."),
    Metric.TOKENS: ("trained_tokens", "Tokens trained on; a rollback takes back what it abandons."),
    Metric.TOKENS_PER_S: ("tokens_per_second", "Tokens per second in the newest step."),
    Metric.MFU_FRAC: ("mfu_ratio", "Model FLOPs utilisation."),
    Metric.STEP_S: ("step_seconds", "Wall time of the newest step."),
}
_COUNTERS = {
    "steps": "Steps made, those that were made again included.",
    "skipped_steps": "Steps that the guard skipped.",
    "restarts": "Processes that went on with the run after the first one.",
    "rollbacks": "Rollbacks to an earlier checkpoint.",
    "checkpoints": "Checkpoints committed.",
    "checkpoint_failures": "Checkpoints that could not be saved.",
    "outliers": "Outlier batches.",
}


class _Sample(NamedTuple):
    value: float
    labels: Mapping[str, str] = {}


class PrometheusMirror(Mirror):
    """Serves `/metrics` while the run goes on.

    Raises:
        OSError: the address is taken, by another run of this machine perhaps.
    """

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        self._run = run
        self._mutex = threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(_COUNTERS, 0) | state.get("counts", {})
        self._incidents: dict[str, int] = dict(state.get("incidents", {}))
        self._values: dict[str, float] = {
            name: float(value) for name, value in state.get("values", {}).items()
        }
        self._step: int = state.get("step", 0)
        self._num_processes: int = state.get("num_processes", 0)
        self._ranks: dict[str, list[float]] = state.get("ranks", {})
        self._ledger: Ledger | None = None
        self._saved: tuple[float | None, float | None] = (None, None)
        self._updated = 0.0
        address = (run.settings.prometheus_host, run.settings.prometheus_port)
        self._server = _Server(address, self._text)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        logger.info("metrics at http://%s:%d/metrics", *self._server.server_address[:2])

    def take(self, record: Record) -> None:
        with self._mutex:
            if record.attempt >= 0:
                self._updated = max(self._updated, record.time)
            if record.kind in ("step", "eval"):
                self._take_step(record)
            elif record.kind == "ranks":
                self._ranks = {name: record.values[name] for name in _BY_RANK if name in record.values}
            elif record.kind == "run" and "pid" in record.values:
                self._num_processes += 1
                self._counts["restarts"] = self._num_processes - 1
            elif record.kind == "ledger":
                self._ledger = Ledger.of(record)
            elif record.kind == "event":
                self._take_event(record)

    def _take_step(self, record: Record) -> None:
        self._values |= {
            name: float(record.values[name])
            for name in _GAUGES
            if isinstance(record.values.get(name), (int, float))
        }
        if Metric.TRAIN_LOSS in record.values:
            self._counts["steps"] += 1
            self._step = record.step or 0

    def _take_event(self, record: Record) -> None:
        match read_event(record.values):
            case Outlier():
                self._counts["outliers"] += 1
            case Incident(kind=kind, verdict=verdict):
                kind = (kind or "incident") if len(self._incidents) < MOST_KINDS else "other"
                self._incidents[kind] = self._incidents.get(kind, 0) + 1
                self._counts["skipped_steps"] += verdict in ("skip", "stop")
            case CheckpointFailed():
                self._counts["checkpoint_failures"] += 1
            case Checkpoint():
                self._counts["checkpoints"] += 1
            case Rollback():
                self._counts["rollbacks"] += 1

    def commit(self) -> dict[str, Any]:
        self.idle()
        with self._mutex:
            finite = {name: value for name, value in self._values.items() if math.isfinite(value)}
            return {
                "counts": dict(self._counts),
                "incidents": dict(self._incidents),
                "values": finite,
                "step": self._step,
                "num_processes": self._num_processes,
                "ranks": {}
                if any(not math.isfinite(v) for row in self._ranks.values() for v in row)
                else self._ranks,
            }

    def idle(self) -> None:
        """Looks which checkpoints are there; in this thread, so that a slow disk holds up no scrape."""
        saved = _newest_saved(self._run)
        with self._mutex:
            self._saved = saved

    def abandon(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        state = self.commit()
        self.abandon()
        return state

    def _text(self) -> str:
        with self._mutex:
            return "".join(self._families())

    def _families(self) -> Iterator[str]:
        family = self._family
        about = {"project": self._run.settings.project, "group": self._run.settings.group or ""}
        yield family("run_info", "gauge", "Always 1: what the run belongs to.", [_Sample(1, about)])
        yield family("step", "gauge", "Newest step whose record has arrived, from 0.", [_Sample(self._step)])
        for metric, (name, help_text) in _GAUGES.items():
            if metric in self._values:
                yield family(name, "gauge", help_text, [_Sample(self._values[metric])])
        for name, help_text in _COUNTERS.items():
            yield family(f"{name}_total", "counter", help_text, [_Sample(self._counts[name])])
        by_kind = [_Sample(count, {"kind": kind}) for kind, count in sorted(self._incidents.items())]
        yield family("incidents_total", "counter", "Incidents, by what was wrong.", by_kind)
        names = ("last_checkpoint", "last_healthy_checkpoint")
        for name, saved_at in zip(names, self._saved, strict=True):
            if saved_at is not None:
                what = f"When the newest {'healthy ' * ('healthy' in name)}checkpoint was committed."
                yield family(f"{name}_timestamp_seconds", "gauge", what, [_Sample(saved_at)])
        if self._updated:
            what = "When the trainer last wrote to the log."
            yield family("last_record_timestamp_seconds", "gauge", what, [_Sample(self._updated)])
        yield from self._rank_families()
        yield from self._ledger_families()

    def _rank_families(self) -> Iterator[str]:
        for name, (shown, help_text) in _BY_RANK.items():
            row = self._ranks.get(name)
            if row:
                extremes = [_Sample(min(row), {"rank": "min"}), _Sample(max(row), {"rank": "max"})]
                yield self._family(shown, "gauge", help_text, extremes)
        if self._ranks.get("compute_s") and min(self._ranks["compute_s"]) > 0:
            row = self._ranks["compute_s"]
            what = (
                "Computing time of the slowest rank by that of the fastest one, without waiting for others."
            )
            yield self._family("rank_skew_ratio", "gauge", what, [_Sample(max(row) / min(row))])
            slowest = [_Sample(row.index(max(row)))]
            yield self._family(
                "slowest_rank",
                "gauge",
                "Rank that computed longest in the newest step that tells of ranks.",
                slowest,
            )

    def _ledger_families(self) -> Iterator[str]:
        if self._ledger is None:
            return
        seconds = [_Sample(spent, {"class": kind}) for kind, spent in self._ledger.seconds.items()]
        yield self._family("time_seconds", "gauge", "The run's wall time so far, by class.", seconds)
        what = "Share of the wall time in which steps were made that count."
        yield self._family("goodput_ratio", "gauge", what, [_Sample(self._ledger.goodput_frac)])
        what = "Share of the wall time that a run without faults would have needed too."
        yield self._family("effective_training_time_ratio", "gauge", what, [_Sample(self._ledger.ettr_frac)])

    def _family(self, name: str, kind: str, help_text: str, samples: Iterable[_Sample]) -> str:
        """A metric with its help, type and samples; all of them bear the run's name."""
        lines = [f"# HELP harness_{name} {help_text}", f"# TYPE harness_{name} {kind}"]
        for value, labels in samples:
            all_labels = {"run": self._run.name, **labels}
            words = ",".join(f'{label}="{_escaped(text)}"' for label, text in all_labels.items())
            lines.append(f"harness_{name}{{{words}}} {_number(value)}")
        return "\n".join([*lines, ""])


_BY_RANK = {
    "compute_s": (
        "rank_compute_seconds",
        "Computing of a rank in the newest step that tells of ranks, without waiting for others.",
    ),
    "data_wait_s": (
        "rank_data_wait_seconds",
        "Waiting of a rank for its batch in the newest step that tells of ranks.",
    ),
}


class _Server(ThreadingHTTPServer):
    """Answers `/metrics`."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], text: Callable[[], str]) -> None:
        self.text = text
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30.0

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "the metrics are at /metrics")
            return
        body = self.server.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each scrape is of no use to anybody."""


def _newest_saved(run: MirroredRun) -> tuple[float | None, float | None]:
    """When the newest checkpoint was committed, and the newest healthy one, in seconds since the epoch."""
    newest: float | None = None
    healthy: float | None = None
    with contextlib.suppress(OSError):
        folder = checkpoints_dir(run.directory)
        for name in list_folder(folder).folders:
            files = list_folder(folder / name).files if checkpoint_of(name) else []
            if MANIFEST in files:
                saved_at = file_status(folder / name / MANIFEST).st_mtime
                newest = max(newest or 0.0, saved_at)
                healthy = max(healthy or 0.0, saved_at) if HEALTHY in files else healthy
    return newest, healthy


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"

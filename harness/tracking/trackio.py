"""The trackio mirror. The only module that imports trackio, and only the side process does.

Rows go straight into trackio's own database, which takes a row once by its `log_id`: here that is the
ordinal of its record, so what is sent again after a crash is there once. After a rewind the rows of the
branch that was left are removed; its events stay.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from harness.errors import needs
from harness.runlog.codec import Record
from harness.runlog.names import EventName
from harness.runlog.paths import media_bytes
from harness.runlog.scalars import scalars_of
from harness.tracking.mirror import Mirror, MirroredRun, StartAgain, shown_name

with needs("trackio", extra="trackio"):
    from trackio import utils
    from trackio.media.utils import get_project_media_path
    from trackio.sqlite_storage import SQLiteStorage

__all__ = ["TrackioMirror"]

_IS_RESERVED = re.compile(r"project|run|timestamp|step|time|metrics|_.*|", re.DOTALL)
"""What trackio keeps for itself, and no name."""
LOCKED_S = 30.0
"""How long another process may hold the database."""


class TrackioMirror(Mirror):
    """Shows the log as a run of a local trackio project: `trackio show --project PROJECT`."""

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        self._mirrored = run
        self._project = run.settings.project
        self._run = {"project": self._project, "run": run.name, "run_id": run.id}
        self._ordinal: int = state.get("ordinal", 0)
        self._step: int = state.get("step", 0)
        self._config: dict[str, Any] = state.get("config", {"_Group": run.settings.group})
        self._forget_waiting()
        SQLiteStorage.validate_project_name(self._project)
        SQLiteStorage.init_db(self._project)
        if state.get("has_rows") and not self._num_rows():
            raise StartAgain
        self._has_rows = bool(state.get("has_rows", False))

    def take(self, record: Record) -> None:
        if record.attempt < 0:
            self._take_from_side(record)
            return
        self._ordinal += 1
        if record.kind == "rewind":
            self._rewind(record.values["step"])
        elif record.step is not None:
            self._step = max(self._step, record.step)
        if record.kind == "hparams":
            self._config |= record.values
        elif record.kind == "event":
            self._alert(record, f"{self._mirrored.id}/{self._ordinal}", level="info")
        elif values := self._row(record):
            step = self._step if record.step is None else record.step
            shown = {shown_name(name, _IS_RESERVED): value for name, value in values.items()}
            self._rows.append((step, _time(record), f"{self._mirrored.id}/{self._ordinal}", shown))

    def commit(self) -> dict[str, Any]:
        if self._rows:
            steps, times, ids, rows = (list(column) for column in zip(*self._rows, strict=True))
            columns = {"metrics_list": rows, "steps": steps, "timestamps": times, "log_ids": ids}
            SQLiteStorage.bulk_log(**self._run, **columns, config=self._config)
            self._has_rows = True
        if self._samples:
            times, ids, rows = (list(column) for column in zip(*self._samples, strict=True))
            SQLiteStorage.bulk_log_system(**self._run, metrics_list=rows, timestamps=times, log_ids=ids)
        if self._alerts:
            names = ("titles", "texts", "levels", "steps", "timestamps", "alert_ids")
            columns = dict(zip(names, map(list, zip(*self._alerts, strict=True)), strict=True))
            SQLiteStorage.bulk_alert(**self._run, **columns)
        self._forget_waiting()
        state = {"ordinal": self._ordinal, "step": self._step, "has_rows": self._has_rows}
        return {**state, "config": self._config}

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.commit()

    def _forget_waiting(self) -> None:
        self._rows: list[tuple[int, str, str, dict[str, Any]]] = []
        self._samples: list[tuple[str, str, dict[str, float]]] = []
        self._alerts: list[tuple[str, str, str, int, str, str]] = []

    def _num_rows(self) -> int:
        return int(SQLiteStorage.get_log_count(**self._run))

    def _rewind(self, step: int) -> None:
        """Drops what was taken of this step and later ones; a repetition of the records brings it again."""
        self._step = max(0, step - 1)
        self._rows = [row for row in self._rows if row[0] < step]
        path = SQLiteStorage.get_project_db_path(self._project)
        with contextlib.closing(sqlite3.connect(path, timeout=LOCKED_S)) as database, database:
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step >= ?", (self._mirrored.id, step))

    def _row(self, record: Record) -> dict[str, Any]:
        if record.kind == "text":
            texts = record.values.items()
            return {name: {"_type": "trackio.markdown", "_value": str(text)} for name, text in texts}
        if record.kind == "image":
            return {
                name: self._image(record, number, image)
                for number, (name, image) in enumerate(record.values.items())
            }
        if record.kind == "histogram":
            return {
                name: {"_type": "trackio.histogram", "bins": h["edges"], "values": h["counts"]}
                for name, h in record.values.items()
            }
        return dict(scalars_of(record))

    def _image(self, record: Record, number: int, image: Mapping[str, Any]) -> dict[str, Any] | None:
        data = media_bytes(self._mirrored.directory, image)
        if data is None:
            return None
        folder = get_project_media_path(self._project, self._mirrored.id, step=self._step)
        path = folder / f"{self._ordinal}-{number}.png"
        path.write_bytes(data)
        return {
            "_type": "trackio.image",
            "file_path": str(path.relative_to(utils.MEDIA_DIR)),
            "caption": None,
        }

    def _take_from_side(self, record: Record) -> None:
        """Side processes number nothing, but each says one thing at a time."""
        its_id = f"{self._mirrored.id}/{min(record.values, default='')}/{record.time!r}"
        if record.kind == "system":
            self._samples.append((_time(record), its_id, dict(scalars_of(record))))
        elif record.values.get("name") == EventName.ALERT:
            level = str(record.values.get("level"))
            self._alert(record, its_id, level={"info": "info", "error": "error"}.get(level, "warn"))

    def _alert(self, record: Record, its_id: str, *, level: str) -> None:
        """trackio's list of alerts is where it shows that something happened."""
        text = ", ".join(f"{name}: {value}" for name, value in record.values.items() if name != "name")
        step = self._step if record.step is None else record.step
        name = str(record.values.get("name", "event"))
        self._alerts.append((name, text, level, step, _time(record), its_id))


def _time(record: Record) -> str:
    return datetime.fromtimestamp(record.time, UTC).isoformat()

"""The Weights & Biases mirror. The only module that imports wandb, and only the side process does.

Every row carries the ordinal of its record as W&B's own step, which only ever grows, and the training step
as a metric that all charts use as their axis: a rewind is shown as it happened, and rows sent twice after a
crash fall on each other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import wandb
from PIL import Image
from wandb.errors import Error as WandbError
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from harness.priority import pass_on_to
from harness.runlog.codec import Record
from harness.runlog.events import Alert, read_event
from harness.runlog.paths import media_bytes, wandb_dir
from harness.runlog.scalars import scalars_of
from harness.tracking.mirror import Mirror, MirroredRun, StartAgain, shown_name

__all__ = ["WandbMirror"]

logger = logging.getLogger(__name__)

_IS_RESERVED = re.compile(r"step|attempt|time|_.*|", re.DOTALL)
"""What every row carries, what W&B keeps for itself (`_step`, `_timestamp`, `_runtime`), and no name."""

_OFFLINE = (
    "Weights & Biases is not reachable, so the run is still kept offline: `wandb login`, then try again"
)
INIT_TIMEOUT_S = 30.0
"""How long a server may be out of reach; half of `wandb_start_s` where that is less."""
WRITE_TIMEOUT_S = 60.0
"""How long wandb may write nothing. It writes every 15 s, or when 32 KiB are full: some forty rows, which it
manages in this time with a thousandth of a core."""


class WandbMirror(Mirror):
    """Shows the log as a W&B run; offline runs lie in `wandb` in the run directory."""

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        self._mirrored = run
        self._ordinal: int = state.get("ordinal", 0)
        self._step: int = state.get("step", 0)
        self._run, self._mode = _start(run)
        self._file = _RunFile(Path(self._run.settings.sync_file))
        self._last_row = 0
        self._waiting_since: float | None = None
        if (state.get("mode"), self._mode) == ("offline", "online"):
            self._run.finish()
            raise StartAgain  # the account is there now: it gets what was kept offline too
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def take(self, record: Record) -> None:
        if record.attempt < 0:
            self._take_from_side(record)
            return
        self._ordinal += 1
        if record.kind == "rewind":
            self._step = max(0, record.values["step"] - 1)
        elif record.step is not None:
            self._step = max(self._step, record.step)
        if record.kind == "hparams":
            self._run.config.update(record.values, allow_val_change=True)
        elif values := self._row(record):
            row = {shown_name(name, _IS_RESERVED): value for name, value in values.items()}
            row["step"] = self._step if record.step is None else record.step
            row |= {"attempt": record.attempt, "time": record.time}
            self._run.log(row, step=self._ordinal, commit=True)
            self._last_row = self._ordinal

    def commit(self) -> dict[str, Any] | None:
        """What is handed over is on disk some seconds later, or never if the disk is full.

        Raises:
            TimeoutError: wandb has written nothing for `WRITE_TIMEOUT_S` and still has rows to write.
        """
        before = self._file.offset
        if self._run.disabled or self._file.last_row() >= self._last_row:
            self._waiting_since = None
            return {"ordinal": self._ordinal, "step": self._step, "mode": self._mode}
        now = time.monotonic()
        if self._waiting_since is None or self._file.offset > before:
            self._waiting_since = now
        if now - self._waiting_since > WRITE_TIMEOUT_S:
            raise TimeoutError("wandb does not write its file")
        return None

    def abandon(self) -> None:
        """A run that is not finished would keep its id from the next one."""
        with contextlib.suppress(Exception):
            self._run.finish(exit_code=1)
        _tear_down()

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        """Finishes the W&B run, which uploads what is left; as failed if the trainer crashed or
        gave up."""
        state = "crashed" if end is None else end.get("state", "finished")
        self._run.summary["state"] = state
        settings = self._mirrored.settings
        if settings.wandb_tensorboard and settings.tensorboard:
            folder = self._mirrored.tensorboard_dir
            self._run.save(str(folder / "*.tfevents.*"), base_path=str(folder.parent), policy="now")
        self._run.finish(exit_code=1 if state in ("crashed", "unstable") else 0)
        while (written := self.commit()) is None:
            time.sleep(0.05)
        if settings.wandb == "online" and self._mode == "offline":
            self.kept_back = _OFFLINE
        return written

    def _row(self, record: Record) -> dict[str, Any]:
        if record.kind == "event":
            return {f"events/{record.values.get('name', 'event')}": _words(record.values)}
        if record.kind == "text":
            return {name: str(text) for name, text in record.values.items()}
        if record.kind == "image":
            files = {
                name: media_bytes(self._mirrored.directory, image) for name, image in record.values.items()
            }
            return {name: wandb.Image(Image.open(io.BytesIO(data))) for name, data in files.items() if data}
        if record.kind == "histogram":
            return {
                name: wandb.Histogram(np_histogram=(np.array(h["counts"]), np.array(h["edges"])))
                for name, h in record.values.items()
            }
        return dict(scalars_of(record))

    def _take_from_side(self, record: Record) -> None:
        """Samples go into the next row. They are not numbered: the log's rows have to be the same again."""
        if record.kind == "system":
            samples = {shown_name(name, _IS_RESERVED): x for name, x in scalars_of(record).items()}
            self._run.log(samples, step=self._ordinal + 1, commit=False)
        elif isinstance(alert := read_event(record.values), Alert):
            level = {"info": "INFO", "error": "ERROR"}.get(str(alert.level), "WARN")
            self._run.alert(title=f"alert: {alert.rule}", text=str(alert.message), level=level)


class _RunFile:
    """The file in which wandb's own process keeps a run, online too. Read to learn what has arrived there.

    A 7-byte head, then LevelDB's log framing: blocks of 32 KiB, frames of checksum, length, kind and body.
    `offset` is how far it has been read.
    """

    _FRAME = struct.Struct("<IHB")
    _BLOCK = 32 * 1024
    _WHOLE, _FIRST, _LAST = 1, 2, 4

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offset = 7
        self._parts = b""
        self._last_row = 0

    def last_row(self) -> int:
        """W&B's own number of the newest row in the file, 0 without one."""
        self._read_on()
        return self._last_row

    def _read_on(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        at = 0
        while True:
            left = self._BLOCK - (self.offset + at) % self._BLOCK
            if left < self._FRAME.size:
                at += left
            body_at = at + self._FRAME.size
            if body_at > len(data):
                break
            _, length, kind = self._FRAME.unpack_from(data, at)
            if kind == 0 or body_at + length > len(data):
                break
            self._take(kind, data[body_at : body_at + length])
            at = body_at + length
        self.offset += at

    def _take(self, kind: int, body: bytes) -> None:
        self._parts = body if kind in (self._WHOLE, self._FIRST) else self._parts + body
        if kind in (self._WHOLE, self._LAST):
            record = WandbRecord.FromString(self._parts)
            if record.HasField("history"):
                self._last_row = max(self._last_row, record.history.step.num)


def _start(mirrored: MirroredRun) -> tuple[wandb.Run, str]:
    """Starts the run online if that is asked for and possible, else offline; says which."""
    if mirrored.settings.wandb == "online":
        try:
            run = _init(mirrored, None)  # WANDB_MODE may still say otherwise
            return run, "offline" if run.offline else "online"
        except WandbError as error:
            reason = str(error).split("\n")[0]
            logger.warning(
                "Weights & Biases is not reachable (%s): the run is kept offline in %s; "
                "`wandb login`, then `harness sync` uploads it",
                reason,
                wandb_dir(mirrored.directory),
            )
    return _init(mirrored, "offline"), "offline"


def _init(mirrored: MirroredRun, mode: Literal["offline"] | None) -> wandb.Run:
    with _within(mirrored.settings.wandb_start_s):
        run = _begun(mirrored, mode)
    for child in psutil.Process().children():  # wandb's own process, which begins a session
        pass_on_to(child.pid)
    return run


def _begun(mirrored: MirroredRun, mode: Literal["offline"] | None) -> wandb.Run:
    settings = mirrored.settings
    return wandb.init(
        project=_cleaned(settings.project, r"[/\\#?%:\x00-\x1f]", 128) or "harness",
        name=_cleaned(mirrored.name, r"[\x00-\x1f]", 128),
        id=mirrored.id,
        group=_cleaned(settings.group or "", r"[\x00-\x1f]", 128) or None,
        tags=[tag for tag in (_cleaned(tag, r"[\x00-\x1f]", 64) for tag in settings.tags) if tag],
        notes=settings.notes or None,
        dir=str(mirrored.directory),
        mode=mode,
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=min(INIT_TIMEOUT_S, settings.wandb_start_s / 2),
            save_code=False,
            disable_git=True,
            x_disable_stats=True,  # it would watch the side process; `resources` watches the node
        ),
    )


@contextlib.contextmanager
def _within(limit_s: float) -> Iterator[None]:
    """Ends wandb's own process when the time is over; what waits for its answer raises then.

    After any failure too: one that was started in vain would stay, and keep the run's id.
    """
    is_over = threading.Event()
    timer = threading.Timer(limit_s, _end_service, (is_over,))
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        was_late = is_over.is_set()
        _end_service(is_over)
        _tear_down()  # or the next run would ask the same process
        if was_late:
            raise TimeoutError(f"wandb has begun no run within {limit_s:.0f} s") from error
        raise
    finally:
        timer.cancel()


def _end_service(is_over: threading.Event) -> None:
    is_over.set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "wandb-core":
                child.kill()


def _tear_down() -> None:
    with contextlib.suppress(Exception, SystemExit):  # it exits, thread or not, if its process failed
        wandb.teardown()


def _cleaned(text: str, forbidden: str, longest: int) -> str:
    return re.sub(forbidden, "_", text)[:longest]


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items() if name != "name")

"""What a mirror is, and how one is kept in step with the log.

A mirror takes records and commits them together with the positions up to which it has taken the log. After
a crash it opens again at the last commit, so nothing is missing and nothing is there twice.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from harness.atomic import write_atomically
from harness.files import read_file
from harness.locks import locked
from harness.runlog.codec import Record
from harness.runlog.paths import log_dir, mirror_lock, mirror_state_file, tensorboard_dir, wandb_id_file
from harness.runlog.segments import Follower, Position, node_folders
from harness.tracking.settings import MirrorSettings

__all__ = ["Mirror", "MirrorFollower", "MirroredRun", "OpenMirror", "StartAgain", "shown_name"]

logger = logging.getLogger(__name__)

POLL_S = 2.0
"""Mirrors are for looking back: the live views read the log. Larger portions cost less."""
COMMIT_EVERY_S = 2.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
STATE_BYTES = 16 << 20


@dataclass(frozen=True)
class MirroredRun:
    """What a mirror is told of the run that it shows."""

    directory: Path
    settings: MirrorSettings

    @property
    def id(self) -> str:
        """The same for every attempt and every later `harness sync`, and no other run's."""
        if self.settings.run_id is not None:
            return self.settings.run_id
        kept = wandb_id_file(self.directory)
        if not kept.exists():  # each mirror's thread may be the first
            kept.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                write_atomically(kept, uuid.uuid4().hex[:12], overwrite=False)
        return kept.read_text()

    @property
    def name(self) -> str:
        """What people call it."""
        return self.settings.name or self.directory.resolve().name

    @property
    def tensorboard_dir(self) -> Path:
        """Where its event file lies."""
        folder = self.settings.tensorboard_dir
        return Path(folder) if folder else tensorboard_dir(self.directory)


class Mirror(ABC):
    """Somewhere that records are shown.

    Made in the side process, in a thread of its own, as `Kind(run, state)`, a `MirroredRun` and what the last
    `commit` returned; an empty state means from nothing. Whatever goes wrong may be raised: it is said, and
    after a while another one is made with the same state. Making it may raise `StartAgain`.
    """

    kept_back: str | None = None
    """After `close`: why not all of it is where it was asked to be, and what to do about it."""

    @abstractmethod
    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def take(self, record: Record) -> None:
        """Accepts one record; it need not be visible before `commit`."""

    @abstractmethod
    def commit(self) -> dict[str, Any] | None:
        """Makes everything taken durable and returns what making it again needs to go on from here (plain
        JSON); None if that takes longer: nothing more is given then, and it is asked again."""

    def idle(self) -> None:  # noqa: B027  (most have nothing to do)
        """Called every few seconds while there is nothing to take."""

    def abandon(self) -> None:  # noqa: B027
        """Lets go after a failure: another one will be made at the last commit."""

    @abstractmethod
    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        """The log has come to its end; `end` is what its `end` record says, None if the trainer died.
        Everything taken is durable afterwards; returns what `commit` would."""


OpenMirror = Callable[[Mapping[str, Any]], Mirror]
"""Makes a mirror from what its last `commit` returned."""


class StartAgain(Exception):
    """What the mirror wrote is not there any more: it has to be built again from the log's beginning."""


class MirrorFollower:
    """Keeps one mirror in step with the log of `run_dir`, across restarts of this process and of others.

    Args:
        run_dir: The run.
        name: Name of the mirror; its state is kept in `log/mirrors/NAME.json`.
        open_mirror: See `OpenMirror`.
        ended: Set when nothing more will be written to the log; what is there is then taken to its end.
        poll_s: How often to look for something new.

    Attributes:
        done: Set when the mirror is complete.
        has_turn: Whether no other process keeps the mirror.
        moved_at: When the last record was taken, by the monotonic clock.
        trouble: What the last failure said, or what is kept back; None if all is well.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        open_mirror: OpenMirror,
        *,
        ended: threading.Event,
        poll_s: float = POLL_S,
    ) -> None:
        self.name = name
        self._log_dir = log_dir(run_dir)
        self._state_path = mirror_state_file(run_dir, name)
        self._lock_path = mirror_lock(run_dir, name)
        self._open_mirror = open_mirror
        self._ended = ended
        self._poll_s = poll_s
        self._last_end: Mapping[str, Any] | None = None
        self.done = threading.Event()
        self.has_turn = False
        self.moved_at = time.monotonic()
        self.trouble: str | None = None

    def run(self) -> None:
        """Follows until the log has ended; on failure tries again from the last commit, ever more slowly."""
        delay_s = FIRST_RETRY_S
        while not self.done.is_set():
            try:
                self._lock_path.parent.mkdir(parents=True, exist_ok=True)
                with locked(self._lock_path):  # the side process of an earlier attempt may still drain
                    self.has_turn = True
                    self._follow()
                self.done.set()
            except StartAgain:
                self.forget()
            except (Exception, SystemExit) as error:  # noqa: BLE001  (a mirror may fail in any way)
                self._say(error)
                self._pause(delay_s)
                delay_s = min(2 * delay_s, LAST_RETRY_S)

    def _pause(self, delay_s: float) -> None:
        """After the trainer's end somebody may be waiting: no long pauses then."""
        if self._ended.wait(delay_s):
            time.sleep(FIRST_RETRY_S)

    def forget(self) -> None:
        """Drops the position: the mirror is built anew from the log's beginning."""
        self._state_path.unlink(missing_ok=True)

    def _follow(self) -> None:
        state = self._load()
        followers = {
            folder: Follower(self._log_dir / folder, Position(**place))
            for folder, place in state.get("positions", {}).items()
        }
        self._last_end = state.get("end")
        mirror = self._open_mirror(state.get("mirror", {}))
        try:
            self._keep_up(mirror, followers)
            self._save(mirror.close(self._last_end), followers)
        except (Exception, SystemExit):
            mirror.abandon()
            raise
        self._say_well_again()
        self.trouble = mirror.kept_back

    def _keep_up(self, mirror: Mirror, followers: dict[str, Follower]) -> None:
        """Takes what is written until the log has ended."""
        committed = time.monotonic()
        is_dirty = is_committing = False
        while True:
            ended = self._ended.is_set()  # asked before reading: what is read then is all there is
            num_taken = 0 if is_committing and not ended else self._take_new(mirror, followers)
            if ended and num_taken == 0:
                return
            is_dirty = is_dirty or num_taken > 0
            if is_dirty and not ended and time.monotonic() - committed > COMMIT_EVERY_S:
                state = mirror.commit()
                is_committing = state is None
                if state is not None:
                    self._save(state, followers)
                    self._say_well_again()
                    committed, is_dirty = time.monotonic(), False
            if num_taken == 0:
                mirror.idle()
                self._ended.wait(self._poll_s)

    def _take_new(self, mirror: Mirror, followers: dict[str, Follower]) -> int:
        for folder in node_folders(self._log_dir):
            if folder not in followers:
                followers[folder] = Follower(self._log_dir / folder)
        num_taken = 0
        for follower in followers.values():
            for record in follower.read():
                num_taken += 1
                if record.kind == "run":
                    self._last_end = None
                elif record.kind == "end":
                    self._last_end = record.values
                mirror.take(record)
                self.moved_at = time.monotonic()
        return num_taken

    def _load(self) -> dict[str, Any]:
        """What was saved; nothing, so that the mirror is built anew, if that is damaged."""
        try:
            state: dict[str, Any] = orjson.loads(read_file(self._state_path, most_bytes=STATE_BYTES))
            places = {folder: Position(**place) for folder, place in state["positions"].items()}
            is_sound = isinstance(state["mirror"], dict) and isinstance(state["end"], dict | None)
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return {}
        numbers = [number for place in places.values() for number in (place.segment, place.offset)]
        return state if is_sound and all(type(n) is int and n >= 0 for n in numbers) else {}

    def _save(self, mirror: dict[str, Any], followers: dict[str, Follower]) -> None:
        positions = {
            folder: {"segment": follower.position.segment, "offset": follower.position.offset}
            for folder, follower in followers.items()
        }
        state = {"positions": positions, "mirror": mirror, "end": self._last_end}
        write_atomically(self._state_path, orjson.dumps(state))

    def _say(self, error: BaseException) -> None:
        trouble = f"{type(error).__name__}: {error}"
        if trouble != self.trouble:
            logger.warning(
                "%s cannot be written (%s); training goes on, it is tried again", self.name, trouble
            )
            logger.debug("details", exc_info=error)
        self.trouble = trouble

    def _say_well_again(self) -> None:
        if self.trouble is not None:
            logger.warning("%s is written again", self.name)
        self.trouble = None


def shown_name(name: str, reserved: re.Pattern[str]) -> str:
    """The name under which a mirror shows what people have logged: `user/NAME` if it needs NAME itself.

    Different names stay different: of a name that looks like one made here another one is made.
    """
    bare = re.sub(r"\A(user/)+", "", name)
    return f"user/{name}" if reserved.fullmatch(bare) else name

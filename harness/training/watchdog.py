"""The watchdog: names the ranks that hang, keeps the stacks of all, and ends the run for its restart.

A thread of each rank looks at what the training thread notes in its `Progress`; the ranks tell each other
through the store every few seconds (`Heartbeats`). Nothing of it is a collective or touches a device.

    every rank     is late when what it does takes longer than its limit
    a few ranks    hear all others; when all that are furthest behind are late, or a rank has waited for
                   others as long as it may, one raises the alarm
    every rank     writes its stacks to the run's incidents/ and answers
    who raised it  names the ranks without a sign of life; else, of those furthest behind, the ones that do
                   not wait for others
    every rank     leaves, once rank 0 has noted how the run ended

What a rank does begins anew with every few bytes that it writes of a checkpoint, and with every few records
of data that it prepares: neither a slow disk nor a large corpus is a hang.
A rank that waits for one that works (a long evaluation, a slow disk) raises no alarm: the other one is
behind, and within its own limit. Words are some seconds old, so besides nobody may have moved for some beats.
What counts is time that the thread has lived through, so not while a process is stopped or a machine
suspended. A debugger that has stopped a rank stops its clock too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from harness.config import TrainConfig
from harness.dist import Heartbeats, write_flight_records, write_ras_report
from harness.errors import LostRankError
from harness.runlog.paths import hang_dir
from harness.training.late import RankState, late_ranks, limit_s
from harness.training.progress import Phase, Progress
from harness.training.stacks import arose_waiting, innermost, is_debugged, waits_for_others, write_stacks

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)

_LONGEST_BEAT_S = 5.0
_BEATS_PER_LIMIT = 12
_SILENT_BEATS = 6
"""A rank that has said nothing for so many beats gives no sign of life; less may be a busy machine."""
_STILL_BEATS = 3
"""For so many beats nobody has to have moved, as some words are older than others."""
_ANSWER_BEATS = 3
"""How long an answer to an alarm may take."""
_PATIENCE = 0.9
"""What part of `parallel.timeout_s` a rank waits for others until it says so: before it ends, as that of NCCL
ends the process."""
_GRACE_S = 5.0
"""For what may block when all else does: a disk, a terminal, the store."""
_MOST_NAMED = 8


class Watchdog:
    """Watches one rank, and with a few others all of them. A context manager, in the training thread."""

    def __init__(self, config: TrainConfig, *, begun: float | None = None) -> None:
        self.progress = Progress(begun=begun)
        """Where the training thread notes what it does."""
        self.note_end: Sequence[Callable[[LostRankError], None]] = ()
        """Called on every rank before it leaves, to write down how the run ended; each in seconds."""
        self._config = config.watchdog
        self._compiles = config.loop.compile
        self._enabled = config.watchdog.enabled and not config.debug
        self._timeout_s = config.parallel.timeout_s
        self._timed_out = threading.Event()
        self._run_dir = Path(config.runs_dir) / config.name
        limits = (self._config.min_step_s, self._config.min_other_s, self._config.first_s)
        self._beat_s = min(_LONGEST_BEAT_S, min(limits) / _BEATS_PER_LIMIT)
        self._trainer = threading.get_ident()
        self._clock = _Clock(2 * self._beat_s)
        self._mine = _Since(self._clock)
        self._beats = 0
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        if self._enabled:
            self._heartbeats = Heartbeats(self._beat_s)
            self._store, self._all = _Since(self._clock), _Since(self._clock)
            self._others = [_Since(self._clock) for _ in range(self._heartbeats.size)]
            self._look()
            self._heartbeats.start()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._closed.set()
            self._thread.join()
            self._heartbeats.close()

    @contextmanager
    def naming_who_hangs(self) -> Iterator[None]:
        """Within it, on the training thread, a collective that times out raises the alarm, which ends the
        process; its error goes on if no rank is found for whom it waited."""
        try:
            yield
        except Exception as error:
            waited_s = time.monotonic() - self.progress.at.since
            if self._enabled and waited_s > _PATIENCE * self._timeout_s and arose_waiting(error):
                logger.error("waited for other ranks in vain, and asks who hangs: %s", error)
                self._timed_out.set()
                self._closed.wait(2 * (_STILL_BEATS + _ANSWER_BEATS) * self._beat_s + 5 * _GRACE_S)
            raise

    def _run(self) -> None:
        while not self._closed.wait(self._beat_s):
            self._clock.tick()
            mine = self._look()
            if self._heartbeats.alarm is not None:
                self._end(partial(self._follow, self._heartbeats.alarm))
            if self._store.age_s(self._heartbeats.num_beats) <= _SILENT_BEATS * self._beat_s:
                states = self._states()
                if self._is_still(states) and self._late(states):
                    self._end(partial(self._lead, states))
            elif mine.is_late or mine.timed_out:
                self._end(partial(self._alone, mine))

    def _look(self) -> RankState:
        """Sees what the training thread does, and has the others told."""
        at = self.progress.at
        if is_debugged(self._trainer):
            self._mine.restart()
        self._beats += 1
        state = RankState(
            rank=self._heartbeats.rank,
            order=at.order,
            doing=str(at.phase) if at.phase in (Phase.START, Phase.END) else f"{at.phase} of step {at.step}",
            age_s=self._mine.age_s(at.order, self.progress.signs_of_life()),
            limit_s=limit_s(self._config, self.progress, compiles=self._compiles),
            host=platform.node(),
            pid=os.getpid(),
            beat=self._beats,
            waits=self._waits(),
            timed_out=self._timed_out.is_set(),
        )
        self._heartbeats.word = json.dumps(dataclasses.asdict(state))
        return state

    def _states(self) -> list[RankState]:
        """All ranks, for those that hear them."""
        return [self._state(rank, word) for rank, word in enumerate(self._heartbeats.heard)]

    def _waits(self) -> bool:
        return self._timed_out.is_set() or waits_for_others(self._trainer)

    def _late(self, states: list[RankState]) -> list[RankState]:
        return late_ranks(states, patience_s=_PATIENCE * self._timeout_s)

    def _is_still(self, states: list[RankState]) -> bool:
        still_s = self._all.age_s(sum(state.order for state in states))
        return bool(states) and still_s > _STILL_BEATS * self._beat_s

    def _state(self, rank: int, word: str) -> RankState:
        state = RankState(**json.loads(word))
        silent_s = self._others[rank].age_s(state.beat)
        if silent_s <= _SILENT_BEATS * self._beat_s:
            return state
        # What it did when it last spoke, in the middle of an evaluation perhaps, is no bound for its silence.
        limit_s = min(state.limit_s, state.age_s + self._config.min_step_s)
        return dataclasses.replace(state, silent_s=silent_s, limit_s=limit_s)

    def _lead(self, states: list[RankState]) -> LostRankError | None:
        """Raises the alarm, hears all ranks, and finds out who it was; None if another rank does."""
        folder = hang_dir(self._run_dir)
        alarm = json.dumps({"folder": str(folder), "by": self._heartbeats.rank})
        if not self._heartbeats.raise_alarm(alarm):
            return None  # the alarm of the other one comes with the next beat
        self._answer(folder)
        asking = threading.Thread(target=_ask_nccl, args=(folder,), name="watchdog-ras", daemon=True)
        asking.start()  # while the ranks answer
        answering = [state.rank for state in states if not state.silent_s]
        said = self._heartbeats.answers(answering, _ANSWER_BEATS * self._beat_s)
        answers = {rank: json.loads(text) for rank, text in said.items()}
        late = self._late(states)
        culprits = [
            s for s in late if s.silent_s or not answers.get(s.rank, {"waits": False})["waits"]
        ] or late
        descriptions = [_described(state, answers) for state in culprits[:_MOST_NAMED]]
        if len(culprits) > _MOST_NAMED:
            descriptions.append(f"and {len(culprits) - _MOST_NAMED} more ranks")
        asking.join(_GRACE_S)
        text, ranks = "; ".join(descriptions), [state.rank for state in culprits]
        _try(lambda: _write_report(folder, text, [_described(state, answers) for state in states]))
        error = self._error(text, ranks, folder)
        logger.error("%s", error)
        self._heartbeats.publish(json.dumps({"text": text, "ranks": ranks, "folder": str(folder)}))
        return error

    def _follow(self, alarm: str) -> LostRankError:
        """Answers an alarm, and waits for what comes of it."""
        raised = json.loads(alarm)
        self._answer(Path(raised["folder"]))
        report = self._heartbeats.report(timeout_s=_ANSWER_BEATS * self._beat_s + 3 * _GRACE_S)
        if report is None:
            text = f"rank {raised['by']} found that the run hangs, and did not come to say why"
            return self._error(text, [], Path(raised["folder"]))
        found = json.loads(report)
        return self._error(found["text"], found["ranks"], Path(found["folder"]))

    def _alone(self, mine: RankState) -> LostRankError:
        """Without the others, as the store does not answer."""
        folder = hang_dir(self._run_dir)
        _try(lambda: self._write_stacks(folder))
        holder = "rank 0 or its launcher, which holds the store,"
        error = self._error(f"{holder} does not answer; {_described(mine, {})}", [], folder)
        logger.error("%s", error)
        return error

    def _answer(self, folder: Path) -> None:
        _try(lambda: self._write_stacks(folder))
        where = {"at": innermost(self._trainer), "waits": self._waits()}
        self._heartbeats.answer(json.dumps(where))

    def _write_stacks(self, folder: Path) -> None:
        if self._run_dir.is_dir():  # else the start would find a directory that holds no run
            folder.mkdir(parents=True, exist_ok=True)
            state = RankState(**json.loads(self._heartbeats.word))
            heading = f"{state}, at {innermost(self._trainer)}"
            write_stacks(folder / f"rank-{state.rank}.txt", heading)
            write_flight_records(folder, state.rank)

    def _error(self, text: str, ranks: list[int], folder: Path) -> LostRankError:
        config = self._config
        error = LostRankError(
            f"the run hangs: {text}",
            rule=f"each thing may take {config.ratio:g} times as long as the slowest of its kind lately, at"
            f" least {config.min_step_s:g} s in a step and {config.min_other_s:g} s elsewhere (watchdog), and"
            f" one rank may wait {self._timeout_s:g} s for another (parallel.timeout_s)",
            remedy=f"look at the stacks of the ranks in {folder}",
        )
        error.ranks, error.stacks = tuple(ranks) or None, str(folder)
        return error

    def _end(self, find_out: Callable[[], LostRankError | None]) -> None:
        """Finds out, notes the end, and ends the process; returns where another rank leads."""
        found: list[LostRankError | None] = []
        _try(lambda: found.append(find_out()), timeout_s=_ANSWER_BEATS * self._beat_s + 5 * _GRACE_S)
        if found and found[0] is None:
            return
        if found and found[0] is not None:
            error = found[0]
            for note in self.note_end:
                _try(partial(note, error))
        longest_s = _GRACE_S * (1 + len(self.note_end))
        _try(lambda: self._heartbeats.leave_together(longest_s), timeout_s=longest_s)
        _leave()


class _Clock:
    """Seconds that this thread has lived through, in ticks.

    Args:
        longest_s: Most that a tick counts: the process was stopped, or got no processor, in the rest.
    """

    def __init__(self, longest_s: float) -> None:
        self.now_s = 0.0
        self._longest_s, self._last = longest_s, time.monotonic()

    def tick(self) -> None:
        """Time has passed."""
        now = time.monotonic()
        self.now_s += min(now - self._last, self._longest_s)
        self._last = now


class _Since:
    """How long a number has been the same."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._changed_s = clock, clock.now_s
        self._number: tuple[int, ...] = ()

    def age_s(self, *number: int) -> float:
        """Since when the number, or several, is this one."""
        if number != self._number:
            self._number = number
            self.restart()
        return self._clock.now_s - self._changed_s

    def restart(self) -> None:
        """As if the number had changed now."""
        self._changed_s = self._clock.now_s


def _described(state: RankState, answers: dict[int, dict[str, str]]) -> str:
    answer = answers.get(state.rank)
    return str(state) if answer is None else f"{state}, at {answer['at']}"


def _write_report(folder: Path, text: str, ranks: list[str]) -> None:
    if folder.is_dir():
        (folder / "report.txt").write_text("\n".join([text, "", *ranks, ""]))


def _ask_nccl(folder: Path) -> None:
    if folder.is_dir():
        _try(lambda: write_ras_report(folder, _GRACE_S))


def _try(action: Callable[[], object], timeout_s: float = _GRACE_S) -> None:
    """Does it on a thread of its own, and goes on after `timeout_s`: what hangs the run may hang this too."""

    def guarded() -> None:
        try:
            action()
        except Exception:
            logger.exception("the watchdog could not do all that it does when a run hangs")

    thread = threading.Thread(target=guarded, name="watchdog-last", daemon=True)
    thread.start()
    thread.join(timeout_s)


def _leave() -> NoReturn:
    # Nothing else ends a process whose training thread waits in C++.
    os._exit(LostRankError.exit_code)

"""The end of a run, in one place: how it ended and why, every part closed, all of it written down.

| status | how it came | exit code |
|---|---|---|
| `finished` | all steps are done, or a callback says that the run is | 0 |
| `stopped` | a signal asked for it, and a checkpoint is committed | 75 |
| `unstable` | the ladder's last rung, or a rule that says stop | 3 |
| `crashed` | anything else | 2 for a `HarnessError`, else 1 |

Nothing that can wait stands here: the side process draws the picture and completes the mirrors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import orjson

from harness.atomic import write_atomically
from harness.errors import DataError, HarnessError, LostRankError, TaskError
from harness.runlog import events
from harness.runlog.paths import summary_file
from harness.training.loop import Run
from harness.training.summary import Ending, TrainResult, render_summary

__all__ = ["Start", "end_run", "judge_restart", "note_hang"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """What a run had behind it when this attempt began."""

    tokens: int
    step: int
    time_s: float

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(run.counters.tokens, run.counters.step, time.perf_counter())


def end_run(run: Run, ending: Ending, error: BaseException | None, start: Start) -> TrainResult:
    """Closes every part whatever the others do, notes the end, and raises the first error that there was.

    Local, on every rank: no rank waits for another here, as some may be gone.

    Args:
        error: What ended the loop; its ending is made of it.
    """
    run.stop.is_over = True  # the first rank to leave may have its launcher end the others
    run.black_box.end_with(error, run.model)
    error = _close_parts(run, error)
    if error is not None:
        ending = Ending.of_error(error)
    if ending.status == "unstable":
        run.journal.event(events.Stop(reason=ending.reason), run.counters.step)
    for outcome in (*run.ended_saves, *run.checkpointer.outcomes()):
        run.journal.on_saved(run, outcome)  # the callbacks cannot be told: other ranks may not know of it
    run.callbacks.end_after_error(run, ending.status)
    run.journal.close(ending)
    run.black_box.close()
    result = _result(run, ending, start)
    if run.world.is_main:
        _leave_summary(result, run)
    if error is not None:
        raise error
    return result


def note_hang(run: Run, error: LostRankError, start: Start) -> None:
    """Writes down that the run hung; in the watchdog's thread. Nothing else is closed: it might hang too."""
    ending = Ending.of_error(error)
    run.journal.close(ending, hangs=True)
    if run.world.is_main:
        _leave_summary(_result(run, ending, start), run)


def _close_parts(run: Run, error: BaseException | None) -> BaseException | None:
    """Closes all but the journal; the error that came first, of the loop or of a part."""
    parts: dict[str, Callable[[], None]] = {
        "guard": run.guard.close,
        "loader": run.loader.close,
        "checkpointer": lambda: run.checkpointer.close(after_error=error is not None),
    }
    for part, close in parts.items():
        try:
            close()
        except Exception as failure:  # noqa: BLE001  (kept, or said; the other parts have to be closed)
            if error is None:
                error = failure
            else:
                logger.error("closing the %s failed too: %s", part, failure)
    return error


def judge_restart(error: HarnessError, took_steps: bool) -> None:
    """A task's own error, or data that cannot be read: before the first step it is there at every start.

    To be called before other ranks are told of the error, which judge theirs by it.
    """
    if isinstance(error, (TaskError, DataError)):
        error.restart_may_help = took_steps


def _result(run: Run, ending: Ending, start: Start) -> TrainResult:
    counters, seconds = run.counters, time.perf_counter() - start.time_s
    return TrainResult(
        status=ending.status,
        reason=ending.reason,
        rank=ending.rank,
        steps=counters.step,
        tokens=counters.tokens,
        tokens_per_s=(counters.tokens - start.tokens) / seconds,
        seconds=seconds,
        last_val_loss=counters.last_val_loss,
        best_val_loss=counters.best_val_loss,
        num_skips=counters.num_skips,
        num_clips=counters.num_clips,
        incidents=counters.incidents,
        num_outliers=counters.num_outliers,
        directory=run.directory,
    )


def _leave_summary(result: TrainResult, run: Run) -> None:
    text = orjson.dumps(result.to_json(), option=orjson.OPT_INDENT_2).decode()
    try:
        write_atomically(summary_file(result.directory), text, sync=True)
    except OSError as error:
        logger.error("summary.json cannot be written: %s", error)
    if result.status in ("finished", "stopped"):
        logger.info("%s", render_summary(result, tensorboard=run.config.tracking.tensorboard))

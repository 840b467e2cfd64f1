"""What an attempt came to: how it ended, what was reached, and where to look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from harness.errors import HarnessError, InstabilityError
from harness.runlog.paths import checkpoints_dir, log_dir, picture_file, tensorboard_dir

__all__ = ["Ending", "Status", "TrainResult", "render_summary"]

Status = Literal["finished", "stopped", "unstable", "crashed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended, and why."""

    status: Status
    reason: str | None = None
    """Who asked for a stop, what went wrong, or why the run was done early; None after all steps."""
    rank: int | None = None
    """Where that arose; None: on all ranks, or not known."""

    @classmethod
    def of_loop(cls, *, finished: bool, asked: Sequence[tuple[str | None, bool]]) -> Self:
        """Of a loop that came to its end, from what each rank was asked: why, and whether it is done."""
        if finished:
            return cls(status="finished")
        done = {rank: reason for rank, (reason, is_done) in enumerate(asked) if is_done}
        reasons = done or {rank: reason for rank, (reason, _) in enumerate(asked) if reason is not None}
        rank, reason = next(iter(reasons.items()), (None, None))
        status: Status = "finished" if done else "stopped"
        return cls(status=status, reason=reason, rank=None if len(reasons) == len(asked) else rank)

    @classmethod
    def of_error(cls, error: BaseException) -> Self:
        """Of a loop, or of a part that could not be closed, that raised `error`."""
        words = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        ranks = error.ranks if isinstance(error, HarnessError) else None
        status: Status = "unstable" if isinstance(error, InstabilityError) else "crashed"
        return cls(status=status, reason=words, rank=min(ranks) if ranks else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What `train` returns, on every rank, and what `summary.json` holds."""

    status: Status
    """`finished`, or `stopped` with a checkpoint to go on from; in the file also `unstable` and `crashed`."""
    steps: int
    """Steps of the run so far, earlier attempts and skipped steps included."""
    tokens: int
    tokens_per_s: float
    """Over this attempt."""
    seconds: float
    """Wall time of this attempt's steps, evaluations and checkpoints."""
    last_val_loss: float
    best_val_loss: float
    num_skips: int
    num_clips: int
    incidents: dict[str, int]
    directory: Path
    num_outliers: int = 0
    """Outlier batches, which are no incidents."""
    reason: str | None = None
    """The signal that stopped it, what went wrong, or why it was done before its last step."""
    rank: int | None = None
    """The rank on which that arose; None: all, or not known."""

    def to_json(self) -> dict[str, object]:
        """Plain data; numbers that JSON has no name for become None."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {**plain, "directory": str(self.directory)}


def render_summary(result: TrainResult, *, tensorboard: bool) -> str:
    """The summary as lines of text."""
    incidents = ", ".join(f"{count} x {kind}" for kind, count in result.incidents.items()) or "none"
    lines = [
        f"{_status(result)}: {result.steps} steps, {result.tokens:,} tokens, "
        f"{result.tokens_per_s:,.0f} tokens/s, {result.seconds:.0f} s",
        f"  held-out loss  last {result.last_val_loss:.4f}, best {result.best_val_loss:.4f}",
        f"  skipped steps  {result.num_skips}    clipped steps  {result.num_clips}",
        f"  incidents      {incidents}    outlier batches  {result.num_outliers}",
        f"  log            {log_dir(result.directory)}",
        f"  checkpoints    {checkpoints_dir(result.directory)}",
        f"  picture        {picture_file(result.directory)}",
    ]
    lines.append(f"  look at it     harness show {result.directory}")
    if tensorboard:
        lines.append(f"  TensorBoard    tensorboard --logdir {tensorboard_dir(result.directory)}")
    return "\n".join(lines)


def _status(result: TrainResult) -> str:
    if result.status == "finished":
        return result.status if result.reason is None else f"{result.status} ({result.reason})"
    on_rank = "" if result.rank is None else f" on rank {result.rank}"
    return result.status if result.reason is None else f"{result.status} by {result.reason}{on_rank}"

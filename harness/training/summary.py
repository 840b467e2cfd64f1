"""The end of an attempt: what was reached, and where to look."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from harness.runlog.paths import checkpoints_dir, log_dir, picture_file, tensorboard_dir

__all__ = ["TrainResult", "render_summary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What `train` returns, on every rank, and what `summary.json` holds."""

    status: str
    """`finished`, or `stopped` with a checkpoint to go on from."""
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
        f"{result.status}: {result.steps} steps, {result.tokens:,} tokens, "
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

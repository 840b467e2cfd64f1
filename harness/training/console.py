"""What a person at the terminal sees of a run: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from tqdm import tqdm

from harness import env
from harness.runlog.names import Metric

__all__ = ["Console"]

logger = logging.getLogger(__name__)


class Console:
    """Shows step, loss, tokens/s, gradient norm, skips and the time that is left; rank 0 only."""

    def __init__(
        self, mode: Literal["auto", "bar", "lines", "off"], *, first_step: int, num_steps: int
    ) -> None:
        if mode == "auto":
            mode = "bar" if env.is_terminal() else "lines"
        self._num_steps = num_steps
        self._lines = mode == "lines"
        self._bar = (
            tqdm(initial=first_step, total=num_steps, unit="step", dynamic_ncols=True)
            if mode == "bar"
            else None
        )

    def step(self, step: int, values: Mapping[str, float], *, tokens_per_s: float, left_s: float) -> None:
        """Shows the state after `step`, 0-based, was finished."""
        text = (
            f"loss {values[Metric.TRAIN_LOSS]:.4f}  norm {values[Metric.GRAD_NORM]:.3g}  "
            f"lr {values[Metric.LR]:.2e}  {_count(tokens_per_s)} tok/s  skips {values[Metric.SKIPS]:.0f}"
        )
        if self._bar is not None:
            self._bar.update(step + 1 - self._bar.n)
            self._bar.set_postfix_str(text)
        elif self._lines:
            logger.info("step %d/%d  %s  left %s", step + 1, self._num_steps, text, _duration(left_s))

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            logger.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _count(value: float) -> str:
    return (
        f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

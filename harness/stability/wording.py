"""What is said about the size of a step's loss and gradient norm."""

from __future__ import annotations

import math

from harness.stability.verdict import Summary

__all__ = ["describe_size"]

ALSO_HIGH = 3.5
"""Score from which a signal is named beside the one that stands out most."""


def describe_size(step: int, summary: Summary) -> str | None:
    """Which signal stands out, its value, its usual value, their ratio and the score; None if nothing does.

    `gradient norm 4.11, 5.6 times its usual 0.734 (score 9.2)`
    """
    if summary.is_absurd:
        norm = _compared("gradient norm", summary.grad_norm, summary.usual_norm)
        return f"absurd gradient: {norm}, more than guard.absurd_norm_ratio"
    if not summary.is_spike and not summary.is_outlier:
        return None
    signals = [
        (summary.norm_score, "gradient norm", summary.grad_norm, summary.usual_norm),
        (summary.loss_score, "loss", summary.loss, summary.usual_loss),
    ]
    first, second = sorted(signals, reverse=True)
    shown = [first, second] if second[0] > ALSO_HIGH else [first]
    words = [f"{_compared(name, value, usual)} (score {score:.1f})" for score, name, value, usual in shown]
    if summary.is_spike and summary.num_in_a_row > 1:
        words.append(f"disturbed since step {step - int(summary.num_in_a_row) + 1}")
    return f"{'spike' if summary.is_spike else 'outlier batch'}: {'; '.join(words)}"


def _compared(name: str, value: float, usual: float) -> str:
    """A value beside its usual one, and their ratio where it says something: not of a loss below 0."""
    if math.isnan(usual):
        return f"{name} {value:.4g}"
    if value > 0 and usual > 0:
        return f"{name} {value:.4g}, {value / usual:.3g} times its usual {usual:.4g}"
    return f"{name} {value:.4g}, usually {usual:.4g}"

"""Tables, numbers and curves for a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["age", "damage", "number", "printable", "sparkline", "spelled", "table"]

_NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_BARS = "▁▂▃▄▅▆▇█"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by their widest cell; the first to the left, numbers to the right."""
    cells = [[printable(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    to_right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def number(value: float | None) -> str:
    """Short, and never less exact than people need: five digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.5g}"


def spelled(value: Any) -> Any:
    """Plain data with `nan`, `inf` and `-inf` as strings, since JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {name: spelled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(each) for each in value]
    return value


def age(seconds: float) -> str:
    """`42 s`, `5 min`, `3.2 h`, `4.1 d`."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if unit == 3600 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} d"


def damage(num_damaged: int) -> str:
    """What is said of a log in which lines are damaged or foreign."""
    return f"{num_damaged} lines of the log cannot be read and are left out"


def sparkline(values: npt.NDArray[np.float64], width: int) -> str:
    """The curve in one line; each character stands for the mean of its share, `!` for one not finite."""
    if not len(values):
        return ""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    if largest > 0:  # neither a sum nor a difference overflows then, and no quotient is 0 / 0
        values = values / largest
    parts = np.array_split(values, min(width, len(values)))
    means = [float(np.mean(part)) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    span = high - low if high > low else 1.0
    top = len(_BARS) - 1
    return "".join(_BARS[round((m - low) / span * top)] if math.isfinite(m) else "!" for m in means)


def printable(text: str, longest: int = 120) -> str:
    """Other people's text, harmless: one line, not too long, and nothing that a terminal would obey.

    No control characters, no marks that turn the direction of writing, no bytes that are no UTF-8.
    """
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join("�" if unicodedata.category(char) in _NOT_SHOWN else char for char in shown)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in ("-", "")
    return True

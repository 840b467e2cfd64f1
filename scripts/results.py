"""How benchmarks write down what they saw: JSON for machines and a table for people."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["machine", "summarise", "write_results"]

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and how many."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))],
        "n": len(ordered),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    about = {
        "cores": len(os.sched_getaffinity(0)),  # that this process may use
        "processor": platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
    }
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    return about


def write_results(
    name: str,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    device: torch.device,
    about: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> None:
    """Writes docs/benchmarks/NAME.json and NAME.md (on CUDA: NAME-cuda) and prints the table; `sections` are
    more of them, each under its title."""
    stem = name if device.type == "cpu" else f"{name}-{device.type}"
    content = {"machine": machine(device), "about": dict(about), "rows": rows, **(sections or {})}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")
    table = "\n\n## ".join(
        [_table(rows), *(f"{t}\n\n{_table(more)}" for t, more in (sections or {}).items())]
    )
    where = ", ".join(f"{key} {value}" for key, value in {**content["machine"], **about}.items())
    (FOLDER / f"{stem}.md").write_text(f"# {name}\n\n{where}\n\n{table}\n")
    print(table)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['p50']:.4g} (p99 {value['p99']:.4g})"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

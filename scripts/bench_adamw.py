"""AdamW over a model's parameters: torch's fused kernel against Triton's, with and without a clip factor.

Interleaved in one process; CUDA only, for interpreted kernels are not timed. Writes
docs/benchmarks/adamw-cuda.

    python scripts/bench_adamw.py --params 124000000 1200000000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from results import summarise, write_results

from harness.stability.triton_adamw import TritonAdamW

MATRIX = 4096 * 1024
"""Elements of a parameter."""

BYTES = {"torch": 7, "torch, grad_scale": 8, "triton, grad_scale": 7}
"""Elements that a step moves per parameter: the least for what the kernel does."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--params", type=int, nargs="+", default=[124_000_000, 1_200_000_000])
    arguments.add_argument("--rounds", type=int, default=30)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is timed")
        return
    rows = {}
    for num in options.params:
        for dtype in (torch.float32, torch.bfloat16):
            rows |= _compare(num, dtype, options.rounds)
    write_results("adamw", rows, device=torch.device("cuda"), about={"rounds": options.rounds})


def _compare(num: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, Any]]:
    parameters = [
        nn.Parameter(torch.randn(MATRIX, device="cuda", dtype=dtype)) for _ in range(max(1, num // MATRIX))
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kinds: dict[str, Any] = {
        "torch": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "triton": TritonAdamW(parameters, lr=1e-4),
    }
    kinds["triton"].load_state_dict(kinds["torch"].state_dict())
    times: dict[str, list[float]] = {name: [] for name in BYTES}
    for turn in range(rounds + 3):
        for name, seen in times.items():
            taken = _timed(kinds[name.split(",")[0]], has_scale="grad_scale" in name)
            if turn >= 3:
                seen.append(taken)
    moved = sum(p.nbytes for p in parameters)
    return {
        f"{num / 1e6:.0f}M {str(dtype).removeprefix('torch.')}: {name}": {
            **{f"{key}_ms" if key != "n" else key: value for key, value in summarise(seen).items()},
            "TB/s": BYTES[name] * moved / summarise(seen)["p50"] / 1e9,
        }
        for name, seen in times.items()
    }


def _timed(optimizer: Any, *, has_scale: bool) -> float:
    """Milliseconds of a step on the device."""
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.full((), 1.5, device="cuda") if has_scale else None
    return _milliseconds(optimizer.step)


def _milliseconds(call: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


if __name__ == "__main__":
    main()

"""What it costs that an update may be taken back: a guarded step with `undo`, and one without.

Interleaved, on one thread and in seconds of the processor, so that other work on the machine shows little.
Writes docs/benchmarks/undo (on CUDA: undo-cuda, in seconds of the device).

    python scripts/bench_undo.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from results import summarise, write_results

from harness.stability import StepGuard

SHAPE = (512, 2048)
"""Of a matrix."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--layers", type=int, default=4, help="matrices of 2048 x 512")
    arguments.add_argument("--rounds", type=int, default=11)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = {}
    for name in ("adamw, fused", "adamw, foreach", "sgd with momentum"):
        rows |= _compare(name, options.layers, options.rounds, device)
    # Its iteration takes seconds on a CPU.
    rows |= _compare("muon and adamw", 1, 3, device)
    write_results("undo", rows, device=device, about=vars(options))


def _compare(name: str, num_layers: int, num_rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    guards = {undo: _guard(name, undo, num_layers, device) for undo in ("never", "always")}
    seen: dict[str, list[float]] = {undo: [] for undo in guards}
    for turn in range(num_rounds + 2):
        for undo, guard in guards.items():
            taken = _timed(guard, device)
            if turn >= 2:
                seen[undo].append(taken)
    medians = {undo: summarise(values)["p50"] for undo, values in seen.items()}
    return {
        f"{name}, undo {undo}": {"p50_ms": 1e3 * one, "of_never": one / medians["never"]}
        for undo, one in medians.items()
    }


def _guard(name: str, undo: str, num_layers: int, device: torch.device) -> StepGuard:
    model = nn.ModuleList(nn.Linear(*SHAPE) for _ in range(num_layers)).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-4
    settings: Any = {"checks": "off", "sample_every": 0, "per_parameter_every": 0, "replicas_every": 0}
    return StepGuard(model, _optimizers(name, list(model.parameters())), undo=undo, **settings)


def _optimizers(name: str, held: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    if name == "adamw, fused":
        return [torch.optim.AdamW(held, lr=1e-5, fused=True)]
    if name == "adamw, foreach":
        return [torch.optim.AdamW(held, lr=1e-5, foreach=True)]
    if name == "sgd with momentum":
        return [torch.optim.SGD(held, lr=1e-5, momentum=0.9, foreach=True)]
    matrices, vectors = ([p for p in held if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=1e-5), torch.optim.AdamW(vectors, lr=1e-5, fused=True)]


def _timed(guard: StepGuard, device: torch.device) -> float:
    """Seconds of a step; on the CPU of the processor, whoever else wants it."""
    loss = torch.ones((), device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    guard.step(loss)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


if __name__ == "__main__":
    main()

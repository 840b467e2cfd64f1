#!/usr/bin/env python
"""What the guard costs: optimizer steps with no check, with clipping, with naive checks and with the guard.

    python scripts/bench_monitor.py                            # 124M parameters, fp32 and bf16
    python scripts/bench_monitor.py --models llama-1b --dtypes bf16 --rounds 5
    python scripts/bench_monitor.py --scaling                  # messages and bytes over parameters and ranks

All variants work on the same tensors, one step each in turn, in an order that changes every round, so that
what else the machine does strikes all of them alike. Ratios are of medians; the tables give p50 and p99.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.stability import StepGuard
from harness.stability.statistics import bucket_statistics

BARS = {
    "cpu": {"guard, extremes every 10": ("clip", 0.8), "guard, all": ("clip", 1.0)},
    "cuda": {"guard, all": ("clip", 0.92)},
}
"""Largest allowed ratio of medians: variant -> (variant to compare with, ratio)."""
NAIVE_BAR = 0.25

Shapes = list[tuple[int, ...]]


def gpt2(*, dim: int, num_layers: int, vocab_size: int = 50257, length: int = 1024) -> Shapes:
    """Parameter shapes of GPT-2: biases everywhere, the output projection tied to the embedding."""
    norm: Shapes = [(dim,), (dim,)]
    block = norm + [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    block += norm + [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [(vocab_size, dim), (length, dim)] + num_layers * block + norm


def llama(*, dim: int, num_layers: int, kv_dim: int, mlp_dim: int, vocab_size: int = 128256) -> Shapes:
    """Parameter shapes of Llama 3.2: grouped-query attention, tied embeddings, no biases."""
    attention: Shapes = [(dim,), (dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)]
    mlp: Shapes = [(dim,), (mlp_dim, dim), (mlp_dim, dim), (dim, mlp_dim)]
    return [(vocab_size, dim)] + num_layers * (attention + mlp) + [(dim,)]


MODELS: dict[str, Shapes] = {
    "gpt2-124m": gpt2(dim=768, num_layers=12),
    "llama-1b": llama(dim=2048, num_layers=16, kv_dim=512, mlp_dim=8192),
    "llama-3b": llama(dim=3072, num_layers=28, kv_dim=1024, mlp_dim=8192),
}


class Bench:
    """Parameters, gradients and one fused AdamW, with a step of each variant over them."""

    def __init__(self, shapes: Shapes, *, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.parameters = nn.ParameterList(
            nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes
        )
        for parameter in self.parameters:
            # A norm of about 0.5: clipping at 1.0 leaves the values alone, and its cost does not depend on them.
            parameter.grad = torch.randn_like(parameter).mul_(0.5 / self.num_elements**0.5)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.loss = torch.ones((), device=device)
        self.device = device
        self.guards = {
            "guard, all": StepGuard(self.parameters, self.optimizer, max_norm=1.0),
            "guard, extremes every 10": StepGuard(
                self.parameters, self.optimizer, max_norm=1.0, extremes_every=10
            ),
        }
        self.variants: dict[str, Callable[[], None]] = {
            "step": self.optimizer.step,  # type: ignore[dict-item]
            "clip": self._clip,
            "naive": self._naive,
            **{name: lambda guard=guard: self._guarded(guard) for name, guard in self.guards.items()},  # type: ignore[misc]
        }

    @property
    def num_elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def timed(self, name: str) -> float:
        """Seconds of one step of a variant, with the device idle before and after."""
        self._synchronise()
        start = time.perf_counter()
        self.variants[name]()
        self._synchronise()
        return time.perf_counter() - start

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def _naive(self) -> None:
        for parameter in self.parameters:
            gradient: Tensor = parameter.grad  # type: ignore[assignment]
            gradient.isnan().any().item(), gradient.isinf().any().item(), gradient.norm().item()
        self._clip()

    def _guarded(self, guard: StepGuard) -> None:
        guard.step(self.loss)
        guard.drain()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(bench: Bench, *, rounds: int) -> dict[str, dict[str, float]]:
    """Per variant p50 and p99 in milliseconds, after a warm-up round."""
    names = list(bench.variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-1, rounds):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = bench.timed(name)
            if round_index >= 0:
                times[name].append(1000 * seconds)
    return {name: {"p50_ms": statistics.median(t), "p99_ms": _p99(t)} for name, t in times.items()}


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


def judged(results: dict[str, dict[str, float]], device: str) -> Iterator[dict[str, Any]]:
    """One row per bar: the ratio, the bar, whether it holds."""
    bars = [(name, other, bar) for name, (other, bar) in BARS[device].items()]
    bars += [(name, "naive", NAIVE_BAR) for name in results if name.startswith("guard")]
    for name, other, bar in bars:
        ratio = results[name]["p50_ms"] / results[other]["p50_ms"]
        yield {"variant": name, "against": other, "ratio": ratio, "bar": bar, "holds": ratio <= bar}


def kernel_bandwidth(device: torch.device, *, num_elements: int = 2**27, rounds: int = 20) -> dict[str, float]:
    """Read bandwidth in GB/s of the statistics kernel and of `torch.sum` over the same bytes (CUDA)."""
    flat = torch.randn(num_elements, device=device)
    sizes = [num_elements // 64] * 64
    rates = {}
    for name, run in (("sum", flat.sum), ("statistics", lambda: bucket_statistics(flat, sizes))):
        seconds = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()  # type: ignore[operator]
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rates[name] = 4 * num_elements / statistics.median(seconds) / 1e9
    return rates


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["# What the guard costs", "", f"{report['machine']}, torch {report['torch']}.", ""]
    for run in report["runs"]:
        lines += [
            f"## {run['model']}, {run['dtype']}, {run['num_elements'] / 1e6:.0f} M parameters, {run['rounds']} rounds",
            "",
            "| variant | p50 ms | p99 ms | of clip + step |",
            "|---|---|---|---|",
        ]
        clip = run["results"]["clip"]["p50_ms"]
        for name, result in run["results"].items():
            p50, p99 = result["p50_ms"], result["p99_ms"]
            lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {p50 / clip:.2f} |")
        lines += ["", "| bar | against | ratio | at most | |", "|---|---|---|---|---|"]
        for row in run["bars"]:
            verdict = "holds" if row["holds"] else "**missed**"
            lines.append(
                f"| {row['variant']} | {row['against']} | {row['ratio']:.2f} | {row['bar']} | {verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-124m"])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for monitor.json and monitor.md; default: print only")
    options = parser.parse_args()
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": _machine(device), "torch": torch.__version__, "runs": []}
    for model in options.models:
        for dtype in options.dtypes:
            bench = Bench(
                MODELS[model], dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device=device
            )
            results = measure(bench, rounds=options.rounds)
            report["runs"].append(
                {
                    "model": model,
                    "dtype": dtype,
                    "rounds": options.rounds,
                    "num_elements": bench.num_elements,
                    "results": results,
                    "bars": list(judged(results, device.type)),
                }
            )
            del bench
    if device.type == "cuda":
        report["kernel_gb_s"] = kernel_bandwidth(device)
    print(markdown(report))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "monitor.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "monitor.md").write_text(markdown(report) + "\n")
    return 0 if all(row["holds"] for run in report["runs"] for row in run["bars"]) else 1


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""What the guard costs: optimizer steps alone, with clipping, with naive checks, and with the guard.

    python scripts/bench_monitor.py                              # 124M parameters, fp32 and bf16
    python scripts/bench_monitor.py --models llama-1b --dtypes bf16 --rounds 5
    python scripts/bench_monitor.py --models gpt2-124m --scaling # and messages and bytes over 1 to 8 ranks

All variants work on the same tensors, one step each in turn, in an order that changes every round, so that
what else the machine does strikes all of them alike. Ratios are of medians; the tables give p50 and p99.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.stability import StepGuard
from harness.stability.statistics import bucket_statistics

EVERYTHING, CADENCE = "guard, everything every step", "guard, extremes every 10 steps"

BARS: dict[str, list[tuple[str, str, float]]] = {
    "cpu": [(CADENCE, "clip + step", 0.8), (EVERYTHING, "clip + step", 0.9)],
    "cuda": [(EVERYTHING, "clip + step", 0.92)],
}
"""By device: variant, what it is compared with, largest ratio of medians allowed."""
TURN = 10
"""Rounds that a guard is in force, before another one is."""

for _bars in BARS.values():
    _bars += [(CADENCE, "naive + clip + step", 0.25), (EVERYTHING, "naive + clip + step", 0.25)]

Shapes = list[tuple[int, ...]]


def gpt2(*, dim: int, num_layers: int, vocab_size: int = 50257, length: int = 1024) -> Shapes:
    """Parameter shapes of GPT-2: biases everywhere, the output projection tied to the embedding."""
    norm: Shapes = [(dim,), (dim,)]
    attention: Shapes = [*norm, (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    mlp: Shapes = [*norm, (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [(vocab_size, dim), (length, dim), *(num_layers * (attention + mlp)), *norm]


def llama(*, dim: int, num_layers: int, kv_dim: int, mlp_dim: int, vocab_size: int = 128256) -> Shapes:
    """Parameter shapes of Llama 3.2: grouped-query attention, tied embeddings, no biases."""
    attention: Shapes = [(dim,), (dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)]
    mlp: Shapes = [(dim,), (mlp_dim, dim), (mlp_dim, dim), (dim, mlp_dim)]
    return [(vocab_size, dim), *(num_layers * (attention + mlp)), (dim,)]


MODELS: dict[str, Shapes] = {
    "gpt2-124m": gpt2(dim=768, num_layers=12),
    "llama-1b": llama(dim=2048, num_layers=16, kv_dim=512, mlp_dim=8192),
    "llama-3b": llama(dim=3072, num_layers=28, kv_dim=1024, mlp_dim=8192),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bench:
    """Parameters, gradients and one fused AdamW, with a step of each variant over them."""

    def __init__(self, shapes: Shapes, *, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.parameters = nn.ParameterList(
            nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes
        )
        self.num_elements = sum(parameter.numel() for parameter in self.parameters)
        for parameter in self.parameters:
            # A norm of about 0.5. What clipping and the guard cost does not depend on the values.
            parameter.grad = torch.randn_like(parameter).mul_(0.5 / self.num_elements**0.5)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.loss = torch.ones((), device=device)
        self.unguarded: dict[str, Callable[[], None]] = {
            "step": self._step,
            "clip + step": self._clip,
            "naive + clip + step": self._naive,
        }

    @contextmanager
    def guarded(self, extremes_every: int) -> Iterator[Callable[[], None]]:
        """A step under a guard, which has made its first one; parameters have one guard at a time."""
        with StepGuard(self.parameters, self.optimizer, max_norm=1.0, extremes_every=extremes_every) as guard:
            self._guarded(guard)
            yield lambda: self._guarded(guard)

    def timed(self, step: Callable[[], None]) -> float:
        """Milliseconds of one step of a variant, with the device idle before and after."""
        self._synchronise()
        start = time.perf_counter()
        step()
        self._synchronise()
        return 1000 * (time.perf_counter() - start)

    def _step(self) -> None:
        self.optimizer.step()

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def _naive(self) -> None:
        """What a hand-written monitor does: counts and a norm per tensor, read one by one."""
        for parameter in self.parameters:
            gradient: Tensor = parameter.grad  # type: ignore[assignment]  # all have one
            for value in (gradient.isnan().sum(), gradient.isinf().sum(), gradient.norm()):
                value.item()
        self._clip()

    def _guarded(self, guard: StepGuard) -> None:
        guard.step(self.loss)
        guard.drain()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(bench: Bench, *, rounds: int) -> dict[str, dict[str, float]]:
    """Per variant p50 and p99 in milliseconds.

    The guards take turns of `TURN` rounds, each with a round before it to warm up; in a round every other
    variant makes a step too.
    """
    times: dict[str, list[float]] = {name: [] for name in (*bench.unguarded, CADENCE, EVERYTHING)}
    for start in range(0, rounds, TURN):
        for name, every in ((CADENCE, 10), (EVERYTHING, 1)):
            with bench.guarded(every) as step:
                variants = [*bench.unguarded.items(), (name, step)]
                _take_turns(bench, variants, 1)
                for variant, series in _take_turns(bench, variants, min(TURN, rounds - start)).items():
                    times[variant] += series
    return {name: _summary(series) for name, series in times.items()}


def _take_turns(
    bench: Bench, variants: list[tuple[str, Callable[[], None]]], rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name, _ in variants}
    for index in range(rounds):
        shift = index % len(variants)
        for name, step in variants[shift:] + variants[:shift]:
            times[name].append(bench.timed(step))
    return times


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[round(0.99 * (len(ordered) - 1))]}


def judged(results: dict[str, dict[str, float]], device: torch.device) -> list[dict[str, Any]]:
    """One row per bar: the ratio, the bar, whether it holds."""
    rows = []
    for variant, against, bar in BARS[device.type]:
        ratio = results[variant]["p50_ms"] / results[against]["p50_ms"]
        rows.append(
            {"variant": variant, "against": against, "ratio": ratio, "bar": bar, "holds": ratio <= bar}
        )
    return rows


def kernel_bandwidth(*, num_elements: int = 2**28, rounds: int = 20) -> dict[str, float]:
    """Read bandwidth in GB/s of the statistics kernel and of `torch.sum` over the same bytes, on CUDA."""
    flat = torch.randn(num_elements, device="cuda")
    sizes = [num_elements // 64] * 64
    series: dict[str, list[float]] = {"torch.sum": [], "statistics": []}
    for _ in range(rounds):
        for name, run in (("torch.sum", flat.sum), ("statistics", lambda: bucket_statistics(flat, sizes))):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            series[name].append(time.perf_counter() - start)
    return {name: 4e-9 * num_elements / statistics.median(seconds) for name, seconds in series.items()}


def scaling(
    *, worlds: Sequence[int] = (1, 2, 4, 8), widths: Sequence[int] = (64, 256)
) -> list[dict[str, int]]:
    """Messages and bytes that a guarded step sends per rank, over ranks and model size, under DDP on gloo."""
    rows = []
    for world_size in worlds:
        for width in widths:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_count_traffic, (world_size, width, folder), world_size)
                rows.append(json.loads(Path(folder, "counted.json").read_text()))
    return rows


class _Traffic(TorchDispatchMode):
    """Counts collectives and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.num_bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.messages += 1
            self.num_bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))


def _count_traffic(rank: int, world_size: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    num_elements = sum(p.numel() for p in model.parameters())
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), fused=True)
    guard = StepGuard(ddp, optimizer, per_parameter_every=0, replicas_every=0)
    for _ in range(2):
        loss = ddp(torch.randn(4, width)).square().mean()
        loss.backward()
        with _Traffic() as traffic:
            guard.step(loss)
        optimizer.zero_grad()
    if rank == 0:
        counted = {"ranks": world_size, "parameters": num_elements}
        counted |= {"messages": traffic.messages, "bytes_per_rank": traffic.num_bytes}
        Path(folder, "counted.json").write_text(json.dumps(counted))
    dist.barrier()
    dist.destroy_process_group()


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["# What the guard costs", "", f"{report['machine']}, torch {report['torch']}.", ""]
    for run in report["runs"]:
        size = f"{run['num_elements'] / 1e6:.0f} M parameters and gradients in {run['dtype']}"
        lines += [f"## {run['model']}: {size}, {run['rounds']} rounds", ""]
        clip = run["results"]["clip + step"]["p50_ms"]
        lines += _table(
            ["one step", "p50 ms", "p99 ms", "of clip + step"],
            [
                [name, f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['p50_ms'] / clip:.2f}"]
                for name, r in run["results"].items()
            ],
        )
        lines += _table(
            ["bar", "against", "ratio", "at most", ""],
            [
                [
                    r["variant"],
                    r["against"],
                    f"{r['ratio']:.2f}",
                    r["bar"],
                    "holds" if r["holds"] else "missed",
                ]
                for r in run["bars"]
            ],
        )
    if "kernel_gb_s" in report:
        lines += ["## Read bandwidth", ""]
        lines += _table(["kernel", "GB/s"], [[k, f"{v:.0f}"] for k, v in report["kernel_gb_s"].items()])
    if "scaling" in report:
        lines += ["## What a guarded step sends under DDP, besides the gradients", ""]
        lines += _table(list(report["scaling"][0]), [list(row.values()) for row in report["scaling"]])
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in lines] + [""]


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians, a panel per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = report["runs"]
    figure, panels = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 2.4), squeeze=False, sharey=True)
    for panel, run in zip(panels[0], runs, strict=True):
        names = list(run["results"])[::-1]
        medians = [run["results"][name]["p50_ms"] for name in names]
        colours = ["tab:blue" if name.startswith("guard") else "0.6" for name in names]
        panel.bar_label(panel.barh(names, medians, color=colours), fmt="%.0f", padding=2)
        panel.axvline(run["results"]["clip + step"]["p50_ms"], color="0.3", linewidth=0.8)
        panel.set_title(f"{run['model']}, {run['dtype']}: ms a step", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for."""
    device = torch.device(options.device)
    runs = []
    for model in options.models:
        for dtype in options.dtypes:
            bench = Bench(MODELS[model], dtype=DTYPES[dtype], device=device)
            results = measure(bench, rounds=options.rounds)
            run = {"model": model, "dtype": dtype, "rounds": options.rounds}
            run |= {"num_elements": bench.num_elements, "results": results}
            runs.append(run | {"bars": judged(results, device)})
            del bench
    report: dict[str, Any] = {"machine": _machine(device), "torch": torch.__version__, "runs": runs}
    if device.type == "cuda":
        report["kernel_gb_s"] = kernel_bandwidth()
    if options.scaling:
        report["scaling"] = scaling()
    return report


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main() -> int:
    """0 if all bars hold, 1 if one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-124m"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scaling", action="store_true", help="count messages and bytes over 1 to 8 ranks")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png too")
    options = parser.parse_args()
    report = run_all(options)
    print(markdown(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(report))
        draw(report, options.out.with_suffix(".png"))
    return 0 if all(row["holds"] for run in report["runs"] for row in run["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Records loss and gradient norm of small real trainings, stable and deliberately unstable ones.

    python scripts/record_series.py [NAME ...]

One file a run under docs/benchmarks/series/: the settings, `loss` and `grad_norm` (before clipping) per step
(null: not finite), and `bad_steps`, the steps whose batch was replaced by noise.
`scripts/bench_detectors.py` replays them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from harness.config.schema import ModelConfig
from harness.models import build_model

SERIES = Path(__file__).parents[1] / "docs" / "benchmarks" / "series"
SEQUENCE_LENGTH = 64
ODD = re.compile(rb"([^A-Za-z0-9\s])\1{9,}|[\x80-\xff]+")
"""Lines drawn with one sign, and tables of foreign letters: a single window of them doubles the gradient norm
of a batch of 64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training and what is wrong with it, if anything is."""

    task: str
    steps: int
    lr: float
    batch: int = 8
    warmup_steps: int = 50
    decay: bool = True
    max_norm: float | None = 1.0
    precision: str = "fp32"
    pixel_noise: float = 0.0
    """Standard deviation of fresh noise on images of values 0 to 1, against learning them by heart."""
    odd_text: bool = False
    """Leave in what `ODD` matches."""
    bad_every: int = 0
    """Every so many steps, from the middle of the first such span on, a batch is noise."""


RUNS = {
    # Stable.
    "decoder": Run(task="decoder", steps=1500, lr=3e-3, batch=64),
    "decoder-unclipped": Run(task="decoder", steps=1500, lr=1e-3, batch=32, decay=False, max_norm=None),
    "decoder-bf16": Run(task="decoder", steps=1000, lr=3e-3, batch=32, precision="bf16"),
    "digits-cnn": Run(task="cnn", steps=2000, lr=3e-3, batch=64),
    "digits-cnn-noisy": Run(task="cnn", steps=3000, lr=3e-3, batch=64, pixel_noise=0.5),
    "digits-mlp": Run(task="mlp", steps=4000, lr=1e-3, batch=32, max_norm=None),
    "digits-mlp-noisy": Run(task="mlp", steps=4000, lr=1e-3, batch=32, pixel_noise=0.5),
    # Stable, with odd texts left in and few tokens a step: single windows show.
    "decoder-raw-text": Run(task="decoder", steps=3000, lr=3e-3, batch=8, odd_text=True),
    # With something wrong.
    "decoder-bad-data": Run(task="decoder", steps=2000, lr=3e-3, batch=32, bad_every=150),
    "decoder-no-warmup": Run(task="decoder", steps=1000, lr=5e-2, warmup_steps=0, max_norm=None),
    "decoder-high-lr": Run(task="decoder", steps=1500, lr=2e-2, warmup_steps=200, decay=False, max_norm=None),
    "digits-mlp-diverging": Run(task="mlp", steps=1000, lr=30.0, batch=32, warmup_steps=999, max_norm=None),
    "decoder-fp16": Run(task="decoder", steps=800, lr=3e-3, batch=16, precision="fp16"),
    "digits-cnn-high-lr": Run(task="cnn", steps=1000, lr=5e-2, batch=16, max_norm=None),
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def text_batches(run: Run, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes of the standard library and the bytes that follow them; on bad steps, random bytes."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = b"".join(path.read_bytes() for path in sources)
    if not run.odd_text:
        code = ODD.sub(b"", code)
    text = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    span = torch.arange(SEQUENCE_LENGTH + 1)
    for step in range(run.steps):
        start = torch.randint(len(text) - len(span), (run.batch, 1), generator=generator)
        window = text[start + span].long()
        if step in bad_steps(run):
            window = torch.randint(256, window.shape, generator=generator)
        yield window[:, :-1], window[:, 1:]


def digit_batches(run: Run, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    for _ in range(run.steps):
        chosen = torch.randint(len(labels), (run.batch,), generator=generator)
        noise = run.pixel_noise * torch.randn(run.batch, 1, 8, 8, generator=generator)
        yield images[chosen] + noise, labels[chosen]


def bad_steps(run: Run) -> list[int]:
    return list(range(run.bad_every * 3 // 2, run.steps, run.bad_every)) if run.bad_every else []


def make_model(run: Run) -> nn.Module:
    if run.task == "decoder":
        shape = ModelConfig(num_layers=2, dim=64, num_heads=2)
    else:
        shape = ModelConfig(kind=run.task, num_layers=2, dim=64 if run.task == "mlp" else 16)  # type: ignore[arg-type]
    return build_model(shape, sequence_length=SEQUENCE_LENGTH, num_classes=10, image_shape=(1, 8, 8))


def learning_rate(run: Run, step: int) -> float:
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    done = (step - run.warmup_steps) / (run.steps - run.warmup_steps)
    return run.lr * (0.55 + 0.45 * math.cos(math.pi * done)) if run.decay else run.lr


def record(run: Run) -> dict[str, object]:
    """Trains and returns what is written down. fp16 starts from too large a loss scale, as runs do."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make_model(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=(0.9, 0.95))
    batches: Callable[..., Iterator[tuple[Tensor, Tensor]]]
    batches = text_batches if run.task == "decoder" else digit_batches
    scale = 2.0**24 if run.precision == "fp16" else 1.0
    losses, norms = [], []
    for step, (inputs, targets) in enumerate(batches(run, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate(run, step)
        dtype = AUTOCAST.get(run.precision)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(inputs)
        loss = cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        (loss * scale).backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item() / scale
        losses.append(loss.item())
        norms.append(norm)
        if not math.isfinite(norm):
            scale = max(scale / 2, 1.0)
            continue
        coef = 1 / scale if run.max_norm is None else min(1.0, run.max_norm / (norm + 1e-12)) / scale
        torch._foreach_mul_(grads, coef)
        optimizer.step()
    return {
        "settings": dataclasses.asdict(run),
        "bad_steps": bad_steps(run),
        "loss": [_written(value) for value in losses],
        "grad_norm": [_written(value) for value in norms],
    }


def _written(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    SERIES.mkdir(parents=True, exist_ok=True)
    for name in names or list(RUNS):
        start = time.perf_counter()
        series = record(RUNS[name])
        (SERIES / f"{name}.json").write_text(json.dumps(series, separators=(",", ":")) + "\n")
        print(f"{name:20} {RUNS[name].steps} steps in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Records loss and gradient norm of small real trainings, stable and deliberately unstable ones.

    python scripts/record_series.py [NAME ...]

`quickstart` is the program's own, the preset quickstart; the others are trained here.

One file a run under docs/benchmarks/series/: the settings, `loss` and `grad_norm` (before clipping) per step
(null: not finite), and `bad_steps`, the steps whose batch was replaced by noise.
`scripts/bench_detectors.py` replays them.

`chosen/` and `held-out/` are two surveys of trainings with nothing wrong, on raw data. The spike rule's
settings were chosen by the first and are judged by the second: other files of each text, other images, seeds.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from harness.config import ModelConfig, TrainConfig
from harness.models import build_model
from harness.runlog.reader import open_run
from harness.training import train

ROOT = Path(__file__).parents[1]
SERIES = ROOT / "docs" / "benchmarks" / "series"
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
    seed: int = 0
    text: str = "python"
    """What a decoder reads, a key of `TEXTS` or `mixed`."""
    half: int | None = None
    """0 or 1: only every second file of the text, or every second image, from this one on."""
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


def survey(half: int) -> dict[str, Run]:
    """Clean trainings of all kinds, on half of the data: texts x learning rates x tokens per step, images."""
    seeds = itertools.cycle(range(half, 20, 2))  # ten of the twenty
    runs = {}
    for text, lr in itertools.product([*TEXTS, "mixed"], (1e-3, 3e-3, 1e-2)):
        for batch, steps in ((4, 1200), (16, 600), *([(128, 300)] if lr == 3e-3 else [])):
            seed = next(seeds)
            if batch < 128 or text in ("python", "prose", "tables"):
                runs[f"{text}-{lr:g}-{batch * SEQUENCE_LENGTH}"] = Run(
                    task="decoder",
                    steps=steps,
                    lr=lr,
                    batch=batch,
                    text=text,
                    half=half,
                    odd_text=True,
                    seed=seed,
                )
    for task, (lr, batch), noise in itertools.product(
        ("cnn", "mlp"), ((1e-3, 16), (1e-2, 16), (3e-3, 128)), (0.0, 0.3)
    ):
        name = f"{task}-{lr:g}-{batch}-{'noisy' if noise else 'plain'}"
        runs[name] = Run(
            task=task, steps=1500, lr=lr, batch=batch, pixel_noise=noise, half=half, seed=next(seeds)
        )
    return runs


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
TEXTS: dict[str, Callable[[], list[bytes]]] = {
    "python": lambda: _files(Path(sysconfig.get_paths()["stdlib"]), "*.py"),
    "prose": lambda: _files(SITE_PACKAGES, "*.dist-info/**/LICENSE*", "**/*.rst", "**/*.md"),
    "tables": lambda: _files(SITE_PACKAGES, "**/*.json", "**/*.csv"),
    "headers": lambda: _files(SITE_PACKAGES / "torch" / "include" / "ATen", "**/*.h"),
    "base64": lambda: [base64.encodebytes(random.Random(i).randbytes(100_000)) for i in range(8)],
}
"""Files of each kind of text, as they are."""
MOST_BYTES = 3_000_000


def _files(folder: Path, *patterns: str) -> list[bytes]:
    """Contents in the order of the names, none over 300 kB."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return [path.read_bytes()[:300_000] for path in paths]


@functools.cache
def text_of(kind: str, half: int | None, odd_text: bool) -> Tensor:
    """All bytes of a kind of text, `[n]` uint8."""
    if kind == "mixed":
        return torch.cat([text_of(name, half, odd_text)[:500_000] for name in TEXTS])
    files = TEXTS[kind]()
    text = b"".join(files if half is None else files[half::2])
    if half is not None:
        text = text[:MOST_BYTES]
    if not odd_text:
        text = ODD.sub(b"", text)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def text_batches(run: Run, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes of a text and the bytes that follow them; on bad steps, random bytes."""
    text = text_of(run.text, run.half, run.odd_text)
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
    if run.half is not None:
        images, labels = images[run.half :: 2], labels[run.half :: 2]
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
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed + 1)
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


def quickstart() -> dict[str, object]:
    """The same of a run of the program itself."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_file("quickstart", [f"runs_dir={folder}"])
        return of_log(train(config).directory)


def of_log(run_dir: Path) -> dict[str, object]:
    """What is written down, from a run's log."""
    run = open_run(run_dir)
    loss, norm = (run.scalars(f"train/{name}").values.tolist() for name in ("loss", "grad_norm"))
    return {
        "settings": {"config": "quickstart"},
        "bad_steps": [],
        "loss": [_written(value) for value in loss],
        "grad_norm": [_written(value) for value in norm],
    }


def _written(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def all_runs() -> dict[str, Run]:
    """Every run by the name of its file."""
    surveys = {"chosen": survey(0), "held-out": survey(1)}
    return RUNS | {f"{folder}/{name}": run for folder, runs in surveys.items() for name, run in runs.items()}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    runs = all_runs()
    for name in names or [*runs, "quickstart"]:
        start = time.perf_counter()
        series = quickstart() if name == "quickstart" else record(runs[name])
        path = SERIES / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(series, separators=(",", ":")) + "\n")
        print(f"{name:30} {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

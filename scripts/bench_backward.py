"""What it saves to measure gradients while the backward pass computes (`guard.during_backward`).

    python scripts/bench_backward.py [--rounds 20] [--tokens 64] [--layers 12] [--vocab 50257]

Backward pass and step of a GPT-2 (124M parameters), three ways, each with a model of its own (2 GB), one step
of each in turn, in an order that changes every round. Also in seconds of this process on the processor, which
what else a machine does changes less. The figures go to docs/benchmarks/backward.*.
"""

from __future__ import annotations

import argparse
import time
from typing import Literal

import torch
from results import summarise, write_results
from torch import nn

from harness.config import ModelConfig
from harness.models import build_model
from harness.stability import StepGuard

WARM_UP = 2
"""Rounds that do not count."""


def gpt2(*, num_layers: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        dim=768,
        num_heads=12,
        mlp="gelu",
        norm="layer",
        positions="learned",
        bias=True,
        vocab_size=vocab_size,
    )


class Way:
    """A model and its fused AdamW, clipped or guarded.

    Args:
        during_backward: The guard's setting; None: `clip_grad_norm_` in place of a guard.
    """

    def __init__(
        self,
        during_backward: Literal["off", "on"] | None,
        *,
        config: ModelConfig,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = build_model(config, sequence_length=num_tokens).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.tokens = torch.randint(256, (1, num_tokens), device=device)
        self.guard = (
            None
            if during_backward is None
            else StepGuard(self.model, self.optimizer, during_backward=during_backward)
        )

    def step(self) -> tuple[float, float]:
        """Seconds of a backward pass and what follows it, and of the processor meanwhile."""
        self.optimizer.zero_grad()
        logits = self.model(self.tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten())
        self._synchronise()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss.backward()
        if self.guard is None:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        else:
            self.guard.step(loss)
            self.guard.drain()
        self._synchronise()
        return time.perf_counter() - start, time.process_time() - cpu_start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of the batch: few, so that the gain shows")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    switches: dict[str, Literal["off", "on"] | None] = {
        "backward + clip + step": None,
        "backward + guard": "off",
        "backward + guard, measured during it": "on",
    }
    config = gpt2(num_layers=options.layers, vocab_size=options.vocab)
    ways = {
        name: Way(one, config=config, num_tokens=options.tokens, device=device)
        for name, one in switches.items()
    }
    about = {
        "tokens": options.tokens,
        "parameters": sum(p.numel() for p in next(iter(ways.values())).model.parameters()),
        "threads": torch.get_num_threads(),
    }
    write_results("backward", rows_of(take_turns(ways, options.rounds)), device=device, about=about)


def take_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By way, what each of its steps took."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for index in range(WARM_UP + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = ways[name].step()
            if index >= WARM_UP:
                taken[name].append(seconds)
    return taken


def rows_of(taken: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, object]]:
    """Medians; `of_clip` are those of each round's ratio to the first way."""
    rows: dict[str, dict[str, object]] = {}
    first = next(iter(taken.values()))
    for name, series in taken.items():
        rows[name] = {}
        for column, kind in (("step", 0), ("cpu", 1)):
            values, clip = [one[kind] for one in series], [one[kind] for one in first]
            rows[name][f"{column}_s"] = summarise(values)
            ratios = [one / other for one, other in zip(values, clip, strict=True)]
            rows[name][f"{column}_of_clip"] = summarise(ratios)["p50"]
    return rows


if __name__ == "__main__":
    main()

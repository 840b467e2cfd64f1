#!/usr/bin/env python
"""What the checks for silent errors find, what they do not invent, and what they cost.

    python scripts/silent_errors.py flips              # 1,000 bits flipped in FSDP2 shards and moments
    python scripts/silent_errors.py alarms             # sound loops of many kinds: nothing may be said
    python scripts/silent_errors.py cost               # share of a step's time, in one interleaved run

`--out docs/benchmarks/silent-errors` writes NAME.md beside the other results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.config import GuardConfig
from harness.stability import StepGuard
from harness.stability.checks.base import StepView
from harness.stability.checks.state import StateCheck

SEED = 20260801

PER_GAP = 4
"""Bits flipped between two steps, each in another place."""


# --- flips ---------------------------------------------------------------------------------------


def flips(num: int) -> list[str]:
    """Flips one bit in each gap between two steps, of a random element and place; counts who is named."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_flip_rank, (2, num, folder), 2)
        counts = json.loads(Path(folder, "counts.json").read_text())
    lines = ["| place | flipped | detected | right rank and parameter |", "|---|---:|---:|---:|"]
    for place, (flipped, detected, right) in counts.items():
        lines.append(f"| {place} | {flipped} | {detected} | {right} |")
    return [
        f"## {num} flipped bits, FSDP2 on two gloo ranks, four in each gap between two steps",
        "",
        "Seeded: four different places (rank, parameter or moment), element and bit are drawn evenly. After "
        "the next step all is put back.",
        "",
        *lines,
        "",
    ]


class _EachLook(StateCheck):
    """Does not remember where it has found something: places are hit again and again here."""

    name = "each look"

    def measure(self, view: StepView) -> Tensor | None:
        self._seen = None
        return super().measure(view)


def _flip_rank(rank: int, world_size: int, num: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    # A flip may make anything of a step; nothing may end the run.
    check = _EachLook(GuardConfig(state_every=1))
    guard = StepGuard(
        model, optimizer, checks=[check], state_every=0, replicas_every=0, per_parameter_every=0, ladder=False
    )
    draw = random.Random(SEED)
    planned: dict[int, list[tuple[str, int, str]]] = {}
    said: dict[int, str] = {}
    saved: list[tuple[Tensor, Tensor]] = []
    for step in range(2 * (num // PER_GAP) + 6):
        generator = torch.Generator().manual_seed(2 * step + rank)
        loss = model(torch.randn(8, 16, generator=generator)).square().mean()
        loss.backward()
        guard.step(loss.detach())
        optimizer.zero_grad()
        with torch.no_grad():
            for tensor, before in saved:  # torch counts this
                tensor.copy_(before)
        for record in guard.drain():
            said[record.step] = record.reason or ""
        if saved or step < 2 or PER_GAP * len(planned) == num:
            saved = []
            continue
        saved = [(tensor, tensor.clone()) for tensor in _locals(model, optimizer)]
        planned[step + 1] = _flip(model, optimizer, draw, rank)
        if rank == 0 and step % 50 == 3:
            print(f"step {step}", flush=True)
    for record in guard.drain(wait=True):
        said[record.step] = record.reason or ""
    if rank == 0:
        counts: dict[str, list[int]] = {}
        for step, flipped in planned.items():
            for place, culprit, name in flipped:
                what = name if place == "parameter" else f"the optimizer state of {name}"
                count = counts.setdefault(place, [0, 0, 0])
                count[0] += 1
                count[1] += "a bit was flipped" in said[step]
                count[2] += f" {what} on rank {culprit}" in said[step]
        Path(folder, "counts.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def _locals(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's shards of parameters and moments."""
    tensors = list(model.parameters())
    tensors += [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq")]
    return [tensor._local_tensor for tensor in tensors]


def _flip(
    model: nn.Module, optimizer: torch.optim.Optimizer, draw: random.Random, rank: int
) -> list[tuple[str, int, str]]:
    """Flips bits behind torch's back, on the ranks that are drawn; every rank draws the same."""
    named = dict(model.named_parameters())
    # A checksum is of all moments of a parameter: one of them at a time.
    kinds = [("parameter", name) for name in sorted(named)]
    kinds += [(draw.choice(("exp_avg", "exp_avg_sq")), name) for name in sorted(named)]
    places = draw.sample([(place, culprit, name) for place, name in kinds for culprit in (0, 1)], PER_GAP)
    for place, culprit, name in places:
        where, bit = draw.random(), draw.randrange(32)
        tensor = named[name] if place == "parameter" else optimizer.state[named[name]][place]
        if rank == culprit:
            flat = tensor._local_tensor.detach().view(torch.int32).numpy().reshape(-1).view("uint32")
            flat[int(where * flat.size)] ^= 1 << bit
    return places


# --- alarms --------------------------------------------------------------------------------------


def _adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, **{"lr": 1e-3, "fused": True, **settings})


def _mlp(*shape: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(shape):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


class Said:
    """Collects what guards say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def drain(self, *guards: StepGuard) -> None:
        for guard in guards:
            self.lines += [one.summary() for record in guard.drain() for one in record.findings]


def _train(model: nn.Module, steps: int, said: Said, **settings: Any) -> None:
    optimizer = _adamw(model)
    with StepGuard(model, optimizer, **settings) as guard:
        for _ in range(steps):
            loss = model(torch.randn(8, 16)).square().mean()
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            said.drain(guard)


def gan(steps: int, said: Said, *, clamp: bool = False) -> None:
    """Generator and critic with a guard each; the critic's gradients grow in the generator's turn. With
    `clamp` the critic's weights are clamped through .data after each step (WGAN)."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
    critic = _mlp(16, 16, 1, act=lambda: nn.LeakyReLU(0.2))
    own, other = _adamw(generator), _adamw(critic)
    guards = StepGuard(generator, own), StepGuard(critic, other)
    for _ in range(steps):
        with torch.no_grad():
            fake = generator(torch.randn(8, 4))
        other.zero_grad()
        loss = critic(fake).mean() - critic(torch.randn(8, 16) + 1).mean()
        loss.backward()
        guards[1].step(loss)
        if clamp:
            for parameter in critic.parameters():
                parameter.data.clamp_(-0.05, 0.05)
        own.zero_grad()
        loss = -critic(generator(torch.randn(8, 4))).mean()
        loss.backward()
        guards[0].step(loss)
        said.drain(*guards)


def frozen_backbone(steps: int, said: Said) -> None:
    model = nn.Sequential(_mlp(16, 32, 32), nn.Linear(32, 4))
    model[0].requires_grad_(False)
    _train(model, steps, said)


class Lora(nn.Module):
    """A frozen layer and a low-rank path beside it, whose second factor begins at zero."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


def lora(steps: int, said: Said) -> None:
    _train(nn.Sequential(Lora(nn.Linear(16, 16)), nn.Tanh(), Lora(nn.Linear(16, 4))), steps, said)


def rl(steps: int, said: Said) -> None:
    """Acts without a graph and draws actions, then takes several updates on what it has seen."""
    policy = _mlp(16, 32, 4, act=nn.Tanh)
    optimizer = _adamw(policy)
    with StepGuard(policy, optimizer) as guard:
        for _ in range(steps // 4):
            with torch.no_grad():
                seen = torch.randn(32, 16)
                actions = torch.distributions.Categorical(logits=policy(seen)).sample()
            returns = torch.randn(32)
            for chosen in torch.randperm(32).split(8):
                logp = policy(seen[chosen]).log_softmax(-1).gather(1, actions[chosen, None])[:, 0]
                loss = -(logp * returns[chosen]).mean()
                loss.backward()
                guard.step(loss)
                optimizer.zero_grad()
                said.drain(guard)


def batch_norm(steps: int, said: Said) -> None:
    """With a held-out loss every 50 steps, in eval mode."""
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
    optimizer = _adamw(model)
    with StepGuard(model, optimizer) as guard:
        for step in range(steps):
            loss = model(torch.randn(8, 16)).square().mean()
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad(set_to_none=False)
            if step % 50 == 49:
                held_out = [torch.ones(8, 16) * i for i in range(4)]
                with guard.watch_evaluation(), torch.no_grad():
                    model.eval()
                    for batch in held_out:
                        model(batch)
                    model.train()
            said.drain(guard)


def ragged(steps: int, said: Said) -> None:
    """Batches of other sizes, micro-batches of other numbers, clipped by the loop as well."""
    model = _mlp(16, 32, 4)
    optimizer = _adamw(model)
    draw = random.Random(0)
    with StepGuard(model, optimizer) as guard:
        for _ in range(steps):
            num = draw.randint(1, 4)
            for _ in range(num):
                loss = model(torch.randn(draw.randint(1, 9), 16)).square().mean()
                (loss / num).backward()
                guard.accumulate(loss, weight=1 / num)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.step()
            optimizer.zero_grad()
            said.drain(guard)


def warm_up_from_zero(steps: int, said: Said) -> None:
    """A learning rate that begins at 0, layers thawed later, an average that is kept of the weights."""
    model = _mlp(16, 32, 32, 4)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 50))
    average = torch.optim.swa_utils.AveragedModel(model)
    with StepGuard(model, optimizer) as guard:
        for step in range(steps):
            if step == steps // 2:
                model[0].requires_grad_(True)
            loss = model(torch.randn(8, 16)).square().mean()
            loss.backward()
            guard.step(loss)
            schedule.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            said.drain(guard)


LOOPS: dict[str, Callable[[int, Said], None]] = {
    "plain": lambda steps, said: _train(_mlp(16, 32, 4), steps, said),
    "GAN, batch norm": gan,
    "WGAN, clamped through .data": lambda steps, said: gan(steps, said, clamp=True),
    "frozen backbone": frozen_backbone,
    "LoRA": lora,
    "RL-like": rl,
    "batch norm, dropout, evaluations": batch_norm,
    "ragged batches and accumulation": ragged,
    "warm-up from 0, thawed half-way, average of weights": warm_up_from_zero,
}


def alarms(steps: int) -> list[str]:
    """Every loop, and what was said of it."""
    lines = [f"## Sound loops, {steps} steps each", "", "| loop | findings |", "|---|---|"]
    for name, loop in LOOPS.items():
        torch.manual_seed(SEED)
        said = Said()
        loop(steps, said)
        lines.append(f"| {name} | {'<br>'.join(said.lines) or 'none'} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


# --- cost ----------------------------------------------------------------------------------------


def cost(rounds: int) -> list[str]:
    """The quickstart preset's model and batch, with the checks and without, step by step in turn."""
    from harness.config import TrainConfig
    from harness.models import build_model

    config = TrainConfig.from_file("quickstart")
    shares = {}
    for name in ("on", "off"):
        torch.manual_seed(0)
        length = config.data.sequence_length
        model = build_model(config.model, sequence_length=length, num_classes=0, image_shape=(0, 0, 0))
        shares[name] = _Loop(model, config.loop.global_batch, length, config.model.vocab_size, name)
    times: dict[str, list[float]] = {"on": [], "off": []}
    for index in range(rounds):
        for name in ("on", "off") if index % 2 else ("off", "on"):
            times[name].append(shares[name].step())
    num = sum(p.numel() for p in shares["on"].model.parameters())
    median = {name: statistics.median(one[11:]) for name, one in times.items()}
    mean = {name: _trimmed(one[11:]) for name, one in times.items()}
    return [
        f"## Cost, {num / 1e6:.1f} M parameters, the quickstart preset's batch on the CPU, {rounds} rounds",
        "",
        "| | off, ms | on, ms | ratio |",
        "|---|---:|---:|---:|",
        f"| median | {median['off']:.2f} | {median['on']:.2f} | {median['on'] / median['off']:.4f} |",
        f"| mean without the slowest tenth | {mean['off']:.2f} | {mean['on']:.2f} | "
        f"{mean['on'] / mean['off']:.4f} |",
        "",
    ]


def _trimmed(values: list[float]) -> float:
    return statistics.fmean(sorted(values)[: len(values) * 9 // 10])


class _Loop:
    """One of the two models, with its guard."""

    def __init__(self, model: nn.Module, batch: int, length: int, vocab: int, checks: Any) -> None:
        self.model, self._shape, self._vocab = model, (batch, length + 1), vocab
        self._optimizer = _adamw(model)
        self._guard = StepGuard(model, self._optimizer, checks=checks)

    def step(self) -> float:
        """Milliseconds of CPU time of this process: what else the machine does is not in it."""
        tokens = torch.randint(0, self._vocab, self._shape)
        start = time.process_time()
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self._guard.step(loss.detach())
        self._guard.drain()
        self._optimizer.zero_grad()
        return 1000 * (time.process_time() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("flips", "alarms", "cost"))
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder for WHAT.md")
    options = parser.parse_args()
    lines = {"flips": flips, "alarms": alarms, "cost": cost}[options.what](options.num)
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.what}.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""What the checks for silent errors find, what they do not invent, and what they cost.

    python scripts/silent_errors.py flips              # 1,000 bits flipped in FSDP2 shards and moments
    python scripts/silent_errors.py alarms             # sound loops of many kinds: nothing may be said
    python scripts/silent_errors.py presets            # the same of every preset that two cores can train
    python scripts/silent_errors.py cost               # share of a step's time, in one interleaved run

`--out docs/benchmarks/silent-errors` writes NAME.md beside the other results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import results

from harness.config import GuardConfig
from harness.stability import StepGuard
from harness.stability.audits.cleared import _Watched
from harness.stability.checks.base import StepView
from harness.stability.checks.state import StateCheck

if TYPE_CHECKING:
    from harness.config import TrainConfig

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
    """Acts without a graph and draws actions, with dropout, then takes several updates on what it has
    seen."""
    policy = nn.Sequential(_mlp(16, 32, act=nn.Tanh), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4))
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


class Reader(nn.Module):
    """Gives logits of the next token; for two more of the loops."""

    def __init__(self, classes: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, classes, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(tokens)).tanh())


def language_model(steps: int, said: Said) -> None:
    """Ragged micro-batches with tied weights, each token with one weight; epochs in another order each."""
    data = torch.randint(0, 32, (64, 24), generator=torch.Generator().manual_seed(0))
    model = Reader()
    optimizer = _adamw(model)
    draw = random.Random(0)
    order: list[int] = []
    with StepGuard(model, optimizer) as guard:
        for _ in range(steps):
            order = order if len(order) >= 12 else draw.sample(range(64), 64)
            chosen, order = order[:12], order[12:]
            batches = [data[chosen[i : i + 4], : draw.randint(8, 24)] for i in (0, 4, 8)]
            num_tokens = sum(batch[:, 1:].numel() for batch in batches)
            for batch in batches:
                logits = model(batch[:, :-1]).flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
                (loss / num_tokens).backward()
            guard.step(loss / num_tokens)
            optimizer.zero_grad()
            said.drain(guard)


def masked_language_model(steps: int, said: Said) -> None:
    """The loss of masked tokens, with smoothed labels, which is no plain cross entropy."""
    model = Reader()
    optimizer = _adamw(model)
    with StepGuard(model, optimizer) as guard:
        for _ in range(steps):
            tokens = torch.randint(1, 32, (8, 24))
            is_masked = torch.rand(8, 24) < 0.15
            logits = model(tokens.masked_fill(is_masked, 0))
            targets = tokens.masked_fill(~is_masked, -100)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            said.drain(guard)


def masked_micro_batches(steps: int, said: Said) -> None:
    """Eight micro-batches of 4 x 64 tokens, each with its own number of masked ones, by a plain loss."""
    model = Reader()
    optimizer = _adamw(model)
    with StepGuard(model, optimizer) as guard:
        for _ in range(steps):
            for _ in range(8):
                tokens = torch.randint(1, 32, (4, 64))
                is_masked = torch.rand(4, 64) < 0.15
                logits = model(tokens.masked_fill(is_masked, 0))
                targets = tokens.masked_fill(~is_masked, -100)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
                (loss / 8).backward()
            guard.step(loss)
            optimizer.zero_grad()
            said.drain(guard)


def repeated_on_purpose(steps: int, said: Said, *, size: int, times: int) -> None:
    """`size` batches, all of them `times` times, and then others: updates of a policy on its rollouts. With
    as many times as steps, a few batches to be overfitted."""
    model = _mlp(16, 32, 4)
    optimizer = _adamw(model)
    batches: list[Tensor] = []
    with StepGuard(model, optimizer) as guard:
        for step in range(steps):
            if step % (size * times) == 0:
                batches = list(torch.randn(size, 8, 16))
            loss = model(batches[step % size]).square().mean()
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            said.drain(guard)


class Shifting(nn.Module):
    """Takes labels and shifts them by itself, as the decoder of an encoder-decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader()

    def forward(self, labels: Tensor) -> Tensor:
        return self.inner(nn.functional.pad(labels[:, :-1], (1, 0)))


def shifts_by_itself(steps: int, said: Said) -> None:
    model = Shifting()
    optimizer = _adamw(model)
    with StepGuard(model, optimizer) as guard:
        for _ in range(steps):
            tokens = torch.randint(0, 32, (8, 24))
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            said.drain(guard)


def epochs_of_single_samples(steps: int, said: Said) -> None:
    """Forty samples in batches of one, shuffled in each epoch by a DataLoader."""
    samples = list(torch.randn(40, 16))
    loader = torch.utils.data.DataLoader(samples, batch_size=1, shuffle=True)
    model = _mlp(16, 32, 4)
    optimizer = _adamw(model)
    with StepGuard(model, optimizer) as guard:
        for _ in range(-(-steps // 40)):
            for batch in loader:
                loss = model(batch).square().mean()
                loss.backward()
                guard.step(loss)
                optimizer.zero_grad()
                said.drain(guard)


LOOPS: dict[str, Callable[[int, Said], None]] = {
    "plain": lambda steps, said: _train(_mlp(16, 32, 4), steps, said),
    "GAN, batch norm": gan,
    "WGAN, clamped through .data": lambda steps, said: gan(steps, said, clamp=True),
    "frozen backbone": frozen_backbone,
    "LoRA": lora,
    "RL-like, dropout": rl,
    "batch norm, dropout, evaluations": batch_norm,
    "ragged batches and accumulation": ragged,
    "warm-up from 0, thawed half-way, average of weights": warm_up_from_zero,
    "language model, ragged micro-batches of an epoch": language_model,
    "masked language model, smoothed labels": masked_language_model,
    "masked language model, eight micro-batches": masked_micro_batches,
    "decoder that shifts labels by itself": shifts_by_itself,
    "epochs of forty single samples": epochs_of_single_samples,
    "PPO, four epochs of one batch": partial(repeated_on_purpose, size=1, times=4),
    "GRPO, eight batches twice": partial(repeated_on_purpose, size=8, times=2),
    "four batches four times": partial(repeated_on_purpose, size=4, times=4),
    "three batches overfitted": partial(repeated_on_purpose, size=3, times=10**6),
}


def alarms(steps: int) -> list[str]:
    """Every loop, and what was said of it."""
    torch.set_num_threads(1)
    lines = [
        f"## Sound loops, {steps} steps each",
        "",
        f"{_machine()}.",
        "",
        "| loop | findings |",
        "|---|---|",
    ]
    for name, loop in LOOPS.items():
        torch.manual_seed(SEED)
        said = Said()
        loop(steps, said)
        lines.append(f"| {name} | {'<br>'.join(said.lines) or 'none'} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


# --- presets -------------------------------------------------------------------------------------

SHORT = ("--data.sequence_length=64", "--loop.global_batch=8", "--loop.micro_batch=null")
SMALL = ("--model.num_layers=2", "--model.dim=64", "--model.num_heads=4", "--model.vocab_size=256")

PRESETS: dict[str, tuple[str, ...]] = {
    "basic": SHORT,
    "debug": ("--data.sequence_length=64",),
    "digits": (),
    "full": ("--data.sequence_length=64", "--loop.global_batch=8", "--tracking.wandb=off"),
    "numerical_stability": SHORT,
    "hf_tiny": ("--data.sequence_length=64", "--loop.global_batch=8"),
    "gpt2_124m": (*SHORT, *SMALL, "--loop.compile=false", "--loop.eval_every=100"),
    "llama_1b": (*SHORT, *SMALL, "--model.num_kv_heads=2", "--model.mlp_dim=128", "--parallel.strategy=ddp"),
    "ddp_cpu": ("--data.sequence_length=64", "--loop.global_batch=8", "--loop.micro_batch=2"),
    "fsdp_cpu": ("--data.sequence_length=64", "--loop.global_batch=8", "--loop.micro_batch=2"),
    "inject_nan": ("--data.sequence_length=64", "--loop.global_batch=8", "--loop.micro_batch=1"),
    "quickstart": ("--data.sequence_length=32", "--loop.global_batch=2"),
}
"""Those that can be trained on two cores, and how they are made smaller for that. `hf_finetune` needs weights
that have to be downloaded."""

TWO_RANKS = ("ddp_cpu", "fsdp_cpu", "inject_nan")
MAIN_STEPS = 2000
"""Of the main job."""


def presets(num: int) -> list[str]:
    """Trains every preset for at most `num` steps, and lists the findings in its log."""
    lines = ["## Presets", "", f"{_machine()}.", "", "| preset | changed | ranks | steps | findings |"]
    lines.append("|---|---|---:|---:|---|")
    for name, changes in PRESETS.items():
        steps = MAIN_STEPS if name == "quickstart" else min(num, _preset_steps(name))
        ranks = 2 if name in TWO_RANKS else 1
        with tempfile.TemporaryDirectory() as folder:
            found = _findings_of(name, [*changes, f"--loop.steps={steps}"], ranks, Path(folder))
        changed = " ".join(f"`{change.removeprefix('--')}`" for change in changes) or "nothing"
        lines.append(f"| {name} | {changed} | {ranks} | {steps} | {'<br>'.join(found) or 'none'} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def _preset_steps(name: str) -> int:
    from harness.config import TrainConfig

    return TrainConfig.from_file(name).loop.steps


QUIET = (
    "--parallel.device=cpu",
    "--parallel.threads=1",
    "--tracking.progress=off",
    "--tracking.tensorboard=false",
)


def _findings_of(name: str, changes: list[str], ranks: int, folder: Path) -> list[str]:
    from harness import train
    from harness.config import parse_arguments
    from harness.runlog import events
    from harness.runlog.reader import open_run

    arguments = [f"--config={name}", f"--runs_dir={folder}", "--name=run", *QUIET, *changes]
    if ranks == 1:
        status = train(parse_arguments(arguments)).status
        if status != "finished":
            return [f"the run has {status}"]
    else:
        launcher = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "harness.train",
        ]
        subprocess.run([sys.executable, "-m", *launcher, *arguments], check=True)
    logged = [event.what for event in open_run(folder / "run").events("finding")]
    return [f"{what.check}: {what.problem}" for what in logged if isinstance(what, events.Finding)]


# --- cost ----------------------------------------------------------------------------------------


def cost(rounds: int) -> list[str]:
    """The main job's model and batch, with the checks and without, step by step in turn; and how long a step
    stays in the code of the checks."""
    from harness.config import TrainConfig

    torch.set_num_threads(1)
    config = TrainConfig.from_file("quickstart")
    loops = {name: _Loop(config, name) for name in ("on", "off")}
    own = {name: _OwnTime(loop) for name, loop in loops.items()}
    times: dict[str, list[float]] = {"on": [], "off": []}
    for index in range(rounds):
        for name in ("on", "off") if index % 2 else ("off", "on"):
            times[name].append(loops[name].step())
    num = sum(p.numel() for p in loops["on"].model.parameters())
    median = {name: statistics.median(one[FIRST:]) for name, one in times.items()}
    mean = {name: _trimmed(one[FIRST:]) for name, one in times.items()}
    in_checks = {name: one.mean_ms(rounds) for name, one in own.items()}
    extra = in_checks["on"] - in_checks["off"]
    return [
        f"## Cost, {num / 1e6:.1f} M parameters, the main job's batch, one thread, {rounds} rounds",
        "",
        f"{_machine()}. CPU time of the process, ms a step; load of the machine "
        f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} cores.",
        "",
        "| | off | on | on / off |",
        "|---|---:|---:|---:|",
        f"| a step, median | {median['off']:.2f} | {median['on']:.2f} | {median['on'] / median['off']:.4f} |",
        f"| a step, mean without the slowest tenth | {mean['off']:.2f} | {mean['on']:.2f} | "
        f"{mean['on'] / mean['off']:.4f} |",
        f"| of it in the code of checks, mean | {in_checks['off']:.3f} | {in_checks['on']:.3f} | "
        f"{extra:.3f} ms more: {100 * extra / median['off']:.2f} % of a step |",
        "",
        *_by_check(own["on"], rounds),
    ]


FIRST = 11
"""Steps that warm up."""


class _OwnTime:
    """Adds up the CPU time of the thread that is spent in the methods of a guard's checks and its hooks."""

    def __init__(self, loop: _Loop) -> None:
        self.ns: dict[str, int] = {}
        checks = loop.guard._checks
        for name, check in checks._checks.items():
            for method in ("observe", "before_update", "after_update", "measure", "read"):
                setattr(check, method, self._timed(name, getattr(check, method)))
        if checks._forward is not None:
            checks._forward._note = self._timed("forward hook", checks._forward._note)
            for method in ("look", "note"):  # those of the hooks on gradients
                setattr(_Watched, method, self._timed("gradient hooks", getattr(_Watched, method)))

    def mean_ms(self, rounds: int) -> float:
        return sum(self.ns.values()) / rounds / 1e6

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = time.thread_time_ns()
            try:
                return call(*args)
            finally:
                self.ns[name] = self.ns.get(name, 0) + time.thread_time_ns() - begun

        return timed


def _machine() -> str:
    return ", ".join(f"{key} {value}" for key, value in results.machine(torch.device("cpu")).items())


def _by_check(own: _OwnTime, rounds: int) -> list[str]:
    rows = sorted(own.ns.items(), key=lambda item: -item[1])
    return [
        "| check | ms a step |",
        "|---|---:|",
        *(f"| {name} | {spent / rounds / 1e6:.4f} |" for name, spent in rows),
        "",
    ]


def _trimmed(values: list[float]) -> float:
    return statistics.fmean(sorted(values)[: len(values) * 9 // 10])


class _Loop:
    """One of the two models, with its guard."""

    def __init__(self, config: TrainConfig, checks: Any) -> None:
        from harness.models import build_model

        torch.manual_seed(0)
        length = config.data.sequence_length
        self.model = build_model(config.model, sequence_length=length, num_classes=0, image_shape=(0, 0, 0))
        self._shape, self._vocab = (config.loop.global_batch, length + 1), config.model.vocab_size
        self._optimizer = _adamw(self.model)
        self.guard = StepGuard(self.model, self._optimizer, checks=checks)

    def step(self) -> float:
        """Milliseconds of CPU time of this process: what else the machine does is not in it."""
        tokens = torch.randint(0, self._vocab, self._shape)
        start = time.process_time()
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.guard.step(loss.detach())
        self.guard.drain()
        self._optimizer.zero_grad()
        return 1000 * (time.process_time() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("flips", "alarms", "presets", "cost"))
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder for WHAT.md")
    options = parser.parse_args()
    lines = {"flips": flips, "alarms": alarms, "presets": presets, "cost": cost}[options.what](options.num)
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.what}.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

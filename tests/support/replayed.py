"""Runs in which something is wrong at many steps, and what a replay of each has to name."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.config import FaultConfig
from harness.dist import World
from harness.replay import replay
from harness.replay.story import as_data
from tests.support import broken_tasks
from tests.support.broken_tasks import BAD, EXPECTED
from tests.support.own_tasks import own_config, run_loop

__all__ = ["Found", "check_fault", "check_task", "faults", "train_faults", "train_task"]

KINDS = ("nan", "inf")
TARGETS = ("gradient", "activation", "loss", "batch")
PLACES = {"gradient": "blocks.1.project.weight", "activation": "blocks.0.norm"}
FIRST_STEP = 2
STRUCK = "harness/training/faults.py"


class Found(NamedTuple):
    """What came of a cell."""

    problems: list[str]
    seconds: float


def faults(kinds: Sequence[str] = KINDS) -> list[FaultConfig]:
    """Each kind of value in each target of each rank, at a step of its own."""
    cells = itertools.product(kinds, TARGETS, (0, 1))
    return [
        FaultConfig(
            step=FIRST_STEP + number,
            rank=rank,
            kind=kind,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            parameter=PLACES.get(target),
            micro_batch=number % 2,
        )
        for number, (kind, target, rank) in enumerate(cells)
    ]


def _settings(strategy: str, precision: str, steps: int) -> list[str]:
    return [
        f"--parallel.strategy={strategy}",
        f"--loop.precision={precision}",
        f"--loop.steps={steps}",
        "--loop.global_batch=16",
        "--loop.micro_batch=4",
        "--optim.name=adamw",
        "--checkpoint.every=4",
        "--checkpoint.keep_last=20",
        "--guard.max_consecutive_skips=1000",
    ]


def _world(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))


def train_faults(
    rank: int, size: int, folder: str, strategy: str, precision: str, struck: list[FaultConfig]
) -> None:
    """One rank of a run in which all of `struck` strike."""
    texts = [
        f"{{step: {one.step}, rank: {one.rank}, kind: {one.kind}, target: {one.target},"
        f" parameter: {one.parameter or 'null'}, micro_batch: {one.micro_batch}}}"
        for one in struck
    ]
    steps = max(one.step for one in struck) + 2
    more = [*_settings(strategy, precision, steps), f"--faults=[{', '.join(texts)}]"]
    run_loop(own_config(Path(folder), broken_tasks.sound, *more), _world(rank, size))


def train_task(rank: int, size: int, folder: str, name: str, precision: str) -> None:
    """One rank of a run of a task that goes bad at certain samples."""
    task = getattr(broken_tasks, name)
    run_loop(own_config(Path(folder), task, *_settings("ddp", precision, 3)), _world(rank, size))


def check_fault(directory: Path, fault: FaultConfig) -> Found:
    """Replays the step at which `fault` struck."""
    started = time.perf_counter()
    found = replay(directory, fault.step)
    data = as_data(found)
    problems = _not_reproduced(data)
    causes = data["causes"]
    where = [(one["rank"], one["micro_batch"]) for one in causes]
    if where != [(fault.rank, fault.micro_batch)]:
        return Found([*problems, f"rank and micro-batch {where}"], time.perf_counter() - started)
    (cause,) = causes
    if fault.target == "batch":
        _expect(problems, "bad before", cause["bad_before"], "the batch's x")
        first = next(
            one.samples[0]
            for one in found.played.micro_batches
            if (one.rank, one.number) == (fault.rank, fault.micro_batch)
        )
        _expect(problems, "samples", cause["samples"], [first])
    else:
        producer = cause["producer"] or {}
        operation = "aten.mul.Tensor" if fault.target == "loss" else "aten.fill_.Tensor"
        _expect(problems, "operation", producer.get("operation"), operation)
        direction = "backward" if fault.target == "gradient" else "forward"
        _expect(problems, "direction", producer.get("direction"), direction)
        _expect(problems, "file", str(producer.get("file")).endswith(STRUCK), True)
        if fault.target == "gradient":
            _expect(problems, "parameter", producer.get("parameter"), fault.parameter)
            _expect(problems, "module", producer.get("module"), fault.parameter.rpartition(".")[0])
        else:
            _expect(problems, "module", producer.get("module"), fault.parameter)
        _expect(problems, "makes", producer.get("makes"), {"nan": "NaN", "inf": "Inf"}[fault.kind])
        _expect(problems, "samples", cause["samples"], [])
        _expect(problems, "judgement", data["judgement"]["kind"], "rehearsed")
    return Found(problems, time.perf_counter() - started)


def check_task(directory: Path, name: str) -> Found:
    """Replays the last incident of a task that goes bad at certain samples."""
    started = time.perf_counter()
    found = replay(directory)
    data = as_data(found)
    problems = _not_reproduced(data)
    _expect(problems, "judgement", data["judgement"] and data["judgement"]["kind"], "data")
    samples = {(one.rank, one.number): one.samples for one in found.played.micro_batches}
    if not data["causes"]:
        problems.append("no cause")
    for cause in data["causes"]:
        own = samples[cause["rank"], cause["micro_batch"]]
        _expect(problems, "samples", cause["samples"], [one for one in own if one in BAD])
        if name not in EXPECTED:
            _expect(problems, "bad before", cause["bad_before"], "the batch's x")
            continue
        producer: dict[str, Any] = cause["producer"] or {}
        names = ("module", "operation", "direction", "forward_operation", "makes")
        for key, value in zip(names, EXPECTED[name], strict=True):
            _expect(problems, key, producer.get(key), value)
    return Found(problems, time.perf_counter() - started)


def _not_reproduced(data: dict[str, Any]) -> list[str]:
    return [f"{one['what']}: {one['in_run']} became {one['in_replay']}" for one in data["differences"]]


def _expect(problems: list[str], what: str, found: object, expected: object) -> None:
    if found != expected:
        problems.append(f"{what} is {found}, not {expected}")

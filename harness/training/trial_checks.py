"""What a trial can look at and a long run cannot: forward passes for a check alone, and a checkpoint that is
read back into another model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.dist import gather, plain
from harness.errors import ConfigError
from harness.records import Finding
from harness.runlog.names import Metric
from harness.stability.checks.replicas import checksums
from harness.training.evaluate import evaluate
from harness.training.loop import Run

__all__ = ["State", "difference", "mode_finding", "state_of", "step_finding"]

MAX_RATIO = 2.0
"""Of the loss in eval mode to that in training mode, on the same samples with the same weights."""

MIN_DIFFERENCE = 0.05
"""Of the two: near 0 a ratio says nothing."""

SAME_LOSS = 1e-3
"""Relative. On the CPU it is the same to the last bit; kernels of a GPU may add up in another order."""


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint has to bring back."""

    step: int
    loss: float
    """On held-out samples, in eval mode."""
    names: tuple[str, ...]
    sums: list[list[int]]
    """By rank, of each parameter with its optimizer state."""


def state_of(run: Run) -> State:
    """Of all ranks, and the same on all. Synchronises; some collectives."""
    layout = run.guard.layout
    state = _state(run)
    sums: list[int] = checksums(layout.parameters, lambda p: state.get(p, {})).tolist()
    return State(run.counters.step, _loss(run), layout.names, gather(lambda: sums))


def _state(run: Run) -> dict[Any, dict[str, Any]]:
    """What the optimizers remember, by parameter."""
    return {parameter: state for one in run.optimizers for parameter, state in one.state.items()}


def difference(saved: State, read: State) -> Finding | None:
    """What is wrong with a checkpoint: of what was saved, and what another run has read from it."""
    remedy = "look at state_dict and load_state_dict of model and optimizer"
    for rank, (before, after) in enumerate(zip(saved.sums, read.sums, strict=True)):
        rows = [row for row, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
        if rows:
            name = saved.names[rows[0]]
            problem = f"{name} or its optimizer state does not come back from a checkpoint as it was saved"
            return Finding(check="checkpoint", problem=problem, remedy=remedy, rank=rank, parameter=name)
    if saved.step != read.step:
        problem = f"the checkpoint of step {saved.step} comes back as that of step {read.step}"
        return Finding(check="checkpoint", problem=problem, remedy=remedy)
    are_numbers = math.isfinite(saved.loss) and math.isfinite(read.loss)
    if are_numbers and not math.isclose(saved.loss, read.loss, rel_tol=SAME_LOSS):
        return Finding(
            check="checkpoint",
            problem=f"the held-out loss is {saved.loss:.4g}, and {read.loss:.4g} once the model is read from "
            "its checkpoint, with the same parameters",
            remedy="keep whatever the forward pass depends on in parameters or persistent buffers",
        )
    return None


def mode_finding(run: Run) -> Finding | None:
    """Whether the loss of some held-out samples is much larger in eval mode than in training mode. Draws
    nothing that the run sees; a forward pass in training mode may leave traces in the model all the same.

    Synchronises; some collectives.
    """
    try:
        in_training = _loss(run, in_training_mode=True)
    except ConfigError:
        return None  # its forward pass writes to parameters in training mode
    in_evaluation = _loss(run)
    if in_evaluation < max(MAX_RATIO * in_training, in_training + MIN_DIFFERENCE) or math.isnan(in_training):
        return None
    return Finding(
        check="eval mode",
        problem=f"the loss of the same samples is {in_evaluation:.3g} in eval mode and {in_training:.3g} in "
        "training mode",
        remedy="look at running statistics of batches (momentum, tiny micro-batches) and at what the model "
        "does otherwise in eval mode",
    )


def step_finding(run: Run) -> Finding | None:
    """Whether the optimizer has made as many steps as were applied. Synchronises."""
    applied, state = run.counters.step - run.counters.num_skips, _state(run)
    counts = [state.get(parameter, {}).get("step") for parameter in run.guard.layout.parameters]
    # The largest: one that takes part in some steps only has its own count.
    made = max((int(count) for count in counts if count is not None), default=applied)
    if made == applied:
        return None
    return Finding(
        check="steps",
        problem=f"the optimizer has made {made} steps, and {applied} were applied",
        remedy="look for step() in callbacks, and at what the optimizer does when it is called",
    )


def _loss(run: Run, *, in_training_mode: bool = False) -> float:
    config = run.config
    num_samples = config.loop.micro_batch or config.loop.global_batch // run.world.world_size
    metrics = evaluate(
        plain(run.model),
        run.task,
        config,
        run.world,
        precision=run.precision,
        num_samples=num_samples * run.world.world_size,
        in_training_mode=in_training_mode,
    )
    assert metrics is not None  # nobody interrupts it
    return metrics[Metric.VAL_LOSS]

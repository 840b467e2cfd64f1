"""What a cross entropy is taken of, and with which weight: seen in the gradient that comes back to the
logits.

The gradient of a token's cross entropy by its logits is `w (softmax - onehot)`: target and weight of the
token follow from it, whatever the loop does with loss and labels. Where it is not of this form (label
smoothing, distillation, regression) nothing is said.

Legend: W ranks, B x T tokens of a pass, V classes, n tokens of them that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.audits.forward import ForwardWatch
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import is_look
from harness.stability.checks.fingerprint import spread_places
from harness.stability.host_copy import is_capturing
from harness.stability.inert import ForwardHook
from harness.stability.optimizers import Optimizers

__all__ = ["TargetsCheck"]

NUM_LOOKS = 2
"""After the first step and after ten; then the hook is taken out."""

MAX_TOKENS = 64
"""Of a forward pass, that are looked at."""

NUM_ASKED = 16
"""Entries of a token's gradient that tell whether it takes part in the loss."""

OFFSETS = 3
"""Distances from a token to its target that are told apart: itself, the next one, the one after that."""

MAX_RESIDUAL = 0.05
"""Of a gradient, relative to its norm, that the formula may leave unexplained: bf16 has 2^-8."""

MAX_SURE = 0.98
"""Probability of the target above which too little is left of its gradient to tell the weight."""

WEIGHT, MEAN, LEAST, LARGEST, IS_EXPLAINED, NUM_COMPARED, MATCHES = range(7)
"""Columns of a forward pass: the sum of the weights of its tokens; mean, least and largest weight of one;
whether the formula explains them; how many have inputs to compare their targets with; and, `OFFSETS` columns,
how many targets are the input so many places on."""

TOTAL, OF_TOKENS, WITHIN, OF_PASSES, EXPLAINED, COMPARED, MATCHED = range(7)
HAS_PLACES, NUM_PASSES, NUM_IN_TURN = (MATCHED + OFFSETS + column for column in range(3))
NUM_SENT = NUM_IN_TURN + 1
"""Columns of what a rank sends of a step: the sum of all weights; largest by least weight of a token, of a
token in any one pass, of a pass; whether all is explained; the counts; whether logits are `[B, T, V]`, the
number of passes, and of those before which the gradient of the one before was there."""

MIN_PASSES = 3
"""Of a step, that are micro-batches: two may be two tasks."""

NEAR = 0.1
"""Of a number of micro-batches that the weights sum up to."""

UNEVEN, EVEN = 1.25, 1.05

MIN_COMPARED, MATCH_FRAC, OTHER_FRAC = 24, 0.95, 0.5


class TargetsCheck(Check):
    """In the first step and the tenth, of models whose output is logits, or has some. A few small kernels for
    each forward pass of the first ten steps."""

    name = "targets"
    every_step = True

    def __init__(self, config: GuardConfig, forward: ForwardWatch) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._forward = forward
        self._handle: RemovableHandle | None = None
        self._num_looks, self._has_explained = 0, False
        self._begin()

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        if self.every:
            self._handle = model.register_forward_hook(ForwardHook(self._see))

    def is_due(self, step: int) -> bool:
        return self.every > 0 and self._num_looks < NUM_LOOKS and is_look(step)

    def measure(self, view: StepView) -> Tensor:
        """`[NUM_SENT]` float64; zeros where nothing was seen."""
        self._num_looks += 1
        device = view.rows.device
        # Where the guard divides by the tokens, weights are what it makes of them: no passes to compare.
        num_passes = 0 if view.counts_tokens else self._num_passes
        counts = [float(self._has_places), float(num_passes), float(self._num_in_turn)]
        host = torch.tensor(counts, dtype=torch.float64, pin_memory=view.rows.is_cuda)
        of_step = torch.zeros(NUM_SENT - len(counts), dtype=torch.float64, device=device)
        if self._passes and len(self._passes) == self._num_passes:
            of_step = _of_step(torch.stack(self._passes).to(device).double(), view.loss_scale_t)
        return torch.cat([of_step, host.to(device, non_blocking=True)])

    def after_update(self, view: StepView) -> None:
        self._begin()
        if self._num_looks >= NUM_LOOKS:
            self.close()

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, NUM_SENT]`."""
        ranks = [row for row in numbers.tolist() if row[EXPLAINED]]
        self._has_explained = self._has_explained or bool(ranks)
        return Reading(findings=[*_of_weights(ranks), *_of_targets(ranks)])

    def unseen(self, view: StepView) -> Sequence[str]:
        if not self.every or self._has_explained:
            return ()
        return ("accumulation and targets (no logits of a cross entropy come out of the guarded model)",)

    def forget(self) -> None:
        self._begin()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _begin(self) -> None:
        """Begins the next step."""
        self._passes: list[Tensor] = []
        self._num_passes, self._num_in_turn, self._has_places = 0, 0, False

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Whatever it cannot look at, the forward pass is the user's and goes on.
        with suppress(Exception):
            logits = _logits(output)
            if logits is not None and torch.is_grad_enabled() and not is_capturing():
                self._note(logits)

    def _note(self, logits: Tensor) -> None:
        self._num_in_turn += len(self._passes) == self._num_passes
        self._num_passes += 1
        num_classes = logits.shape[-1]
        self._has_places = logits.dim() > 2
        with torch.no_grad():
            flat = logits.detach().reshape(-1, num_classes)
            places = spread_places(len(flat), min(len(flat), MAX_TOKENS), flat.device)
            inputs = _inputs_at(self._forward.tokens, logits, places)
            logits.register_hook(partial(self._note_gradient, places, flat[places].float(), inputs))

    def _note_gradient(self, places: Tensor, rows: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        with suppress(Exception), torch.no_grad():
            flat = gradient.detach().reshape(-1, rows.shape[-1])
            num_tokens = (flat[:, :NUM_ASKED] != 0).any(1).sum()
            self._passes.append(_of_pass(flat[places].float(), rows, inputs, num_tokens))


def _logits(output: Any) -> Tensor | None:
    """The logits among what a model gives, `[..., V]`."""
    if not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    is_usable = isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad
    return (
        output if is_usable and type(output) is Tensor and output.dim() > 1 and output.shape[-1] > 1 else None
    )


def _inputs_at(tokens: Tensor | None, logits: Tensor, places: Tensor) -> Tensor:
    """`[n, OFFSETS]` int64: the inputs at the places of tokens, and at those that follow; -1: there is
    none."""
    if tokens is None or logits.dim() != 3 or len(tokens) != len(logits) or tokens.shape[1] < logits.shape[1]:
        return places.new_full((len(places), OFFSETS), -1)
    padded = nn.functional.pad(tokens, (0, OFFSETS), value=-1)
    row, column = places // logits.shape[1], places % logits.shape[1]
    return torch.stack([padded[row, column + offset] for offset in range(OFFSETS)], dim=1)


def _of_pass(gradient: Tensor, logits: Tensor, inputs: Tensor, num_tokens: Tensor) -> Tensor:
    """`[MATCHES + OFFSETS]` float32 of one forward pass.

    Args:
        gradient: `[n, V]` fp32, of the tokens that are looked at.
        logits: `[n, V]` fp32, theirs.
        inputs: `[n, OFFSETS]`.
        num_tokens: 0-d, how many take part in the loss in all.
    """
    target = gradient.argmin(dim=1)
    probabilities = logits.softmax(dim=1)
    of_target = probabilities.gather(1, target[:, None])[:, 0]
    weight = gradient.clamp(min=0).sum(1) / (1 - of_target)
    onehot = nn.functional.one_hot(target, gradient.shape[1])
    residual = (gradient - weight[:, None] * (probabilities - onehot)).norm(dim=1)
    takes_part = (gradient != 0).any(1)
    is_explained = takes_part & (residual <= MAX_RESIDUAL * gradient.norm(dim=1)) & (of_target < MAX_SURE)
    num_explained = is_explained.sum()
    # Those whose target is all but certain have no weight to tell, and do not speak against the others.
    are_explained = (num_explained > 0) & (num_explained == (takes_part & (of_target < MAX_SURE)).sum())
    mean = torch.where(is_explained, weight, 0).sum() / num_explained
    least = torch.where(is_explained, weight, torch.inf).amin()
    largest = torch.where(is_explained, weight, 0).amax()
    is_compared = is_explained & (inputs >= 0).all(1)
    matches = ((inputs == target[:, None]) & is_compared[:, None]).sum(0)
    numbers = [mean * num_tokens, mean, least, largest, are_explained, is_compared.sum(), *matches]
    return torch.stack([one.float() for one in numbers])


def _of_step(passes: Tensor, loss_scale_t: Tensor) -> Tensor:
    """`[MATCHED + OFFSETS]` float64 of `[G, MATCHES + OFFSETS]`."""
    ratio = [
        passes[:, MEAN].amax() / passes[:, MEAN].amin(),
        (passes[:, LARGEST] / passes[:, LEAST]).amax(),
        passes[:, WEIGHT].amax() / passes[:, WEIGHT].amin(),
    ]
    explained = (passes[:, IS_EXPLAINED] > 0).all().double()
    counts = passes[:, NUM_COMPARED:].sum(0)
    of_step = torch.stack([passes[:, WEIGHT].sum() / loss_scale_t, *ratio, explained, *counts])
    return torch.where(explained > 0, of_step, 0.0)


def _of_weights(ranks: Sequence[Sequence[float]]) -> Iterator[Finding]:
    """Of the ranks for which the formula explains everything."""
    for row in ranks:
        num = row[NUM_PASSES]
        if num < MIN_PASSES or row[NUM_IN_TURN] < num:
            continue
        if abs(row[TOTAL] / num - 1) < NEAR or abs(row[TOTAL] * num - 1) < NEAR:
            times = f"{num:.0f} times as much as" if row[TOTAL] > 1 else f"1/{num:.0f} of"
            yield Finding(
                check="accumulation",
                problem=f"{num:.0f} micro-batches of a step weigh {times} one batch",
                remedy="divide the loss of each by their number, once; nothing is wrong if they are tasks",
            )
            return
        is_mean_of_means = row[OF_TOKENS] > UNEVEN and row[OF_PASSES] < EVEN and row[WITHIN] < EVEN
        if row[HAS_PLACES] and is_mean_of_means:
            yield Finding(
                check="accumulation",
                problem=f"a token of one micro-batch weighs {row[OF_TOKENS]:.1f} times as much as one of "
                "another: the mean of each is taken, though they have different numbers of tokens",
                remedy="divide the sums of all micro-batches by the number of tokens in the step "
                "(num_items_in_batch of transformers)",
            )
            return


def _of_targets(ranks: Sequence[Sequence[float]]) -> Iterator[Finding]:
    for row in ranks:
        compared = row[COMPARED]
        same, following, after_that = row[MATCHED : MATCHED + OFFSETS]
        if compared < MIN_COMPARED or following >= OTHER_FRAC * compared:
            continue
        if same >= MATCH_FRAC * compared:
            problem = "the model is trained to repeat the tokens that it is given: labels are not shifted"
        elif after_that >= MATCH_FRAC * compared:
            problem = "the model is trained on the token after the next: labels are shifted twice"
        else:
            continue
        remedy = (
            "let either the loop or the model shift labels by one (models of transformers do it themselves)"
        )
        yield Finding(check="targets", problem=problem, remedy=remedy)
        return

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
"""After the first step and after ten, in which alone the hook does anything; then it is taken out."""

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

WEIGHT, MEAN, LEAST, LARGEST, IS_EXPLAINED, LOSS, IN_A_ROW, NUM_COMPARED, MATCHES = range(9)
"""Columns of a forward pass: the sum of the weights of its tokens; mean, least and largest weight of one;
whether the formula explains them; their mean cross entropy, nats; the fraction of the tokens in the loss that
another one follows; how many have inputs to compare their targets with; and, `OFFSETS` columns, how many
targets are the input so many places on."""

TOTAL, OF_TOKENS, WITHIN, OF_PASSES, EXPLAINED, MEAN_LOSS, LEAST_IN_A_ROW, COMPARED, MATCHED = range(9)
HAS_PLACES, NUM_PASSES, NUM_IN_TURN = (MATCHED + OFFSETS + column for column in range(3))
NUM_SENT = NUM_IN_TURN + 1
"""Columns of what a rank sends of a step: the sum of all weights; largest by least weight of a token, of a
token in any one pass, of a pass; whether all is explained; the mean over passes of their losses, and the
least fraction of tokens in a row; the counts; whether logits are `[B, T, V]`, the number of passes, and
of those before which the gradient of the one before was there."""

MIN_PASSES = 3
"""Of a step, that are micro-batches: two may be two tasks."""

NEAR = 0.1
"""Of a number of micro-batches that the weights sum up to."""

UNEVEN, EVEN = 2.0, 1.05

MIN_IN_A_ROW = 0.5
"""Of the tokens in the loss, that another one follows: of random masks there are as many as are masked."""

MIN_COMPARED, MATCH_FRAC, OTHER_FRAC = 24, 0.95, 0.5

COLLAPSED = 0.5
"""Of the first loss: what is left of it, after ten steps, of a model that learns to repeat its input. A model
that shifts its inputs by itself has the same targets, and learns no faster than others."""


class TargetsCheck(Check):
    """In the first step and the tenth, of models whose output is logits, or has some. A few small kernels for
    each forward pass of these two steps."""

    name = "targets"
    every_step = True

    def __init__(self, config: GuardConfig, forward: ForwardWatch) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._forward = forward
        self._handle: RemovableHandle | None = None
        self._num_looks, self._has_explained = 0, False
        self._looks: dict[int, list[list[float]]] = {}
        """By step, what the ranks have sent; a record may be made twice."""
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
        self._begin(is_watched=is_look(view.step + 1))
        if self._num_looks >= NUM_LOOKS:
            self.close()

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, NUM_SENT]`."""
        self._looks[arrived.step] = numbers.tolist()
        ranks = [row for row in self._looks[arrived.step] if row[EXPLAINED]]
        self._has_explained = self._has_explained or bool(ranks)
        findings = list(_of_multiples(ranks))
        if len(self._looks) == NUM_LOOKS and arrived.step == max(self._looks):
            first, last = self._looks[min(self._looks)], self._looks[arrived.step]
            both = [
                pair for pair in zip(first, last, strict=True) if pair[0][EXPLAINED] and pair[1][EXPLAINED]
            ]
            findings += [*_of_lengths(both), *_of_targets(both)]
        return Reading(findings=findings)

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

    def _begin(self, *, is_watched: bool = True) -> None:
        """Begins the next step; one whose number is not known is watched."""
        self._is_watched = is_watched
        self._passes: list[Tensor] = []
        self._num_passes, self._num_in_turn, self._has_places = 0, 0, False

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._is_watched:
            return
        # Whatever it cannot look at, the forward pass is the user's and goes on.
        with suppress(Exception):
            logits = _logits(output)
            if logits is not None and torch.is_grad_enabled() and not is_capturing():
                self._note(logits)

    def _note(self, logits: Tensor) -> None:
        self._num_in_turn += len(self._passes) == self._num_passes
        self._num_passes += 1
        self._has_places = logits.dim() > 2
        with torch.no_grad():
            num = logits.shape[:-1].numel()
            # By index: a reshape copies all logits that are not contiguous.
            places = torch.unravel_index(
                spread_places(num, min(num, MAX_TOKENS), logits.device), logits.shape[:-1]
            )
            inputs = _inputs_at(self._forward.tokens, logits, places)
            logits.register_hook(
                partial(self._note_gradient, places, logits.detach()[places].float(), inputs)
            )

    def _note_gradient(
        self, places: tuple[Tensor, ...], rows: Tensor, inputs: Tensor, gradient: Tensor
    ) -> None:
        with suppress(Exception), torch.no_grad():
            takes_part = (gradient[..., :NUM_ASKED] != 0).any(-1)
            self._passes.append(_of_pass(gradient[places].float(), rows, inputs, takes_part))


def _logits(output: Any) -> Tensor | None:
    """The logits among what a model gives, `[..., V]`."""
    if not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    is_usable = isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad
    return (
        output if is_usable and type(output) is Tensor and output.dim() > 1 and output.shape[-1] > 1 else None
    )


def _inputs_at(tokens: Tensor | None, logits: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """`[n, OFFSETS]` int64: the inputs at the places of tokens, and at those that follow; -1: there is
    none."""
    if tokens is None or logits.dim() != 3 or len(tokens) != len(logits) or tokens.shape[1] < logits.shape[1]:
        return places[0].new_full((len(places[0]), OFFSETS), -1)
    padded = nn.functional.pad(tokens, (0, OFFSETS), value=-1)
    row, column = places
    return torch.stack([padded[row, column + offset] for offset in range(OFFSETS)], dim=1)


def _of_pass(gradient: Tensor, logits: Tensor, inputs: Tensor, in_loss: Tensor) -> Tensor:
    """`[MATCHES + OFFSETS]` float32 of one forward pass.

    Args:
        gradient: `[n, V]` fp32, of the tokens that are looked at.
        logits: `[n, V]` fp32, theirs.
        inputs: `[n, OFFSETS]`.
        in_loss: `[B, T]` or `[B]` bool, of all tokens, whether they take part in the loss.
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
    num_tokens = in_loss.sum()
    in_a_row = (in_loss[..., 1:] & in_loss[..., :-1]).sum() / num_tokens
    loss = torch.where(takes_part, -of_target.log(), 0).sum() / takes_part.sum()
    numbers = [mean * num_tokens, mean, least, largest, are_explained, loss, in_a_row]
    numbers += [is_compared.sum(), *matches]
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
    loss, in_a_row = passes[:, LOSS].mean(), passes[:, IN_A_ROW].amin()
    total = passes[:, WEIGHT].sum() / loss_scale_t
    of_step = torch.stack([total, *ratio, explained, loss, in_a_row, *counts])
    return torch.where(explained > 0, of_step, 0.0)


Both = tuple[Sequence[float], Sequence[float]]
"""What a rank has sent at the first look, and at the last."""


def _of_multiples(ranks: Sequence[Sequence[float]]) -> Iterator[Finding]:
    """Of the ranks for which the formula explains everything."""
    for row in ranks:
        num = row[NUM_PASSES]
        if not _is_accumulation(row):
            continue
        if abs(row[TOTAL] / num - 1) < NEAR or abs(row[TOTAL] * num - 1) < NEAR:
            times = f"{num:.0f} times as much as" if row[TOTAL] > 1 else f"1/{num:.0f} of"
            yield Finding(
                check="accumulation",
                problem=f"{num:.0f} micro-batches of a step weigh {times} one batch",
                remedy="divide the loss of each by their number, once; nothing is wrong if they are tasks",
            )
            return


def _of_lengths(ranks: Sequence[Both]) -> Iterator[Finding]:
    for first, last in ranks:
        if _is_mean_of_means(first) and _is_mean_of_means(last):
            yield Finding(
                check="accumulation",
                problem=f"a token of one micro-batch weighs {last[OF_TOKENS]:.1f} times as much as one of "
                "another: is the mean of each taken, though they have different numbers of tokens?",
                remedy="divide the sums of all micro-batches by the number of tokens in the step "
                "(num_items_in_batch of transformers); nothing is wrong if each is to count the same",
            )
            return


def _is_accumulation(row: Sequence[float]) -> bool:
    """Whether its passes are micro-batches."""
    return row[NUM_PASSES] >= MIN_PASSES and row[NUM_IN_TURN] >= row[NUM_PASSES]


def _is_mean_of_means(row: Sequence[float]) -> bool:
    if not (_is_accumulation(row) and row[HAS_PLACES] and row[LEAST_IN_A_ROW] >= MIN_IN_A_ROW):
        return False
    return row[OF_TOKENS] > UNEVEN and row[OF_PASSES] < EVEN and row[WITHIN] < EVEN


def _of_targets(ranks: Sequence[Both]) -> Iterator[Finding]:
    for first, last in ranks:
        is_learnt = last[MEAN_LOSS] < COLLAPSED * first[MEAN_LOSS]
        if is_learnt and _is_offset(first, 0) and _is_offset(last, 0):
            problem = "is the model trained to repeat the tokens that it is given? Labels are not shifted"
        elif _is_offset(first, 2) and _is_offset(last, 2):
            problem = "is the model trained on the token after the next? Labels are shifted twice"
        else:
            continue
        remedy = (
            "let either the loop or the model shift labels by one (models of transformers do it themselves); "
            "nothing is wrong if the model shifts its inputs, or is meant to give these tokens"
        )
        yield Finding(check="targets", problem=problem, remedy=remedy)
        return


def _is_offset(row: Sequence[float], offset: int) -> bool:
    """Whether the targets are the inputs `offset` places on, and not the next ones."""
    following, matches = row[MATCHED + 1], row[MATCHED + offset]
    compared = row[COMPARED]
    return compared >= MIN_COMPARED and following < OTHER_FRAC * compared and matches >= MATCH_FRAC * compared

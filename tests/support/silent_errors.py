"""Loops that are wrong in one place each and say nothing, and the same ones mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness import StepGuard

__all__ = ["ALONE", "STEPS", "found_in"]

STEPS = 14
"""Within which each error has to be named: the first look after ten steps, and its lag."""

Loop = Callable[[bool], list[str]]


def found_in(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    guarded: nn.Module | None = None,
    step: Callable[[int, StepGuard], Tensor] | None = None,
    clear: Callable[[], None] | None = None,
    after: Callable[[int, StepGuard], None] = lambda number, guard: None,
    num_steps: int = STEPS,
    rank: int = 0,
    **settings: Any,
) -> list[str]:
    """Names of the checks that find something in a loop of `num_steps`.

    Args:
        step: Makes forward and backward pass of a step, and returns its loss; default: `square`.
        clear: In place of `optimizer.zero_grad`.
        after: What the loop does after a step.
    """
    guard = StepGuard(guarded or model, optimizer, **settings)
    make = step or (lambda number, guard: square(model, points(number, rank)))
    findings = []
    with guard:
        for number in range(num_steps):
            guard.step(make(number, guard))
            (clear or optimizer.zero_grad)()
            after(number, guard)
    for record in guard.drain(wait=True):
        findings += [finding.check for finding in record.findings]
        findings += ["incident"] if record.reason else []
    return sorted(set(findings))


def points(number: int, rank: int = 0, size: int = 6) -> Tensor:
    """`[size, 4]`, a function of the arguments alone."""
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1000 * rank + number))


def square(model: nn.Module, x: Tensor) -> Tensor:
    """The mean square of the model's output, after its backward pass."""
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


def network(**changes: nn.Module) -> nn.Sequential:
    """Three layers; `changes` takes the place of some of them."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"first": nn.Linear(4, 8), "act": nn.Tanh(), "last": nn.Linear(8, 3)}
    model = nn.Sequential()
    for name, layer in {**layers, **changes}.items():
        model.add_module(name, layer)
    return model


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "fused": True, **settings})


def gradients_not_cleared(broken: bool) -> list[str]:
    model = network()
    return found_in(model, adamw(model), clear=(lambda: None) if broken else None)


def wrong_model_cleared(broken: bool) -> list[str]:
    model, other = network(), network()
    return found_in(model, adamw(model), clear=(other if broken else model).zero_grad)


def not_cleared_between_clipped_accumulations(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)

    def step(number: int, guard: StepGuard) -> Tensor:
        losses = [square(model, points(3 * number + i)) for i in range(3)]
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return losses[-1]

    clear = (lambda: None) if broken else (lambda: optimizer.zero_grad(set_to_none=False))
    return found_in(model, optimizer, step=step, clear=clear)


def optimizer_stepped_by_the_loop_too(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)

    def clear() -> None:
        if broken:
            optimizer.step()
        optimizer.zero_grad()

    return found_in(model, optimizer, clear=clear)


def head_in_no_optimizer(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)
    if broken:
        model.add_module("head", nn.Linear(3, 2))
    return found_in(model, optimizer)


def layer_rebuilt_after_the_optimizer(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 2:
            model.last = nn.Linear(8, 3).requires_grad_(False)

    return found_in(model, optimizer, after=after)


def frozen_with_a_gradient_in_it(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)

    def after(number: int, guard: StepGuard) -> None:
        if number == 0:
            model.first.requires_grad_(False)

    return found_in(
        model, optimizer, clear=lambda: optimizer.zero_grad(set_to_none=not broken), after=after, num_steps=12
    )


def frozen_in_the_middle(broken: bool) -> list[str]:
    model = network()

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 12:
            model.first.requires_grad_(False)

    return found_in(model, adamw(model), after=after, num_steps=36)


def type_changed_in_the_middle(broken: bool) -> list[str]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 2:
            model.double()

    return found_in(
        model,
        optimizer,
        step=lambda number, guard: square(model, points(number).to(model.first.weight.dtype)),
        after=after,
    )


def weight_tie_broken(broken: bool) -> list[str]:
    model = network(first=nn.Linear(4, 4), last=nn.Linear(4, 4))
    model.last.weight = model.first.weight
    optimizer = adamw(model)

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 2:
            model.last.weight = nn.Parameter(model.first.weight.detach().clone())

    return [name for name in found_in(model, optimizer, after=after) if name != "coverage"]


def compiled_model_not_called(broken: bool) -> list[str]:
    model = network()
    compiled = torch.compile(model, backend="eager")
    called = model if broken else compiled
    return found_in(
        model, adamw(model), guarded=compiled, step=lambda number, guard: square(called, points(number))
    )


def _with_dropout() -> nn.Sequential:
    return network(act=nn.Dropout(0.5))


def eval_mode_after_an_evaluation(broken: bool) -> list[str]:
    model = _with_dropout()

    def after(number: int, guard: StepGuard) -> None:
        if number == 4:
            model.eval()
            with torch.no_grad():
                model(points(number))
            model.train(not broken)

    return found_in(model, adamw(model), after=after)


def eval_mode_from_the_start(broken: bool) -> list[str]:
    model = _with_dropout().train(not broken)
    return found_in(model, adamw(model))


def evaluated_in_training_mode(broken: bool) -> list[str]:
    model = _with_dropout()

    def after(number: int, guard: StepGuard) -> None:
        if number == 6:
            model.train(broken)
            with torch.no_grad():
                for batch in range(3):
                    model(points(100 + batch))
            model.train()

    return found_in(model, adamw(model), after=after)


def evaluation_draws(broken: bool) -> list[str]:
    model = network()

    def after(number: int, guard: StepGuard) -> None:
        with guard.watch_evaluation(), torch.no_grad():
            model(torch.randn(6, 4) if broken else points(number))

    return found_in(model, adamw(model), after=after)


def evaluation_leaves_a_trace(broken: bool) -> list[str]:
    model = network(act=nn.BatchNorm1d(8))

    def after(number: int, guard: StepGuard) -> None:
        with guard.watch_evaluation(), torch.no_grad():
            model.train(broken)
            model(points(number))
            model.train()

    return found_in(model, adamw(model), after=after)


class Labelled(nn.Module):
    """Takes pixels and labels, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return self.inner(pixel_values)[: len(labels)] - labels[: len(pixel_values)]


def lengths_disagree(broken: bool) -> list[str]:
    model = Labelled()

    def step(number: int, guard: StepGuard) -> Tensor:
        labels = torch.zeros(5 if broken and number > 3 else 6, 3)
        loss = model(pixel_values=points(number), labels=labels).square().mean()
        loss.backward()
        return loss.detach()

    return found_in(model, adamw(model), step=step)


class Cut(nn.Module):
    """Passes its input on, and nothing back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def detached_in_the_forward_pass(broken: bool) -> list[str]:
    model = network(act=Cut() if broken else nn.Tanh())
    return found_in(model, adamw(model))


def dead_units(broken: bool) -> list[str]:
    model = network(act=nn.ReLU())
    if broken:
        nn.init.constant_(model.first.bias, -1e3)
    return found_in(model, adamw(model, weight_decay=0.0))


def learning_rate_of_a_group_is_zero(broken: bool) -> list[str]:
    model = network()
    groups = [{"params": model.first.parameters()}, {"params": model.last.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0, fused=True)
    if broken:
        optimizer.param_groups[0]["lr"] = 1e-30
    return found_in(model, optimizer)


def updates_below_the_precision(broken: bool) -> list[str]:
    model = network().bfloat16()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5 if broken else 1e-1)
    return found_in(
        model, optimizer, step=lambda number, guard: square(model, points(number).bfloat16()), max_norm=1.0
    )


def the_same_batch_again_and_again(broken: bool) -> list[str]:
    model = network()
    loader = [points(number) for number in range(STEPS)]
    return found_in(
        model,
        adamw(model),
        step=lambda number, guard: square(model, loader[0] if broken else loader[number]),
    )


def autocast_forgotten(broken: bool) -> list[str]:
    model = network()

    def step(number: int, guard: StepGuard) -> Tensor:
        with guard.watch_forward(), torch.autocast("cpu", torch.bfloat16, enabled=not broken):
            loss = model(points(number)).float().square().mean()
        loss.backward()
        return loss.detach()

    return found_in(model, adamw(model), step=step, precision=torch.bfloat16)


def loss_scale_at_its_floor(broken: bool) -> list[str]:
    model = network()

    def step(number: int, guard: StepGuard) -> Tensor:
        loss = model(points(number)).square().mean()
        guard.scale(loss).backward()
        return loss.detach()

    scale = 1.0 if broken else 1024.0
    return found_in(model, adamw(model), step=step, precision=torch.float16, init_loss_scale=scale)


def bit_flipped(broken: bool, *, moment: bool = False) -> list[str]:
    model = network(first=nn.Linear(4, 16), last=nn.Linear(16, 3))
    optimizer = adamw(model)

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 7:
            weight = model.first.weight
            tensor = optimizer.state[weight]["exp_avg"] if moment else weight.detach()
            tensor.view(torch.int32).numpy()[1, 2] ^= 1 << 20

    return found_in(model, optimizer, after=after, state_every=1)


def bit_flipped_in_a_moment(broken: bool) -> list[str]:
    return bit_flipped(broken, moment=True)


def written_behind_torchs_back(broken: bool) -> list[str]:
    model = network()

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 7:
            model.first.weight.data.mul_(0.7)

    return found_in(model, adamw(model), after=after, state_every=1)


def optimizer_leaves_nan(broken: bool) -> list[str]:
    model = network(act=nn.ReLU())
    nn.init.constant_(model.first.bias, -1e3)  # its gradients are zeros
    optimizer = adamw(model, eps=0.0 if broken else 1e-8, weight_decay=0.0)
    found = found_in(model, optimizer, state_every=1, ladder=False)
    return [name for name in found if name not in ("gradient", "incident")]


class Speaker(nn.Module):
    """Gives logits of the next token, as a language model does."""

    def __init__(self, classes: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(classes, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def sentences(number: int, length: int = 20, num: int = 4) -> Tensor:
    """`[num, length]` int64, a function of the arguments alone."""
    return torch.randint(0, 11, (num, length), generator=torch.Generator().manual_seed(number))


def next_token_loss(model: nn.Module, tokens: Tensor, *, shift: int = 1, **settings: Any) -> Tensor:
    logits = model(tokens)[:, : tokens.shape[1] - shift]
    targets = tokens[:, shift:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **settings)


def accumulation(divisor: float, *, lengths: tuple[int, ...] = (20, 20, 20, 20)) -> list[str]:
    model = Speaker()

    def step(number: int, guard: StepGuard) -> Tensor:
        for place, length in enumerate(lengths):
            loss = next_token_loss(model, sentences(10 * number + place, length))
            (loss / divisor).backward()
        return loss.detach()

    return found_in(model, adamw(model), step=step)


def micro_batches_not_divided(broken: bool) -> list[str]:
    return accumulation(1 if broken else 4)


def micro_batches_divided_twice(broken: bool) -> list[str]:
    return accumulation(16 if broken else 4)


def mean_of_the_means_of_ragged_micro_batches(broken: bool) -> list[str]:
    if broken:
        return accumulation(3, lengths=(8, 16, 30))
    model, lengths = Speaker(), (8, 16, 30)
    num_tokens = sum(4 * (length - 1) for length in lengths)

    def step(number: int, guard: StepGuard) -> Tensor:
        for place, length in enumerate(lengths):
            loss = next_token_loss(model, sentences(10 * number + place, length), reduction="sum")
            (loss / num_tokens).backward()
        return loss.detach()

    return found_in(model, adamw(model), step=step)


def shifted(shift: int) -> list[str]:
    model = Speaker()

    def step(number: int, guard: StepGuard) -> Tensor:
        loss = next_token_loss(model, sentences(number), shift=shift)
        loss.backward()
        return loss.detach()

    return found_in(model, adamw(model, lr=0.1), step=step)


def labels_shifted_twice(broken: bool) -> list[str]:
    return shifted(2 if broken else 1)


def labels_not_shifted(broken: bool) -> list[str]:
    return shifted(0 if broken else 1)


def epochs_in_one_order(broken: bool) -> list[str]:
    model, num = network(), 32
    orders = [torch.randperm(4 * num, generator=torch.Generator().manual_seed(e)) for e in range(3)]
    data = points(0, size=4 * num)

    def step(number: int, guard: StepGuard) -> Tensor:
        epoch, place = divmod(number, num)
        return square(model, data[orders[0 if broken else epoch].view(num, 4)[place]])

    return found_in(model, adamw(model), step=step, num_steps=80)


def schedule_that_ends_too_early(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)

    def after(number: int, guard: StepGuard) -> None:
        for _ in range(4 if broken else 1):
            if not broken and number > 17:
                return
            schedule.step()

    return found_in(model, optimizer, after=after, num_steps=60)


def resumed_without_moments(broken: bool) -> list[str]:
    model = network()
    optimizer = adamw(model)
    with StepGuard(model, optimizer) as guard:
        for number in range(3):
            guard.step(square(model, points(number)))
            optimizer.zero_grad()
    again = adamw(model)
    if not broken:
        again.load_state_dict(optimizer.state_dict())
    findings = []
    with StepGuard(model, again) as resumed:
        resumed.load_state_dict(guard.state_dict())
        for number in range(3, 14):
            resumed.step(square(model, points(number)))
            again.zero_grad()
    for record in resumed.drain(wait=True):
        findings += [finding.check for finding in record.findings]
    return findings


ALONE: dict[Loop, str] = {
    gradients_not_cleared: "cleared",
    wrong_model_cleared: "cleared",
    not_cleared_between_clipped_accumulations: "cleared",
    optimizer_stepped_by_the_loop_too: "outside",
    head_in_no_optimizer: "coverage",
    layer_rebuilt_after_the_optimizer: "membership",
    frozen_with_a_gradient_in_it: "frozen",
    frozen_in_the_middle: "attributes",
    type_changed_in_the_middle: "attributes",
    weight_tie_broken: "ties",
    compiled_model_not_called: "wrapper",
    eval_mode_after_an_evaluation: "training mode",
    eval_mode_from_the_start: "training mode",
    evaluated_in_training_mode: "evaluation mode",
    evaluation_draws: "evaluation",
    evaluation_leaves_a_trace: "evaluation",
    lengths_disagree: "batch",
    detached_in_the_forward_pass: "gradient",
    dead_units: "gradient",
    learning_rate_of_a_group_is_zero: "movement",
    updates_below_the_precision: "movement",
    the_same_batch_again_and_again: "constant batch",
    autocast_forgotten: "precision",
    loss_scale_at_its_floor: "loss scale",
    bit_flipped: "incident",
    bit_flipped_in_a_moment: "incident",
    written_behind_torchs_back: "state",
    optimizer_leaves_nan: "state",
    micro_batches_not_divided: "accumulation",
    micro_batches_divided_twice: "accumulation",
    mean_of_the_means_of_ragged_micro_batches: "accumulation",
    labels_shifted_twice: "targets",
    labels_not_shifted: "targets",
    epochs_in_one_order: "repeated batch",
    schedule_that_ends_too_early: "rate",
    resumed_without_moments: "resumed",
}
"""Loops of one process, and the check that names each."""

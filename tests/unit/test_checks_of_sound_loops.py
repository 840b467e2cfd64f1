"""What checks for silent errors, on by default, do not disturb and do not call an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap

from harness import StepGuard
from harness.config import GuardConfig
from harness.errors import ConfigError
from harness.stability.checks.base import Arrived
from harness.stability.checks.fingerprint import fingerprint
from harness.stability.checks.movement import COULD_MOVE, MOVED, OWN, REDUCED, TRAINABLE, MovementCheck
from harness.stability.checks.state import StateCheck
from harness.stability.layout import Layout
from tests.support.silent_errors import adamw, found_in, network, points, square


def gradients_of_samples(model: nn.Module) -> None:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in model.named_parameters()}, points(0))


def traced(model: nn.Module) -> None:
    torch.jit.trace(model, points(0))


@pytest.mark.parametrize("use", [gradients_of_samples, traced])
def test_a_guarded_model_can_be_transformed_and_traced(use: Callable[[nn.Module], None]) -> None:
    model = network()
    with StepGuard(model, adamw(model)) as guard:
        use(model)
        guard.step(square(model, points(1)))


def test_a_guarded_model_is_not_scripted_until_the_guard_is_closed() -> None:
    model = network()
    with StepGuard(model, adamw(model)) as guard:
        with pytest.raises(ConfigError, match="is guarded"):
            torch.jit.script(model)
        guard.step(square(model, points(0)))
    torch.jit.script(model)


@pytest.fixture
def _alone() -> Iterator[None]:
    hook = sys.excepthook
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    sys.excepthook = hook


@pytest.mark.usefixtures("_alone")
def test_an_evaluation_under_fsdp2_leaves_the_root_whole_and_nothing_else() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = network()
    fully_shard(model.last, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the first layer is the root's own

    def after(number: int, guard: StepGuard) -> None:
        with guard.watch_evaluation(), torch.no_grad():
            model.eval()(points(number))
            model.train()

    assert found_in(model, adamw(model), after=after) == []


class Scaled(nn.Module):
    """With a scale of its own, as CLIP has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.logit_scale


def test_a_scalar_that_is_clamped_is_no_fault_of_memory() -> None:
    model = Scaled()

    def after(number: int, guard: StepGuard) -> None:
        if number == 7:
            model.logit_scale.data.mul_(2)  # one bit: the exponent of what lies in [0.5, 1)

    found = found_in(model, adamw(model), after=after, state_every=1)
    assert found == ["state"]


def reading_of(*places: tuple[int, int, int]) -> tuple[bool, int]:
    """Whether the state check calls it a flipped bit, and the number of its findings; `places` are what it
    sends: the place plus 1, the difference, whether it was seen before."""
    model = network(first=nn.Linear(4, 16))
    layout = Layout.of(model.named_parameters(), of=list(model.parameters()))
    numbers = torch.zeros(1, 5, 4, dtype=torch.int64)
    numbers[0, 0, 0] = len(places)
    for row, place in enumerate(places, start=1):
        numbers[0, row, :3] = torch.tensor(place)
    arrived = Arrived(step=0, layout=layout, num_replicas=1, divisor=1.0)
    reading = StateCheck(GuardConfig()).read(numbers, arrived)
    return reading.reason is not None, len(reading.findings)


def test_what_is_a_flipped_bit_and_what_a_program_does() -> None:
    assert reading_of() == (False, 0)
    assert reading_of((1, 1 << 20, 0)) == (True, 0)
    assert reading_of((1, 1 << 20, 1)) == (False, 1)  # again and again
    assert reading_of((1, 3 << 20, 0)) == (
        False,
        1,
    )  # what the weights of state explain, and a parameter's not
    assert reading_of((2, 3 << 20, 0)) == (True, 0)


def test_where_a_loop_writes_by_design_it_is_not_named_and_a_flip_elsewhere_is() -> None:
    model = network(first=nn.Linear(4, 16), last=nn.Linear(16, 3))
    flips: list[bool] = []

    def after(number: int, guard: StepGuard) -> None:
        model.last.weight.data.clamp_(-0.05, 0.05)
        if flips and number == 9:
            model.first.weight.detach().view(torch.int32).numpy()[1, 2] ^= 1 << 20

    optimizer = adamw(model, lr=0.1)
    assert found_in(model, optimizer, after=after, state_every=1) == []
    flips.append(True)
    assert found_in(model, optimizer, after=after, state_every=1) == ["incident"]


def test_what_the_state_check_sends_does_not_grow_with_the_model() -> None:
    sizes = set()
    for num_layers in (1, 30):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))
        optimizer = torch.optim.SGD(model.parameters())
        with StepGuard(model, optimizer, state_every=1) as guard:
            check = guard._checks._checks["state"]
            measure = check.measure
            check.measure = lambda view, measure=measure: note(sizes, measure(view))  # type: ignore[method-assign]
            for number in range(3):
                guard.step(square(model, points(number)))
                optimizer.zero_grad()
    assert sizes == {(5, 4)}


def note(sizes: set[tuple[int, ...]], sent: Tensor) -> Tensor:
    sizes.add(tuple(sent.shape))
    return sent


def test_gradients_that_are_zeroed_through_data_are_cleared() -> None:
    model = network()

    def clear() -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.data.zero_()

    assert "cleared" not in found_in(model, adamw(model), clear=clear)


def test_fingerprints_see_more_than_one_column() -> None:
    images = torch.zeros(1024, 1, 28, 28)
    one, other = images.clone(), images.clone()
    one[..., 5:20, 5:20], other[..., 5:20, 8:22] = 0.5, 0.5
    assert fingerprint(one) != fingerprint(other)
    classes = nn.functional.one_hot(torch.arange(16 * 4096) % 16)
    assert fingerprint(classes) != fingerprint(classes.roll(1, dims=1))


def test_a_rank_without_a_gradient_is_named_after_two_windows_in_a_row() -> None:
    model = network()
    layout = Layout.of(model.named_parameters(), of=list(model.parameters()))
    check = MovementCheck(GuardConfig())

    def found(num_steps: int, *, is_missing: bool) -> list[str]:
        flags = torch.full((2, len(layout)), OWN + REDUCED + MOVED + COULD_MOVE + TRAINABLE)
        flags[1, 0] -= OWN if is_missing else 0
        arrived = Arrived(step=0, layout=layout, num_replicas=2, divisor=1.0)
        return [one.check for one in check.read(flags + num_steps * 2 * TRAINABLE, arrived).findings]

    assert found(10, is_missing=True) == found(99, is_missing=True) == []
    assert found(99, is_missing=False) == found(99, is_missing=True) == []
    assert found(99, is_missing=True) == ["rank's gradient"]

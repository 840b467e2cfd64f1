"""What a step of the guard may cost: one gather of fixed size, and not one look from the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.stability import Check, Reading, StepGuard, before, rank_statistics, sources
from harness.stability.checks import samples, state
from harness.stability.checks.base import Arrived, StepView
from harness.stability.verdict import Decision
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model


class _Reads(TorchFunctionMode):
    """Notes every read of a value that Python asks for; on the CPU not all of them reach the dispatcher."""

    NAMES = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "equal")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.seen += [name] if name in self.NAMES else []
        return function(*args, **(kwargs or {}))


class _InnerReads(TorchDispatchMode):
    """Notes the reads that operators make, and shapes that hang on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        self.seen += [name] if name.startswith(self.NAMES) else []
        return function(*args, **(kwargs or {}))


@contextmanager
def _host_reads() -> Iterator[list[str]]:
    """Within it everything is noted that would make the host wait for a CUDA device."""
    seen: list[str] = []
    with _InnerReads(seen), _Reads(seen):
        yield seen


def _as_on_cuda(tensors: Sequence[Tensor], *, extremes: bool = True) -> Tensor:
    """Statistics without a look at a value, as the kernels take them; the CPU's own path looks, for free."""
    rows = []
    for tensor in tensors:
        finite = tensor.isfinite()
        values = tensor.where(finite, 0).double()
        counts = [tensor.isnan().sum(), tensor.isinf().sum(), (tensor == 0).sum()]
        largest = values.abs().max() if len(values) else values.sum()
        rows.append(torch.stack([values.square().sum(), largest, *counts]))
    return torch.stack(rows)


def _muon(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices, vectors = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, fused=True)]


UNFUSED: dict[str, Any] = {
    "sgd-foreach": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "muon": _muon,
}


@pytest.mark.parametrize("undo", ["auto", "never"])
@pytest.mark.parametrize("name", UNFUSED)
def test_what_keeps_nothing_on_the_host_asks_it_nothing(
    name: str, undo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sources, before):
        monkeypatch.setattr(module, "tensor_statistics", _as_on_cuda)
    monkeypatch.setattr(Decision, "is_on_host", False)
    monkeypatch.setattr(before, "_is_known_good", lambda _: False)
    model = make_model()
    guard = StepGuard(model, UNFUSED[name](list(model.parameters())), sample_every=0, undo=undo, lag_steps=9)
    reads = []
    for step in range(3):
        loss = nn.functional.mse_loss(model(batch(step)[0]), batch(step)[1])
        loss.backward()
        with _host_reads() as seen:
            guard.step(loss)
        model.zero_grad()
        reads.append(seen)
    assert reads[1:] == [[], []], reads


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad"])
def test_no_value_is_read_between_backward_and_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "tensor_statistics", _as_on_cuda)
    monkeypatch.setattr(samples, "tensor_statistics", _as_on_cuda)
    monkeypatch.setattr(state, "tensor_statistics", _as_on_cuda)
    monkeypatch.setattr(Decision, "is_on_host", False)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    # Everything that has a cadence is due in every step; none is so old that it is read.
    settings = {
        "spike": "skip",
        "per_parameter_every": 1,
        "sample_every": 1,
        "state_every": 1,
        "lag_steps": 9,
    }
    guard = StepGuard(model, optimizer, precision=torch.float16, **settings)
    reads = []
    for step in range(3):
        for micro_batch in range(2):
            loss = nn.functional.mse_loss(model(batch(step, 0, micro_batch)[0]), batch(step)[1])
            guard.scale(loss).backward()
            with _host_reads() as accumulating:
                guard.accumulate(loss)
        with _host_reads() as stepping:
            guard.step(nominal_tokens=2)
        optimizer.zero_grad()
        reads.append(accumulating + stepping)
    # The first step creates the state of all but Adagrad, and asks once.
    assert reads == [[] if name == "adagrad" else ["tolist"], [], []]


@pytest.mark.parametrize(("undo", "reads"), [("never", ["tolist"]), ("always", ["tolist", "__bool__"])])
def test_an_optimizer_that_counts_on_the_host_costs_one_read_and_its_undoing_another(
    undo: str, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sources, before):
        monkeypatch.setattr(module, "tensor_statistics", _as_on_cuda)
    monkeypatch.setattr(Decision, "is_on_host", False)
    monkeypatch.setattr(before, "_is_known_good", lambda _: False)
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["rmsprop"](model.parameters()), sample_every=0, undo=undo)
    for _ in range(2):
        loss = nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        with _host_reads() as seen:
            guard.step(loss)
        assert [name for name in seen if name != "_local_scalar_dense"] == reads


def _two_sizes(rank: int, world_size: int, wrap: str) -> list[list[tuple[int, int]]]:
    return [_collectives(rank, wrap, width) for width in (8, 64)]


def _collectives(rank: int, wrap: str, width: int) -> list[tuple[int, int]]:
    """Per step, while the guard works: number of collectives, and float64 that this rank sends."""
    model = make_model(width=width)
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    every = {"per_parameter_every": 4, "sample_every": 0, "replicas_every": 0}
    guard = StepGuard(model, optimizer, checks="off", **every)
    sent: list[int] = []
    gather = torch.ops.c10d._allgather_base_.default

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is gather:
                sent.append(args[1].numel())
            return function(*args, **(kwargs or {}))

    seen = []
    for step in range(6):
        loss = nn.functional.mse_loss(model(batch(step, rank)[0]), batch(step, rank)[1])
        loss.backward()
        sent.clear()
        with CommDebugMode() as comm, Sizes():
            guard.step(loss)
            guard.drain()
        optimizer.zero_grad()
        seen.append((comm.get_total_counts(), sum(sent)))
    return seen


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_step_costs_one_gather_whose_size_knows_nothing_of_the_model(wrap: str) -> None:
    assert rank_statistics.NUM_FIELDS <= 18
    plain, with_rows = (1, rank_statistics.NUM_FIELDS), (1, rank_statistics.NUM_FIELDS + 6 * 6)
    expected = [with_rows, plain, plain, plain, with_rows, plain]
    assert run_ranks(_two_sizes, 2, wrap) == [[expected, expected]] * 2


class _Counts(Check):
    """A check of a user's own, due in every third step."""

    name, every = "counts", 3

    def measure(self, view: StepView) -> Tensor:
        return view.rows[:, 4].sum()

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        return Reading(values={"mine/zeros": float(numbers.sum())})


def _with_all_checks(rank: int, world_size: int, wrap: str) -> list[int]:
    model = make_model()
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    every = {"per_parameter_every": 1, "sample_every": 1, "replicas_every": 1}
    guard = StepGuard(model, optimizer, checks=[_Counts()], **every)
    seen = []
    for step in range(4):
        loss = nn.functional.mse_loss(model(batch(step, rank)[0]), batch(step, rank)[1])
        loss.backward()
        with CommDebugMode() as comm:
            guard.step(loss)
            guard.drain()
        optimizer.zero_grad()
        seen.append(comm.get_total_counts())
    records = guard.drain(wait=True)
    assert [bool(record.sampled) for record in records[-2:]] == [True, True]
    assert "mine/zeros" in records[-1].measured
    return seen


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_whatever_is_due_travels_in_the_one_gather(wrap: str) -> None:
    assert run_ranks(_with_all_checks, 2, wrap) == [[1, 1, 1, 1]] * 2

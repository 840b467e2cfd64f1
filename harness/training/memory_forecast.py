"""How much memory one rank of a run will need, before anything is started.

A step is run on tensors without data, as one rank of a process group whose others do not exist, and every
storage that it makes is counted until it is gone. So whatever the model, the optimizer and FSDP2 do is in the
figure, and nothing is in it that they do not do.
"""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.config import TrainConfig
from harness.data import Batch, Shares, Task, fetch
from harness.dist import Deferred, distribute, gradient_sync, local_part
from harness.dist.fake import fake_world
from harness.errors import ConfigError, HarnessError
from harness.stability.before import Before, is_undone
from harness.training.optim import build_optimizers
from harness.training.precision import autocast, resolved_precision
from harness.training.tasks import build_task

__all__ = ["MemoryForecast", "forecast_memory"]

_PARTS = ("parameters", "buffers", "optimizer_state", "gradients", "activations")

_STEPS = 2
"""The first one makes the optimizer's state, which is there during the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes that one rank holds when a step needs most.

    Not in it: what the device's driver, NCCL and the allocator keep for themselves, on a GPU some 1 to 2 GiB,
    and the batches that the loader has ready.
    """

    parameters: int
    """Of this rank's shards."""
    buffers: int
    optimizer_state: int
    gradients: int
    activations: int
    """What forward keeps for backward, what layers gather of other ranks' shards, and temporary results."""

    num_ranks: int
    micro_batch: int
    """Samples."""
    precision: str
    """Of forward and backward."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in _PARTS)

    def text(self) -> str:
        """A table."""
        batch = f"micro-batches of {self.micro_batch} samples in {self.precision}"
        lines = [f"memory of one rank of {self.num_ranks}, {batch}:"]
        for name in (*_PARTS, "total"):
            lines.append(f"  {name.replace('_', ' '):<16}{getattr(self, name) / 2**30:>10.3f} GiB")
        return "\n".join(lines)


def forecast_memory(config: TrainConfig, *, num_ranks: int) -> MemoryForecast:
    """What rank 0 of `num_ranks` will hold. Data is prepared as for a run, and a micro-batch is made.

    Precision auto is taken for bf16 where there is CUDA here, as in a run. What a compiled model saves is not
    known: it is run as it stands.

    Raises:
        ConfigError: the configuration does not fit that many ranks, or what the model, its loss or the
            optimizer does depends on values.
        HarnessError: whatever is wrong with task or data.
    """
    config.check_world(num_ranks)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, device="cpu"))
    task = _task_without_values(config)
    shares = Shares.of(config.loop.global_batch, num_ranks, at_most=config.loop.micro_batch)
    batch = fetch(task.train_data, [index % len(task.train_data) for index in range(shares.micro_batch)])
    precision = resolved_precision(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # constants of the model or its loss
    _make_fake(task.model, fakes)
    is_sharded = config.parallel.strategy == "fsdp"
    optim = dataclasses.replace(config.optim, fused="torch")  # a kernel in Triton takes no fake tensors
    with fake_world(num_ranks) as world:
        # Around a model, DDP adds nothing but its buckets.
        world = world if is_sharded else dataclasses.replace(world, world_size=1)
        step = _Step(
            model=distribute(task.model, config.parallel, world),
            task=task,
            batch={name: fakes.from_tensor(value) for name, value in batch.items()},
            precision=precision,
            num_passes=shares.num_passes,
        )
        optimizers = build_optimizers(step.model, optim, config.muon, is_sharded=is_sharded)
        with fakes, _values_are_not_read():
            live = _LiveStorages(step.model.parameters())
            stays = num_ranks > 1 and not is_sharded
            _run(step, [*optimizers.values()], live, undo=config.guard.undo, gradients_stay=stays)
    return _forecast(step, [*optimizers.values()], live, num_ranks=num_ranks)


def _task_without_values(config: TrainConfig) -> Task:
    """A model may be larger than this machine's memory: parameters get none, if its code allows for that.

    What a run of that name has kept is left alone: it may be one of other settings.
    """
    with tempfile.TemporaryDirectory() as empty:
        config = dataclasses.replace(config, runs_dir=empty)
        if config.task == "hf":  # transformers unties a tied head where tensors have no memory
            return build_task(config)
        try:
            with Deferred():
                return build_task(config)
        except (HarnessError, RuntimeError):  # where something else is wrong it is said again
            return build_task(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Forward and backward of one rank."""

    model: nn.Module
    task: Task
    batch: Batch
    precision: str
    num_passes: int

    def run(self) -> None:
        """Leaves the gradients."""
        for index in range(self.num_passes):
            is_last = index == self.num_passes - 1
            with gradient_sync(self.model, on=is_last), autocast(torch.device("cpu"), self.precision):
                loss = self.task.loss(self.model, self.batch).total
            loss.backward()


@contextmanager
def _values_are_not_read() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ConfigError(
            f"the model, its loss or the optimizer asks for values of tensors ({error.func})",
            rule="memory can be predicted where nothing depends on values",
            remedy="start a short run, and look at the memory in its log",
        ) from error


def _run(
    step: _Step, optimizers: Sequence[Optimizer], live: _LiveStorages, *, undo: str, gradients_stay: bool
) -> None:
    """
    Args:
        undo: The guard's: whose updates it may take back, from a copy.
        gradients_stay: They are views of DDP's buckets.
    """
    if gradients_stay:
        for parameter in step.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with live:
        live.note_all([*step.model.parameters(), *step.model.buffers(), *step.batch.values()])
        for _ in range(_STEPS):
            step.run()
            before = [Before(optimizer) for optimizer in optimizers if is_undone(optimizer, undo)]
            for optimizer in optimizers:
                optimizer.step()
            del before
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=not gradients_stay)


def _forecast(
    step: _Step, optimizers: Sequence[Optimizer], live: _LiveStorages, *, num_ranks: int
) -> MemoryForecast:
    parameters, buffers = _num_bytes(step.model.parameters()), _num_bytes(step.model.buffers())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    state = _num_bytes(value for one in states for value in one.values())
    return MemoryForecast(
        parameters=parameters,
        buffers=buffers,
        optimizer_state=state,
        gradients=live.gradients_at_peak,
        activations=live.peak - parameters - buffers - state - live.gradients_at_peak,
        num_ranks=num_ranks,
        micro_batch=len(next(iter(step.batch.values()))),
        precision=step.precision,
    )


class _LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, while they live."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.peak = 0
        self.gradients_at_peak = 0
        self._parameters = list(parameters)
        self._live = 0
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        """Of each storage its bytes, in a list that its finalizer reads as well."""

    def __enter__(self) -> Self:
        # FSDP2 gives the memory of gathered parameters back by this, which no dispatch mode sees.
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing()  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def note_all(self, tensors: Iterable[Tensor]) -> None:
        """Those that were there before."""
        for tensor in tensors:
            self._note(local_part(tensor).untyped_storage())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation; what it returns is noted."""
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            self._sizes[storage] = size = [0]
            weakref.finalize(storage, self._set, size, 0)
            self._set(size, storage.nbytes())

    def _set(self, size: list[int], num_bytes: int) -> None:
        self._live += num_bytes - size[0]
        size[0] = num_bytes
        if self._live > self.peak:
            self.peak = self._live
            self.gradients_at_peak = _num_bytes(p.grad for p in self._parameters if p.grad is not None)

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        def resize_(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
            self._note(storage)
            resized: torch.UntypedStorage = self._resize(storage, num_bytes)
            self._set(self._sizes[storage], num_bytes)
            return resized

        return resize_


def _num_bytes(tensors: Iterable[Any]) -> int:
    """Of the storages of what this rank holds, each counted once."""
    storages = {local_part(each).untyped_storage() for each in tensors if isinstance(each, Tensor)}
    return sum(storage.nbytes() for storage in storages)


def _make_fake(model: nn.Module, fakes: FakeTensorMode) -> None:
    """Takes the values out of the parameters and buffers of `model`; what is shared stays shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor not in made:
                made[tensor] = _fake(tensor, fakes)
            setattr(module, name, made[tensor])


def _fake(tensor: Tensor, fakes: FakeTensorMode) -> Tensor:
    with fakes:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake

"""Whether an evaluation leaves everything as it was: generators, modes, parameters, buffers, gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from harness.stability.audits.base import Audit, Found, Scene

__all__ = ["EvaluationAudit", "generators_hash"]

_TRACES = {
    1: ("draws random numbers, so that training goes on otherwise than without it", "restore the generators"),
    2: ("leaves modules in another mode than it found them in", "restore the modes"),
    3: ("writes to parameters or buffers", "evaluate under model.eval() and torch.no_grad()"),
    4: ("leaves gradients", "evaluate under torch.no_grad()"),
    5: ("runs dropout or batch norm in training mode", "call model.eval() first"),
}


class EvaluationAudit(Audit):
    """What stands in `StepGuard.watch_evaluation()` has changed something."""

    name = "evaluation"
    remedy = "let an evaluation only read: eval mode, no_grad, and generators put back"

    def __init__(self) -> None:
        self._found: set[int] = set()
        self._is_watched = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Around an evaluation. Host work only."""
        self._is_watched = True
        modes = {module: module.training for module in model.modules()}
        before, left = generators_hash(_device(model)), _Left(model)
        yield
        traces = {
            1: generators_hash(_device(model)) != before,
            2: any(module.training != training for module, training in modes.items()),
            3: left.is_written(),
            4: left.has_other_gradients(),
        }
        self._found |= {trace for trace, is_there in traces.items() if is_there}

    def note_forward(self) -> None:
        """A forward pass within it was made in training mode."""
        self._found.add(5)

    def look(self, scene: Scene) -> Iterable[Found]:
        for trace in sorted(self._found):
            yield Found(value=trace)

    def words(self, value: int, parameter: str | None) -> str:
        what, remedy = _TRACES[value]
        return f"the evaluation {what} ({remedy})"

    def unseen(self, scene: Scene) -> str | None:
        return None if self._is_watched else "no evaluation stands in guard.watch_evaluation()"

    def forget(self) -> None:
        self._found = set()


def generators_hash(device: torch.device) -> int:
    """Of the states of torch's generators for the CPU and for a device. Without a synchronisation: of a CUDA
    generator the host keeps seed and offset."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    digest = hashlib.blake2b(digest_size=7)  # not hash(): ranks compare it
    for state in states:
        digest.update(state.numpy().tobytes())
    return int.from_bytes(digest.digest())


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class _Left:
    """Tensors as an evaluation finds them. The very ones: FSDP2 puts whole parameters in the place of shards
    in the forward pass, writes to them, and may leave them there: of its models buffers alone tell."""

    def __init__(self, model: nn.Module) -> None:
        is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        parameters = [] if is_sharded else list(model.parameters())
        tensors: list[Tensor] = [*parameters, *model.buffers()]
        self._versions = [(tensor, tensor._version) for tensor in tensors]
        self._gradients = [(p, p.grad, None if p.grad is None else p.grad._version) for p in parameters]

    def is_written(self) -> bool:
        """Whether any was written to."""
        return any(tensor._version != version for tensor, version in self._versions)

    def has_other_gradients(self) -> bool:
        """Whether a gradient has come, gone or been written to."""
        return any(
            p.grad is not gradient or (gradient is not None and gradient._version != version)
            for p, gradient, version in self._gradients
        )

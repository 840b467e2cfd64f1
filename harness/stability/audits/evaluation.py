"""Whether an evaluation leaves everything as it was: generators, modes, parameters, buffers, gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harness.dist import local_part
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
        before, versions, gradients = generators_hash(_device(model)), _versions(model), _gradients(model)
        yield
        traces = {
            1: generators_hash(_device(model)) != before,
            2: any(module.training != training for module, training in modes.items()),
            3: _versions(model) != versions,
            4: _gradients(model) != gradients,
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


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return [(id(tensor), local_part(tensor)._version) for tensor in tensors]


def _gradients(model: nn.Module) -> list[tuple[int, int]]:
    gradients = [p.grad for p in model.parameters()]
    return [(id(one), -1 if one is None else local_part(one)._version) for one in gradients]

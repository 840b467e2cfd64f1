"""Numbers on their way from the device to the host, without a wait until somebody needs them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy", "is_capturing"]


class HostCopy:
    """A copy in flight, and the memory for the next ones of its size."""

    def __init__(self, values: Tensor) -> None:
        self._on_cuda = values.is_cuda
        self.numel = values.numel()
        if self._on_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._event = torch.cuda.Event()
        self.start(values)

    def start(self, values: Tensor) -> None:
        """Begins to copy `values`; does not wait. On the CPU it keeps the tensor itself."""
        if self._on_cuda:
            self._host.copy_(values, non_blocking=True)
            self._event.record()
        else:
            self._host = values

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once. Does not synchronise."""
        if not self._on_cuda:
            return True
        return not is_capturing() and self._event.query()

    def wait(self) -> Tensor:
        """The numbers, on the host."""
        if self._on_cuda:
            self._event.synchronize()
        return self._host


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing may be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

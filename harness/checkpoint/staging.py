"""The copy that training waits for: from wherever the tensors live into one reused buffer on the host.

The buffer holds a rank's data in the very order of its file, so that writing is one long stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from harness.checkpoint.adapters import Soundness
from harness.checkpoint.hostcopy import copy_to_host, is_finite
from harness.checkpoint.layout import Part, ShardLayout
from harness.errors import CheckpointError

__all__ = ["Staging", "local"]


class Staging:
    """A host buffer that keeps its memory from save to save; pinned if tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._extremes: dict[str, torch.Tensor] = {}
        """Least and largest element of what came from a GPU; both are NaN if one element is."""
        self.layout = ShardLayout(parts=())

    def fill(self, layout: ShardLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies this rank's parts of `tensors`. Blocks until the copy is complete, GPU copies included."""
        self.layout, self._extremes = layout, {}
        sources = {part.tensor: local(tensors[part.tensor]) for part in layout.parts}
        self._reserve(layout.size_bytes, pinned=any(tensor.is_cuda for tensor in sources.values()))
        for part in layout.parts:
            source = sources[part.tensor]
            if source.is_cuda and _can_be_nonfinite(part) and part.dtype.itemsize > 1:
                real = torch.view_as_real(source) if source.is_complex() else source
                self._extremes[part.tensor] = torch.stack(torch.aminmax(real))
        copy_to_host([(self._view(part), sources[part.tensor]) for part in layout.parts])
        self._extremes = _to_host(self._extremes)

    @property
    def data(self) -> torch.Tensor:
        """The bytes to be written, as `layout` says."""
        return self._buffer[: self.layout.size_bytes]

    def check_sound(self, checked: Mapping[str, Soundness]) -> None:
        """Raises unless all elements of the tensors of these names are what they have to be.

        What came from a GPU was measured there; what came from the CPU is measured now.

        Raises:
            CheckpointError: an element is NaN or, where that is excluded too, infinite.
        """
        for part in self.layout.parts:
            if part.tensor not in checked or not _can_be_nonfinite(part):
                continue
            extremes = self._extremes.get(part.tensor)
            values = self._view(part) if extremes is None else extremes
            if checked[part.tensor] == "finite" and not is_finite(values):
                raise CheckpointError(
                    f"{part.tensor} holds NaN or infinite values",
                    rule="a checkpoint holds finite parameters and optimizer state",
                )
            if not is_finite(values, or_infinite=True):
                raise CheckpointError(
                    f"{part.tensor} holds NaN",
                    rule="no tensor of a model in a checkpoint does, buffers included",
                    remedy="see in which step it arose: the guard undoes what a skipped step did to buffers",
                )

    def _reserve(self, size_bytes: int, *, pinned: bool) -> None:
        if self._buffer.numel() < size_bytes or self._pinned != pinned:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of the old before the new is made
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._pinned = pinned

    def _view(self, part: Part) -> torch.Tensor:
        data = self._buffer[part.start : part.start + part.size_bytes]
        return data.view(part.dtype).view(part.sizes)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: of a DTensor its part, of any other all of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _can_be_nonfinite(part: Part) -> bool:
    return (part.dtype.is_floating_point or part.dtype.is_complex) and math.prod(part.sizes) > 0


def _to_host(extremes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not extremes:
        return {}
    on_host = torch.stack([extreme.double() for extreme in extremes.values()]).cpu()
    return dict(zip(extremes, on_host, strict=True))

"""How the gradient memory is cut into the chunks that the kernels' programs measure.

Legend: P segments, C chunks. All indices count elements from a base address and are int64: segments may be
longer, and lie further from the base, than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "ChunkTable", "chunk_table"]

ALIGNMENT = 16
"""Elements. A full chunk starts at a multiple of this, so that it is read in whole 16-byte vectors."""


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Chunks in the order of their segments. One of full length is aligned, a shorter one lies anywhere."""

    starts: Tensor
    """`[C]` int64."""
    lengths: Tensor
    """`[C]` int64, 1 to block."""
    first_chunk: Tensor
    """`[P + 1]` int64: segment p has the chunks `first_chunk[p]` to `first_chunk[p + 1]`, none if empty."""

    def to(self, device: torch.device) -> ChunkTable:
        """A copy on `device`, on the current stream and without a synchronisation."""
        if device.type == "cpu":
            return self
        fields = (self.starts, self.lengths, self.first_chunk)
        return ChunkTable(*(field.pin_memory().to(device, non_blocking=True) for field in fields))


def chunk_table(starts: Sequence[int], sizes: Sequence[int], *, block: int) -> ChunkTable:
    """Cuts segments, which start at `starts` and have `sizes` elements, into chunks of at most `block`.

    The first chunk of a segment is shortened so that all further ones are aligned.
    """
    begin = torch.tensor(starts, dtype=torch.int64)
    size = torch.tensor(sizes, dtype=torch.int64)
    head = torch.minimum(size, block - begin % ALIGNMENT)
    num_chunks = (size > 0).long() + (size - head + block - 1) // block
    first_chunk = torch.cat([num_chunks.new_zeros(1), num_chunks.cumsum(0)])
    segment = torch.repeat_interleave(num_chunks)
    place = torch.arange(len(segment)) - first_chunk[segment]
    # The chunk at place k > 0 starts after the head and k - 1 blocks; clamping does both cases.
    chunk_starts = begin[segment] + place.clamp(max=1) * head[segment] + (place - 1).clamp(min=0) * block
    ends = torch.minimum(begin[segment] + head[segment] + place * block, (begin + size)[segment])
    return ChunkTable(chunk_starts, ends - chunk_starts, first_chunk)

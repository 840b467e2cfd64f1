"""The arithmetic of the chunk table, for memory that no test could allocate."""

from __future__ import annotations

import itertools
import random

import pytest

from harness.stability.chunks import ALIGNMENT, chunk_table


def spans(starts: list[int], sizes: list[int], block: int) -> list[list[tuple[int, int]]]:
    """Per segment: start and end of each chunk, checked against the table's own promises."""
    table = chunk_table(starts, sizes, block=block)
    chunks = list(zip(table.starts.tolist(), table.lengths.tolist(), strict=True))
    bounds = table.first_chunk.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(chunks)
    assert all(0 < length <= block for _, length in chunks)
    assert all(start % ALIGNMENT == 0 for start, length in chunks if length == block)
    return [
        [(start, start + length) for start, length in chunks[first:last]]
        for first, last in itertools.pairwise(bounds)
    ]


def assert_covered(segment: list[tuple[int, int]], start: int, size: int) -> None:
    """The chunks lie end to end from the segment's start to its end."""
    ends = [start, *(end for _, end in segment)]
    assert [begin for begin, _ in segment] == ends[:-1]
    assert ends[-1] == start + size


@pytest.mark.parametrize("seed", range(20))
def test_chunks_cover_every_segment_end_to_end_and_full_ones_are_aligned(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [
        rng.choice([0, 1, 15, 16, 17, 63, 64, 65, rng.randrange(1000)]) for _ in range(rng.randrange(1, 30))
    ]
    starts = [rng.randrange(10_000) for _ in sizes]
    for segment, start, size in zip(spans(starts, sizes, 64), starts, sizes, strict=True):
        assert_covered(segment, start, size)


def test_a_segment_longer_than_2_to_the_32_elements_is_covered() -> None:
    size = 2**32 + 12_345
    (first, second) = spans([7, 7 + size], [size, 5], 2**20)
    assert_covered(first, 7, size)
    assert_covered(second, 7 + size, 5)


def test_an_empty_segment_has_no_chunk() -> None:
    assert spans([3, 3], [0, 0], 64) == [[], []]
    assert spans([], [], 64) == []

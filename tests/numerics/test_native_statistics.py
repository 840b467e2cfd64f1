"""The compiled loop against the reference: the same numbers, the same bits on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from harness.stability import native, reference, statistics
from harness.stability.layout import MAX_ABS, NUM_ZERO, SUM_SQUARES

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="no C++ compiler that builds for this machine"
)

SIZES = (0, 1, 7, 8, 2047, 2048, 2049, 65536, 150_001)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def values(size: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randn(size, generator=generator) * scale
    tensor[::5] = 0.0
    return tensor.to(dtype)


def assert_measured(rows: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Sums of squares to 2^-21 of what float64 gives: 256 additions in fp32, of which nearly all round; the
    rest exactly."""
    expected = reference.tensor_statistics([tensor.double() for tensor in tensors])
    torch.testing.assert_close(rows[:, SUM_SQUARES], expected[:, SUM_SQUARES], rtol=2**-21, atol=0)
    assert rows[:, MAX_ABS:].equal(expected[:, MAX_ABS:])


@pytest.mark.parametrize("dtype", sorted(native.MEASURED, key=str))
@pytest.mark.parametrize("scale", [1.0, 1e-21, 1e19, 3e38])
def test_it_measures_what_the_reference_does(dtype: torch.dtype, scale: float) -> None:
    tensors = [values(size, scale, dtype) for size in SIZES]
    assert_measured(native.tensor_statistics(tensors), tensors)


@pytest.mark.parametrize("dtype", sorted(native.MEASURED, key=str))
@pytest.mark.parametrize("at", [0, 2048, 150_000])
def test_what_is_not_finite_is_counted_and_left_out_of_the_rest(dtype: torch.dtype, at: int) -> None:
    tensor = values(SIZES[-1], 1.0, dtype)
    tensor[at] = math.nan
    for step, value in enumerate((-math.inf, math.inf, -math.nan), start=1):
        tensor[(at + 31 * step) % len(tensor)] = value
    assert_measured(native.tensor_statistics([tensor]), [tensor])


def test_denormal_and_negative_zeros_are_what_they_are() -> None:
    tensor = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38] * 20)
    row = native.tensor_statistics([tensor])[0]
    assert row[NUM_ZERO] == 40
    assert_measured(row[None], [tensor])


def test_the_bits_hang_neither_on_threads_nor_on_how_a_buffer_is_cut() -> None:
    tensor = values(SIZES[-1], 1.0, torch.float32)
    torch.set_num_threads(1)
    alone = native.tensor_statistics([tensor])
    torch.set_num_threads(2)
    padded = torch.cat([values(4096, 1.0, torch.float32), tensor, torch.full((64,), math.nan)])
    assert native.tensor_statistics([tensor]).equal(alone)
    assert statistics.bucket_statistics(padded, [4096, len(tensor)])[1].equal(alone[0])


def test_a_transposed_gradient_is_measured_as_it_lies() -> None:
    tensor = values(6000, 1.0, torch.float32).reshape(60, 100)
    assert_measured(native.tensor_statistics([tensor.t()]), [tensor])


def test_without_extremes_they_are_not_measured() -> None:
    row = native.tensor_statistics([torch.ones(100)], extremes=False)[0]
    assert row[SUM_SQUARES] == 100
    assert row[[MAX_ABS, NUM_ZERO]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 65536, 150_001])
def test_a_sum_of_integers_is_torchs(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    limits = torch.iinfo(dtype)
    values = torch.randint(limits.min, limits.max, (size,), generator=generator, dtype=dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert native.sum_of_integers(values).equal(values.sum(dtype=torch.int64))


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++", ""])
def test_without_a_compiler_that_works_torch_measures(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("HARNESS_NATIVE", "0")
    native._library.cache_clear()
    tensor = values(1000, 1.0, torch.float32)
    assert statistics.tensor_statistics([tensor]).equal(reference.tensor_statistics([tensor]))
    assert not native.is_available()
    monkeypatch.undo()
    native._library.cache_clear()
    assert native.is_available()

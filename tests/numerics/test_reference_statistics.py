"""The torch path of the gradient statistics against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from harness.stability import reference
from harness.stability.statistics import (
    MAX_ABS,
    NUM_INF,
    NUM_NAN,
    NUM_ZERO,
    SUM_SQUARES,
    bucket_statistics,
    tensor_statistics,
)
from tests.support.oracle import EDGE_VALUES, awkward, oracle_statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = [MAX_ABS, NUM_NAN, NUM_INF, NUM_ZERO]
# About a thousand fp32 additions to each of a dot product's partial sums, at 2^-24 each; squares of bf16
# have so few bits that their roundings hardly cancel (4e-6 seen).
SQUARES_TOLERANCE = 1e-5


def assert_matches_oracle(table: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    truth = oracle_statistics(tensors)
    assert table.dtype == torch.float64
    assert table[:, EXACT].tolist() == truth[:, EXACT].tolist()
    torch.testing.assert_close(table[:, SUM_SQUARES], truth[:, SUM_SQUARES], rtol=SQUARES_TOLERANCE, atol=0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks to a segment without many elements."""
    monkeypatch.setattr(reference, "STREAMED_ELEMENTS", 64)
    monkeypatch.setattr(reference, "CACHED_ELEMENTS_PER_THREAD", 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.usefixtures("small_chunks")
def test_any_mix_of_values_and_segment_lengths_is_measured_exactly(dtype: torch.dtype, seed: int) -> None:
    sizes = [0, 1, 63, 64, 65, 0, 1000, 3, 257, 0]
    flat = awkward(sum(sizes) + 17, seed=seed, dtype=dtype, share=0.003)
    segments = list(flat[: sum(sizes)].split(sizes))
    assert_matches_oracle(bucket_statistics(flat, sizes), segments)
    assert_matches_oracle(tensor_statistics(segments), segments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_the_real_length_lose_no_accuracy(dtype: torch.dtype) -> None:
    flat = torch.randn(2 * reference.STREAMED_ELEMENTS + 4321, generator=torch.Generator().manual_seed(0))
    flat = flat.to(dtype)
    assert_matches_oracle(bucket_statistics(flat, [len(flat)]), [flat])
    norm_only = bucket_statistics(flat, [len(flat)], extremes=False)
    truth = oracle_statistics([flat])
    torch.testing.assert_close(norm_only[:, 0], truth[:, 0], rtol=SQUARES_TOLERANCE, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", range(3))
@pytest.mark.parametrize("extremes", [True, False])
def test_the_largest_and_the_least_values_neither_overflow_nor_vanish(
    dtype: torch.dtype, edge: int, extremes: bool
) -> None:
    values = torch.full((1000,), EDGE_VALUES[dtype][edge], dtype=dtype)
    table = tensor_statistics([values], extremes=extremes)
    truth = oracle_statistics([values])
    torch.testing.assert_close(table[:, SUM_SQUARES], truth[:, SUM_SQUARES], rtol=SQUARES_TOLERANCE, atol=0)
    assert table[0, SUM_SQUARES] > 0
    assert table[0, [NUM_NAN, NUM_INF]].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_segment_without_any_finite_element_has_norm_and_max_zero(bad: float) -> None:
    values = torch.full((300,), bad)
    assert_matches_oracle(tensor_statistics([values]), [values])
    assert tensor_statistics([values])[0, [SUM_SQUARES, MAX_ABS]].tolist() == [0.0, 0.0]


def test_without_extremes_norm_nan_and_inf_are_the_same_and_the_rest_says_not_measured() -> None:
    flat = awkward(5000, seed=1)
    full, cheap = (bucket_statistics(flat, [3000, 2000], extremes=extremes) for extremes in (True, False))
    torch.testing.assert_close(cheap[:, SUM_SQUARES], full[:, SUM_SQUARES], rtol=SQUARES_TOLERANCE, atol=0)
    assert cheap[:, [NUM_NAN, NUM_INF]].tolist() == full[:, [NUM_NAN, NUM_INF]].tolist()
    assert cheap[:, [MAX_ABS, NUM_ZERO]].isnan().all()


def test_negative_zero_is_a_zero_and_not_a_negative_maximum() -> None:
    row = tensor_statistics([torch.full((10,), -0.0)])[0]
    assert row.tolist() == [0.0, 0.0, 0.0, 0.0, 10.0]
    assert not torch.signbit(row).any()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 7).T,
        torch.randn(8, 8)[::2, ::3],
        torch.randn(80)[3::7],
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(3, 1).expand(3, 4),
        torch.nn.Parameter(torch.randn(5)),
    ],
    ids=[
        "channels_last",
        "transposed",
        "strided",
        "every_seventh",
        "scalar",
        "empty",
        "expanded",
        "parameter",
    ],
)
def test_any_memory_layout_is_measured(tensor: torch.Tensor) -> None:
    assert_matches_oracle(tensor_statistics([tensor]), [tensor])


def test_dense_layouts_are_read_in_place() -> None:
    dense = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert reference.flattened(dense).data_ptr() == dense.data_ptr()


def test_float64_gradients_are_measured_in_float64() -> None:
    values = torch.tensor([1e200, 1e-200, 1 + 2**-50], dtype=torch.float64)[1:]
    assert tensor_statistics([values])[0, SUM_SQUARES] == values.square().sum()


def test_measuring_leaves_the_gradients_as_they_are() -> None:
    flat = awkward(4096, seed=3)
    before = flat.clone()
    bucket_statistics(flat, [4096])
    assert torch.equal(flat.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.int64)])
def test_a_sparse_or_integer_gradient_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=f"{tensor.layout}, {tensor.dtype}"):
        tensor_statistics([tensor])


def test_no_tensors_give_an_empty_table() -> None:
    assert tensor_statistics([]).shape == (0, 5)
    assert bucket_statistics(torch.randn(4), []).shape == (0, 5)

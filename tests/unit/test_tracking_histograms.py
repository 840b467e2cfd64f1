"""Histograms agree with numpy's, whatever the dtype, and count what is not finite apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness.tracking.histograms import histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts_and_moments_are_those_of_numpy(dtype: torch.dtype) -> None:
    tensor = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = tensor.float().double().numpy()
    result = histograms({"x": tensor})["x"]
    assert (result["min"], result["max"]) == (values.min(), values.max())
    assert result["num"] == sum(result["counts"]) == 10_000
    np.testing.assert_allclose(result["sum"], values.sum(), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(result["sum_squares"], np.square(values).sum(), rtol=1e-12)
    counts, edges = np.histogram(values, bins=64, range=(values.min(), values.max()))
    np.testing.assert_allclose(result["edges"], edges, rtol=1e-12, atol=1e-15)
    # Values within a rounding of an edge may fall on its other side.
    assert np.abs(np.cumsum(result["counts"]) - np.cumsum(counts)).max() <= (2 if dtype.itemsize > 2 else 200)


def test_what_is_not_finite_is_counted_apart() -> None:
    tensor = torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf, 3.0])
    result = histograms({"x": tensor}, num_bins=2)["x"]
    assert result["counts"] == [1.0, 2.0]
    assert (result["min"], result["max"], result["sum"]) == (1.0, 3.0, 6.0)
    assert (result["num_nan"], result["num_inf"]) == (1, 2)


@pytest.mark.parametrize(
    ("values", "num"),
    [([math.nan, math.inf], 0), ([0.0, 0.0], 2), ([5.0], 1), ([3e38, -3e38], 2), ([1e-45, 0.0], 2)],
)
def test_odd_tensors_have_histograms_too(values: list[float], num: int) -> None:
    result = histograms({"x": torch.tensor(values)})["x"]
    assert result["num"] == num
    assert len(result["edges"]) == len(result["counts"]) + 1
    assert all(map(math.isfinite, result["edges"]))


def test_an_empty_tensor_has_none_and_a_gradient_is_not_needed() -> None:
    assert histograms({"x": torch.zeros(0)}) == {}
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    assert histograms({"p": parameter})["p"]["num"] == 12

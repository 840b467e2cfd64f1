"""The look at the bits finds exactly what `torch.isfinite` finds."""

from __future__ import annotations

import math

import pytest
import torch

from harness.checkpoint.hostcopy import copy_to_host, is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1 << 18, 700_000])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, place: int, value: float) -> None:
    tensor = torch.randn(700_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    tensor[place] = value
    assert not is_finite(tensor)
    assert is_finite(tensor, or_infinite=True) == (not math.isnan(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_sixteen_bits_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert [is_finite(pattern) for pattern in patterns] == torch.isfinite(patterns).tolist()
    numbers = [is_finite(pattern, or_infinite=True) for pattern in patterns]
    assert numbers == (~torch.isnan(patterns)).tolist()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_every_pattern_of_eight_bits_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    assert [is_finite(pattern) for pattern in patterns] == torch.isfinite(patterns.float()).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_and_nothing_at_all_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert is_finite(
        torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, -0.0], dtype=dtype)
    )
    assert is_finite(torch.empty(0, dtype=dtype))


def test_copies_are_exact_for_every_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3000, 2000, generator=generator)
    sources = [wide, wide.t(), wide[::2, 5:], torch.tensor(3.0), torch.empty(0), wide.bfloat16(), wide > 0]
    targets = [torch.empty(source.shape, dtype=source.dtype) for source in sources]
    copy_to_host(list(zip(targets, sources, strict=True)))
    assert all(target.equal(source) for target, source in zip(targets, sources, strict=True))

"""What of the statistics kernels only a GPU can show; their values are judged in `tests/numerics`."""

from __future__ import annotations

import pytest
import torch

from harness.stability import reference
from harness.stability.statistics import bucket_statistics, tensor_statistics
from tests.support.cuda import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_says_what_the_reference_says(dtype: torch.dtype) -> None:
    flat = torch.randn(3_000_001, device="cuda").to(dtype)
    sizes = [1_000_003, 0, 5, 1_999_993]
    table = bucket_statistics(flat, sizes).cpu()
    truth = reference.bucket_statistics(flat.cpu(), sizes)
    assert torch.equal(table[:, 1:], truth[:, 1:])
    torch.testing.assert_close(table[:, 0], truth[:, 0], rtol=1e-5, atol=0)


def test_measuring_does_not_wait_for_the_device() -> None:
    tensors = [torch.randn(1000, device="cuda"), torch.randn(77, device="cuda").bfloat16()]
    with no_synchronisation():
        for _ in range(2):
            bucket_statistics(tensors[0], [400, 600])
            tensor_statistics(tensors)


def test_ten_thousand_measurements_give_the_same_bits() -> None:
    flat = torch.randn(1_000_000, device="cuda")
    first = bucket_statistics(flat, [300_000, 700_000])
    differing = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(10_000):
        differing |= (bucket_statistics(flat, [300_000, 700_000]) != first).any()
    assert not differing.item()

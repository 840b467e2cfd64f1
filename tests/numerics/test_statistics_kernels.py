"""The Triton kernels against the float64 oracle: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
import torch

from harness.stability import kernels
from harness.stability.chunks import ChunkTable
from harness.stability.statistics import MAX_ABS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES
from tests.support.oracle import EDGE_VALUES, awkward, oracle_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = [MAX_ABS, NUM_NAN, NUM_INF, NUM_ZERO]
# fp32 additions in a tree: a few roundings of 2^-24.
SQUARES_TOLERANCE = 1e-6
# A chunk is added up before it is known whether its squares fit; interpreted, NumPy warns of that.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning"
)
ODD_SIZES = [0, 1, 15, 16, 17, 0, 1000, 3, 257, 512, 511, 0]


def assert_matches_oracle(table: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    truth = oracle_statistics([tensor.cpu() for tensor in tensors])
    table = table.cpu()
    assert table.dtype == torch.float64
    assert table[:, EXACT].tolist() == truth[:, EXACT].tolist()
    torch.testing.assert_close(table[:, SUM_SQUARES], truth[:, SUM_SQUARES], rtol=SQUARES_TOLERANCE, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 256, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_segments_of_any_length_and_alignment_are_measured_exactly(
    dtype: torch.dtype, block: int, seed: int
) -> None:
    flat = awkward(sum(ODD_SIZES) + 17, seed=seed, dtype=dtype, share=0.003).to(DEVICE)
    segments = list(flat[: sum(ODD_SIZES)].split(ODD_SIZES))
    assert_matches_oracle(kernels.bucket_statistics(flat, ODD_SIZES, block=block), segments)


def test_a_buffer_that_is_itself_misaligned_is_measured_exactly() -> None:
    flat = awkward(3001, seed=5).to(DEVICE)[1:]
    assert_matches_oracle(kernels.bucket_statistics(flat, [3000], block=256), [flat])


@pytest.mark.parametrize("seed", range(3))
def test_tensors_of_several_dtypes_and_layouts_that_share_no_buffer_are_measured_exactly(seed: int) -> None:
    tensors = [
        awkward(size, seed=10 * seed + place, dtype=DTYPES[place % 3]).to(DEVICE)
        for place, size in enumerate(ODD_SIZES)
    ]
    tensors += [tensors[6].view(10, 100).T, tensors[8][3:200:7]]
    assert_matches_oracle(kernels.tensor_statistics(tensors, block=256), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", range(3))
def test_the_largest_and_the_least_values_neither_overflow_nor_vanish(dtype: torch.dtype, edge: int) -> None:
    values = torch.full((1000,), EDGE_VALUES[dtype][edge], dtype=dtype, device=DEVICE)
    assert_matches_oracle(kernels.bucket_statistics(values, [1000], block=512), [values])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_segment_without_any_finite_element_has_norm_and_max_zero(bad: float) -> None:
    values = torch.full((300,), bad, device=DEVICE)
    assert_matches_oracle(kernels.bucket_statistics(values, [300], block=128), [values])


def test_the_same_gradients_give_the_same_bits() -> None:
    flat = awkward(10_000, seed=7).to(DEVICE)
    first, second = (kernels.bucket_statistics(flat, [7000, 3000], block=512) for _ in range(2))
    assert torch.equal(first, second)


def test_more_chunks_than_are_added_at_once() -> None:
    flat = awkward(16 * (kernels.ROWS_AT_ONCE + 5), seed=8).to(DEVICE)
    assert_matches_oracle(kernels.bucket_statistics(flat, [len(flat)], block=16), [flat])


def test_without_extremes_they_are_not_measured_and_the_rest_is_the_same() -> None:
    flat = awkward(5000, seed=1).to(DEVICE)
    full, cheap = (
        kernels.bucket_statistics(flat, [3000, 2000], extremes=extremes, block=1024)
        for extremes in (True, False)
    )
    kept = [SUM_SQUARES, NUM_NAN, NUM_INF]
    assert torch.equal(cheap[:, kept], full[:, kept])
    assert cheap[:, [MAX_ABS, NUM_ZERO]].isnan().all()


def test_nothing_to_measure_gives_an_empty_table() -> None:
    assert kernels.bucket_statistics(torch.randn(4, device=DEVICE), []).shape == (0, 5)
    assert kernels.tensor_statistics([]).shape == (0, 5)
    assert kernels.tensor_statistics([torch.empty(0, device=DEVICE)]).tolist() == [[0.0] * 5]


def test_the_table_is_made_anew_only_when_an_address_or_a_size_changes() -> None:
    tensors = [torch.randn(100, device=DEVICE) for _ in range(3)]
    kernels._cached_table.cache_clear()
    for _ in range(3):
        kernels.tensor_statistics(tensors)
    assert kernels._cached_table.cache_info().misses == 1
    kernels.tensor_statistics([*tensors[:2], torch.randn(101, device=DEVICE)])
    assert kernels._cached_table.cache_info().misses == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="address space without memory behind it exists on the CPU only")
def test_elements_beyond_2_to_the_31_are_reached() -> None:
    far, block = 2**31 + 48, 64
    reserved = mmap.mmap(-1, 4 * (far + block), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(reserved, dtype=torch.float32)
    values[far : far + block] = 3.0
    table = ChunkTable(torch.tensor([0, far]), torch.tensor([block, block]), torch.tensor([0, 1, 2]))
    rows = kernels.launch(values, table, extremes=True, block=block).tolist()
    assert rows == [[0.0, 0.0, 0.0, 0.0, 64.0], [9.0 * block, 3.0, 0.0, 0.0, 0.0]]


COMPILE_FOR_CUDA = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from harness.stability import kernels

aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
for kind, warps in (("*fp32", kernels.WARPS[4]), ("*i16", kernels.WARPS[2]), ("*fp16", kernels.WARPS[2])):
    source = ASTSource(
        kernels._measure_chunk,
        signature={"base": kind, "starts": "*i64", "lengths": "*i64", "partial": "*fp64", "num_chunks": "i32",
                   "BLOCK": "constexpr"},
        constexprs={"BLOCK": kernels.BLOCK}, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert "ld.global.v4" in ptx, "full chunks are not read in vectors"
    assert ".ftz" not in ptx, "denormals are flushed"
source = ASTSource(
    kernels._add_chunks,
    signature={"partial": "*fp64", "first_chunk": "*i64", "result": "*fp64", "num_chunks": "i32",
               "EXTREMES": "constexpr", "ROWS": "constexpr"},
    constexprs={"EXTREMES": True, "ROWS": kernels.ROWS_AT_ONCE})
assert "atom" not in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


def test_the_kernels_compile_for_an_h100_with_vector_loads_and_without_flushing_denormals() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_CUDA],
        env={
            "TRITON_INTERPRET": "0",
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr

"""The loops of `native.cpp`, which take a third of torch's time; built where a C++ compiler is found.

It is compiled once, in about a second, into the user's cache. Without a compiler, or with `HARNESS_NATIVE=0`,
the statistics on the CPU are `reference`'s: they differ by up to some 1e-5. So all ranks of a
group use the loop, or none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import operator
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from harness.atomic import replacing
from harness.dist.collectives import all_gather
from harness.env import cache_dir, compiler, wants_native
from harness.stability import reference
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_ZERO
from harness.stability.rank_words import on_ranks

__all__ = ["MEASURED", "is_available", "sum_of_integers", "tensor_statistics", "use_alike"]

MEASURED = frozenset({torch.float32, torch.bfloat16})
"""Element types that the loop knows."""

DTYPE = operator.attrgetter("dtype")

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILE = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-Wno-psabi")
LINK = ("-shared",)
"""Without an OpenMP library: it shall be the one, and use the threads, that torch has loaded."""
COMPILE_S = 60

logger = logging.getLogger(__name__)

_is_off = False
"""Another rank has it not."""


def is_available() -> bool:
    """Whether the loop is to be used on this machine. The first call may compile."""
    return not _is_off and _library() is not None


def use_alike(group: dist.ProcessGroup | None) -> None:
    """Has all ranks of `group` use the loop, or none: their statistics are compared. One collective on the
    host, on all of them; none without a group."""
    global _is_off
    has_it = torch.tensor([int(is_available())])
    have = all_gather(has_it, group=group).flatten().tolist()
    without = [rank for rank, has in enumerate(have) if not has]
    if not without or len(without) == len(have):
        return
    _is_off = True
    if group is not None and group.rank() == 0:
        logger.warning(
            "the compiled loop for gradient statistics is not there%s (no C++ compiler, or "
            "HARNESS_NATIVE=0): no rank uses it, and they take three times as long on the CPU",
            on_ranks(without, len(have)),
        )


def tensor_statistics(tensors: Sequence[Tensor], *, extremes: bool = True) -> Tensor:
    """Statistics of tensors of the types in `MEASURED`: `[len(tensors), 5]` float64, the same bits on any
    number of threads. For where `is_available`.

    Args:
        extremes: False gives NaN for max-abs and the number of zeros, as elsewhere; here they cost nothing.
    """
    library = _library()
    assert library is not None
    count = len(tensors)
    # One question to hundreds of tensors is a part of a step's host time: maps ask in C.
    flat = tensors
    if not all(map(Tensor.is_contiguous, tensors)):
        flat = [reference.flattened(tensor) for tensor in tensors]  # kept: these may be copies
    rows = torch.empty(count, NUM_COLUMNS, dtype=torch.float64)
    library.harness_statistics(
        (ctypes.c_void_p * count)(*map(Tensor.data_ptr, flat)),
        (ctypes.c_int64 * count)(*map(Tensor.numel, flat)),
        (ctypes.c_uint8 * count)(*[dtype is torch.bfloat16 for dtype in map(DTYPE, flat)]),
        ctypes.c_int64(count),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(rows.data_ptr()),
    )
    if not extremes:
        rows[:, MAX_ABS] = rows[:, NUM_ZERO] = torch.nan
    return rows


def sum_of_integers(values: Tensor) -> Tensor:
    """0-d int64: the sum of a contiguous integer tensor on the CPU, exact modulo 2^64. For where
    `is_available`."""
    library = _library()
    assert library is not None
    total = library.harness_sum_of_bits(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(values.numel()),
        ctypes.c_int64(values.element_size()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return torch.tensor(total, dtype=torch.int64)


@functools.cache
def _library() -> ctypes.CDLL | None:
    cxx = compiler()
    if cxx is None or not wants_native():
        return None
    try:
        path = _built(cxx)
        library = ctypes.CDLL(str(path))
        library.harness_statistics.restype = None
        library.harness_sum_of_bits.restype = ctypes.c_int64
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logger.info("gradient statistics by torch, %s did not build the faster loop: %s", cxx, error)
        return None
    return library


def _built(cxx: str) -> Path:
    """The compiled loop, from the cache or made now.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, or not be kept.
    """
    folder = cache_dir() / "native"
    path = folder / f"statistics-{_key(cxx)}.so"
    if path.is_file() and path.stat().st_uid == os.getuid():  # nobody else's code is run
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, replacing(path.with_suffix(".o")) as compiled:
        _run(cxx, *COMPILE, "--compile", str(SOURCE), "-o", str(compiled))
        _run(cxx, *LINK, str(compiled), "-o", str(unfinished))
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=COMPILE_S, stdin=subprocess.DEVNULL, capture_output=True)


def _key(cxx: str) -> str:
    """Differs wherever another binary is needed: a home folder may be shared by unequal machines."""
    parts = (SOURCE.read_bytes(), repr((cxx, COMPILE, LINK, platform.machine(), _processor())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> list[str]:
    """Model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]

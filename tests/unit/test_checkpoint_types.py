"""What is saved comes back equal and of the same type, or saving refuses it by its path."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import math
import pathlib
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from harness.checkpoint import Checkpointer
from harness.errors import CheckpointError


def counting(**values: int) -> defaultdict[str, int]:
    counts: defaultdict[str, int] = defaultdict(int)
    counts.update(values)
    return counts


KEPT: dict[str, Any] = {
    "containers": [
        Counter({30: 1, "a": -2}),
        OrderedDict(b=1, a=2),
        counting(a=1),
        defaultdict(None, {1: 2}),
        {1, "a"},
        frozenset({(1, 2)}),
        deque([1, 2], maxlen=3),
        deque(),
    ],
    "keys": [
        {1: "a", "1": "b"},
        {True: 1},
        {None: 1},
        {(1, "a"): 2},
        {1.5: 2},
        {b"x": 1},
        {"": 1},
        {"$x": 1},
        {"$tensor": "x", "$dict": [[1, 2]]},
        {frozenset({1}): 0},
        {np.int64(3): 1},
    ],
    "numbers": [
        -0.0,
        math.nan,
        -math.nan,
        struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0],
        math.inf,
        -math.inf,
        5e-324,
        1 + 2j,
        complex(math.nan, -0.0),
        2**63,
        -(2**200),
        10**5000,
        True,
    ],
    "bytes and strings": [b"\0\xff", bytearray(b"ab"), "\ud800", "ÿ\n"],
    "empty": {"a": {}, "b": [], "c": (), "d": [[], ()], "e": {"f": [{}]}, "g": set()},
    "numpy numbers": [
        np.float64(0.1),
        np.float32("nan"),
        np.float16(-0.0),
        np.int8(3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1 + 2j),
        np.datetime64("2020-01-01T10:00"),
        np.timedelta64(3, "D"),
    ],
    "arrays": [
        np.arange(3),
        np.array(3.5),
        np.zeros((0, 3)),
        np.array([2**64 - 1], dtype=np.uint64),
        np.arange(3, dtype=">f4"),
        np.zeros((0, 2), dtype=">i2"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6)[::-2],
        np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"),
    ],
    "torch": [
        torch.Size([1, 2]),
        torch.bfloat16,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        torch.ones(0, 3),
        torch.tensor(1, dtype=torch.uint16),
    ],
    "paths that look alike": {
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "1": torch.ones(2),
        1: torch.zeros(2),
    },
}


class Pair(NamedTuple):
    a: int
    b: float


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Plain:
    x: int = 1


class Word(str):
    pass


class Own(dict[str, int]):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "named tuple": (Pair(1, 2.0), "Pair"),
    "enumeration": (Colour.RED, "Colour"),
    "dataclass": (Plain(), "Plain"),
    "subclass of str": (Word("x"), "Word"),
    "subclass of dict": (Own(a=1), "Own"),
    "namespace": (argparse.Namespace(a=1), "Namespace"),
    "factory of one's own": (defaultdict(lambda: 1), "makes values by <function"),
    "long double": (np.longdouble(1) / 3, "longdouble"),
    "array of long doubles": (np.ones(2, np.longdouble), "ndarray of"),
    "array of objects": (np.array([{}], dtype=object), "ndarray of object"),
    "structured array": (np.zeros(2, dtype=[("a", "i4")]), "ndarray of"),
    "matrix": (np.ma.array([1]), "MaskedArray"),
    "string of numpy": (np.str_("x"), "str_"),
    "time": (datetime.datetime(2020, 1, 1), "datetime"),
    "path": (pathlib.PurePosixPath("x"), "PurePosixPath"),
    "decimal": (decimal.Decimal("1.1"), "Decimal"),
    "function": (len, "builtin_function"),
    "sparse tensor": (torch.eye(2).to_sparse(), "sparse"),
    "tensor without data": (torch.ones(2, device="meta"), "meta"),
}


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and not isinstance(one, np.generic):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, complex) and not isinstance(one, np.generic):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, np.ndarray | np.generic):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, defaultdict | deque):
        extra = "default_factory" if isinstance(one, defaultdict) else "maxlen"
        if getattr(one, extra) != getattr(other, extra):
            return False
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_saved_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    state = {"x": {"v": None}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": {"v": KEPT[name]}})
        checkpointer.wait()
        checkpointer.load(state)
    assert same(KEPT[name], state["x"]["v"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_come_back_as_something_else_is_refused_by_its_path(name: str, tmp_path: Path) -> None:
    value, said = REFUSED[name]
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"x/v/1/0 is a .*Let state_dict\(\) return") as caught,
    ):
        checkpointer.save(1, {"x": {"v": {1: [value]}}})
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_schedulers_own_state_is_one_that_it_goes_on_with(tmp_path: Path) -> None:
    def make() -> torch.optim.lr_scheduler.MultiStepLR:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3, 3])

    one, other = make(), make()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"schedule": one})
        checkpointer.wait()
        checkpointer.load({"schedule": other})
    assert same(one.state_dict()["milestones"], other.state_dict()["milestones"])
    assert other._get_closed_form_lr() == [1.0]

"""What goes into a record comes out of it: exactly, or with an error that names the value."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from harness.errors import TrackingError
from harness.runlog.codec import MAX_ELEMENTS, decode, encode


def there_and_back(values: dict[Any, Any]) -> dict[str, Any]:
    record = decode(encode("step", values, attempt=0, step=3, time=1.5))
    assert record is not None
    assert (record.kind, record.attempt, record.step, record.time) == ("step", 0, 3, 1.5)
    return record.values


def test_every_finite_float_keeps_its_bits() -> None:
    rng = random.Random(7)
    floats = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)]
    finite = {str(i): x for i, x in enumerate(floats) if math.isfinite(x)}
    back = there_and_back(finite)
    assert {k: struct.pack("<d", v) for k, v in back.items()} == {
        k: struct.pack("<d", v) for k, v in finite.items()
    }


def test_nan_and_infinities_come_back_and_none_stays_none() -> None:
    back = there_and_back({"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1.0})
    assert math.isnan(back["a"])
    assert (back["b"], back["c"], back["d"], back["e"]) == (math.inf, -math.inf, None, 1.0)


def test_nonfinite_values_inside_nested_details_come_back_in_their_places() -> None:
    details = {"rows": [{"loss": math.inf, "rank": 0}, {"loss": 2.0, "rank": 1}], "nonfinite": [["nan", "x"]]}
    assert there_and_back(details) == details


def test_finite_values_whose_sum_overflows_are_kept() -> None:
    values = {"a": 1.7e308, "b": 1.7e308, "c": -1.0}
    assert there_and_back(values) == values


def test_an_infinity_and_its_negative_do_not_hide_one_another() -> None:
    assert there_and_back({"a": math.inf, "b": -math.inf}) == {"a": math.inf, "b": -math.inf}


def test_numbers_of_numpy_torch_and_the_standard_library_are_taken_at_their_value() -> None:
    values = {
        "float32": np.float32(0.1),
        "int64": np.int64(-7),
        "bool": np.bool_(True),
        "longdouble": np.longdouble(0.5),
        "tensor": torch.tensor(0.1),
        "bf16": torch.tensor(0.1, dtype=torch.bfloat16, requires_grad=True),
        "nan": torch.tensor(math.nan),
        "array": np.array([1.0, math.inf]),
        "decimal": Decimal("0.25"),
        "fraction": Fraction(1, 4),
        "huge": 2**70,
    }
    back = there_and_back(values)
    assert back["float32"] == float(np.float32(0.1))
    assert (back["int64"], back["bool"], back["longdouble"]) == (-7, True, 0.5)
    assert back["tensor"] == float(np.float32(0.1))
    assert back["bf16"] == 0.10009765625
    assert math.isnan(back["nan"])
    assert back["array"] == [1.0, math.inf]
    assert (back["decimal"], back["fraction"], back["huge"]) == (0.25, 0.25, 2.0**70)


@dataclass
class Setting:
    rate: float
    path: Path


def test_hyperparameters_of_any_usual_kind_become_plain_data() -> None:
    back = there_and_back({"setting": Setting(math.inf, Path("a/b")), 3: ("x", {"y"}), "dtype": "bf16"})
    assert back == {"setting": {"rate": math.inf, "path": "a/b"}, "3": ["x", ["y"]], "dtype": "bf16"}


def test_hostile_names_and_texts_come_back_or_are_escaped() -> None:
    names = ["../../etc/passwd", "line\nbreak", "null\0byte", "x" * 100_000, "", "a.b/c", '"quoted"', "ünï😀"]
    assert list(there_and_back(dict.fromkeys(names, 1.0))) == names
    assert there_and_back({"lone \ud800 surrogate": "and \udcff"}) == {
        "lone \\ud800 surrogate": "and \\udcff"
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "object"),
        (1 + 2j, "complex"),
        (Decimal("sNaN"), "sNaN"),
        (10**400, "no float can hold"),
        (torch.zeros(MAX_ELEMENTS + 1), str(MAX_ELEMENTS + 1)),
        (torch.eye(2).to_sparse(), "Tensor"),
    ],
)
def test_what_a_log_cannot_hold_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(TrackingError, match=said) as caught:
        there_and_back({"fine": 1.0, "outer": {"inner": value}})
    assert "'outer/inner'" in str(caught.value)


def test_a_structure_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(TrackingError, match="nested deeper"):
        there_and_back(loop)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"kind":"step"}',
        b"\0\0\0\0",
        b'{"kind":"s","attempt":0,"step":1,"time":1}',
        b'{"kind":"s","attempt":null,"step":1,"time":1,"values":{}}',
        b'{"kind":"s","attempt":0,"step":"1","time":1,"values":{}}',
        b'{"kind":"s","attempt":0,"step":1,"time":1,"values":[]}',
        b'{"kind":"s","attempt":0,"step":1,"time":1,"values":{},"nonfinite":[["nan","gone","x"]]}',
    ],
)
def test_a_damaged_line_is_no_record(line: bytes) -> None:
    assert decode(line) is None


def test_no_prefix_of_a_line_is_a_record() -> None:
    line = encode("step", {"a": math.nan, "b": "text"}, attempt=1, step=2, time=3.0)
    assert all(decode(line[:end]) is None for end in range(len(line) - 1))


def random_json(draw: random.Random, depth: int) -> Any:
    """Now and then longer or deeper than a log allows."""
    if depth == 0 or draw.random() < 0.1:
        return draw.choice([None, True, 0, -(2**63), 2**64 - 1, 10**30, 0.5, "text", "ü\0", [], {}, [0] * 9])
    if draw.random() < 0.005:
        return [draw.choice([0.5, "a", [], None])] * (MAX_ELEMENTS + draw.choice([0, 1]))
    inner = [random_json(draw, depth - 1) for _ in range(draw.choice([0, 1, 1, 1, 1, 2]))]
    return inner if draw.random() < 0.5 else {f"k{number}": one for number, one in enumerate(inner)}


@pytest.mark.parametrize("kind", ["run", "event", "ranks", "of another program"])
def test_what_is_decoded_can_be_encoded_and_what_is_encoded_decoded(kind: str) -> None:
    draw = random.Random(kind)
    num_taken = 0
    for _ in range(150):
        values = {"a": random_json(draw, draw.choice([3, 14, 15, 16, 17])), "b": 1}
        fields = {"kind": kind, "attempt": 0, "step": 1, "time": 1.0, "values": values}
        record = decode(json.dumps(fields).encode())
        try:
            line = encode(kind, values, attempt=0, step=1, time=1.0)
        except TrackingError:
            assert record is None
            continue
        assert decode(line) == record
        num_taken += record is not None
        if record is not None:
            encode(kind, record.values, attempt=0, step=1, time=1.0)
    assert num_taken > 10 or kind == "ranks"


def num_calls(action: Callable[[], object]) -> int:
    """Calls, of Python and of C, and of generators to go on: what a check costs on any machine."""
    counted = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return counted


HISTOGRAM = {"counts": [0.5] * 64, "edges": [0.25] * 65, "min": 0, "max": 1, "num": 1, "sum": 1}
LONG_VALUES: dict[str, tuple[str, Any, int]] = {
    "empty lists": ("event", {"a": [[] for _ in range(1 << 18)]}, 1),
    "empty lists in lists": ("event", {"a": [[[] for _ in range(50_000)] for _ in range(5)]}, 250_006),
    "histograms": ("histogram", {str(n): {**HISTOGRAM, "sum_squares": 1} for n in range(2000)}, 2000),
    "ranks": ("ranks", {str(n): [0.5] * 60_000 for n in range(16)}, 16),
}
"""Kind, values, and how many rows or containers have to be looked into."""


@pytest.mark.parametrize("name", LONG_VALUES)
def test_checking_a_line_takes_no_call_for_each_of_its_elements(name: str) -> None:
    kind, values, num_rows = LONG_VALUES[name]
    line = orjson.dumps({"kind": kind, "attempt": 0, "step": 1, "time": 1.0, "values": values})
    assert (decode(line) is None) == (name == "empty lists")
    assert num_calls(lambda: decode(line)) < 30 * num_rows + 100

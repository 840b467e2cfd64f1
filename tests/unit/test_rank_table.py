"""What thousands of ranks said of a step, without a row for each of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from harness.config import GuardConfig
from harness.records import RankRow
from harness.stability.checks.rows import RowsCheck
from harness.stability.optimizers import Optimizers
from harness.stability.rank_statistics import LOSS_SUM, NUM_FIELDS, TOKENS
from harness.stability.rank_table import RankTable, rank_column
from harness.training.journal import ranks_are_due


def table(num_ranks: int = 5) -> RankTable:
    numbers = np.random.default_rng(0).uniform(1.0, 9.0, (num_ranks, NUM_FIELDS)).round(2)
    numbers[1, [LOSS_SUM, TOKENS]] = 0.0
    return RankTable(numbers, divisor=4.0, counts_tokens=True)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RankRow)])
def test_a_column_is_the_field_of_all_rows_bit_for_bit(field: str) -> None:
    rows = table()
    expected = [float(getattr(row, field)) for row in rows]
    if field not in ("stop_requested", "num_saves"):  # sent as they are, whole numbers in a run
        np.testing.assert_array_equal(rank_column(rows, field), expected)
    np.testing.assert_array_equal(rank_column(tuple(rows), field), expected)


def test_it_is_a_sequence_like_the_tuple_of_its_rows() -> None:
    rows = RankTable(np.ones((4, NUM_FIELDS)), divisor=2.0, counts_tokens=False)
    assert rows == tuple(rows)
    assert rows != tuple(rows)[:3]
    assert rows[1:3] == tuple(rows)[1:3]
    assert (rows[-1].rank, rows[3].num_tokens, rows[3].grad_norm) == (3, 0, 0.5)
    with pytest.raises(IndexError):
        rows[4]


def test_a_rank_without_tokens_has_no_loss() -> None:
    assert math.isnan(table()[1].loss)


def test_no_row_is_made_for_what_the_loop_asks_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankTable, "_row", lambda self, rank: pytest.fail("a row was made"))
    for field in ("loss", "grad_norm", "compute_s", "data_wait_s", "stop_requested", "num_saves"):
        assert len(rank_column(table(), field)) == 5


@pytest.mark.parametrize(("num_ranks", "every"), [(1, 10), (512, 10), (1_000_000, 0)])
def test_rows_of_each_parameter_are_left_out_where_all_ranks_would_hold_too_many(
    num_ranks: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    check = RowsCheck(GuardConfig(per_parameter_every=10))
    check.attach(model, Optimizers([torch.optim.SGD(model.parameters())]))
    assert check.every == every


@pytest.mark.parametrize(
    ("num_ranks", "steps"), [(1, []), (2, [0, 1, 2, 3]), (512, [0, 1, 2, 3]), (513, [1, 3])]
)
def test_the_log_takes_what_thousands_of_ranks_say_in_some_steps_only(
    num_ranks: int, steps: list[int]
) -> None:
    assert [step for step in range(4) if ranks_are_due(num_ranks, step, every=2)] == steps
    in_incidents = [ranks_are_due(num_ranks, step, every=2, is_notable=True) for step in range(4)]
    assert in_incidents == [num_ranks > 1] * 4

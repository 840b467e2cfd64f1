"""Which ranks are late, from what all ranks say of their steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.config import StragglerConfig
from harness.errors import ConfigError
from harness.records import RankRow
from harness.training.straggler import Window, described


def rows(compute_s: list[float], data_s: list[float] | None = None) -> list[RankRow]:
    waits = data_s or [0.0] * len(compute_s)
    zeros = {"loss": 0.0, "num_tokens": 1, "grad_norm": 1.0, "max_abs": 1.0}
    counts = {"num_nan": 0, "num_inf": 0, "num_zero": 0}
    return [
        RankRow(rank=rank, compute_s=seconds, data_wait_s=wait, **zeros, **counts)
        for rank, (seconds, wait) in enumerate(zip(compute_s, waits, strict=True))
    ]


def late(*steps: list[RankRow]) -> list[tuple[int, str]]:
    window = Window(0.75)
    for step in steps:
        window.add(step)
    return [(one.rank, one.why) for one in window.late()]


def test_a_rank_below_the_share_of_the_fastest_is_a_straggler_and_one_above_is_none() -> None:
    assert late(*[rows([1.0, 1.3, 1.4])] * 10) == [(2, "straggler")]


def test_the_latest_comes_first() -> None:
    assert late(*[rows([1.0, 2.0, 3.0])] * 10) == [(2, "straggler"), (1, "straggler")]


def test_a_rank_that_is_late_once_is_none_however_late_that_is() -> None:
    assert late(*[rows([1.0, 1.0])] * 9, rows([1.0, 60.0])) == []


def test_noise_that_hits_each_rank_now_and_then_is_none() -> None:
    draw = np.random.default_rng(0)
    steps = [rows(list(draw.lognormal(0, 0.15, 64))) for _ in range(100)]
    assert late(*steps) == []


def test_a_rank_whose_batches_come_late_is_no_straggler() -> None:
    assert late(*[rows([1.0, 1.0], [0.0, 0.5])] * 10) == [(1, "data-bound rank")]
    assert late(*[rows([1.0, 1.0], [5.0, 5.2])] * 10) == []  # all are, alike
    assert late(*[rows([0.1, 1.0], [0.2, 0.0])] * 10) == [(1, "straggler")]  # nobody waits for the other one


def test_one_late_batch_does_not_hide_that_a_rank_is_slow() -> None:
    assert late(*[rows([1.0, 2.0])] * 9, rows([1.0, 2.0], [0.0, 30.0])) == [(1, "straggler")]


def test_what_a_machine_does_not_tell_of_a_slow_rank_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotImplementedError("can't find current frequency file")

    monkeypatch.setattr("psutil.cpu_freq", refuse)
    told = described(torch.device("cpu"))
    assert told.startswith("host ")
    assert told.endswith("cpu, its clocks and load are not known: can't find current frequency file")


def test_a_window_that_was_cleared_has_forgotten() -> None:
    window = Window(0.75)
    window.add(rows([1.0, 2.0]))
    window.clear()
    assert (window.num_steps, window.seconds) == (0, 0.0)


@pytest.mark.parametrize("setting", [{"below_frac": 1.0}, {"below_frac": 0.0}, {"window_s": 0.0}])
def test_settings_that_cannot_be_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        StragglerConfig(**setting)

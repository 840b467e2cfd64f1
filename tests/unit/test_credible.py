"""Which finite gradient norms cannot be meant, and which sequences of legitimate ones must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from harness.stability.credible import RANK, WINDOW, CredibleNorm

ABSURD = 1.5e20


def absurd_steps(bound: CredibleNorm, norms: Sequence[float]) -> list[int]:
    """The steps that are found absurd; a norm that is not finite stands for a step that is not trusted."""
    found = []
    for step, norm in enumerate(norms):
        trusted = torch.tensor(math.isfinite(norm))
        if bound.check(torch.tensor(norm, dtype=torch.float64), trusted)[0]:
            found.append(step)
    return found


@pytest.mark.parametrize("after", [RANK, 20, 500])
@pytest.mark.parametrize("level", [1e-6, 1.0, 1e6])
def test_an_absurd_norm_is_found_as_soon_as_there_is_something_to_go_by(after: int, level: float) -> None:
    norms = [level] * after + [1.1e4 * level, level, 1.5e20 * level, 0.9e4 * level]
    assert absurd_steps(CredibleNorm(1e4), norms) == [after, after + 2]


def test_the_first_steps_of_a_run_may_be_anything() -> None:
    assert absurd_steps(CredibleNorm(1e4), [10.0 ** (5 * step) for step in range(RANK)]) == []


@pytest.mark.parametrize(
    "norms",
    [
        [1.0] * 20 + [1e-12] * 500 + [1.0] * 20,
        [1.0] * 20 + [0.0] * 500 + [1.0] * 20,
        [0.0] * 500 + [1.0] * 20,
        ([1.0] + [1e-3] * 50) * 20,
        [1.0] * 20 + [1e-3] * 50 + [1.0] * 20,
        [1e4 * 0.9**step + 1 for step in range(300)],
        [1e-6 * 1.1**step for step in range(300)],
        [math.nan] * 100 + [1.0] * 20,
        [1.0] * 20 + [math.inf] * 100 + [1.0] * 20,
        [1.0] * 100 + [500.0] * 100,
    ],
    ids=[
        "padding",
        "no gradient",
        "no gradient at first",
        "mostly small",
        "small for a while",
        "falling",
        "rising",
        "NaN at first",
        "Inf between",
        "another level",
    ],
)
def test_legitimate_norms_are_never_absurd(norms: list[float]) -> None:
    assert absurd_steps(CredibleNorm(1e4), norms) == []


def test_a_run_may_begin_with_batches_that_teach_nothing() -> None:
    norms = [1e-7] * 40 + [5.0, 0.3, 60.0, 2.0]
    assert absurd_steps(CredibleNorm(1e4, max_norm=1.0), norms) == []
    assert absurd_steps(CredibleNorm(1e4, max_norm=1.0), [*norms, 1.1e2]) == [44]


def test_absurd_norms_do_not_become_usual_by_repetition() -> None:
    bound = CredibleNorm(1e4)
    assert absurd_steps(bound, [1.0] * WINDOW + [ABSURD] * 50) == list(range(WINDOW, WINDOW + 50))
    assert absurd_steps(bound, ([1.0] * 3 + [ABSURD]) * 50) == list(range(3, 200, 4))


def test_nothing_is_left_out_for_ever() -> None:
    found = absurd_steps(CredibleNorm(1e4), [1.0] * WINDOW + [1e6] * 200)
    assert found == list(range(WINDOW, WINDOW + WINDOW - RANK + 1))


@pytest.mark.parametrize("ratio", [None, 0])
def test_it_can_be_switched_off(ratio: float | None) -> None:
    assert absurd_steps(CredibleNorm(ratio), [1.0] * 100 + [ABSURD]) == []


def test_a_loaded_memory_goes_on_where_it_was_saved_and_at_its_old_address() -> None:
    saved, other = CredibleNorm(1e4), CredibleNorm(1e4)
    absurd_steps(saved, [1.0] * 20)
    absurd_steps(other, [1e9] * 20)
    state, address = saved.state_dict(), other._on(torch.device("cpu")).data_ptr()
    absurd_steps(saved, [1e3] * 20)
    other.load_state_dict(state)
    assert other._on(torch.device("cpu")).data_ptr() == address
    assert absurd_steps(other, [1.1e4, 1.0]) == [0]
    other.load_state_dict({})
    assert absurd_steps(other, [ABSURD]) == []

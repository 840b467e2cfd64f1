"""The learning rate over a run."""

import pytest

from harness.config import ScheduleConfig
from harness.training.schedule import learning_rate

PEAK = 2.0
STEPS = 100


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [learning_rate(step, peak=PEAK, num_steps=STEPS, schedule=schedule) for step in range(STEPS + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_the_warm_up_is_linear_moves_at_once_and_ends_at_the_peak(kind: str) -> None:
    values = rates(kind=kind, warmup_steps=10)
    assert values[:11] == pytest.approx([PEAK * (step + 1) / 11 for step in range(11)])
    assert max(values) == PEAK


def test_cosine_ends_at_its_floor_and_is_half_way_down_in_the_middle() -> None:
    values = rates(kind="cosine", warmup_steps=0, min_lr_frac=0.1)
    assert values[STEPS] == pytest.approx(0.1 * PEAK)
    assert values[STEPS // 2] == pytest.approx(PEAK * 0.55)


def test_wsd_stays_at_the_peak_until_its_linear_decay() -> None:
    values = rates(kind="wsd", warmup_steps=10, decay_frac=0.2, min_lr_frac=0.0)
    assert set(values[10:81]) == {PEAK}
    assert values[90] == pytest.approx(PEAK / 2)
    assert values[STEPS] == 0.0


def test_constant_stays() -> None:
    assert set(rates(kind="constant", warmup_steps=0)) == {PEAK}

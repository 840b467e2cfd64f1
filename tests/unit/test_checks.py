"""A check of one's own: measured on the device every so many steps, and read with the step's record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import StepGuard, TrainConfig
from harness.config import GuardConfig
from harness.data import Task
from harness.errors import ConfigError, TaskError
from harness.runlog.reader import open_run
from harness.stability import Check, Reading
from harness.stability.checks.base import Arrived, StepView
from tests.support.own_tasks import own_config, points_task, run_loop

HERE = "tests.unit.test_checks"


class LargestWeight(Check):
    """The largest weight of all; one above `limit` is an incident."""

    name = "largest_weight"

    def __init__(self, config: GuardConfig | None = None, *, every: int = 2, limit: float = 100.0) -> None:
        self.every, self.limit = every, limit

    def measure(self, view: StepView) -> Tensor:
        return torch.stack([parameter.detach().abs().amax() for parameter in view.layout.parameters])

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        largest = numbers.amax(0)
        name = arrived.layout.names[int(largest.argmax())]
        wrong = f"a weight of {largest.amax():.3g}" if largest.amax() > self.limit else None
        return Reading(
            values={"mine/largest_weight": float(largest.amax())}, reason=wrong, parameter=wrong and name
        )


class Broken(LargestWeight):
    name = "broken"

    def measure(self, view: StepView) -> Tensor:
        raise ValueError("no ruler")


def points(config: TrainConfig) -> Task:
    return points_task()


def records_of(*checks: Check | str, num_steps: int = 4, **settings: Any) -> list[Any]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    nn.init.constant_(model.weight, 5.0)
    guard = StepGuard(model, optimizer, checks=checks, max_norm=None, **settings)
    for _ in range(num_steps):
        model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.zeros(1)
        guard.step(torch.tensor(1.0))
    return guard.drain(wait=True)


def test_what_a_check_measures_is_in_the_records_of_its_steps() -> None:
    records = records_of(LargestWeight())
    assert [record.measured for record in records] == [
        {"mine/largest_weight": 5.0},
        {},
        {"mine/largest_weight": 3.0},
        {},
    ]
    assert [record.reason for record in records] == [None] * 4


def test_a_check_can_make_an_incident_and_name_who_is_to_blame() -> None:
    records = records_of(LargestWeight(limit=4.0))
    assert [record.reason for record in records] == ["a weight of 5", None, None, None]
    assert records[0].parameter == "weight"
    assert records[0].verdict == "apply"


def test_a_check_by_its_name_and_one_that_is_never_due() -> None:
    records = records_of(f"{HERE}:LargestWeight", LargestWeightNever())
    assert [*records[0].measured] == ["mine/largest_weight"]


class LargestWeightNever(Broken):
    name = "never"

    def __init__(self) -> None:
        super().__init__(every=0)


def test_a_check_that_fails_is_named() -> None:
    with pytest.raises(TaskError, match=r"the check broken\.measure raised ValueError: no ruler"):
        records_of(Broken())


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ([LargestWeight(), LargestWeight()], "two checks are called 'largest_weight'"),
        ([f"{HERE}:points"], "returned Task"),
        ([f"{HERE}:LargestWait"], "id you mean tests.unit.test_checks:LargestWeight"),
    ],
)
def test_what_is_no_check_is_refused(checks: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        records_of(*checks)


def test_a_run_logs_what_its_checks_find(tmp_path: Path) -> None:
    run_loop(own_config(tmp_path, points, f"--guard.checks=[{HERE}:LargestWeight]"))
    logged = open_run(tmp_path / "runs" / "own").scalars("mine/largest_weight")
    assert logged.steps.tolist() == [0, 2, 4]


def test_a_run_refuses_a_wrong_check_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guard\.checks"):
        run_loop(own_config(tmp_path, points, "--guard.checks=[no.such:check]"))
    assert not (tmp_path / "runs").exists()

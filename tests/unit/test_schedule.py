"""The learning rate over a run."""

import itertools
from pathlib import Path

import pytest

from harness.config import ScheduleConfig, TrainConfig, parse_arguments, to_dict
from harness.dashboard import forks
from harness.tracking import RunLog
from harness.training import train
from harness.training.directory import prepare_directory
from harness.training.schedule import describe_schedule, learning_rate
from tests.support.runs import tiny_config

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


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 10, STEPS + 20])
def test_a_run_longer_than_its_schedule_goes_on_at_the_rate_it_ended_with(
    kind: str, warmup_steps: int
) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps)  # type: ignore[arg-type]
    values = [learning_rate(s, peak=PEAK, num_steps=STEPS, schedule=schedule) for s in range(4 * STEPS)]
    changes = [abs(after - before) for before, after in itertools.pairwise(values)]
    assert max(changes[STEPS:]) <= max(changes[:STEPS])
    assert set(values[2 * STEPS :]) == {PEAK if kind == "constant" else values[STEPS]}


@pytest.mark.parametrize(
    ("arguments", "length", "before", "said"),
    [
        ([], 400, 400, "cosine over 400 steps, 0.00165 at step 210"),
        (
            ["--loop.steps=800"],
            400,
            400,
            "stays at 0.0003 from step 400 on (--schedule.steps 800 makes it 0.00262",
        ),
        (["--loop.steps=800"], 800, 400, "0.00262 at step 210, where --schedule.steps 400 gave 0.00165"),
        (["--loop.steps=300"], 400, 400, "0.000744 in the last, 299"),
        (["--schedule.kind=constant", "--loop.steps=800"], 400, 400, "constant at 0.003"),
    ],
)
def test_the_rate_of_an_attempt_is_said(arguments: list[str], length: int, before: int, said: str) -> None:
    line = describe_schedule(parse_arguments(arguments), step=210, length=length, length_before=before)
    assert said in line


@pytest.mark.parametrize("logged", [{}, {"schedule_steps": 5}, {"schedule_steps": "damaged"}])
def test_an_attempt_that_is_killed_before_its_first_checkpoint_lengthens_no_schedule(
    logged: dict[str, object], tmp_path: Path
) -> None:
    def attempt(steps: int) -> int:
        config = parse_arguments([f"--runs_dir={tmp_path}", "--name=run", f"--loop.steps={steps}"])
        directory, length = prepare_directory(config)
        if steps == 5:
            RunLog(directory, info={"config": to_dict(config), **logged}).close()
        return length

    assert [attempt(steps) for steps in (5, 9, 9)] == [5, 5, 5]


def test_a_fork_of_more_steps_keeps_its_parents_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tiny_config(tmp_path, "--loop.steps=5", "--loop.eval_every=0")
    train(parent)
    started: list[TrainConfig] = []
    monkeypatch.setattr(forks, "start", lambda config, **_: started.append(config))
    directory = tmp_path / "runs/tiny"
    forks.fork(directory, "longer", {"loop.steps": 9}, step=5)
    forks.fork(directory, "stretched", {"loop.steps": 9, "schedule.steps": 9}, step=5)
    assert [config.schedule.steps for config in started] == [5, 9]
    assert [config.loop.steps for config in started] == [9, 9]

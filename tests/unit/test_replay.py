"""What a replay says of a step: where its NaN or Inf began, whose it is, and what is not as it was."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.cli.main import main
from harness.errors import CheckpointError, ReplayError
from harness.replay import replay
from harness.replay.compare import Parting
from harness.replay.history import read_history
from harness.replay.judgement import judge_sound
from harness.replay.probe import Probe
from harness.replay.ranks import RanksInTurn
from harness.replay.story import story
from harness.replay.trace import Tracer
from harness.runlog import events
from harness.runlog.names import EventName
from harness.runlog.paths import incident_dir
from harness.runlog.reader import open_run
from harness.runlog.writer import RunLog
from tests.support import broken_tasks
from tests.support.own_tasks import Points, outlying, own_config, run_loop
from tests.support.replayed import check_task, train_task


# The others are in scripts/trial_replay.py.
@pytest.mark.parametrize("name", ["hidden_log_of_zero", "softmax_of_nothing", "poisoned"])
def test_the_operation_and_the_samples_are_named(name: str, tmp_path: Path) -> None:
    train_task(0, 1, str(tmp_path), name, "fp32")
    assert check_task(tmp_path / "runs" / "own", name).problems == []


class PairOnly(broken_tasks.MaskedMean):
    def forward(self, h: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert len(h) > 1
        return super().forward(h, x, mask)


def test_samples_that_cannot_be_run_alone_leave_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken_tasks, "MaskedMean", PairOnly)
    train_task(0, 1, str(tmp_path), "empty_mean", "fp32")
    found = replay(tmp_path / "runs" / "own")
    assert found.reproduced
    assert "cannot be run by themselves" in story(found)
    assert found.judgement is not None
    assert found.judgement.kind == "unknown"


def test_memory_that_nothing_has_written_is_named() -> None:
    model = nn.Linear(2, 2)
    tracer = Tracer(model, [])
    deterministic = torch.utils.deterministic
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with tracer:
            out = torch.empty(2, 2)
            out[0] = 1.0
            loss = model(out).sum()
    finally:
        torch.use_deterministic_algorithms(False)
    producer = tracer.way_to([loss.detach()], usual=set())[0]
    assert not isinstance(producer, str)
    assert producer.name == "aten.empty.memory_format"


def test_what_is_bad_and_reaches_nothing_is_not_blamed() -> None:
    model = nn.Linear(2, 2)
    tracer = Tracer(model, [])
    with tracer:
        x = torch.zeros(2, 2)
        x.log()  # nobody uses it
        loss = (model(torch.ones(2, 2)) / torch.zeros(1)).sum()
    producer = tracer.way_to([loss.detach()], usual=set())[0]
    assert not isinstance(producer, str)
    assert producer.name == "aten.div.Tensor"
    assert Path(str(producer.place.file)).name == Path(__file__).name


def test_memory_that_held_nan_in_the_run_only_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as within:
        within.setattr(broken_tasks.Unwritten, "before", torch.nan)
        train_task(0, 1, str(tmp_path), "unwritten", "fp32")
    found = replay(tmp_path / "runs" / "own")
    assert not found.reproduced
    assert found.judgement is not None
    assert found.judgement.kind == "kernel"
    producer = found.causes[0].producer
    assert not isinstance(producer, str | None)
    assert (producer.name, producer.place.module) == ("aten.empty_like.default", "middle")
    assert "memory that nobody has written" in story(found)


def test_the_sample_that_carries_a_large_gradient_is_named(tmp_path: Path) -> None:
    more = ["--loop.steps=40", "--guard.spike=skip", "--guard.spike_warmup=3", "--checkpoint.every=4"]
    run = run_loop(own_config(tmp_path, outlying, *more))
    positions = [run.loader.step_indices(8 * step) for step in range(40)]
    step = next(step for step, samples in enumerate(positions) if 17 in samples and step > 3)
    found = replay(tmp_path / "runs" / "own", step)
    assert found.reproduced, found.differences
    assert found.carriers is not None
    assert [one.sample for one in found.carriers.outstanding] == [17]
    assert "Samples that stand out: 17" in story(found)


def test_a_step_in_order_is_compared_with_the_log(tmp_path: Path) -> None:
    run_loop(own_config(tmp_path, broken_tasks.sound, "--loop.steps=5", "--checkpoint.every=2"))
    directory = tmp_path / "runs" / "own"
    found = replay(directory, 3)
    assert (found.reproduced, found.started_from, found.causes) == (True, 2, [])
    with pytest.raises(ReplayError, match="no step 9"):
        replay(directory, 9)
    with pytest.raises(ReplayError, match="no incident"):
        replay(directory)


def test_another_model_does_not_reproduce_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code has changed since: the replay says that, and where the two part."""
    train_task(0, 1, str(tmp_path), "log_of_zero", "fp32")
    monkeypatch.setattr(broken_tasks.Log, "forward", lambda self, h, x, mask: h + x)
    found = replay(tmp_path / "runs" / "own", steps_before=10)
    assert not found.reproduced
    assert "does not reproduce" in story(found)


def test_the_command_leaves_the_story_beside_the_incident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_task(0, 1, str(tmp_path), "empty_mean", "fp32")
    directory = tmp_path / "runs" / "own"
    assert main(["replay", str(directory), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    folder = incident_dir(directory, printed["step"])
    assert json.loads((folder / "replay.json").read_text()) == printed
    assert "aten.div.Tensor" in (folder / "story.md").read_text()


def test_what_cannot_be_written_down_is_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_loop(own_config(tmp_path, broken_tasks.sound, "--loop.steps=3", "--incidents.enabled=false"))
    directory = tmp_path / "runs" / "own"
    (directory / "incidents").write_text("no folder")
    assert main(["replay", str(directory), "--step=1"]) == 0
    printed = capsys.readouterr()
    assert "Step 1 of own" in printed.out
    assert "from the beginning of the run, 2 steps x 1 ranks" in printed.err
    assert "cannot be written" in printed.err


def test_a_long_way_from_the_beginning_is_gone_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["harness.replay.replay"], "MOST_UNASKED", 2)
    run_loop(own_config(tmp_path, broken_tasks.sound, "--loop.steps=4"))
    directory = tmp_path / "runs" / "own"
    with pytest.raises(ReplayError, match="--from-start"):
        replay(directory, 2)
    said: list[str] = []
    assert replay(directory, 2, from_start=True, say=said.append).reproduced
    assert said == ["from the beginning of the run, 3 steps x 1 ranks"]


@pytest.mark.parametrize(
    ("num_steps", "num_same", "notes", "kind"),
    [
        (3, 3, [], "hardware"),
        (0, 0, [], "unknown"),
        (3, 2, [], "unknown"),
        (3, 3, ["the data is another"], "unknown"),
    ],
)
def test_the_hardware_is_named_only_where_all_else_was_compared(
    num_steps: int, num_same: int, notes: list[str], kind: str
) -> None:
    way = Parting(num_steps=num_steps, num_same_bits=num_same, largest=0.0, step=None)
    judged = judge_sound([], way=way, notes=notes)
    assert (judged.kind, judged.sure) == (kind, "likely" if kind == "hardware" else "open")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_optimizer_is_the_runs(strategy: str, tmp_path: Path) -> None:
    """FSDP2's shards are trained by an SGD that is not fused, which may differ in the last bit."""
    config = own_config(tmp_path, broken_tasks.sound, f"--parallel.strategy={strategy}")
    ranks = RanksInTurn(
        config, world_size=2, device=torch.device("cpu"), precision="fp32", schedule_steps=6, faults=()
    )
    assert ranks.optimizers[0].defaults["fused"] == (strategy == "ddp")


def test_other_data_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_loop(own_config(tmp_path, outlying, "--loop.steps=2"))
    monkeypatch.setattr(Points, "fingerprint", lambda self: "another", raising=False)
    found = replay(tmp_path / "runs" / "own", 1)
    assert any("data was" in note and "another" in note for note in found.notes)


def test_an_incident_of_the_machines_is_not_taken_for_a_step(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with RunLog(directory) as log:
        log.write("run", {"config": {"name": "run"}, "world_size": 1}, step=0)
        for step in range(3):
            log.write("step", {"train/loss": 1.0, "train/grad_norm": 1.0}, step=step)
        slow = events.Incident(kind="straggler", summary="rank 1 is slow", rank=1)
        log.write("event", slow.to_values(), step=2)
    with pytest.raises(ReplayError, match="straggler"):
        read_history(directory, None)
    history = read_history(directory, 2)
    assert (history.incident, history.unplayable) == (None, ("straggler",))
    with RunLog(directory) as log:
        bad = events.Incident(kind="spike", summary="spike", verdict="skip", reason="spike")
        log.write("event", bad.to_values(), step=1)
        log.write("event", slow.to_values(), step=1)
        log.write("event", slow.to_values(), step=2)
    for step in (None, 1):
        history = read_history(directory, step)
        assert history.step == 1
        assert history.incident is not None
        assert history.incident.kind == "spike"


@pytest.mark.parametrize("step", [9, 13])
def test_a_run_that_was_rolled_back_is_replayed_on_either_branch(step: int, tmp_path: Path) -> None:
    """Faults at steps 8 and 9 roll the run back, over data; one at step 13 is of the new branch."""
    struck = [f"{{step: {at}, rank: 0, kind: nan, target: loss}}" for at in (8, 9, 13)]
    more = [
        "--loop.steps=16",
        "--loop.micro_batch=4",
        "--optim.name=adamw",
        "--checkpoint.every=2",
        "--checkpoint.keep_last=20",
        "--checkpoint.healthy_after=1",
        "--guard.max_consecutive_skips=1",
        "--guard.lag_steps=0",
        "--guard.rollback_skip_steps=3",
        "--guard.max_skip_frac=1",
        f"--faults=[{', '.join(struck)}]",
    ]
    run_loop(own_config(tmp_path, broken_tasks.sound, *more))
    directory = tmp_path / "runs" / "own"
    assert len(list(open_run(directory).events(EventName.ROLLBACK))) == 1
    found = replay(directory, step, steps_before=6)
    assert found.reproduced, found.differences
    assert found.parting.is_same
    assert found.remembered.num_steps > 1
    assert found.remembered.differs is None


def test_other_random_numbers_than_remembered_are_named(tmp_path: Path) -> None:
    train_task(0, 1, str(tmp_path), "poisoned", "fp32")
    directory = tmp_path / "runs" / "own"
    found = replay(directory, steps_before=3)
    assert (found.remembered.num_steps, found.remembered.differs) == (found.history.step + 1, None)
    assert "are what it remembers" in story(found)
    path = incident_dir(directory, found.history.step) / "rank-0.json"
    box = json.loads(path.read_text())
    box["steps"][0]["rng"]["torch"] = "another"
    path.write_text(json.dumps(box))
    again = replay(directory, steps_before=3)
    assert str(again.remembered.differs).endswith("begins with other random numbers on rank 0 (torch's)")


@pytest.mark.parametrize(("undo", "step"), [("always", 0), ("never", 1)])
def test_an_update_that_is_not_finite_is_the_optimizers(undo: str, step: int, tmp_path: Path) -> None:
    """Taken back in its own step; or found in the weights of the next one."""
    settings = ("--loop.steps=2", "--optim.name=sgd", "--optim.lr=1e39", f"--guard.undo={undo}")
    with contextlib.suppress(CheckpointError):  # which do not hold such weights
        run_loop(own_config(tmp_path, broken_tasks.sound, *settings))
    found = replay(tmp_path / "runs" / "own", step)
    assert found.differences == []
    assert found.record.undone == (undo == "always")
    assert found.judgement is not None
    assert found.judgement.kind == ("optimization" if undo == "always" else "state")
    assert story(found)


def in_turn(folder: Path, *settings: str) -> RanksInTurn:
    """Two ranks at their first step."""
    return RanksInTurn(
        own_config(folder, broken_tasks.sound, *settings),
        world_size=2,
        device=torch.device("cpu"),
        precision="fp32",
        schedule_steps=0,
        faults=[],
    )


def test_a_micro_batch_by_itself_is_what_it_was_in_its_step(tmp_path: Path) -> None:
    """Dropout draws the same: rank 1, with one micro-batch less, made a blank pass before."""
    ranks = in_turn(tmp_path, "--loop.global_batch=5", "--loop.micro_batch=1")
    played = ranks.play(apply=False)
    assert [(one.rank, one.number) for one in played.micro_batches] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    probe = Probe(ranks)
    losses = [probe.run(one).loss for one in played.micro_batches]
    assert sum(losses) / played.record.num_tokens == pytest.approx(played.record.loss, rel=1e-6)


def test_a_run_is_replayed_with_what_lies_in_its_own_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path / "moved" / "run") as log:
        log.write("run", {"config": {"name": "other", "runs_dir": "runs"}, "world_size": 1}, step=0)
        log.write("step", {"train/loss": 1.0, "train/grad_norm": 1.0}, step=0)
    monkeypatch.chdir(tmp_path / "moved" / "run")
    for directory in (tmp_path / "moved" / "run", Path(), Path("..", "run")):
        config = read_history(directory, 0).config
        assert Path(config.runs_dir, config.name) == tmp_path / "moved" / "run"

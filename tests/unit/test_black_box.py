"""What a rank remembers of its last steps, and what is kept of an incident."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness import Callback, TrainConfig
from harness.checkpoint import Rng
from harness.data import Loader, Task
from harness.dist import World
from harness.errors import InstabilityError, LostRankError, TaskError, TrackingError
from harness.runlog.incident_files import (
    INCIDENT,
    STACKS,
    IncidentFile,
    RankFile,
    incident_steps,
    rank_path,
    read_incident,
    read_rank,
    read_rng,
)
from harness.runlog.paths import incident_dir
from harness.runlog.reader import open_run
from harness.tracking.incidents import show_incident
from harness.tracking.mirrors import MirrorHandle
from harness.tracking.overview import show_run
from harness.training import train
from harness.training.black_box import BlackBox, open_black_box
from harness.training.progress import Phase, Progress
from harness.training.rng_states import HeldRng, rng_from_plain
from tests.support.own_tasks import ALONE, Points, own_config, points_task


@pytest.fixture(autouse=True)
def no_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("harness.tracking.recorder.start_mirrors", lambda *_: MirrorHandle(None))


NAN = "{step: 3, kind: nan, micro_batch: 1}"


class Named(Points):
    def source_of(self, index: int) -> str:
        return f"points.csv#{index}"


class Drops(nn.Module):
    """Draws from torch's generator in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.drawn: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return self.linear(x)


def named(config: TrainConfig) -> Task:
    return points_task(train_data=Named())


MODELS: list[Drops] = []


def dropping(config: TrainConfig) -> Task:
    MODELS.append(Drops())
    return points_task(model=MODELS[-1])


def loses_memory(config: TrainConfig) -> Task:
    class Greedy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.grad is not None or self.calls == 2:
                torch.empty(1 << 50)
            self.calls += self.training
            return super().forward(x)

        calls = 0

    return points_task(model=Greedy(4, 1))


def fails(config: TrainConfig) -> Task:
    class Broken(Points):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 7:
                raise ValueError("row 7 is torn")
            return super().__getitem__(index)

        def fingerprint(self) -> str:
            return "broken"

    return points_task(train_data=Broken())


def kept(folder: Path, step: int) -> tuple[IncidentFile, RankFile]:
    found = incident_dir(folder / "runs" / "own", step)
    return read_incident(found), read_rank(found, 0)


def test_a_bad_step_leaves_its_samples_by_name_and_what_is_needed_to_make_it_again(tmp_path: Path) -> None:
    more = (
        f"--faults=[{NAN}]",
        "--loop.micro_batch=4",
        "--checkpoint.every=2",
        "--incidents.save_batch=true",
    )
    train(own_config(tmp_path, named, *more))
    what, mine = kept(tmp_path, 3)
    assert (what.kind, what.verdict, what.rank, what.micro_batch) == ("non-finite gradient", "skip", 0, 1)
    assert what.parameter == "weight"
    assert what.culprit_parameters["weight"].num_nan == 1
    assert (what.world_size, what.num_micro_batches, what.micro_batch_samples, what.position) == (1, 2, 4, 24)
    assert what.culprits[0].samples == what.samples[0][1] == mine.at(3).samples[1]  # type: ignore[union-attr]
    assert what.sources == {str(index): f"points.csv#{index}" for index in what.culprits[0].samples}
    assert what.checkpoint == "step-00000002"
    assert what.versions["torch"] == torch.__version__
    batch = load_file(rank_path(incident_dir(tmp_path / "runs" / "own", 3), "batch-rank-{}.safetensors", 0))
    assert sorted(batch) == ["micro_batch_1/x", "micro_batch_1/y"]
    rows = [round(float(x) * 40) for x in batch["micro_batch_1/x"][:, 0]]
    assert rows == list(what.culprits[0].samples)
    run_dir = tmp_path / "runs" / "own"
    said = show_incident(run_dir, 3)
    for words in ("micro-batch 1, weight", f"points.csv#{rows[0]}", "checkpoints/step-00000002", "rank 0:"):
        assert words in said
    assert "incidents/step-00000003" in show_run(run_dir)
    (event,) = open_run(run_dir).events("incident")
    assert event.details["sample_sources"] == [f"points.csv#{row}" for row in rows]
    with pytest.raises(TrackingError, match="kept are those of the steps 3"):
        show_incident(run_dir, 4)
    assert [step.step for step in mine.steps][:4] == [0, 1, 2, 3]
    assert mine.steps[0].loss is not None
    assert mine.steps[0].step_s is not None


def test_the_random_states_of_a_step_give_what_it_drew(tmp_path: Path) -> None:
    MODELS.clear()
    train(own_config(tmp_path, dropping, "--faults=[{step: 3, kind: nan}]"))
    folder = incident_dir(tmp_path / "runs" / "own", 3)
    drawn = MODELS[-1].drawn[-6:]
    for step in range(4):
        Rng().load_state_dict(rng_from_plain(read_rng(folder, 0, step)))
        assert float(torch.rand(())) == drawn[step]


def test_all_generators_come_back(tmp_path: Path) -> None:
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(11)
    np.random.standard_normal()  # leaves half a pair behind
    held = HeldRng.take(torch.device("cpu"))
    first = (random.gauss(), np.random.standard_normal(), float(torch.rand(())))
    Rng().load_state_dict(rng_from_plain(held.plain()))
    assert (random.gauss(), np.random.standard_normal(), float(torch.rand(()))) == first


def test_folders_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    faults = ", ".join(f"{{step: {step}, kind: nan}}" for step in (1, 3, 5, 7, 9))
    more = (f"--faults=[{faults}]", "--loop.steps=12", "--guard.max_skip_frac=0.9")
    train(own_config(tmp_path, named, *more, "--incidents.keep=2"))
    assert incident_steps(tmp_path / "runs" / "own") == [7, 9]
    train(own_config(tmp_path, named, *more, "--name=small", "--incidents.max_bytes=1000"))
    assert incident_steps(tmp_path / "runs" / "small") == [9]


def test_a_run_of_incidents_keeps_the_first_ones(tmp_path: Path) -> None:
    faults = ", ".join(f"{{step: {step}, kind: nan}}" for step in range(1, 40, 2))
    train(own_config(tmp_path, named, f"--faults=[{faults}]", "--loop.steps=40", "--guard.max_skip_frac=0.9"))
    assert incident_steps(tmp_path / "runs" / "own") == list(range(1, 17, 2))


def test_nothing_is_kept_where_that_is_switched_off(tmp_path: Path) -> None:
    train(
        own_config(tmp_path, named, f"--faults=[{NAN}]", "--loop.micro_batch=4", "--incidents.enabled=false")
    )
    assert incident_steps(tmp_path / "runs" / "own") == []


def test_a_run_that_its_guard_ends_has_kept_why(tmp_path: Path) -> None:
    with pytest.raises(InstabilityError):
        train(own_config(tmp_path, named, "--faults=[{step: 3, kind: nan}]", "--guard.nonfinite=stop"))
    assert kept(tmp_path, 3)[0].verdict == "stop"


def test_a_crash_keeps_the_step_its_samples_and_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="row 7 is torn"):
        train(own_config(tmp_path, fails, "--loop.steps=50"))
    (step,) = incident_steps(tmp_path / "runs" / "own")
    what, mine = kept(tmp_path, step)
    assert (what.kind, what.rank, what.verdict) == ("crash", 0, None)
    assert 7 in what.samples[0][0]
    assert "row 7 is torn" in (mine.error or "")
    assert mine.phase == "waiting for the batch"
    stacks = rank_path(incident_dir(tmp_path / "runs" / "own", step), STACKS, 0).read_text()
    assert "ValueError: row 7 is torn" in stacks


def test_a_failed_allocation_says_what_memory_was_taken_by(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="allocate"):
        train(own_config(tmp_path, loses_memory))
    what, _ = kept(tmp_path, 2)
    assert what.kind == "out of memory"
    folder = incident_dir(tmp_path / "runs" / "own", 2)
    assert b"parameter_bytes" in (folder / "memory-rank-0.json").read_bytes()


class FailsToEvaluate(Callback):
    def on_eval(self, run: Any, step: int, metrics: Any) -> None:
        if step > 4:
            raise ZeroDivisionError("of this test")


def test_a_crash_outside_a_step_blames_no_sample(tmp_path: Path) -> None:
    config = own_config(tmp_path, named, "--loop.eval_every=3", "--incidents.save_batch=true")
    with pytest.raises(TaskError, match="of this test"):
        train(config, callbacks=[FailsToEvaluate()])
    what, _ = kept(tmp_path, 5)
    assert (what.kind, what.rank) == ("crash", 0)
    assert (what.samples, what.culprits[0].samples, dict(what.sources)) == ((), (), {})
    assert not list(incident_dir(tmp_path / "runs" / "own", 5).glob("batch-*"))
    assert show_incident(tmp_path / "runs" / "own", 5)


def test_a_crash_while_a_run_is_resumed_is_kept_at_the_step_that_it_resumes_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(own_config(tmp_path, named, "--loop.steps=4"))
    monkeypatch.setattr("harness.training.loop.rehearse", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train(own_config(tmp_path, named, "--loop.steps=6"))
    assert incident_steps(tmp_path / "runs" / "own") == [4]
    assert kept(tmp_path, 4)[0].samples == ()


def test_folders_of_hangs_count_and_the_newest_is_named_and_stays(tmp_path: Path) -> None:
    run_dir, progress = tmp_path / "runs" / "own", Progress()
    hangs = [run_dir / "incidents" / f"hang-20250101-00000{number}" for number in range(5)]
    for hang in hangs:
        hang.mkdir(parents=True)
        (hang / "rank-0.txt").write_text("stacks")
    config = own_config(tmp_path, named, "--incidents.keep=3")
    loader = Loader(Named(), global_batch=8)
    box = open_black_box(config, ALONE, progress, run_dir, loader, Named())
    box.begin(2, 16)
    progress.enter(Phase.FORWARD, 2)
    error = LostRankError("the run hangs")
    error.ranks, error.stacks = (0,), str(hangs[1])
    box.end_hung(error)
    left = {path.name for path in (run_dir / "incidents").iterdir()}
    assert len(left) == 3
    assert {"step-00000002", hangs[1].name} < left
    what = read_incident(incident_dir(run_dir, 2))
    assert (what.kind, what.stacks, what.rank) == ("hang", hangs[1].name, 0)
    assert not rank_path(incident_dir(run_dir, 2), STACKS, 0).exists()
    assert f"incidents/{hangs[1].name}" in show_incident(run_dir, 2)


def raised_in(name: str) -> RuntimeError:
    """As torch raises it, out of the file `name`."""
    code = compile("def fail(): raise RuntimeError('Connection closed by peer')", name, "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    with pytest.raises(RuntimeError) as caught:
        scope["fail"]()
    return caught.value


def test_a_survivor_takes_nothing_upon_itself_and_leaves_what_the_culprit_wrote(tmp_path: Path) -> None:
    in_gloo = raised_in(f"{Path(torch.__file__).parent}/distributed/distributed_c10d.py")
    config, run_dir = own_config(tmp_path, named), tmp_path / "runs" / "own"
    boxes: list[BlackBox] = []
    said: list[tuple[str, int | None]] = []
    for rank in (0, 1):
        world = World(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))
        loader, progress = Loader(Named(), global_batch=8, rank=rank, world_size=2), Progress()
        with patch("harness.training.incident_report.gather", lambda _: [None, None]):
            boxes.append(open_black_box(config, world, progress, run_dir, loader, Named()))
        boxes[rank].begin(2, 16)
        progress.enter(Phase.BACKWARD, 2)
    for rank, error in ((0, in_gloo), (1, MemoryError("none is left")), (0, in_gloo)):
        boxes[rank].end_with(error, nn.Linear(4, 1))
        boxes[rank].close()
        found = read_incident(incident_dir(run_dir, 2))
        said.append((found.kind, found.rank))
    assert said == [("crash", None), ("out of memory", 1), ("out of memory", 1)]
    assert found.culprits[0].samples == found.samples[1][0]
    assert read_rank(incident_dir(run_dir, 2), 0).error == "RuntimeError: Connection closed by peer"


def test_steps_are_profiled_on_demand_and_after_an_incident(tmp_path: Path) -> None:
    more = ("--incidents.profile_steps=[1]", "--incidents.profile_after=true", "--loop.steps=8")
    train(own_config(tmp_path, named, "--faults=[{step: 3, kind: nan}]", *more))
    run_dir = tmp_path / "runs" / "own"
    for step, others in ((1, False), (3, True)):
        assert (incident_dir(run_dir, step) / "trace-rank-0.json.gz").is_file()
        assert (incident_dir(run_dir, step) / INCIDENT).is_file() == others

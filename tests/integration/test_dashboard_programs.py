"""Real runs, started, heard, stopped, taken up and forked as the dashboard does it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.config import TrainConfig, flatten, read_yaml
from harness.dashboard import programs
from harness.dashboard.checkpoints import checkpoints
from harness.dashboard.forks import fork
from harness.dashboard.records import Program
from harness.errors import CheckpointError, ConfigError, TrackingError
from harness.runlog.process import identity
from harness.runlog.reader import open_run
from tests.support.runs import ROOT, tiny_config, wait_for
from tests.support.side_process import side_processes_of

LONG = ["--loop.steps=1000000", "--checkpoint.every=0", "--loop.eval_every=0"]
END_S = 60.0


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    yield folder
    for program in programs.programs(folder):
        with contextlib.suppress(TrackingError):
            programs.kill(program.directory)
    # Not for exit codes: what another process has started never gets one.
    wait_for(
        lambda: not any(program.is_running() for program in programs.programs(folder)),
        timeout_s=END_S,
        what="the end of all programs",
    )


def wait_until_left(program: Program) -> None:
    """Until nothing writes into the run any more."""
    wait_for(lambda: not side_processes_of(program.directory), timeout_s=120.0, what="the side process's end")


def ended(program: Program) -> int:
    """Waits for the end; the exit code."""

    def exit_code() -> int | None:
        now = programs.program(program.directory)
        assert now is not None
        return now.exit_code

    wait_for(lambda: exit_code() is not None, timeout_s=END_S, what="the end of the program")
    code = exit_code()
    assert code is not None
    return code


def printed(program: Program) -> str:
    text, offset = "", 0
    while True:
        more, offset = programs.output(program.directory.parent, program.name, offset)
        if not more:
            return text
        text += more


def wait_for_text(program: Program, text: str) -> None:
    wait_for(lambda: text in printed(program), timeout_s=END_S, what=f"{text!r} in the output")


def losses(directory: Path) -> dict[int, float]:
    series = open_run(directory).scalars("train/loss")
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def zombies() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_started_stopped_with_a_checkpoint_and_resumed_to_its_end(
    processes: int, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the dashboard itself had been started by a launcher, in a world that is none of the run's.
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tmp_path, *LONG, "--parallel.device=cpu", "--runs_dir=elsewhere")
    program = programs.start(config, runs_dir=runs, processes=processes)
    assert (program.directory, program.is_running()) == (runs / "tiny", True)
    with pytest.raises(TrackingError, match="is running"):
        programs.start(config, runs_dir=runs)
    wait_for_text(program, "step 8/")
    with pytest.raises(TrackingError, match="is running"):
        programs.resume(program.directory)
    programs.stop(program.directory)
    assert ended(program) == (75 if processes == 1 else 1)
    assert printed(program).count("SIGTERM: finishing the step") == 1
    run = open_run(program.directory)
    assert (run.state(), run.info["world_size"], run.attempts) == ("stopped", processes, [0])
    (saved,) = checkpoints(program.directory)
    assert saved.step == max(losses(program.directory)) + 1
    with pytest.raises(TrackingError, match="not running"):
        programs.stop(program.directory)

    again = programs.resume(program.directory, steps=saved.step + 5)
    assert (again.processes, ended(again)) == (processes, 0)
    run = open_run(program.directory)
    assert (run.state(), run.last_step) == ("finished", saved.step + 4)
    assert sorted(losses(program.directory)) == list(range(saved.step + 5))
    assert f"going on at step {saved.step}" in printed(again)
    assert zombies() == []


@pytest.mark.slow
def test_a_fork_goes_on_like_its_parent_and_a_changed_one_does_not(runs: Path, tmp_path: Path) -> None:
    parent = programs.start(tiny_config(tmp_path, "--model.dropout=0.1"), runs_dir=runs)
    assert ended(parent) == 0, printed(parent)
    wait_until_left(parent)
    before = {path: path.stat() for path in parent.directory.rglob("*") if path.is_file()}
    assert [checkpoint.step for checkpoint in checkpoints(parent.directory)] == [4, 8, 12]
    same = fork(parent.directory, "same", step=8)
    other = fork(parent.directory, "1e-3", {"optim.lr": 1e-3, "guard.spike": "skip"}, step=8)
    anew = fork(parent.directory, "anew", {"loop.steps": 3.0, "seed": "7"})
    assert [ended(each) for each in (same, other, anew)] == [0, 0, 0], printed(other)
    expected = losses(parent.directory)
    assert losses(same.directory) == {step: expected[step] for step in range(8, 12)}
    rates = {each.name: open_run(each.directory).scalars("train/lr").values for each in (same, other)}
    assert rates["1e-3"] == pytest.approx(rates["same"] / 3)
    assert losses(other.directory)[8] == expected[8]
    assert losses(other.directory)[9] != expected[9]
    assert sorted(losses(anew.directory)) == [0, 1, 2]
    notes = {each.name: programs.configuration(each.directory).tracking.notes for each in (same, other, anew)}
    assert notes == {
        "same": "Forked from tiny at step 8.",
        "1e-3": "Forked from tiny at step 8.",
        "anew": "Forked from tiny.",
    }
    after = {path: path.stat() for path in parent.directory.rglob("*") if path.is_file()}
    assert {p: (s.st_size, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_size, s.st_mtime_ns) for p, s in before.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with one checkpoint, for what is refused without a start."""
    folder = tmp_path_factory.mktemp("finished")
    program = programs.start(tiny_config(folder, "--loop.steps=4"), runs_dir=folder / "runs")
    assert ended(program) == 0
    wait_until_left(program)
    return program.directory


@pytest.mark.parametrize(
    ("name", "overrides", "step", "rule"),
    [
        ("new", {"model.dim": 64}, 4, "resumed with the model"),
        ("new", {"seed": 5}, 4, "resumed with the model"),
        ("new", {"optim.weight_decay": 0.0}, 4, "resumed with the model"),
        ("new", {"loop.global_batch": 16}, 4, "resumed with the model"),
        ("new", {"loop.steps": 0}, None, "greater than 0"),
        ("new", {"no.such": 0}, None, "unknown key"),
        ("new", {}, 5, "no checkpoint of step 5"),
        ("tiny", {}, 4, "already exists"),
        ("tiny", {}, None, "already exists"),
        ("../new", {}, 4, "below"),
        (".dashboard", {}, 4, "below"),
        ("x" * 300, {}, 4, "below"),
    ],
)
def test_a_fork_that_cannot_be_is_refused_before_anything_is_written(
    name: str, overrides: dict[str, object], step: int | None, rule: str, finished: Path
) -> None:
    before = sorted(finished.parent.parent.rglob("*"))
    with pytest.raises((ConfigError, CheckpointError), match=rule):
        fork(finished, name, overrides, step=step)
    assert sorted(finished.parent.parent.rglob("*")) == before


def test_a_start_that_cannot_be_is_refused_before_anything_is_written(runs: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for processes, rule in ((3, "multiple of world size"), (0, "1 or more"), (-1, "1 or more")):
        with pytest.raises(ConfigError, match=rule):
            programs.start(config, runs_dir=runs, processes=processes)
    with pytest.raises(ConfigError, match="cannot read"):
        programs.resume(runs / "none")
    for act in (programs.stop, programs.kill):
        with pytest.raises(TrackingError):
            act(runs / "none")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_under_a_name_that_is_taken_is_refused(finished: Path) -> None:
    config = tiny_config(finished.parent.parent, "--model.dim=64")
    with pytest.raises(ConfigError, match="with the settings that it began with"):
        programs.start(config, runs_dir=finished.parent)


@pytest.mark.parametrize(
    "run",
    [
        "..",
        ".",
        "",
        "../x",
        "a/../../x",
        "/etc",
        ".dashboard",
        ".dashboard/x",
        "link/x",
        "link",
        "a\0b",
        "\ud800",
        "x" * 300,
    ],
)
def test_no_name_leads_out_of_the_folder_of_runs(run: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        programs.output(folder, run, 0)


@pytest.mark.slow
def test_a_run_outlives_the_dashboard_and_the_next_one_hears_it_out_and_ends_it(
    runs: Path, tmp_path: Path
) -> None:
    name = "--config $(id); 'é' \"x\""
    arguments = [*LONG, f"--name={name}"]
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from harness.dashboard import programs; from tests.support.runs import tiny_config\n"
        "config = tiny_config(Path(sys.argv[1]), *sys.argv[2:])\n"
        "programs.start(config, runs_dir=Path(sys.argv[1], 'runs'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dashboard = [sys.executable, "-c", script, str(tmp_path), *arguments]
    assert subprocess.run(dashboard, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    (program,) = programs.programs(runs)
    assert program.name == name
    wait_for_text(program, "step 12/")
    assert program.is_running()
    assert open_run(program.directory).state() == "running"
    programs.kill(program.directory)
    wait_for(lambda: not program.is_running(), what="the end")
    assert open_run(program.directory).state() == "crashed"
    with pytest.raises(TrackingError, match="no program"):
        programs.kill(program.directory)


@pytest.mark.slow
def test_a_kill_reaches_workers_that_hang_in_sessions_of_their_own(runs: Path, tmp_path: Path) -> None:
    hang = "--faults=[{step: 4, rank: 1, kind: hang}]"
    program = programs.start(tiny_config(tmp_path, hang, "--parallel.device=cpu"), runs_dir=runs, processes=2)
    wait_for_text(program, "step 4/")
    workers = psutil.Process(program.pid).children()
    assert len(workers) == 2
    programs.kill(program.directory)
    assert ended(program) == -signal.SIGKILL
    wait_for(lambda: not any(worker.is_running() for worker in workers), what="the workers' end")


def test_a_run_that_is_stopped_while_it_loads_ends_at_once_and_can_be_started_again(
    runs: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "--loop.steps=2")
    program = programs.start(config, runs_dir=runs)
    programs.stop(program.directory)
    code = ended(program)
    if code == 75:  # it had come so far as to take the signal, and has saved step 0
        assert [checkpoint.step for checkpoint in checkpoints(program.directory)] == [0]
        again = programs.resume(program.directory)
    else:
        assert code == -signal.SIGTERM
        assert "[ended by Terminated, signal 15]" in printed(program)
        assert not program.directory.exists()
        again = programs.start(config, runs_dir=runs)
    assert ended(again) == 0


def test_a_program_that_fails_says_why_and_is_listed(runs: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--data.paths=[/no/such/file]", "--name=broken")
    program = programs.start(config, runs_dir=runs)
    assert ended(program) == 2
    assert "/no/such/file" in printed(program)
    assert [(each.name, each.exit_code) for each in programs.programs(runs)] == [("broken", 2)]


def test_a_number_that_belongs_to_another_process_by_now_is_never_hit(finished: Path) -> None:
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    records = finished.parent / ".dashboard" / finished.name / "program.json"
    noted = records.read_text()
    try:
        forged = {**json.loads(noted), "pid": bystander.pid, "exit_code": None}
        records.write_text(json.dumps({**forged, "process_start_s": forged["process_start_s"] - 3600}))
        for act in (programs.stop, programs.kill):
            with pytest.raises(TrackingError):
                act(finished)
        records.write_text(json.dumps({**forged, "machine": "another"}))
        with pytest.raises(TrackingError):
            programs.kill(finished)
        assert bystander.poll() is None
    finally:
        records.write_text(noted)
        bystander.kill()
        bystander.wait()


def test_a_run_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "runs/far/log"
    log.mkdir(parents=True)
    values = {**identity(), "machine": "another", "host": "far", "pid": os.getpid()}
    from harness.runlog.codec import encode

    (log / "00000000.jsonl").write_bytes(encode("run", values, attempt=0, step=None, time=time.time()))
    with pytest.raises(TrackingError, match=f"running on far.*kill -TERM {os.getpid()}"):
        programs.stop(log.parent)
    with pytest.raises(TrackingError, match="is running, on far"):
        programs.start(TrainConfig(name="far"), runs_dir=tmp_path / "runs")


def test_a_resumed_run_keeps_its_own_configuration(finished: Path) -> None:
    assert flatten(read_yaml(finished / "config.yaml"))["loop.steps"] == 4
    assert programs.configuration(finished) == tiny_config(finished.parent.parent, "--loop.steps=4")

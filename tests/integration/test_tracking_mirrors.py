"""The side process: mirrors complete and without duplicates, and a trainer that never notices it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from harness.errors import TrackingError
from harness.runlog.reader import open_run
from harness.tracking import RunLog, start_mirrors, sync_run
from tests.support.side_process import let_it_take_its_share
from tests.support.wandb_offline import history, records

QUIET: dict[str, Any] = {"system_every_s": 0.0, "alerts": ()}

FAKE_WANDB = """
import time
class AlertLevel: INFO = WARN = ERROR = 0
class Settings:
    def __init__(self, **_): pass
class Image: pass
class Histogram: pass
class Run: pass
{behaviour}
"""
FAKE_ERRORS = "class Error(Exception): pass\n"
FAKE_PROTO = "class Record: pass\n"


@pytest.fixture(autouse=True)
def takes_its_share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "give_way" not in request.node.name:
        let_it_take_its_share(monkeypatch)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    """Processes that are started from now on import a wandb that behaves like this."""
    package = tmp_path / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB.format(behaviour=behaviour))
    (package / "errors.py").write_text(FAKE_ERRORS)
    (package / "proto").mkdir()
    (package / "proto" / "wandb_internal_pb2.py").write_text(FAKE_PROTO)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def write_steps(log: RunLog, steps: range, value: float = 1.0) -> None:
    for step in steps:
        log.write("step", {"train/loss": value + step}, step=step)


def points_in_events(run_dir: Path) -> Counter[tuple[str, int]]:
    """How often each (tag, step) is in the event file."""
    [path] = (run_dir / "tensorboard").glob("*tfevents*")
    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return Counter((value.tag, e.step) for e in events for value in e.summary.value)


def shown_by_tensorboard(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_the_log_and_after_a_rollback_the_new_branch_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    handle = start_mirrors(tmp_path, **QUIET)
    write_steps(log, range(20))
    log.rewind(15)
    write_steps(log, range(15, 18), value=100.0)
    log.close()
    assert handle.close(30)
    expected = [(s, 1.0 + s) for s in range(15)] + [(s, 100.0 + s) for s in range(15, 18)]
    assert shown_by_tensorboard(tmp_path, "train/loss") == expected


def test_every_kind_of_record_arrives_in_both_mirrors(tmp_path: Path) -> None:
    picture = tmp_path / "log" / "media" / "x.png"
    with RunLog(tmp_path) as log:
        picture.parent.mkdir()
        from PIL import Image

        Image.new("RGB", (3, 2)).save(picture)
        log.write("hparams", {"lr": 0.1})
        log.write("step", {"train/loss": float("nan")}, step=1)
        log.write("eval", {"val/loss": 2.0}, step=1)
        log.write("epoch", {"epoch": 0}, step=1)
        log.write("event", {"name": "incident", "rank": 1}, step=1)
        log.write("text", {"note": "**hello**"}, step=1)
        log.write("layers", {"grad_norm": {"a.weight": 0.5}}, step=1)
        log.write("ranks", {"loss": [1.0, 3.0]}, step=1)
        histogram = {"counts": [1, 2], "edges": [0.0, 0.5, 1.0], "min": 0.0, "max": 1.0}
        histogram |= {"num": 3, "sum": 1.5, "sum_squares": 1.0}
        log.write("histogram", {"gradients/a": histogram}, step=1)
        image = {"file": "log/media/x.png", "width": 3, "height": 2, "channels": 3}
        log.write("image", {"picture": image}, step=1)
    assert sync_run(tmp_path, wandb="offline", **QUIET) == ["tensorboard", "wandb"]

    numbers = {"train/loss", "val/loss", "epoch", "layers/grad_norm/a.weight", "ranks/loss/max_rank"}
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert numbers <= set(tags["scalars"])
    assert {"events/incident", "hparams", "note"} <= set(tags["tensors"])
    assert (tags["images"], tags["histograms"]) == (["picture"], ["gradients/a"])

    names = {name for row in history(tmp_path) for name in row}
    assert numbers | {"events/incident", "note", "picture/path", "gradients/a/_type"} <= names
    [path] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    configs = [r.config for r in records(path) if r.WhichOneof("record_type") == "config"]
    assert any(item.key == "lr" and item.value_json == "0.1" for c in configs for item in c.update)


def test_the_trainer_dies_and_the_mirrors_are_completed_and_the_wandb_run_closed_as_failed(
    tmp_path: Path,
) -> None:
    program = (
        "import os, signal, sys\n"
        "from harness.tracking import RunLog, start_mirrors\n"
        "log = RunLog(sys.argv[1])\n"
        "handle = start_mirrors(sys.argv[1], wandb='offline', system_every_s=0.0)\n"
        "for step in range(500): log.write('step', {'train/loss': step}, step=step)\n"
        "print(handle.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    side = int(done.stdout)
    wait_until(lambda: not psutil.pid_exists(side))
    assert open_run(tmp_path).state() == "crashed"
    assert [step for step, _ in shown_by_tensorboard(tmp_path, "train/loss")] == list(range(500))
    assert [row["step"] for row in history(tmp_path) if "train/loss" in row] == list(range(500))
    [path] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [r.exit.exit_code for r in records(path) if r.WhichOneof("record_type") == "exit"] == [1]
    assert [e.details["rule"] for e in open_run(tmp_path).events("alert")] == ["crashed"]


@pytest.mark.parametrize("seed", range(2))
def test_a_side_process_killed_at_any_moment_leaves_no_gap_and_no_duplicate(
    tmp_path: Path, seed: int
) -> None:
    log = RunLog(tmp_path)
    for part in range(3):
        handle = start_mirrors(tmp_path, **QUIET)
        assert handle.pid is not None
        deadline = time.monotonic() + 0.3 + 0.4 * ((seed * 7 + part * 3) % 5)
        step = part * 1000
        while time.monotonic() < deadline:
            write_steps(log, range(step, step + 1))
            step += 1
            time.sleep(0.002)
        write_steps(log, range(step, (part + 1) * 1000))
        os.kill(handle.pid, signal.SIGKILL)
        handle.close(5)
    log.close()
    assert sync_run(tmp_path) == ["tensorboard"]
    points = points_in_events(tmp_path)
    assert {points["train/loss", step] for step in range(3000)} == {1}
    assert sync_run(tmp_path) == ["tensorboard"]
    assert points_in_events(tmp_path) == points


def test_a_record_below_the_resume_point_drops_nothing_in_wandb(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(20))
    with RunLog(tmp_path) as log:
        log.write("eval", {"val/loss": 2.0}, step=3)
        log.write("text", {"notes": "why"}, step=3)
        write_steps(log, range(20, 24))
    assert sync_run(tmp_path, wandb="offline", **QUIET) == ["tensorboard", "wandb"]
    rows = history(tmp_path)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: 1.0 + step for step in range(24)}
    assert [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row] == [(3, 2.0)]


def test_a_rebuilt_mirror_is_the_same_file_byte_for_byte(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    handle = start_mirrors(tmp_path, **QUIET)
    write_steps(log, range(50))
    log.rewind(30)
    write_steps(log, range(30, 60))
    log.close()
    handle.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    live = path.read_bytes()
    path.unlink()
    sync_run(tmp_path)
    assert path.read_bytes() == live
    sync_run(tmp_path, rebuild=True)
    assert path.read_bytes() == live


def test_a_side_process_that_hangs_holds_up_nothing_and_catches_up_afterwards(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    handle = start_mirrors(tmp_path, **QUIET)
    write_steps(log, range(10))
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGSTOP)
    began = time.monotonic()
    write_steps(log, range(10, 5000))
    log.close()
    assert not handle.close(timeout_s=0.5)
    assert time.monotonic() - began < 30.0  # the side process would hang for ever
    os.kill(handle.pid, signal.SIGCONT)
    wait_until(lambda: not handle.is_alive())
    assert len(shown_by_tensorboard(tmp_path, "train/loss")) == 5000


def test_the_side_process_has_a_session_of_its_own_and_outlives_the_jobs_signals(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, **QUIET)
        assert handle.pid is not None
        wait_until(lambda: (tmp_path / "log" / "side.log").exists())
        assert os.getsid(handle.pid) != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(handle.pid, number)
        write_steps(log, range(3))
    assert handle.close(30)
    assert len(shown_by_tensorboard(tmp_path, "train/loss")) == 3


def test_the_side_process_loads_neither_torch_nor_tensorflow() -> None:
    program = (
        "import sys\n"
        "import harness.tracking.side, harness.tracking.tensorboard, harness.tracking.wandb\n"
        "print(sorted({'torch', 'tensorflow', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "behaviour",
    [
        "def init(**_): time.sleep(1000)",
        "def init(**_): raise RuntimeError('refused')",
        "def init(**_): raise SystemExit(1)",
        "raise ImportError('broken installation')",
        "def log(*_, **__): raise OSError('no')\n"
        "def init(**_):\n r = Run(); r.offline = True; r.define_metric = log; return r",
    ],
    ids=["hangs", "refuses", "exits", "cannot be imported", "raises on logging"],
)
def test_a_broken_wandb_costs_the_others_nothing_and_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    run_dir = tmp_path / "run"
    log = RunLog(run_dir)
    fake_wandb(tmp_path, monkeypatch, behaviour)
    handle = start_mirrors(run_dir, wandb="online", **QUIET)
    monkeypatch.delenv("PYTHONPATH")
    write_steps(log, range(100))
    log.close()
    assert not handle.close(timeout_s=1.0)
    wait_until((run_dir / "log" / "mirrors" / "tensorboard.json").exists)
    wait_until(lambda: len(shown_by_tensorboard(run_dir, "train/loss")) == 100)
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    wait_until(lambda: not handle.is_alive())
    assert sync_run(run_dir, wandb="offline") == ["tensorboard", "wandb"]
    assert [row["step"] for row in history(run_dir) if "train/loss" in row] == list(range(100))


@pytest.mark.slow
def test_a_wandb_process_that_hangs_at_its_start_is_ended_and_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(5))
    hung: list[psutil.Process] = []

    def hang_the_first() -> None:
        while not hung:
            for helper in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Not that of an earlier test, whose side process may still be at work.
                    owners = [word for parent in helper.parents() for word in parent.cmdline()]
                    if helper.name() == "wandb-core" and str(tmp_path) in owners:
                        helper.suspend()
                        hung.append(helper)
            time.sleep(0.002)

    threading.Thread(target=hang_the_first, daemon=True).start()
    assert sync_run(tmp_path, wandb="offline", tensorboard=False, wandb_start_s=5.0) == ["wandb"]
    wait_until(lambda: not hung[0].is_running())
    assert "has begun no run within 5 s" in caplog.text
    assert len(history(tmp_path)) == 5


def test_a_sync_that_hangs_is_given_up_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path / "run") as log:
        write_steps(log, range(5))
    fake_wandb(tmp_path, monkeypatch, "def init(**_): time.sleep(1000)")
    with pytest.raises(TrackingError, match=r"wandb .* is not complete: after 6 s it hangs"):
        sync_run(tmp_path / "run", wandb="offline", timeout_s=6.0)
    assert len(shown_by_tensorboard(tmp_path / "run", "train/loss")) == 5
    assert "in _begun" in (tmp_path / "run" / "log" / "side.log").read_text()
    monkeypatch.delenv("PYTHONPATH")
    assert sync_run(tmp_path / "run", wandb="offline") == ["tensorboard", "wandb"]


def test_without_an_account_wandb_goes_offline_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, wandb="online", **QUIET)
        write_steps(log, range(3))
        wait_until(lambda: bool(caplog.messages))
    assert handle.close(30)
    assert sum("is kept offline in" in message for message in caplog.messages) == 1
    assert len(history(tmp_path)) == 3


@pytest.mark.slow
def test_an_account_whose_server_is_out_of_reach_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, wandb="online", wandb_start_s=40.0, **QUIET)
        write_steps(log, range(100))
    assert handle.close(150)
    assert "is kept offline in" in caplog.text
    assert [row["step"] for row in history(tmp_path) if "train/loss" in row] == list(range(100))


def gives_way(helper: psutil.Process) -> bool:
    """All its threads, and its session as a whole."""
    try:
        group = Path(f"/proc/{helper.pid}/autogroup").read_text().split()[-1]
        threads = [int(path.name) for path in Path(f"/proc/{helper.pid}/task").iterdir()]
        return (group, {os.sched_getscheduler(thread) for thread in threads}) == ("19", {os.SCHED_BATCH})
    except (FileNotFoundError, ProcessLookupError):  # it, or a thread of it, has just ended
        return False


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group by session")
def test_the_side_process_and_wandb_give_way_to_the_trainer(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    handle = start_mirrors(tmp_path, wandb="offline", **QUIET)
    write_steps(log, range(3))
    side = psutil.Process(handle.pid)

    def all_give_way() -> bool:
        helpers = [side, *side.children(recursive=True)]
        return "wandb-core" in [each.name() for each in helpers] and all(map(gives_way, helpers))

    wait_until(all_give_way, timeout_s=150)
    log.close()
    assert handle.close(60)


def test_asking_for_an_upload_without_an_account_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with RunLog(tmp_path) as log:
        write_steps(log, range(3))
    with pytest.raises(TrackingError, match="not reachable"):
        sync_run(tmp_path, wandb="online")


def test_hostile_metric_names_and_settings_reach_the_mirrors(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    names = ["../../x", "a\nb", "nul\0", "x" * 5000, "ünï😀", "_step", "a.b[0]"]
    with RunLog(run_dir) as log:
        log.write("step", dict.fromkeys(names, 1.0), step=0)
    settings = {"project": "a/b:c#?%\n", "name": "../..\n", "tags": ("x" * 200, "a\0b"), "notes": "\x1b[2J"}
    assert sync_run(run_dir, wandb="offline", **settings) == ["tensorboard", "wandb"]
    tags = EventAccumulator(str(run_dir / "tensorboard")).Reload().Tags()["scalars"]
    assert set(names) <= set(tags)
    assert list(run_dir.parent.iterdir()) == [run_dir]
    assert list(tmp_path.iterdir()) == [run_dir.parent]


def test_ten_thousand_metrics_are_mirrored(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.write("step", {f"metric/{i}": float(i) for i in range(10_000)}, step=step)
    assert sync_run(tmp_path, wandb="offline") == ["tensorboard", "wandb"]
    assert sum(points_in_events(tmp_path).values()) >= 30_000
    assert sum(name.startswith("metric/") for name in history(tmp_path)[-1]) == 10_000


def test_sync_knows_the_mirrors_that_the_run_had(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    handle = start_mirrors(tmp_path / "run", wandb="offline", tensorboard_dir=str(elsewhere), **QUIET)
    assert not handle.close(timeout_s=0.0)  # left to itself: nobody starts it again
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    write_steps(log, range(3))
    log.close()
    assert sync_run(tmp_path / "run") == ["tensorboard", "wandb"]
    assert len(list(elsewhere.glob("*tfevents*"))) == 1


def test_a_run_that_still_goes_on_is_not_synced_by_another(tmp_path: Path) -> None:
    with RunLog(tmp_path), pytest.raises(TrackingError, match="still running"):
        sync_run(tmp_path)

"""Runs that are stopped and killed at chosen moments, and what has become of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
import psutil

from harness.checkpoint import Checkpointer
from harness.cli.train import EXIT_STOPPED
from harness.runlog.reader import open_run
from tests.support import forked_agent
from tests.support.runs import PROGRAM, start, tiny, wait_for

__all__ = ["FORKING", "LAUNCHERS", "Launched", "Stop", "begin", "judge_stop", "send"]

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--num_processes=1", "--num_machines=1"),
        *("--dynamo_backend=no", "--mixed_precision=no"),
    ],
}
FORKING = "forking-agent"
_COMMANDS = {**LAUNCHERS, FORKING: [sys.executable, "-m", "tests.support.forked_agent"]}
NUM_RANKS = {"python": 1, "torchrun": 2, "accelerate": 1, FORKING: forked_agent.NUM_RANKS}
_NEVER_MET = "did not come to the start"
_TIMEOUT_S = 900.0
"""A busy machine takes minutes to start two processes."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A run under a launcher. A context manager: what is left of it is killed."""

    launcher: str
    process: subprocess.Popen[str]
    run_dir: Path
    seen: list[psutil.Process] = field(default_factory=list)
    """All that were ever among its ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in [*self.seen, *self.ranks()]:  # torchrun gives each a session of its own
            with contextlib.suppress(psutil.Error):
                rank.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[psutil.Process]:
        """The training processes that live, without launcher and side processes."""
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
            family = [main] if self.launcher == "python" else main.children(recursive=True)
            is_rank = _is_forked if self.launcher == FORKING else _runs_program
            ranks = [process for process in family if is_rank(process)]
            self.seen.extend(rank for rank in ranks if rank not in self.seen)
            return ranks
        return []

    def wait_for_ranks(self) -> list[psutil.Process]:
        """All of them, once each handles signals."""
        wanted = NUM_RANKS[self.launcher]
        wait_for(
            lambda: self._has_ended() or len([r for r in self.ranks() if _handles_stop(r)]) == wanted,
            timeout_s=_TIMEOUT_S,
            what="the start",
            pause_s=0.2,  # what is waited for needs the processor more
        )
        assert not self._has_ended(), self.process.communicate()[0]
        return self.ranks()

    def wait_for_step(self, step: int, *, attempt: int = 0) -> None:
        """Until the log holds `step` in this attempt."""
        text = f'"kind":"step","attempt":{attempt},"step":{step},'
        wait_for(lambda: self._has_ended() or text in self._log(), timeout_s=_TIMEOUT_S, what=f"step {step}")

    def wait_for_any_step(self, step: int) -> None:
        """Until the log holds `step`, or a later one, in whatever attempt."""
        wait_for(lambda: self._has_ended() or self._last_step() >= step, timeout_s=_TIMEOUT_S, what="a step")

    def wait_for_save(self) -> None:
        """Until a checkpoint is being written."""
        wait_for(
            lambda: self._has_ended() or any(self.run_dir.glob("checkpoints/.saving-*")),
            timeout_s=_TIMEOUT_S,
            what="a save",
        )

    def _last_step(self) -> int:
        return max(
            map(int, re.findall(r'"kind":"step","attempt":\d+,"step":(\d+),', self._log())), default=-1
        )

    def _log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run_dir.glob("log/*.jsonl")))

    def _has_ended(self) -> bool:
        return self.process.poll() is not None


def begin(
    launcher: str,
    folder: Path,
    *more: str,
    name: str = "tiny",
    options: tuple[str, ...] = (),
    **environment: str,
) -> Launched:
    """Starts the tiny run, or one that differs by `more`, under a launcher with further options."""
    command = [*_COMMANDS[launcher], *options, PROGRAM, *tiny(folder, f"--name={name}", *more)]
    process = start(command, **environment)
    return Launched(launcher, process, folder / "runs" / name)


@dataclass(frozen=True, slots=True)
class Stop:
    """How a run ended that was asked to."""

    exit_code: int
    seconds: float
    """From the signal to the last rank's end."""
    steps: int
    """That the last checkpoint holds."""
    logged_steps: int
    summary: dict[str, Any]
    output: str

    def troubles(self, launcher: str, number: int) -> list[str]:
        """What is not as it should be."""
        if self.exit_code == -number and not self.summary and self.steps < 0 and _NEVER_MET in self.output:
            return []  # the launcher died of it before its ranks had met: there is no run, and they are gone
        wanted = {"python": EXIT_STOPPED, "torchrun": 1}.get(launcher)
        if number in (signal.SIGKILL, signal.SIGUSR1) and launcher == "torchrun":
            wanted = None  # the launcher's own way of ending
        found = {
            "exit code": wanted not in (None, self.exit_code) or self.exit_code == 0,
            "status": self.summary.get("status") != "stopped",
            "reason": not str(self.summary.get("reason")).startswith("SIG"),
            "unsaved steps": self.logged_steps != self.steps or self.summary.get("steps") != self.steps,
        }
        return [f"{name}: {self}" for name, is_wrong in found.items() if is_wrong]


def send(run: Launched, number: int) -> None:
    """Signals the launcher; gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.process.pid, number)


def judge_stop(run: Launched, number: int, *, twice: bool = False) -> Stop:
    """Sends the signal to the launcher, waits for every rank's end, and looks at what is left."""
    ranks = run.ranks()
    sent = time.monotonic()
    send(run, number)
    if twice:
        time.sleep(0.2)
        send(run, number)
    wait_for(lambda: not any(map(_lives, ranks)), timeout_s=_TIMEOUT_S, what="the end of all ranks")
    seconds = time.monotonic() - sent
    output, _ = run.process.communicate(timeout=_TIMEOUT_S)
    with Checkpointer(run.run_dir / "checkpoints") as checkpoints:
        saved = checkpoints.steps()
    summary = run.run_dir / "summary.json"
    return Stop(
        exit_code=run.process.returncode,
        seconds=seconds,
        steps=saved[-1] if saved else -1,
        logged_steps=len(open_run(run.run_dir).scalars("train/loss").values) if saved else 0,
        summary=orjson.loads(summary.read_bytes()) if summary.exists() else {},
        output=output,
    )


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _runs_program(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return command[1:2] == [PROGRAM] or command[2:3] == [PROGRAM]
    return False


def _is_forked(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return forked_agent.is_forked_rank(process)
    return False


def _handles_stop(process: psutil.Process) -> bool:
    """Whether SIGTERM and SIGUSR1 have a handler, as Linux tells it."""
    with contextlib.suppress(OSError, StopIteration):
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        return all(caught >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGUSR1))
    return False

"""A run over several hosts, one torchrun agent each, started by the launch file that users have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from harness.checkpoint import Checkpointer
from harness.config import TrainConfig, parse_arguments
from harness.models import build_model
from harness.runlog.reader import open_run
from harness.training import Callback
from tests.support.hosts import Host
from tests.support.runs import ROOT, tiny, wait_for

__all__ = ["Attempt", "Job", "paced"]

LAUNCH_FILE = ROOT / "harness" / "launch" / "torchrun.sh"
PORT = 29511
START_S = 600.0
"""A busy machine takes a minute to start a process."""
STEP_S = 0.1


def paced(config: TrainConfig) -> Callback:
    """Makes a step take so long that something can happen in it: 0.1 s, or what `Job.pace` says."""
    return _Paced(_pace_file(Path(config.runs_dir), config.name))


class _Paced(Callback):
    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step(self, run: Any, record: Any) -> None:
        time.sleep(float(self._file.read_text()) if self._file.exists() else STEP_S)


def _pace_file(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.pace"


@dataclass(slots=True)
class Attempt:
    """What the log says of one start of the program."""

    world_size: int
    steps: dict[int, float]
    """When each was logged."""
    resumed_at: int | None = None


class Job:
    """The tiny run on `hosts`, of which `rendezvous` holds the agents' store; nothing is started yet.

    Args:
        nnodes: MIN:MAX, or a number.
    """

    def __init__(
        self,
        hosts: list[Host],
        folder: Path,
        *,
        name: str,
        nnodes: str,
        more: tuple[str, ...] = (),
        rendezvous: Host | None = None,
    ) -> None:
        self.hosts, self.name, self.folder = hosts, name, folder
        self.run_dir = folder / "runs" / name
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._nnodes, self._rendezvous = nnodes, rendezvous or hosts[0]
        self._arguments = tiny(folder, f"--name={name}", f"--callbacks=[{__name__}:paced]", *more)

    def start(self) -> None:
        """An agent on each host."""
        for host in self.hosts:
            self.start_agent(host)

    def start_agent(self, host: Host) -> None:
        """One more agent, of a host that is new or comes back."""
        self.agents[host.name] = host.start(
            ["bash", str(LAUNCH_FILE), *self._arguments],
            self.output_of(host),
            NNODES=self._nnodes,
            NPROC="1",
            RDZV=f"{self._rendezvous.address}:{PORT}",
            RUN_ID=self.name,
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

    def output_of(self, host: Host) -> Path:
        """What its processes have said."""
        return self.folder / f"{self.name}-{host.name}.txt"

    def said(self) -> str:
        """What all have said."""
        return "\n".join(
            f"--- {host.name}\n{self.output_of(host).read_text(errors='replace')}"
            for host in self.hosts
            if self.output_of(host).exists()
        )

    def pace(self, step_s: float) -> None:
        """How long each further step takes."""
        file = _pace_file(self.run_dir.parent, self.name)
        written = file.with_suffix(".new")
        written.write_text(str(step_s))
        written.rename(file)

    def kill_rank(self, host: Host) -> None:
        """Kills the training process on a host; its agent lives."""
        for pid in host.pids():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"harness.train" in command[:4] and pid != self.agents[host.name].pid:
                os.kill(pid, signal.SIGKILL)

    def kill_agent(self, host: Host) -> None:
        """Kills the agent on a host, and nothing else."""
        self.agents[host.name].kill()

    def attempts(self) -> list[Attempt]:
        """What the log tells so far."""
        found: dict[int, Attempt] = {}
        for path in sorted(self.run_dir.glob("log/*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = orjson.loads(line)
                if record["kind"] == "run":
                    found[record["attempt"]] = Attempt(record["values"]["world_size"], {})
                elif record["kind"] == "step" and "train/loss" in record["values"]:
                    found[record["attempt"]].steps[record["step"]] = record["time"]
                elif record["kind"] == "event" and record["values"].get("name") == "resume":
                    found[record["attempt"]].resumed_at = record["step"]
        return [found[number] for number in sorted(found)]

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
        """Until it holds; with what the processes said where that does not come."""
        try:
            wait_for(condition, timeout_s=timeout_s, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.said()}") from None

    def wait_for_steps(self, count: int, *, world_size: int, attempt: int) -> float:
        """Until this attempt or a later one has done so many steps at this size of the world; when it did its
        first."""
        began: list[float] = []

        def done() -> bool:
            for found in self.attempts()[attempt:]:
                if found.world_size == world_size and len(found.steps) >= count:
                    began[:] = [min(found.steps.values())]
                    return True
            return False

        self.wait(done, f"{count} steps of {world_size} ranks in attempt {attempt} or later")
        return began[0]

    def wait_for_end(self, *hosts: Host) -> None:
        """Until the agents of these hosts, or of all, have ended with 0."""
        for host in hosts or self.hosts:
            agent = self.agents[host.name]
            self.wait(lambda agent=agent: agent.poll() is not None, f"the end of {host.name}'s agent")  # type: ignore[misc]
            assert agent.returncode == 0, self.said()

    def tokens(self) -> list[float]:
        """How many were trained on by the end of each step."""
        tokens: list[float] = open_run(self.run_dir).scalars("train/tokens").values.tolist()
        return tokens

    def assert_same_run(self, whole: Job, *, bitwise: bool) -> None:
        """Every step once, with the losses and last weights of `whole`.

        Args:
            bitwise: To the last bit. At another world size sums are added in another order: the losses then
                agree to some 1e-4, where a wrong batch would show in the second digit.
        """
        mine, other = (open_run(job.run_dir).scalars("train/loss") for job in (self, whole))
        assert mine.steps.tolist() == other.steps.tolist(), "other steps"
        if not bitwise:
            np.testing.assert_allclose(mine.values, other.values, rtol=1e-3)
            return
        assert mine.values.tolist() == other.values.tolist(), "other losses"
        weights, others = self.last_weights(), whole.last_weights()
        assert all(weights[name].equal(others[name]) for name in others), "other weights"

    def last_weights(self) -> dict[str, torch.Tensor]:
        """Of the last checkpoint, which has to be of the last step."""
        config = parse_arguments(self._arguments)
        model = build_model(config.model, sequence_length=config.data.sequence_length)
        with Checkpointer(self.run_dir / "checkpoints") as checkpoints:
            assert checkpoints.load({"model": model}) == config.loop.steps, self.said()
        return model.state_dict()

"""Trains the runs of docs/incidents.md that go wrong, and writes into the page what `harness replay` prints.

    python scripts/incident_stories.py [FOLDER]

Two gloo ranks each; the runs are left in FOLDER, if there is one. The words around what is printed name
samples and lines: read them again afterwards.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from harness.config import TrainConfig  # noqa: E402  (the repository has to be on the path first)
from harness.data import Task  # noqa: E402
from harness.dist import World  # noqa: E402
from harness.runlog.events import Incident  # noqa: E402
from harness.runlog.incident_files import STORY  # noqa: E402
from harness.runlog.names import EventName  # noqa: E402
from harness.runlog.paths import incident_dir  # noqa: E402
from harness.runlog.reader import open_run  # noqa: E402
from tests.support import broken_tasks  # noqa: E402
from tests.support.distributed import run_ranks  # noqa: E402
from tests.support.own_tasks import outlying, own_config, run_loop  # noqa: E402

PAGE = ROOT / "docs" / "incidents.md"
REPLAY = "import sys; from harness.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Story(NamedTuple):
    """A run, and its settings."""

    task: Callable[[TrainConfig], Task]
    settings: tuple[str, ...]


COMMON = (
    "--loop.global_batch=16",
    "--loop.micro_batch=4",
    "--checkpoint.every=4",
    "--checkpoint.keep_last=20",
)
STORIES = {
    "masked_mean": Story(
        broken_tasks.empty_mean,
        ("--parallel.strategy=ddp", "--loop.precision=bf16", "--loop.steps=12", "--optim.name=adamw"),
    ),
    "outlier": Story(
        outlying,
        ("--parallel.strategy=ddp", "--loop.steps=32", "--guard.spike=skip", "--guard.spike_warmup=8"),
    ),
    "ragged": Story(
        broken_tasks.unwritten, ("--parallel.strategy=fsdp", "--loop.steps=8", "--optim.name=adamw")
    ),
}


def main(arguments: list[str]) -> int:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="stories-") as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        for name in STORIES:
            run_ranks(_train, 2, str(folder), name, timeout_s=300.0)
            _paste(name, folder / "runs" / name)
            print(name, flush=True)
    return 0


def _train(rank: int, size: int, folder: str, name: str) -> None:
    # What an allocator hands out now and then; in the replay it is what happens to be there.
    broken_tasks.Unwritten.before = torch.nan
    story = STORIES[name]
    more = (f"--name={name}", "--guard.max_consecutive_skips=1000", *COMMON, *story.settings)
    world = World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))
    run_loop(own_config(Path(folder), story.task, *more), world)


def _paste(name: str, directory: Path) -> None:
    """Puts the last incident's summary and the story of its replay where the page has those of before."""
    last = [event for event in open_run(directory).events(EventName.INCIDENT) if event.step is not None][-1]
    if not isinstance(last.what, Incident):
        raise TypeError(f"{name} ended otherwise: {last.what}")
    command: list[Any] = [sys.executable, "-c", REPLAY, "replay", directory]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)  # 1 where it is not reproduced
    story = (incident_dir(directory, last.step) / STORY).read_text().rstrip()
    before, heading, after = PAGE.read_text().partition(f"```\n\n`harness replay {name}`:\n\n````markdown\n")
    if not heading:
        raise ValueError(f"{PAGE.name} has no story of {name!r}")
    opening = before.rindex("```\n") + len("```\n")
    after = after[after.index("\n````") :]
    PAGE.write_text(f"{before[:opening]}{last.what.summary}\n{heading}{story}{after}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

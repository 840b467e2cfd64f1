"""Where in a run's directory what lies, and the names of checkpoints' and incidents' folders.

config.yaml             the resolved configuration
log/                    segments of the append-only log
log/lock                held by its writer
log/nodes/HOST-ID/      segments of a side process: samples of its node, alerts
log/media/              images and graphs
log/mirrors/            what each mirror has taken of the log
log/side.log            what side processes have printed
tensorboard/  wandb/    mirrors
tokenizer/              of a run of task hf: the tokenizer that it was trained with
checkpoints/            what `checkpoint_of` reads the names of
incidents/              what is known of each incident, and stacks of all ranks of a run that hung
faults/                 of a rehearsal: a note for each fault that has struck
summary.json            the end of the last attempt
curves.png              the picture of the run
report.html  export.csv what people have asked for; so is
export/                 weights of a checkpoint
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness.files import read_file

__all__ = [
    "CONFIG_FILE",
    "HEALTHY",
    "MANIFEST",
    "MEDIA_BYTES",
    "NODES",
    "STORY",
    "CheckpointName",
    "checkpoint_of",
    "checkpoints_dir",
    "config_file",
    "export_dir",
    "export_file",
    "faults_dir",
    "hang_dir",
    "incident_dir",
    "incident_step",
    "incidents_dir",
    "is_hang",
    "log_dir",
    "media_bytes",
    "media_dir",
    "mirror_lock",
    "mirror_settings_file",
    "mirror_state_file",
    "nodes_dir",
    "picture_file",
    "report_file",
    "side_output_file",
    "story_file",
    "summary_file",
    "tensorboard_dir",
    "tokenizer_dir",
    "wandb_dir",
    "wandb_id_file",
    "writer_lock",
]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
"""What a run's configuration is called, in its directory and where the dashboard keeps a copy."""
NODES = "nodes"
"""In a log's folder: the logs of side processes."""
MANIFEST = "manifest.json"
"""In a checkpoint's folder: the file without which it is none."""
HEALTHY = "healthy"
"""In a checkpoint's folder: the empty file that says that it has proved itself."""
STORY = "story.md"
"""In an incident's folder: what a replay has found, as Markdown."""
MEDIA_BYTES = 64 << 20
"""Longest image or graph beside the log; mirrors hold it in memory."""
_STEP = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,9}))?")
_HANG, _HANG_TIME = re.compile(r"hang-[0-9]{8}-[0-9]{6}"), "hang-%Y%m%d-%H%M%S"


class CheckpointName(NamedTuple):
    """What the name of a committed checkpoint's folder says. Newer ones are greater."""

    step: int
    """Completed steps."""
    copy: int = 0
    """0, or which repetition of the same step this is: after a rollback it is committed again."""

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.copy}" if self.copy else "")


def checkpoint_of(name: str) -> CheckpointName | None:
    """Reads the name of a folder; None if no committed checkpoint is called so."""
    match = _STEP.fullmatch(name)
    named = CheckpointName(int(match[1]), int(match[2] or 0)) if match else None
    return named if str(named) == name else None


def config_file(run_dir: str | Path) -> Path:
    """The run's resolved configuration."""
    return Path(run_dir) / CONFIG_FILE


def log_dir(run_dir: str | Path) -> Path:
    """The folder of the run's log."""
    return Path(run_dir) / "log"


def writer_lock(run_dir: str | Path) -> Path:
    """Held by the process that writes the log."""
    return log_dir(run_dir) / "lock"


def nodes_dir(run_dir: str | Path) -> Path:
    """The folder of the logs of side processes; a folder for each."""
    return log_dir(run_dir) / NODES


def media_dir(run_dir: str | Path) -> Path:
    """Images and graphs, which records name."""
    return log_dir(run_dir) / "media"


def mirror_state_file(run_dir: str | Path, mirror: str) -> Path:
    """How far a mirror has got, and what it needs to go on."""
    return log_dir(run_dir) / "mirrors" / f"{mirror}.json"


def mirror_lock(run_dir: str | Path, mirror: str) -> Path:
    """Held by the process that keeps a mirror."""
    return mirror_state_file(run_dir, mirror).with_suffix(".lock")


def mirror_settings_file(run_dir: str | Path) -> Path:
    """Which mirrors the run had last."""
    return log_dir(run_dir) / "mirrors" / "settings.json"


def wandb_id_file(run_dir: str | Path) -> Path:
    """By which id W&B knows the run."""
    return log_dir(run_dir) / "mirrors" / "wandb-run-id"


def side_output_file(run_dir: str | Path) -> Path:
    """What side processes and the libraries in them have printed."""
    return log_dir(run_dir) / "side.log"


def tensorboard_dir(run_dir: str | Path) -> Path:
    """The folder of the event file, unless the settings name another."""
    return Path(run_dir) / "tensorboard"


def tokenizer_dir(run_dir: str | Path) -> Path:
    """The folder of the tokenizer of a run of task hf."""
    return Path(run_dir) / "tokenizer"


def wandb_dir(run_dir: str | Path) -> Path:
    """The folder of W&B's own files."""
    return Path(run_dir) / "wandb"


def checkpoints_dir(run_dir: str | Path) -> Path:
    """The folder of the run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def incidents_dir(run_dir: str | Path) -> Path:
    """What is known of steps that went wrong and of a run that hung: a folder for each."""
    return Path(run_dir) / "incidents"


def incident_dir(run_dir: str | Path, step: int) -> Path:
    """What is known of the step numbered `step`: what its ranks remembered, and what a replay found."""
    return incidents_dir(run_dir) / str(CheckpointName(step))


def incident_step(name: str) -> int | None:
    """Reads the name of a folder; None if no incident's is called so."""
    named = checkpoint_of(name)
    return None if named is None or named.copy else named.step


def hang_dir(run_dir: str | Path) -> Path:
    """Where stacks go of a run that is found to hang now, in this machine's time."""
    return incidents_dir(run_dir) / time.strftime(_HANG_TIME)


def is_hang(name: str) -> bool:
    """Whether a folder's name is one of `hang_dir`."""
    return _HANG.fullmatch(name) is not None


def faults_dir(run_dir: str | Path) -> Path:
    """What faults of a rehearsal have struck: a note for each."""
    return Path(run_dir) / "faults"


def story_file(run_dir: str | Path, step: int) -> Path:
    """What a replay of a step has found, as Markdown."""
    return incident_dir(run_dir, step) / STORY


def summary_file(run_dir: str | Path) -> Path:
    """How the last attempt ended, as JSON."""
    return Path(run_dir) / "summary.json"


def picture_file(run_dir: str | Path) -> Path:
    """The picture of the run's curves."""
    return Path(run_dir) / "curves.png"


def report_file(run_dir: str | Path) -> Path:
    """The HTML report, unless another place was asked for."""
    return Path(run_dir) / "report.html"


def export_dir(run_dir: str | Path) -> Path:
    """The exported weights, unless another place was asked for."""
    return Path(run_dir) / "export"


def export_file(run_dir: str | Path, format: str) -> Path:
    """The exported metrics, unless another place was asked for."""
    return Path(run_dir) / f"export.{format}"


def media_bytes(run_dir: Path, record: Mapping[str, Any]) -> bytes | None:
    """What the file beside the log holds that an image or a graph lies in; None if there is none in the run's
    directory, or if it is longer than `MEDIA_BYTES`.

    The record may be anybody's: no file from elsewhere becomes a part of a mirror.
    """
    try:
        return read_file(run_dir / record["file"], most_bytes=MEDIA_BYTES, within=run_dir)
    except (OSError, ValueError) as error:
        logger.warning("%s names a file that is not there, not in it, or too long: %s", run_dir, error)
        return None

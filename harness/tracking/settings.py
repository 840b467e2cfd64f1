"""What the side process is told when it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import orjson

from harness.atomic import write_atomically
from harness.config import AlertConfig, TrackingConfig, TrainConfig
from harness.runlog.paths import mirror_settings_file, tensorboard_dir

__all__ = ["MirrorSettings", "event_dir"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MirrorSettings:
    """Which mirrors are kept, under which names, and what is watched besides."""

    tensorboard: bool = True
    """Mirror the log to TensorBoard."""
    tensorboard_dir: str | None = None
    """Folder of the event file; default: `tensorboard` in the run directory."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror the log to Weights & Biases; online falls back to offline, and says so, without an account."""
    wandb_tensorboard: bool = False
    """Give W&B the event file too, for its TensorBoard tab."""
    wandb_start_s: float = 300.0
    """How long wandb may take to begin a run before it is ended and started again: for its own process
    it would wait without limit. Where training keeps every core busy a sound start takes a minute or two."""
    project: str = "harness"
    """W&B project."""
    name: str | None = None
    """The run's display name; default: the run directory's name."""
    run_id: str | None = None
    """Identifies the run at W&B; default: made from the run's start and kept."""
    group: str | None = None
    """Name that related runs share."""
    tags: tuple[str, ...] = ()
    """Labels to find the run by."""
    notes: str = ""
    """Free text about the run."""
    system_every_s: float = 10.0
    """Seconds between samples of this node; 0: none."""
    node: str = ""
    """Stands in the names of this node's samples, `system/NODE/...`; empty on the node of rank 0."""
    picture: bool = False
    """Draw the run into `curves.png` when it has ended."""
    alerts: tuple[AlertConfig, ...] = TrackingConfig().alerts
    """When people are told."""
    webhook: str | None = None
    """Address that each alert is sent to as JSON by HTTP POST."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> MirrorSettings:
        """What a training run's configuration asks for."""
        asked = {
            field.name: getattr(config.tracking, field.name) for field in dataclasses.fields(config.tracking)
        }
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(
            name=config.name, picture=True, **{name: value for name, value in asked.items() if name in known}
        )

    def to_json(self) -> str:
        """For the side process's command line."""
        return orjson.dumps(dataclasses.asdict(self)).decode()

    def keep(self, run_dir: Path) -> None:
        """Notes them in the run directory, for a later `harness sync`."""
        path = mirror_settings_file(run_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_json())

    @classmethod
    def kept(cls, run_dir: Path) -> MirrorSettings:
        """What the run's side process was last told; the defaults if it never had one."""
        try:
            return cls.from_json(mirror_settings_file(run_dir).read_text())
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    @classmethod
    def from_json(cls, text: str) -> MirrorSettings:
        """What `to_json` wrote."""
        fields: dict[str, Any] = orjson.loads(text)
        alerts = tuple(AlertConfig(**alert) for alert in fields["alerts"])
        return cls(**{**fields, "tags": tuple(fields["tags"]), "alerts": alerts})


def event_dir(run_dir: Path, settings: MirrorSettings) -> Path:
    """Where the run's event file lies."""
    return Path(settings.tensorboard_dir) if settings.tensorboard_dir else tensorboard_dir(run_dir)

"""What the side process is told when it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import orjson

from harness.atomic import write_atomically
from harness.config import AlertConfig, TrackingConfig, TrainConfig
from harness.errors import ConfigError
from harness.runlog.paths import mirror_settings_file

__all__ = ["MirrorSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorSettings(TrackingConfig):
    """The section `tracking`, and what only a loop of your own can set."""

    tensorboard_dir: str | None = None
    """Folder of the event file; default: `tensorboard` in the run directory."""
    wandb_tensorboard: bool = False
    """Give W&B the event file too, for its TensorBoard tab."""
    wandb_start_s: float = 300.0
    """How long wandb may take to begin a run before it is ended and started again: for its own process
    it would wait without limit. Where training keeps every core busy a sound start takes a minute or two."""
    name: str | None = None
    """The run's display name; default: the run directory's name."""
    run_id: str | None = None
    """Identifies the run at W&B and in trackio; default: made when the run starts, and kept."""
    picture: bool = False
    """Draw the run into `curves.png` when it has ended."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> MirrorSettings:
        """What a training run's configuration asks for."""
        section = config.tracking
        asked = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
        return cls(name=config.name, picture=True, **asked)

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
        except (OSError, ValueError, TypeError, KeyError, ConfigError):
            return cls()

    @classmethod
    def from_json(cls, text: str) -> MirrorSettings:
        """What `to_json` wrote."""
        fields: dict[str, Any] = orjson.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name in known
        }
        return cls(**{**values, "alerts": tuple(AlertConfig(**alert) for alert in fields["alerts"])})

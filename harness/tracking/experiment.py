"""What an experiment is called, what is logged of it, and one step's usual metrics."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.config.plain_yaml import plain_yaml_file
from harness.errors import ConfigError, TrackingError

__all__ = ["ExperimentConfig", "TrainingMetrics"]


@dataclass
class ExperimentConfig:
    """Settings of an `ExperimentTracker`."""

    experiment_name: str = "gradient_clipping_nan_handling"
    """What is being tried; runs of one experiment share it."""
    project_name: str = "harness"
    """W&B project."""
    run_name: str | None = None
    """Name of this run and of its folder; default: the experiment's name with date and time."""
    tags: list[str] = field(default_factory=list)
    """Labels to find the run by."""
    notes: str = ""
    """Free text about the run."""

    enable_tensorboard: bool = True
    """Mirror the log to TensorBoard."""
    enable_wandb: bool = True
    """Mirror the log to Weights & Biases; without an account to its offline files."""
    log_interval: int = 100
    """Steps between the lines that say how training goes; every step is in the log."""
    save_interval: int = 1000
    """Steps between checkpoints, as `should_save` says."""

    log_metrics: bool = True
    """Keep numbers: steps, epochs, custom metrics."""
    log_hyperparameters: bool = True
    """Keep what `log_hyperparameters` is given."""
    log_model_architecture: bool = True
    """Keep what `log_model_architecture` is given."""
    log_gradients: bool = True
    """Keep histograms of gradients and parameters."""
    log_images: bool = True
    """Keep images, the picture of the curves at the end among them."""
    log_text: bool = True
    """Keep texts."""

    tensorboard_dir: str = "runs/tensorboard"
    """Holds one folder of event files per run; runs lie beside it."""
    model_save_dir: str = "models"
    """Holds one folder of checkpoints per run."""
    config_save_dir: str = "configs"
    """Where `save_config` puts a name without a folder."""

    sync_tensorboard: bool = True
    """Give W&B the event file too, so that its TensorBoard tab works."""
    resume_run: bool = False
    """Go on with the run `run_id`, or with the newest one of this experiment."""
    anonymous: bool = False
    """Never ask for a W&B account: stay offline."""
    run_id: str | None = None
    """The run to resume, by the name of its folder or by its W&B id."""
    wandb_group: str | None = None
    """Name that related runs share."""

    @classmethod
    def basic(cls, **changes: Any) -> ExperimentConfig:
        """TensorBoard alone, numbers alone."""
        return cls(**{"enable_wandb": False, "log_gradients": False, "log_images": False, **changes})

    @classmethod
    def full(cls, **changes: Any) -> ExperimentConfig:
        """TensorBoard and W&B, everything logged."""
        return cls(**{"log_interval": 10, "save_interval": 500, **changes})

    @classmethod
    def numerical_stability(cls, **changes: Any) -> ExperimentConfig:
        """Everything, said and saved often: for runs that are expected to go wrong."""
        settings = {"experiment_name": "numerical_stability", "log_interval": 1, "save_interval": 100}
        return cls(**{**settings, "tags": ["numerical-stability"], **changes})

    @classmethod
    def from_file(cls, path: str | Path) -> ExperimentConfig:
        """Reads JSON or YAML, as the suffix says.

        Raises:
            TrackingError: the file cannot be read, or has a key that is no setting.
        """
        values = _read(Path(path))
        known = [each.name for each in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                raise TrackingError(
                    f"{path}: unknown setting {key!r}",
                    rule=f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(known)}",
                )
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Writes JSON or YAML, as the suffix says."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self)
        if path.suffix in (".yaml", ".yml"):
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        else:
            path.write_text(json.dumps(values, indent=2) + "\n")
        return path


@dataclass
class TrainingMetrics:
    """One step's usual metrics; None is not logged."""

    loss: float = 0.0
    accuracy: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Before clipping."""
    nan_count: int = 0
    inf_count: int = 0
    clipping_applied: bool = False
    clipping_threshold: float | None = None
    training_time: float = 0.0
    """Seconds for the step."""
    memory_usage: float | None = None
    """As the caller measures it."""
    gpu_utilization: float | None = None
    """As the caller measures it."""

    def values(self) -> dict[str, Any]:
        """Under the names that log, mirrors and pictures use."""
        named = {
            "train/loss": self.loss,
            "train/accuracy": self.accuracy,
            "train/lr": self.learning_rate,
            "train/grad_norm": self.gradient_norm,
            "train/clipped": self.clipping_applied,
            "train/clip_threshold": self.clipping_threshold,
            "guard/num_nan": self.nan_count,
            "guard/num_inf": self.inf_count,
            "time/step_s": self.training_time or None,
            "system/memory_usage": self.memory_usage,
            "system/gpu_utilization": self.gpu_utilization,
        }
        return {name: value for name, value in named.items() if value is not None}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = plain_yaml_file(path)  # JSON is YAML
    except (OSError, ConfigError) as error:
        raise TrackingError(
            f"{path} cannot be read: {error}", rule="it has to be a file of JSON or YAML"
        ) from error
    if not isinstance(values, Mapping):
        raise TrackingError(f"{path} holds a {type(values).__name__}", rule="it has to hold names and values")
    return values

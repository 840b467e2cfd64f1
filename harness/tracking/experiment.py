"""What an experiment is called, what is logged of it, and one step's usual metrics."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.config.checks import require
from harness.config.plain_yaml import plain_yaml_file
from harness.config.presets import own_configurations
from harness.errors import ConfigError, TrackingError
from harness.runlog.names import Metric

__all__ = ["METRIC_NAMES", "ExperimentConfig", "TrainingMetrics"]


@dataclass
class ExperimentConfig:
    """Settings of an `ExperimentTracker`.

    Raises:
        ConfigError: a setting is of the wrong type, or negative.
    """

    SECTION = ""

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
    """Steps between the lines that say how training goes, 0: none; every step is in the log."""
    save_interval: int = 1000
    """Steps between checkpoints, as `should_save` says; 0: none."""

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

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` for a setting that cannot be right; tags of any collection become a list."""
        tags: object = self.tags
        if isinstance(tags, tuple | set | frozenset):
            self.tags = list(tags) if isinstance(tags, tuple) else sorted(tags, key=str)
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, each.name, value)
            is_right, rule = _RULES[str(each.type)]
            require(self, each.name, is_right(value), rule)
        for name in ("log_interval", "save_interval"):
            require(self, name, getattr(self, name) >= 0, "it has to be 0 (never) or more")
        for name in ("tensorboard_dir", "model_save_dir", "config_save_dir"):
            require(self, name, getattr(self, name) != "", "it has to name a folder")

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
    def from_file(cls, path: str | Path, *, config_save_dir: str | Path = "configs") -> ExperimentConfig:
        """Reads JSON or YAML, as the suffix says.

        Args:
            path: A name without a folder is looked for where `save_config` puts one, and here.
            config_save_dir: That folder.

        Raises:
            TrackingError: the file cannot be read, or has a key that is no setting.
            ConfigError: a setting is of the wrong type, or negative.
        """
        values = _read(_found(Path(path), Path(config_save_dir)))
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
            path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        else:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
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


METRIC_NAMES = {
    "loss": Metric.TRAIN_LOSS,
    "accuracy": Metric.TRAIN_ACCURACY,
    "learning_rate": Metric.LR,
    "gradient_norm": Metric.GRAD_NORM,
    "clipping_applied": Metric.CLIPPED,
    "clipping_threshold": Metric.CLIP_THRESHOLD,
    "nan_count": Metric.NUM_NAN,
    "inf_count": Metric.NUM_INF,
    "training_time": Metric.STEP_S,
    "memory_usage": Metric.MEMORY_USAGE,
    "gpu_utilization": Metric.GPU_UTILIZATION,
}
"""The fields of `TrainingMetrics`, and what they are called in log, mirrors and pictures."""


def _found(path: Path, config_save_dir: Path) -> Path:
    """The file that a name means; two different ones of that name are an error."""
    config_save_dir = own_configurations(config_save_dir)
    saved = config_save_dir / path
    if path.parent != Path() or not saved.is_file():
        return path
    if path.is_file() and path.read_bytes() != saved.read_bytes():
        raise TrackingError(
            f"{path} is here and in {config_save_dir}, and they differ",
            rule="a name without a folder has to mean one file",
            remedy=f"name it with its folder: {path.absolute()} or {saved}",
        )
    return saved


def _read(path: Path) -> Mapping[str, Any]:
    try:
        # JSON is YAML, but for tabs.
        is_json = path.suffix == ".json"
        values = json.loads(path.read_text(encoding="utf-8")) if is_json else plain_yaml_file(path)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise TrackingError(
            f"{path} cannot be read: {error}", rule="it has to be a file of JSON or YAML"
        ) from error
    if not isinstance(values, Mapping):
        raise TrackingError(f"{path} holds a {type(values).__name__}", rule="it has to hold names and values")
    return values


def _is_text(value: object) -> bool:
    """Text that can be written down: half a surrogate pair cannot."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (_is_text, "it has to be text"),
    "str | None": (lambda value: value is None or _is_text(value), "it has to be text, or None"),
    "bool": (lambda value: isinstance(value, bool), "it has to be true or false, without quotes"),
    "int": (
        lambda value: isinstance(value, int) and not isinstance(value, bool),
        "it has to be a whole number",
    ),
    "list[str]": (
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
        'it has to be a list of texts, such as ["a", "b"]',
    ),
}
"""For each type of a setting what is a value of it, and how to say so."""

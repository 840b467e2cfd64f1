"""What a tracker tells of its own run while it goes on: pictures, summaries, the state of things."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.runlog.reader import Run
from harness.tracking.boundary import harmless
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.output import Output

__all__ = ["Views"]


def _no_usage(tracker: object) -> dict[str, float]:
    return {}


def _no_path(tracker: object) -> Path | str | None:
    return None


class Views(ABC):
    """The part of `ExperimentTracker` that reads."""

    config: ExperimentConfig
    is_main: bool
    _output: Output
    _step: int
    _began: float

    @property
    def run_dir(self) -> Path:
        """The run's directory; its log and pictures lie there."""
        return self._output.place.run_dir

    @abstractmethod
    def log_images(self, name: str | Mapping[str, Any], images: Any = None, step: int | None = None) -> None:
        """Logs an image."""

    @harmless(lambda self: self._no_picture())
    def create_visualization(self, save_path: str | Path | None = None) -> dict[str, Any]:
        """Draws loss, accuracy, gradient norm and non-finite values so far, and logs the picture.

        Returns:
            `figure` (matplotlib), `metrics_summary` (as `get_experiment_summary`), `path` of the file or
            None; rank 0 writes it.
        """
        from harness.runlog.preview import open_whole
        from harness.tracking.plots import draw_run

        figure = draw_run(open_whole(self.run_dir))
        path = None
        if save_path is not None and self.is_main and self._output.is_own_process:
            path = self._save_figure(figure, save_path)
        self.log_images("visualization", figure)
        return {"figure": figure, "metrics_summary": self.get_experiment_summary(), "path": path}

    @harmless(lambda self: self._no_summary())
    def get_experiment_summary(self) -> dict[str, Any]:
        """Name, state, number of steps, last and best values, and how often things happened."""
        from harness.tracking.overview import summarise

        return {"experiment": self.config.experiment_name, **summarise(Run(self.run_dir))}

    def get_system_status(self) -> dict[str, Any]:
        """Whether log and mirrors work, and where they are."""
        place = self._output.place
        return {
            "is_main": self.is_main,
            "logging": self._output.writes,
            "mirrors_running": self._output.mirrors_running,
            "tensorboard_dir": str(place.tensorboard_dir) if self.config.enable_tensorboard else None,
            "wandb": self._output.wandb,
            "run_dir": str(self.run_dir),
            "step": self._step,
            "running_s": time.time() - self._began,
        }

    @harmless(_no_usage)
    def get_resource_usage(self) -> dict[str, float]:
        """What this process and its node use at the moment; a few milliseconds."""
        usage: dict[str, float] = self._sampler.sample()
        return usage

    @functools.cached_property
    def _sampler(self) -> Any:
        from harness.tracking.resources import Sampler

        return Sampler(self.run_dir if self.is_main else Path.cwd())

    @harmless(_no_path)
    def _save_figure(self, figure: Any, path: str | Path) -> Path | str | None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path

    def _no_summary(self) -> dict[str, Any]:
        from harness.tracking.overview import no_summary

        return {"experiment": self.config.experiment_name, **no_summary(self.run_dir)}

    def _no_picture(self) -> dict[str, Any]:
        from matplotlib.figure import Figure

        return {"figure": Figure(), "metrics_summary": self._no_summary(), "path": None}

"""The tracker for a training loop of your own: one log, mirrored to TensorBoard and Weights & Biases.

    tracker = ExperimentTracker(ExperimentConfig(experiment_name="mine"))
    tracker.log_training_step(loss=0.5, gradient_norm=0.8)
    tracker.close()

Rank 0 writes; on other ranks every call does nothing. What goes wrong with tracking is said and never
raised into the training loop.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self

from harness.env import launched
from harness.errors import TrackingError
from harness.tracking.codec import to_plain
from harness.tracking.experiment import ExperimentConfig, TrainingMetrics
from harness.tracking.log import RunLog
from harness.tracking.mirrors import start_mirrors
from harness.tracking.numbers import numbers_of, step_numbers
from harness.tracking.places import RunPlace, find_place
from harness.tracking.reader import open_run
from harness.tracking.settings import MirrorSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["CheckpointStore", "ExperimentTracker", "MetricsQueue"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
P = ParamSpec("P")


class CheckpointStore(Protocol):
    """Where checkpoints go; `harness.training` provides one on top of `harness.checkpoint`."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keeps plain data and tensors under the step's number."""

    def load(self, step: int | None) -> dict[str, Any]:
        """What was saved for the step, or for the newest one."""

    def close(self) -> None:
        """Waits for what is still being written."""


class MetricsQueue:
    """Takes metrics that are put in. Nothing waits in it: writing them down is quicker than queueing."""

    def __init__(self, tracker: ExperimentTracker) -> None:
        self._tracker = tracker

    def put(self, metrics: TrainingMetrics | Mapping[str, Any]) -> None:
        """Logs one training step."""
        self._tracker.log_training_step(metrics)

    put_nowait = put

    def qsize(self) -> int:
        """Always 0."""
        return 0

    def empty(self) -> bool:
        """Always true."""
        return True


def _harmless(method: Callable[P, None]) -> Callable[P, None]:
    """What cannot be logged is said; the training loop goes on."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except (TrackingError, OSError) as error:
            logger.error("%s logged nothing: %s", method.__name__.lstrip("_"), error)

    return guarded


class ExperimentTracker:
    """Logs an experiment.

    Args:
        config: What it is called and what is logged.
        rank: This process's rank; default: what the launcher says. Only rank 0 writes.
        checkpoints: Makes the store of `save_checkpoint` and `load_checkpoint` for a folder.

    Raises:
        TrackingError: the run to resume is not there, or its directory cannot be written.
    """

    def __init__(
        self,
        config: ExperimentConfig | None = None,
        *,
        rank: int | None = None,
        checkpoints: Callable[[Path], CheckpointStore] | None = None,
    ) -> None:
        self.config = config or ExperimentConfig()
        self.is_main = (launched().rank if rank is None else rank) == 0
        self.metrics_queue = MetricsQueue(self)
        self._open_store = checkpoints
        self._store: CheckpointStore | None = None
        self._step = 0
        self._began = time.time()
        self._log: RunLog | None = None
        # Weak, so that being registered does not keep a forgotten tracker alive.
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self), os.getpid())
        self._place = find_place(self.config, create=self.is_main)
        if self.is_main:
            self._open()

    @property
    def run_dir(self) -> Path:
        """The run's directory; its log and pictures lie there."""
        return self._place.run_dir

    @property
    def step(self) -> int:
        """The number that the next training step gets."""
        return self._step

    @_harmless
    def log_training_step(
        self,
        metrics: TrainingMetrics | Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        **values: Any,
    ) -> None:
        """Logs one step: the fields of `TrainingMetrics`, as an object or by name, and any others by name.

        A value that is a tensor on a device is waited for. Steps count up by themselves unless `step` is
        given.
        """
        step = self._step if step is None else step
        self._step = step + 1
        if self._log is None or not self.config.log_metrics:
            return
        numbers = step_numbers(metrics, values)
        self._log.write("step", numbers, step=step)
        if (step + 1) % self.config.log_interval == 0:
            logger.info("step %d  %s", step, "  ".join(f"{k} {v:.5g}" for k, v in numbers.items()))

    @_harmless
    def log_epoch(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Logs metrics of a whole epoch, at the step that was logged last."""
        if self._log is not None and self.config.log_metrics:
            named = {name if "/" in name else f"epoch/{name}": value for name, value in metrics.items()}
            self._log.write("epoch", {"epoch": epoch, **numbers_of(named)}, step=self._last_step)

    def log_custom_metric(self, name: str, value: Any, step: int | None = None) -> None:
        """Logs one number under a name of your own."""
        self.log_metrics_batch({name: value}, step)

    @_harmless
    def log_metrics_batch(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs several numbers under names of your own; default: at the step that was logged last."""
        if self._log is not None and self.config.log_metrics:
            self._log.write("step", numbers_of(metrics), step=self._last_step if step is None else step)

    @_harmless
    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Logs settings: numbers, texts, nested mappings. Later values of a name replace earlier ones."""
        if self._log is not None and self.config.log_hyperparameters:
            self._log.write("hparams", hyperparameters)

    @_harmless
    def log_model_architecture(self, model: nn.Module, example_input: Any = None) -> None:
        """Logs the model's modules and sizes, and, if an example input is given, its graph for TensorBoard.

        The graph is traced: the model runs once.
        """
        if self._log is None or not self.config.log_model_architecture:
            return
        from harness.tracking.architecture import count_parameters, describe, trace

        self._log.write("run", {"model": type(model).__name__, **count_parameters(model)})
        self._log.write("text", {"model/architecture": describe(model)})
        if example_input is not None:
            self._log.write("graph", {"file": trace(model, example_input, self.run_dir)})

    @_harmless
    def log_gradients(self, model: nn.Module, step: int | None = None, *, parameters: bool = True) -> None:
        """Logs histograms of the gradients, and of the parameters, counted on the device.

        Costs about three reads of them and one synchronisation: call it every few hundred steps.
        """
        if self._log is None or not self.config.log_gradients:
            return
        from harness.tracking.histograms import histograms

        named = list(model.named_parameters())
        tensors = {f"gradients/{name}": p.grad for name, p in named if p.grad is not None}
        if parameters:
            tensors |= {f"parameters/{name}": p for name, p in named}
        self._log.write("histogram", histograms(tensors), step=self._last_step if step is None else step)

    @_harmless
    def log_images(self, name: str | Mapping[str, Any], images: Any = None, step: int | None = None) -> None:
        """Logs an image, or several by name: arrays, tensors, batches, PIL images, figures, paths."""
        if self._log is None or not self.config.log_images:
            return
        from harness.tracking.media import save_image

        named = name if isinstance(name, Mapping) else {name: images}
        saved = {key: save_image(self.run_dir, image) for key, image in named.items()}
        self._log.write("image", saved, step=self._last_step if step is None else step)

    @_harmless
    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Logs a text; TensorBoard shows it as Markdown."""
        if self._log is not None and self.config.log_text:
            self._log.write("text", {name: str(text)}, step=self._last_step if step is None else step)

    @_harmless
    def log_event(self, name: str, step: int | None = None, **details: Any) -> None:
        """Logs that something happened: an incident, a rollback, a change of data."""
        if self._log is not None:
            at = self._last_step if step is None else step
            self._log.write("event", {**details, "name": name}, step=at)

    def create_visualization(self, save_path: str | Path | None = None) -> dict[str, Any]:
        """Draws loss, accuracy, gradient norm and non-finite values so far, and logs the picture.

        Returns:
            `figure` (matplotlib), `metrics_summary` (as `get_experiment_summary`), `path` or None.
        """
        from harness.tracking.plots import draw_run

        figure = draw_run(open_run(self.run_dir))
        if save_path is not None:
            Path(save_path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(save_path, dpi=150)
        self.log_images("visualization", figure)
        return {"figure": figure, "metrics_summary": self.get_experiment_summary(), "path": save_path}

    def should_save(self, step: int | None = None) -> bool:
        """Whether a checkpoint is due at this step, by `save_interval`."""
        return ((self._step if step is None else step) % self.config.save_interval) == 0

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        epoch: int = 0,
        step: int | None = None,
        loss: Any = None,
        metrics: Any = None,
        scheduler: Any = None,
    ) -> str:
        """Saves the state of training, verified by checksums when it is loaded. All ranks call it.

        It is written in the background; `load_checkpoint` and `close` wait for it.

        Returns:
            The name that `load_checkpoint` takes.
        """
        step = self._last_step if step is None else step
        given = dataclasses.asdict(metrics) if isinstance(metrics, TrainingMetrics) else metrics
        plain, _ = to_plain({"loss": loss, "metrics": given})
        state = {"model_state_dict": model.state_dict(), "epoch": epoch, "step": step, **plain}
        if optimizer is not None:
            state["optimizer_state_dict"] = optimizer.state_dict()
        if scheduler is not None:
            state["scheduler_state_dict"] = scheduler.state_dict()
        self._checkpoints.save(step, state)
        self.log_event("checkpoint", step, epoch=epoch)
        return f"checkpoint_epoch_{epoch}_step_{step}.pt"

    def load_checkpoint(self, name: str | Path | None = None) -> dict[str, Any]:
        """Loads by the name that `save_checkpoint` returned; None loads the newest. All ranks call it.

        Returns:
            `model_state_dict`, `optimizer_state_dict`, `epoch`, `step`, `loss`, `metrics` as saved.

        Raises:
            TrackingError: the name is none of a checkpoint.
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return self._checkpoints.load(None if name is None else _step_in(str(name)))

    def get_experiment_summary(self) -> dict[str, Any]:
        """Name, state, number of steps, last and best values, and how often things happened."""
        from harness.tracking.overview import summarise

        return {"experiment": self.config.experiment_name, **summarise(open_run(self.run_dir))}

    def get_system_status(self) -> dict[str, Any]:
        """Whether log and mirrors work, and where they are."""
        return {
            "is_main": self.is_main,
            "logging": self._log is not None,
            "mirrors_running": self.is_main and self._mirrors.is_alive(),
            "tensorboard_dir": str(self._place.tensorboard_dir) if self.config.enable_tensorboard else None,
            "wandb": self._settings.wandb if self.is_main else "off",
            "run_dir": str(self.run_dir),
            "step": self._step,
            "running_s": time.time() - self._began,
        }

    def get_resource_usage(self) -> dict[str, float]:
        """What this process and its node use at the moment; a few milliseconds."""
        usage: dict[str, float] = self._sampler.sample()
        return usage

    def save_config(self, path: str | Path) -> Path:
        """Writes the configuration as JSON or YAML; a bare name goes to `config_save_dir`."""
        path = Path(path)
        return self.config.save(path if path.parent != Path() else Path(self.config.config_save_dir) / path)

    def close(self, state: str = "finished") -> None:
        """Ends the run: a last picture, the log's end, complete mirrors. Idempotent."""
        atexit.unregister(self._at_exit)
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._log is None:
            return
        if self.config.log_images and self._step > 0:
            self._draw_last_picture()
        log, self._log = self._log, None
        log.close(state)
        self._mirrors.close(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("stopped" if issubclass(kind, KeyboardInterrupt) else "crashed")

    @_harmless
    def _draw_last_picture(self) -> None:
        self.create_visualization(self.run_dir / "curves.png")

    @property
    def _last_step(self) -> int:
        return max(self._step - 1, 0)

    @functools.cached_property
    def _sampler(self) -> Any:
        from harness.tracking.resources import Sampler

        return Sampler(self.run_dir if self.is_main else Path.cwd())

    @property
    def _checkpoints(self) -> CheckpointStore:
        if self._store is None:
            if self._open_store is None:
                raise TrackingError(
                    "this tracker has no store for checkpoints",
                    remedy="`from harness import ExperimentTracker` has one",
                )
            self._store = self._open_store(self._place.checkpoint_dir)
        return self._store

    def _open(self) -> None:
        config = self.config
        place = self._place
        info = {
            "experiment": config.experiment_name,
            "config": dataclasses.asdict(config),
            "checkpoint_dir": str(place.checkpoint_dir),
        }
        self._log = RunLog(place.run_dir, info=info)
        self._step = _next_step(place)
        self._settings = _settings(config, place)
        self._mirrors = start_mirrors(place.run_dir, self._settings)
        atexit.register(self._at_exit)
        if config.notes:
            self.log_text("notes", config.notes)


def _close_at_exit(tracker: weakref.ref[ExperimentTracker], pid: int) -> None:
    """For those who forget to close: the run ended well unless an exception ended the program."""
    live = tracker()
    if live is not None and pid == os.getpid():  # and not a forked child's
        live.close("crashed" if hasattr(sys, "last_value") else "finished")


def _next_step(place: RunPlace) -> int:
    last = open_run(place.run_dir).last_step
    return 0 if last is None else last + 1


def _settings(config: ExperimentConfig, place: RunPlace) -> MirrorSettings:
    wandb = "off" if not config.enable_wandb else "offline" if config.anonymous else "online"
    return MirrorSettings(
        tensorboard=config.enable_tensorboard,
        tensorboard_dir=str(place.tensorboard_dir.resolve()),
        wandb=wandb,  # type: ignore[arg-type]
        wandb_tensorboard=config.sync_tensorboard,
        project=config.project_name,
        name=place.name,
        group=config.wandb_group or config.experiment_name,
        tags=tuple(config.tags),
        notes=config.notes,
    )


def _step_in(name: str) -> int:
    _, found, digits = Path(name).stem.rpartition("step_")
    if not found or not digits.isdecimal():
        raise TrackingError(
            f"{name!r} is no checkpoint's name", rule="such names are like checkpoint_epoch_10_step_1000.pt"
        )
    return int(digits)

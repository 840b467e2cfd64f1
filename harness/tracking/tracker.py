"""The tracker for a training loop of your own: one log, mirrored to TensorBoard and Weights & Biases.

    tracker = ExperimentTracker(ExperimentConfig(experiment_name="mine"))
    tracker.log_training_step(loss=0.5, gradient_norm=0.8)
    tracker.close()

Rank 0 writes; on other ranks every call returns what it returns on a run without records. What goes wrong
with tracking is said and never raised into the training loop.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.presets import own_configurations
from harness.env import launched
from harness.errors import ConfigError
from harness.runlog.names import Prefix
from harness.runlog.paths import picture_file
from harness.runlog.soundness import LAST_STEP
from harness.tracking.boundary import Complaints, harmless
from harness.tracking.checkpoint_names import checkpoint_name
from harness.tracking.checkpointing import Checkpoints, CheckpointStore, Training
from harness.tracking.experiment import ExperimentConfig, TrainingMetrics
from harness.tracking.lenient import plain_values, text_of
from harness.tracking.metrics_queue import MetricsQueue
from harness.tracking.numbers import numbers_of, step_numbers, whole_step
from harness.tracking.output import Output
from harness.tracking.recorder import tensors_of
from harness.tracking.tracker_lifetime import Lifetime
from harness.tracking.tracker_views import Views

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["CheckpointStore", "ExperimentTracker"]

logger = logging.getLogger(__name__)


def _nothing(tracker: object) -> None:
    return None


class ExperimentTracker(Lifetime, Views):
    """Logs an experiment: the interface for a loop of your own. (`harness train` has a `Journal`; what both
    say goes through a `Recorder`, under the same names.)

    No method raises but `load_checkpoint`, whose answer training cannot do without. What
    cannot be logged is said once of each kind. A copy of a tracker in another process, forked or pickled,
    is silent: a run has one writer.

    Args:
        config: What it is called and what is logged.
        rank: This process's rank; default: what the launcher says. Only rank 0 writes.
        checkpoints: Makes the store of `save_checkpoint` and `load_checkpoint` for a folder.

    Raises:
        ConfigError: a setting is wrong. Nothing has been written then.
        TrackingError: the run to resume is not there, or its directory cannot be written.
    """

    def __init__(
        self,
        config: ExperimentConfig | None = None,
        *,
        rank: int | None = None,
        checkpoints: Callable[[Path], CheckpointStore] | None = None,
    ) -> None:
        self.config = ExperimentConfig() if config is None else config
        if not isinstance(self.config, ExperimentConfig):
            raise ConfigError(
                f"config is of type {type(config).__name__}",
                rule="it has to be an ExperimentConfig",
                remedy="ExperimentConfig(**settings) makes one of a dictionary",
            )
        self.config.check()
        self.is_main = (launched().rank if rank is None else rank) == 0
        self.metrics_queue = MetricsQueue(self.log_training_step)
        self._output = Output(self.config, is_main=self.is_main)
        self._checkpoints = Checkpoints(checkpoints, self._output)
        self._step = self._output.first_step
        self._began = time.time()
        self._close_at_exit()
        if self.is_main and self.config.notes:
            self.log_text("notes", self.config.notes)

    @property
    def step(self) -> int:
        """The number that the next training step gets."""
        return self._step

    @harmless(_nothing)
    def log_training_step(
        self,
        /,
        metrics: TrainingMetrics | Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        **values: Any,
    ) -> None:
        """Logs one step: the fields of `TrainingMetrics`, as an object or by name, and any others by name.

        A value that is a tensor on a device is waited for. Steps count up by themselves unless `step` is
        given; an earlier one does not set the count back.
        """
        at = self._output.step_of(step, self._step)
        self._step = max(self._step, min(at + 1, LAST_STEP))
        if not self._output.takes(self.config.log_metrics):
            return
        numbers, refused = step_numbers(metrics, values)
        self._output.leave_out("log_training_step", refused)
        self._output.write("step", numbers, step=at)
        if self.config.log_interval and (at + 1) % self.config.log_interval == 0:
            logger.info("step %d  %s", at, "  ".join(f"{k} {v:.5g}" for k, v in numbers.items()))

    @harmless(_nothing)
    def log_epoch(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Logs metrics of a whole epoch, at the step that was logged last."""
        if self._output.takes(self.config.log_metrics):
            numbers, refused = numbers_of(metrics)
            named = {
                name if "/" in name else f"{Prefix.EPOCH}{name}": value for name, value in numbers.items()
            }
            number, refused_epoch = numbers_of({"epoch": epoch})
            self._output.leave_out("log_epoch", {**refused, **refused_epoch})
            self._output.write("epoch", {**number, **named}, step=self._last_step)

    @harmless(_nothing)
    def log_custom_metric(self, name: str, value: Any, step: int | None = None) -> None:
        """Logs one number under a name of your own."""
        self.log_metrics_batch({name: value}, step)

    @harmless(_nothing)
    def log_metrics_batch(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs several numbers under names of your own, nested or not; default: at the step logged last."""
        if self._output.takes(self.config.log_metrics):
            numbers, refused = numbers_of(metrics)
            self._output.leave_out("log_metrics_batch", refused)
            self._output.write("step", numbers, step=self._output.step_of(step, self._last_step))

    @harmless(_nothing)
    def log_hyperparameters(self, hyperparameters: Any) -> None:
        """Logs settings: a mapping, a namespace or a dataclass of numbers, texts, nested mappings; anything
        else in it as text. Later values of a name replace earlier ones."""
        if self._output.takes(self.config.log_hyperparameters):
            self._output.write("hparams", plain_values(hyperparameters))

    @harmless(_nothing)
    def log_model_architecture(self, model: nn.Module, example_input: Any = None) -> None:
        """Logs the model's modules and sizes, and, if an example input is given, its graph for TensorBoard.

        The graph is traced: the model runs once.
        """
        if self._output.takes(self.config.log_model_architecture):
            self._log_sizes(model)
            if example_input is not None:
                self._log_graph(model, example_input)

    @harmless(_nothing)
    def log_gradients(self, model: nn.Module, step: int | None = None, *, parameters: bool = True) -> None:
        """Logs histograms of the gradients, and of the parameters, counted on the device.

        Costs about three reads of them and one synchronisation: call it every few hundred steps.
        """
        if not self._output.takes(self.config.log_gradients):
            return
        from harness.tracking.histograms import histograms

        tensors = tensors_of(model, parameters=parameters)
        try:
            counted = histograms(tensors)
        except Exception:  # noqa: BLE001  (one tensor cannot be counted: now they are taken one by one)
            counted = self._output.each("log_gradients", tensors, lambda tensor: histograms({"": tensor})[""])
        self._output.write("histogram", counted, step=self._output.step_of(step, self._last_step))

    @harmless(_nothing)
    def log_images(self, name: str | Mapping[str, Any], images: Any = None, step: int | None = None) -> None:
        """Logs an image, or several by name: arrays, tensors, batches, lists, PIL images, figures, paths."""
        if not self._output.takes(self.config.log_images):
            return
        from harness.tracking.media import save_image

        named = name if isinstance(name, Mapping) else {name: images}
        saved = self._output.each("log_images", named, functools.partial(save_image, self.run_dir))
        if saved:
            self._output.write("image", saved, step=self._output.step_of(step, self._last_step))

    @harmless(_nothing)
    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Logs a text; TensorBoard shows it as Markdown."""
        if self._output.takes(self.config.log_text):
            self._output.write(
                "text", {text_of(name): text_of(text)}, step=self._output.step_of(step, self._last_step)
            )

    @harmless(_nothing)
    def log_event(self, /, name: str, step: int | None = None, **details: Any) -> None:
        """Logs that something happened: an incident, a rollback, a change of data."""
        values = {**plain_values(details), "name": text_of(name)}
        self._output.write("event", values, step=self._output.step_of(step, self._last_step))

    @harmless(_nothing)
    def rewind(self, step: int) -> None:
        """Says that training goes back and `step` comes next: what was logged for it and later ones is
        abandoned. Nothing else drops what was logged. For all ranks."""
        step = whole_step(step)
        self._step = step
        self._output.rewind(step)

    @harmless(lambda self: False)
    def should_save(self, step: int | None = None) -> bool:
        """Whether a checkpoint is due at this step, by `save_interval`."""
        at = self._output.step_of(step, self._step)
        return self.config.save_interval > 0 and at % self.config.save_interval == 0

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

        It is written in the background; `load_checkpoint` and `close` wait for it. All are kept. The model
        is saved under its own names, without those of DDP or `torch.compile` around it. One that is not
        finite is saved, and said to be so. A save that fails is said; training goes on.

        Returns:
            The name that `load_checkpoint` takes.

        Raises:
            TrackingError: this is a tracker without a store for checkpoints.
        """
        self._checkpoints.require()
        at = self._output.step_of(step, self._last_step)
        epoch = self._epoch_of(epoch)
        training = Training(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            epoch=epoch,
            step=at,
            loss=loss,
            metrics=metrics,
        )
        self._checkpoints.save_checkpoint(training)
        return checkpoint_name(epoch, at)

    def load_checkpoint(
        self, name: str | Path | None = None, *, model: nn.Module | None = None
    ) -> dict[str, Any]:
        """Loads by the name that `save_checkpoint` returned, or by a path; None loads the newest that is
        finite. All ranks call it.

        Args:
            name: Of a checkpoint of this run, or of another with the path of its folder.
            model: Gives `model_state_dict` the names that this model has, should it be wrapped or compiled.

        Returns:
            `model_state_dict`, `optimizer_state_dict`, `epoch`, `step`, `loss`, `metrics` as saved.

        Raises:
            TrackingError: the name is none of a checkpoint.
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return self._checkpoints.load(name, model)

    @harmless(lambda self: self.run_dir)
    def save_config(self, path: str | Path) -> Path:
        """Writes the configuration as JSON or YAML; a bare name goes to `config_save_dir`, where
        `from_file(name, config_save_dir=...)` finds it (`own_configurations`). Rank 0 writes.

        Returns:
            The file; the run's directory if `path` is no path.
        """
        path = Path(path)
        target = path if path.parent != Path() else own_configurations(self.config.config_save_dir) / path
        self._save_config(target)
        return target

    def close(self, state: str = "finished") -> None:
        """Ends the run: a last picture, the log's end, complete mirrors. Idempotent."""
        if self._output.is_closed or not self._output.is_own_process:
            return
        self._forget_exit()
        try:
            self._checkpoints.close()
            if self._output.writes and self.config.log_images and self._step > 0:
                self.create_visualization(picture_file(self.run_dir))
        finally:
            self._output.close(state)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, in which it is silent."""
        kept = ("config", "_output", "_checkpoints", "_step", "_began")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, is_main=False)
        self.metrics_queue = MetricsQueue(self.log_training_step)
        self._close_at_exit()

    @property
    def _complaints(self) -> Complaints:
        return self._output.complaints

    @property
    def _last_step(self) -> int:
        return max(self._step - 1, 0)

    def _epoch_of(self, epoch: Any) -> int:
        numbers, refused = numbers_of({"epoch": epoch})
        number = numbers.get("epoch", 0)
        if not math.isfinite(number):
            number, refused = 0, {"epoch": f"it is {number}"}
        self._output.leave_out("save_checkpoint", refused)
        return int(number)

    @harmless(_nothing)
    def _log_sizes(self, model: nn.Module) -> None:
        from harness.tracking.architecture import count_parameters, describe

        self._output.write("run", {"model": type(model).__name__, **count_parameters(model)})
        self._output.write("text", {"model/architecture": describe(model)})

    @harmless(_nothing)
    def _log_graph(self, model: nn.Module, example_input: Any) -> None:
        from harness.tracking.architecture import trace

        self._output.write("graph", {"file": trace(model, example_input, self.run_dir)})

    @harmless(_nothing)
    def _save_config(self, path: Path) -> None:
        if self.is_main and self._output.is_own_process:
            self.config.save(path)

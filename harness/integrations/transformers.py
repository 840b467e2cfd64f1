"""The guard in transformers' Trainer and in those that are made from it, TRL's among them; a tracker's
callback.

Tested with transformers 5.23 and TRL 1.16.

    trainer = guarded(Trainer)(model=model, args=args, train_dataset=data)
    trainer.train()

Clipping (`max_grad_norm`, 0: none) and `optimizer.step()` are the guard's then. Clean training is the same,
to the bits where nothing is clipped. `trainer.guard` is there while it trains.

What it cannot see: losses that the Trainer's `logging_nan_inf_filter` hides from its log (set it to False to
see them there), what a `compute_loss` does after it has returned, and gradients of DeepSpeed, Megatron-LM,
FSDP1, XLA, `DataParallel` and SageMaker, all of which are refused. Skipped steps count in `global_step`, and
the schedule goes on with them, as it does after a resume.
"""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, needs
from harness.integrations.accelerate import refuse_unfit
from harness.runlog.names import Prefix
from harness.stability import StepGuard

with needs("transformers", extra="hf"):
    from transformers import TrainerCallback

__all__ = ["TrackerCallback", "guarded"]

T = TypeVar("T")

STATE_FILE = "guard.pt"
"""The guard's state in a checkpoint's folder, beside `optimizer.pt`."""


def guarded(trainer: type[T], **settings: Any) -> type[T]:
    """A subclass of `trainer`, which is transformers' `Trainer` or made from it, with a `StepGuard` in it.

    Args:
        settings: `StepGuard`'s; `max_norm` is the Trainer's `max_grad_norm` if it is not given.

    Returns:
        A class with the same arguments. Its `train` raises `InstabilityError` where too many steps were
        skipped, and `ConfigError` where the guard does not fit.
    """
    name = f"Guarded{trainer.__name__}"
    return type(name, (_Guarded, trainer), {"guard_settings": settings, "__module__": __name__})


class _Guarded:
    """What a guarded trainer does otherwise. The names are the Trainer's."""

    guard_settings: dict[str, Any]
    guard: StepGuard | None = None
    """While it trains, from the first forward pass on."""
    _guard_state: dict[str, Any] | None = None
    _last_grad_norm: float | None = None

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
            if self.guard is not None:
                self.guard.flush()
            return result
        finally:
            if self.guard is not None:
                self.guard.close()
                self.optimizer.step = self._own_step  # an optimizer that the caller made outlives this
            self.guard = self._guard_state = None

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.guard is None:
            self._make_guard(model)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        # The losses of a step's micro-batches add up to its mean: each was divided beforehand.
        parts = self.current_gradient_accumulation_steps
        self.guard.accumulate(loss * parts, weight=1 / parts, is_last=self.accelerator.sync_gradients)
        return loss

    def _make_guard(self: Any, model: nn.Module) -> None:
        refuse_unfit(self.accelerator)
        if isinstance(model, nn.DataParallel):
            raise ConfigError(
                "torch.nn.DataParallel",
                rule="gradients have to be on one device in each process",
                remedy="start a process for each GPU: torchrun --nproc-per-node gpu, or show it one only",
            )
        settings = {"max_norm": self.args.max_grad_norm, **self.guard_settings}
        self.guard = StepGuard(model, self.optimizer, **settings)
        if self._guard_state is not None:
            self.guard.load_state_dict(self._guard_state)
        self._own_step = self.optimizer.step
        # With what a scheduler has left on the method, by which it tells that nobody has replaced it.
        self.optimizer.step = functools.wraps(self._own_step)(lambda *_, **__: self.guard.step())

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """The guard clips."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Known once the step is made: it is in the log all the same."""

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.guard is not None and "loss" in logs:
            records = self.guard.drain(wait=True)
            if records:
                logs["grad_norm"] = records[-1].grad_norm
                logs["skipped_steps"] = sum(record.skipped for record in records)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.guard is not None:
            self.guard.flush()
            if self.args.should_save:
                torch.save(self.guard.state_dict(), os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        path = os.path.join(checkpoint or "", STATE_FILE)
        if checkpoint is not None and os.path.isfile(path):
            self._guard_state = torch.load(path, map_location="cpu", weights_only=True)


class TrackerCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Logs what the Trainer logs into an `ExperimentTracker`, which its owner closes.

    Args:
        tracker: A `harness.ExperimentTracker`; on every rank one, or on rank 0 alone.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracker.log_hyperparameters(args.to_dict())
        if state.global_step:
            self._tracker.rewind(state.global_step + 1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        values = {_name(key): value for key, value in (logs or {}).items()}
        self._tracker.log_metrics_batch(values, step=state.global_step)


def _name(key: str) -> str:
    """`eval_loss` as `val/loss`, what else is logged as `train/...`."""
    return Prefix.VAL + key.removeprefix("eval_") if key.startswith("eval_") else Prefix.TRAIN + key

"""The guard in Lightning's Trainer, as a precision plugin; a callback; a logger. Tested with Lightning 2.6.

    plugin = guarded_precision("bf16-mixed")
    trainer = Trainer(plugins=plugin, callbacks=GuardCallback(), gradient_clip_val=1.0)
    trainer.fit(model, loader)

The plugin takes the place of clipping and of the optimizer's step; `gradient_clip_val` is what it clips to.
The step and the schedule are the Trainer's: skipped steps count in `global_step`, and the schedule goes on
with them.

What it cannot see, and refuses: manual optimization, `gradient_clip_algorithm="value"`, FSDP1 and DeepSpeed.
What it does not see: a `training_step` that returns None is no step. State of the guard is in Lightning's
checkpoints, under the plugin's name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from harness.errors import ConfigError, needs
from harness.stability import StepGuard

with needs("lightning", extra="lightning"):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision
    from lightning.pytorch.utilities import rank_zero_only

__all__ = ["GuardCallback", "TrackerLogger", "guarded_precision"]


def guarded_precision(precision: str = "32-true", *, device: str = "cpu", **settings: Any) -> Precision:
    """A precision plugin with a `StepGuard` in it, for `Trainer(plugins=...)`, in place of `precision=`.

    Args:
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        device: `cpu` or `cuda`, for autocast.
        settings: `StepGuard`'s, but `max_norm`: that is the Trainer's `gradient_clip_val`.

    Raises:
        ConfigError: another precision, or a `max_norm`.
    """
    if "max_norm" in settings:
        raise ConfigError(
            f"max_norm={settings['max_norm']!r} for the guard in Lightning",
            rule="what is clipped to has one place",
            remedy="Trainer(gradient_clip_val=...)",
        )
    if precision == "32-true":
        return _GuardedPrecision(settings)
    if precision in ("bf16-mixed", "16-mixed"):
        return _GuardedMixedPrecision(settings, precision, device)
    raise ConfigError(
        f"precision={precision!r}", rule="the guard knows 32-true, bf16-mixed and 16-mixed in Lightning"
    )


class _Guarded(Precision):  # type: ignore[misc,unused-ignore]
    """What a guarded plugin does otherwise. The names are Lightning's."""

    _settings: dict[str, Any]
    guard: StepGuard | None = None
    """From the first forward pass of a fit to its end."""
    _model: nn.Module | None = None
    """As the strategy wraps it."""
    _saved: dict[str, Any] | None = None
    _loss: Tensor | None = None
    _num_backward = 0
    _is_last = False
    """Whether the backward pass under way is the last before the step."""

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> Any:
        self._model = model
        return super().connect(model, optimizers, lr_schedulers)

    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        # A forward pass under FSDP2 leaves whole parameters in the model, in place of those of the optimizer.
        if self.guard is None and self._model is not None:
            self.guard = self._made_guard(self._model)
        with super().train_step_context():
            yield

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:
        self._num_backward += 1
        self._loss = tensor.detach()  # before it is scaled
        scaled: Tensor = super().pre_backward(tensor, module)
        return scaled

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:
        loss: Tensor = super().post_backward(tensor, module)
        if self.guard is not None and self._loss is not None:
            parts = module.trainer.accumulate_grad_batches  # by which the loss was divided
            self.guard.accumulate(self._loss * parts, weight=1 / parts, is_last=self._is_last)
        return loss

    def optimizer_step(
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        num_backward, self._is_last = self._num_backward, True
        result = closure()
        self._is_last = False
        if self.guard is None or self._num_backward == num_backward:
            return result  # training_step returned None
        scaler = getattr(self, "scaler", None)
        if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # as Lightning does it, for the hooks
        self._after_closure(model, optimizer)  # the hooks between backward and step
        self.guard.step(scaler=scaler)
        if scaler is not None:
            scaler.update()
        return result

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """The guard clips."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"lightning": super().state_dict()}
        if self.guard is not None:
            self.guard.flush()
            state["guard"] = self.guard.state_dict()
        elif self._saved is not None:
            state["guard"] = self._saved
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["lightning"])
        self._saved = state_dict.get("guard")

    def teardown(self) -> None:
        if self.guard is not None:
            self._saved = self.guard.state_dict()  # for a checkpoint that is written after fit
            self.guard.close()
        self.guard = self._model = None
        super().teardown()

    def _made_guard(self, model: nn.Module) -> StepGuard:
        module: Any = getattr(model, "module", model)  # without DDP
        trainer: pl.Trainer = module.trainer
        _refuse_unfit(trainer, module, model)
        _refuse_other_device(self, trainer)
        guard = StepGuard(model, trainer.optimizers, max_norm=trainer.gradient_clip_val, **self._settings)
        if self._saved is not None:
            guard.load_state_dict(self._saved)
        return guard


class _GuardedPrecision(_Guarded):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = settings


class _GuardedMixedPrecision(_Guarded, MixedPrecision):  # type: ignore[misc,unused-ignore]
    def __init__(self, settings: dict[str, Any], precision: Any, device: str) -> None:
        MixedPrecision.__init__(self, precision, device)
        self._settings = settings


def _refuse_unfit(trainer: pl.Trainer, module: pl.LightningModule, model: nn.Module) -> None:
    problems = {
        "manual optimization": not module.automatic_optimization,
        "gradient_clip_algorithm='value'": trainer.gradient_clip_algorithm == "value",
        type(trainer.strategy).__name__: isinstance(model, FullyShardedDataParallel)
        or trainer.strategy.handles_gradient_accumulation,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ConfigError(
                f"{problem} with the guard in Lightning",
                rule="it takes the place of clipping by norm and of the step of automatic optimization, of a "
                "plain model, DDP or FSDP2",
                remedy="leave it out; in a loop with manual optimization make a StepGuard yourself",
            )


def _refuse_other_device(plugin: Precision, trainer: pl.Trainer) -> None:
    ours, theirs = getattr(plugin, "device", None), trainer.strategy.root_device.type
    if ours not in (None, theirs):
        raise ConfigError(
            f"device={ours!r} for the precision of a model on {theirs}",
            rule="autocast changes nothing on another device",
            remedy=f"guarded_precision({plugin.precision!r}, device={theirs!r})",
        )


class GuardCallback(pl.Callback):  # type: ignore[misc,unused-ignore]
    """Logs what the guard saw (`guard/grad_norm`, `guard/skipped`), and waits for the last steps at the end.

    Norms are of the step `lag_steps` ago, so nothing waits for the device.
    """

    num_skipped = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        records = _guard_of(trainer).drain()
        self.num_skipped += sum(record.skipped for record in records)
        if records:
            values = {"guard/grad_norm": records[-1].grad_norm, "guard/skipped": float(self.num_skipped)}
            module.log_dict(values)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        guard = _guard_of(trainer)
        guard.flush()
        self.num_skipped += sum(record.skipped for record in guard.drain())


def _guard_of(trainer: pl.Trainer) -> StepGuard:
    guard = getattr(trainer.precision_plugin, "guard", None)
    if not isinstance(guard, StepGuard):
        raise ConfigError(
            f"GuardCallback with {type(trainer.precision_plugin).__name__}",
            rule="it reads the guard of a guarded precision plugin",
            remedy="Trainer(plugins=guarded_precision(), callbacks=GuardCallback())",
        )
    return guard


class TrackerLogger(Logger):  # type: ignore[misc,unused-ignore]
    """Logs what Lightning logs into an `ExperimentTracker`, on rank 0, and closes it at the end.

    Args:
        tracker: A `harness.ExperimentTracker`.
    """

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self._tracker = tracker

    @property
    def name(self) -> str:
        return str(self._tracker.config.experiment_name)

    @property
    def version(self) -> str:
        return str(self._tracker.run_dir.name)

    @rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tracker.log_metrics_batch(metrics, step=step)

    @rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._tracker.log_hyperparameters(params)

    @rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def finalize(self, status: str) -> None:
        self._tracker.close("finished" if status == "success" else "crashed")

"""One step after the other on the device: its gradients are measured, judged, and applied or left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from harness.config import GuardConfig
from harness.errors import ConfigError
from harness.stability import native
from harness.stability.attach import source_of
from harness.stability.buffers import Buffers
from harness.stability.checks.all import Checks
from harness.stability.checks.attention import is_compiled
from harness.stability.checks.base import StepView
from harness.stability.grad_scaler import ScaledGradients
from harness.stability.group_decider import GroupDecider
from harness.stability.hooks import CommHook
from harness.stability.layout import SUM_SQUARES, Layout
from harness.stability.loss_scale import LossScale
from harness.stability.micro_batches import MicroBatches
from harness.stability.optimizers import Optimizers
from harness.stability.packing import Packet
from harness.stability.rank_statistics import Fault
from harness.stability.stepper import OptimizerStepper
from harness.stability.watch import Watch

__all__ = ["DeviceStep", "StepOutput"]


class StepOutput(NamedTuple):
    """What a step leaves behind on the device, to be read later."""

    packet: Packet
    layout: Layout
    rows: Tensor
    """`[P, 6]`, this rank's statistics and the reduced sums of squares."""
    counts_tokens: bool


class DeviceStep:
    """Makes guarded steps. Synchronises only where `OptimizerStepper` and `Buffers` do.

    Args and errors are `StepGuard`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        config: GuardConfig,
        *,
        checks: Checks,
        comm_hook: CommHook | None,
        precision: torch.dtype,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.number = 0
        """Of the step at hand."""
        self._extremes_every = config.extremes_every
        self._optimizers, self._precision, self._checks = optimizers, precision, checks
        self._watch = Watch(model, optimizers, on_close=self._release)
        self.source = source_of(
            model,
            self.layout,
            comm_hook=comm_hook,
            group=group,
            in_backward=config.during_backward == "on",
        )
        device = self.layout.parameters[0].device
        if device.type == "cpu":
            native.use_alike(self.source.group)
        self.stepper = OptimizerStepper(optimizers, config, device=device, group=self.source.group)
        self.loss_scale = LossScale(
            config.init_loss_scale,
            growth_steps=config.loss_scale_growth_steps,
            device=device,
            enabled=precision == torch.float16,
        )
        self.micro_batches = MicroBatches(device)
        self._decider = GroupDecider(
            config,
            group=self.source.group,
            num_replicas=self.source.num_replicas,
            num_shards=self.source.num_shards,
            loss_scale=self.loss_scale,
            micro_batches=self.micro_batches,
        )
        self.size = self._decider.size
        self.buffers = Buffers(model)
        self._is_compiled = is_compiled(model)
        self._skip_t: Tensor | None = None
        self._take_layout()
        checks.attach(model, optimizers)
        self.start()

    @property
    def layout(self) -> Layout:
        """Which parameter is which row of the statistics, as of the last step."""
        return self._watch.layout

    @property
    def applied_t(self) -> Tensor:
        """0-d bool, whether the last step was applied; False before the first."""
        if self._skip_t is None:
            return torch.zeros_like(self.loss_scale.value_t, dtype=torch.bool)
        return ~self._skip_t

    def start(self) -> None:
        """Forgets what was noted of the step at hand."""
        self.source.start_step()
        self.source.extremes = self.number % self._extremes_every == 0
        self.micro_batches.clear()

    def forget(self) -> None:
        """The run goes on from another state."""
        self._checks.forget()
        self.buffers.take_snapshot()

    def note_gradient(self) -> None:
        """Notes what the last micro-batch did to the gradient."""
        self.micro_batches.note_gradient(self.source.micro_batch_rows(), self.micro_batches.num - 1)

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        """In it checks look at the forward pass, when they are due."""
        if self._is_compiled:
            yield
            return
        with self._checks.watch_forward(self.number):
            yield

    def make(
        self,
        loss: Tensor | None,
        scaler: GradScaler | None,
        *,
        is_whole_step: bool,
        nominal_tokens: float,
        host_fields: Sequence[float],
    ) -> StepOutput:
        """Makes the step at hand.

        Args:
            loss: The mean of the last micro-batch; None: all were noted.
            is_whole_step: The loop has told of no other.
            scaler: What scaled the loss, if anything but the guard did.
            nominal_tokens: What the loss was divided by before the backward pass; 0: its own tokens.
            host_fields: The rank statistics after FAULTS.

        Raises:
            ConfigError: `StepGuard.step`.
        """
        is_new_layout = self._follow_optimizers()
        scaled = self._scaled_gradients(scaler)
        if loss is not None:
            self.micro_batches.add_mean(loss, 1.0, is_whole_step=is_whole_step)
        is_unscaled = scaled is not None and scaled.is_unscaled
        local = self.source.local_rows(unscaled_by=self.loss_scale.value_t if is_unscaled else None)
        reduced = self.source.reduced_rows()
        rows = torch.cat([local, reduced[:, SUM_SQUARES, None]], dim=1)
        view = self._view(rows)
        sent, same = ({}, {}) if view is None else self._measured(view)
        decision, packet = self._decider.decide(
            local,
            reduced,
            host_fields=(float(self._fault()), *host_fields),
            faults_t=self.stepper.fused_check.faults_t,
            is_unscaled=is_unscaled,
            nominal_tokens=nominal_tokens,
            sent=sent,
            same_on_replicas=same,
        )
        if view is not None:
            self._checks.before_update(view)
        decision, of_update = self.stepper.step(self.number, decision, self.layout)
        packet |= {"summary": decision.summary, **of_update}
        self._skip_t = decision.skip_t
        if view is not None:
            self._checks.after_update(view)
        if scaled is not None:
            scaled.note_outcome(decision.overflowed_t)
        self.buffers.restore_if_skipped(decision.skip_t)
        if is_new_layout:
            self.buffers.take_snapshot()  # those of modules that are new too
        self.loss_scale.update(overflowed_t=decision.overflowed_t, skip_t=decision.skip_t)
        return StepOutput(packet, self.layout, rows, self.micro_batches.counts_tokens)

    def close(self, reason: str) -> None:
        """Stops measuring. Idempotent; the first reason counts."""
        self._watch.close(reason)

    def require_open(self) -> None:
        """Refuses a guard that was closed."""
        if self._watch.closed_because is not None:
            raise ConfigError(
                f"the guard cannot be used any more: {self._watch.closed_because}",
                rule="a closed guard measures nothing, and what is not measured is not applied",
                remedy="make a new StepGuard, or call the optimizer yourself",
            )

    def _release(self) -> None:
        self._checks.close()
        self.source.close()
        self.buffers.close()

    def _take_layout(self) -> None:
        self.source.watch(self.layout)
        self.stepper.reset()
        self._watch.claim()

    def _follow_optimizers(self) -> bool:
        """Takes in what they hold now, and refuses what is not reduced; whether they hold anything else."""
        has_changed = self._watch.follow()
        if has_changed:
            self._take_layout()
        self._watch.require_reduced(self.source)
        return has_changed

    def _scaled_gradients(self, scaler: GradScaler | None) -> ScaledGradients | None:
        """What the loop's GradScaler, if it has one, did to the gradients."""
        if scaler is None or not scaler.is_enabled():
            self.loss_scale.follow(None)
            return None
        by_accelerate = scaler is self._optimizers.grad_scaler
        scaled = ScaledGradients(scaler, self._optimizers.unwrapped, updates=by_accelerate)
        self.loss_scale.follow(scaled.scale_t)
        return scaled

    def _fault(self) -> Fault:
        fault = Fault(0) if self.source.is_reduced else Fault.UNREDUCED
        if all(p.grad is None for p in self.layout.parameters):
            fault |= Fault.NO_GRADIENT
        return fault

    def _measured(self, view: StepView) -> tuple[Packet, Packet]:
        self._checks.observe(view)
        return self._checks.measure(view)

    def _view(self, rows: Tensor) -> StepView | None:
        """What checks see of the step; None if none is due."""
        if not self._checks.watches(self.number):
            return None
        return StepView(
            step=self.number,
            layout=self.layout,
            rows=rows,
            state_of=self._optimizers.state_of,
            precision=self._precision,
            num_replicas=self.source.num_replicas,
            applied_t=self.applied_t,
            counts_tokens=self.micro_batches.counts_tokens,
            loss_scale_t=self.loss_scale.value_t,
        )

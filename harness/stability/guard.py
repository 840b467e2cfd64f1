"""`StepGuard`: takes the place of gradient clipping and `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from types import EllipsisType, TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from harness.config import GuardConfig
from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability.checks.all import Checks, load_checks
from harness.stability.checks.base import Check
from harness.stability.device_step import DeviceStep
from harness.stability.grad_scaler import refuse_forgotten_scaler
from harness.stability.hooks import CommHook, DdpSource
from harness.stability.incidents import Incident
from harness.stability.layout import Layout
from harness.stability.monitor import Monitor, Settled
from harness.stability.optimizers import Optimizers
from harness.stability.policy import Ladder, say

__all__ = ["StepGuard"]


class StepGuard:
    """Measures every gradient, decides on the device what becomes of the step, and does it on all ranks.

        guard = StepGuard(model, optimizer, max_norm=1.0)
        ...
        loss.backward()
        guard.step(loss)                  # in place of clip_grad_norm_ and optimizer.step()
        optimizer.zero_grad()

    A step with a NaN or an Inf in any rank's loss or gradient changes neither parameters nor optimizer state
    on any rank, and what its forward passes did to the model's buffers is undone. An incident is said in the
    log as it becomes known, `lag_steps` later; too many of them end the run, on all ranks at the same step.
    Every step has a record (`drain`).

    A step waits for the device to finish the one `lag_steps` before. Nothing else synchronises but optimizers
    that are not fused, the step in which a fused one makes its state, and buffers that change their shape.

    Args:
        model: A plain module, or one under DDP or FSDP2 (`fully_shard`).
        optimizer: One or several, with one norm and one verdict for all; their parameters are the model's.
            What they hold in a step is what is measured, clipped and judged in it: groups may be added,
            layers thawed, parameters replaced. What no optimizer holds is left alone, and said once. Fused
            Adam, AdamW, SGD and Adagrad need no host. Other optimizers over other parts of the model may
            have guards of their own; a later guard of the same parameters closes the earlier one.
        max_norm: The gradient is scaled down to this L2 norm; None or 0: never.
        nonfinite: Whether a step that is not finite is left out, or ends the run (its record says `stop`).
        spike: What to do about a finite but extraordinary loss or norm.
        comm_hook: How DDP reduces a bucket, called with the process group and the bucket;
            `bf16_compress_hook` say. Default: the plain mean, to the same bits as without a guard.
        precision: Of the arithmetic of forward and backward. With float16 the guard keeps a dynamic loss
            scale: pass losses through `scale` before `backward`.
        group: For a plain model whose gradients the caller reduces over these ranks before `step`.
        ladder: Whether too many skipped steps end the run (`Ladder`). False: the caller sees to it.
        rollback: Brings the run back to where it was sound, on all ranks: loads model, optimizer and guard,
            and steps over the data that broke them. It gets the record of the last step; False: it cannot.
        on_incident: Called with each incident as it becomes known, on all ranks.
        checks: "off": without the checks for silent errors (docs/checks.md), which warn and change nothing.
            Or, besides them, measurements of your own, each a `Check` or its name `package.module:function`.
        settings: Any other field of `GuardConfig`.

    Raises:
        ConfigError: parameters on several devices, of complex type or unknown to the model, or in two
            optimizers; sparse embeddings; a DDP model that has a communication hook already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        max_norm: float | None = 1.0,
        nonfinite: Literal["skip", "stop"] = "skip",
        spike: Literal["off", "warn", "clip", "skip"] = "warn",
        comm_hook: CommHook | None = None,
        precision: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
        ladder: bool = True,
        rollback: Callable[[StepRecord], bool] | None = None,
        on_incident: Callable[[Incident], None] | None = None,
        checks: Literal["on", "off"] | Sequence[Check | str] = (),
        **settings: Any,
    ) -> None:
        if isinstance(checks, str):
            settings.setdefault("silent_errors", checks)
            checks = ()
        named = tuple(check for check in checks if isinstance(check, str))
        self.config = GuardConfig(
            max_norm=max_norm, nonfinite=nonfinite, spike=spike, checks=named, **settings
        )
        given = [check for check in checks if not isinstance(check, str)]
        self._checks = all_checks = Checks(self.config, [*load_checks(self.config), *given])
        self._optimizers = Optimizers(optimizer)
        self._device = DeviceStep(
            model,
            self._optimizers,
            self.config,
            checks=all_checks,
            comm_hook=comm_hook,
            precision=precision,
            group=group,
        )
        source = self._device.source
        self._monitor = Monitor(
            group=source.group,
            num_replicas=source.num_replicas,
            lag_steps=self.config.lag_steps,
            checks=all_checks,
        )
        self._ladder = Ladder(self.config, rollback=rollback) if ladder else None
        self._on_incident = on_incident
        self._may_have_forgotten_scaler = True
        self._is_within_accumulation = False

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: GuardConfig,
        *,
        precision: str = "fp32",
        comm_hook: CommHook | None = None,
        group: dist.ProcessGroup | None = None,
        checks: Sequence[Check] = (),
    ) -> StepGuard:
        """The guard that `config` describes, for a caller with a `Ladder` of its own; `precision` is fp32,
        bf16 or fp16. `checks` come to those of `config`."""
        settings = {field.name: getattr(config, field.name) for field in fields(config)}
        settings["checks"] = (*config.checks, *checks)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        return cls(
            model, optimizer, comm_hook=comm_hook, precision=dtype, group=group, ladder=False, **settings
        )

    @property
    def loss_scale(self) -> Tensor:
        """The current loss scale, 0-d fp32 on the device; 1 without loss scaling."""
        return self._device.loss_scale.value_t

    @property
    def applied(self) -> Tensor:
        """Whether the last step changed the weights: 0-d bool on the device, for averages, counters and
        schedules that have to agree with skips: `average.lerp_(p, 0.01 * guard.applied)`. False before the
        first step. Does not synchronise."""
        return self._device.applied_t

    @property
    def next_step(self) -> int:
        """Number of the step that the next call of `step` takes."""
        return self._device.number

    def scale(self, loss: Tensor) -> Tensor:
        """What to call `backward` on: `loss` times the loss scale, or `loss` itself without loss scaling."""
        return loss * self.loss_scale if self._device.loss_scale.enabled else loss

    def accumulate(
        self,
        loss: Tensor,
        num_tokens: Tensor | float | None = None,
        *,
        weight: Tensor | float = 1.0,
        num_correct: Tensor | float = 0,
        is_last: bool = False,
    ) -> None:
        """Notes a micro-batch after its backward pass, and what it did to the gradient.

        Args:
            loss: Of one element, not scaled by a loss scale: the sum over the micro-batch's `num_tokens`
                tokens, or without them its mean, before it is multiplied by a weight.
            num_tokens: How many tokens that were; of all micro-batches of a step or of none.
            weight: What the mean is multiplied by before `backward`: `1 / G` for G micro-batches. The
                record's loss is the weighted mean.
            num_correct: How many of the tokens were predicted right; only passed on to the records.
            is_last: Spares a pass over the gradients, because `step` follows. Under DDP and FSDP2 the guard
                sees by itself that a micro-batch was reduced.

        Raises:
            ConfigError: the loss is not a tensor with one real number in it, or a count is not one number.
        """
        self._device.require_open()
        with torch.no_grad():
            if num_tokens is None:
                self._device.micro_batches.add_mean(loss, weight)
            else:
                self._device.micro_batches.add_sum(loss, num_tokens, num_correct)
            if not is_last:
                self._device.note_gradient()

    def watch_forward(self) -> AbstractContextManager[None]:
        """Put the forward pass into it, and every so many steps checks look at it: every `sample_every` steps
        at the largest attention logit of each layer. Optional; of a model that was compiled before it was
        guarded they see nothing, and one that is compiled later is compiled twice."""
        return self._device.watch_forward()

    def watch_evaluation(self) -> AbstractContextManager[None]:
        """Put an evaluation into it, and a check finds what it leaves behind: random numbers drawn, modes
        changed, parameters or buffers written to, dropout that was on. Optional; host work only."""
        return self._checks.watch_evaluation()

    def step(
        self,
        loss: Tensor | None = None,
        *,
        scaler: GradScaler | EllipsisType | None = ...,
        nominal_tokens: float | None = None,
        compute_s: float = 0.0,
        data_wait_s: float = 0.0,
        stop_requested: bool = False,
        num_saves: int = 0,
    ) -> None:
        """Judges the gradients that lie in the model, clips them, and applies them or leaves them out.

        Args:
            loss: This rank's mean loss, not scaled, of a step with a single batch. Of several micro-batches
                it may be the last one's: the verdict holds for all that lies in the gradients, but the record
                has this loss and names no micro-batch. With `accumulate` after each it has all of it. Within
                `accelerator.accumulate`, each micro-batch's: with an optimizer prepared by accelerate the
                step is made when accelerate makes one.
            scaler: The loop's own GradScaler, if it scales this loss: its scale is taken out of the gradients
                here, with or without `unscale_` before, and `scaler.update()` follows as ever. One that is
                in use and not handed over is an error; None says that it scales another loss.
            nominal_tokens: The constant that summed losses were divided by before the backward pass; the
                gradient becomes that of the mean over the tokens that were really there.
            compute_s: Passed on to the records of all ranks, like the next three: seconds of computing.
            data_wait_s: Seconds of waiting for data.
            stop_requested: Whether this rank was asked to stop.
            num_saves: How many saves have ended on this rank.

        Raises:
            ConfigError: there is no loss, neither here nor from `accumulate`, or there is one from both; a
                GradScaler is in use that was not handed over; the optimizer holds a parameter that is not the
                model's, or that DDP does not reduce; the guard was closed.
            InstabilityError: too many steps were skipped, with a report; on all ranks at the same step.
        """
        self._device.require_open()
        self._require_one_loss(loss)
        if self._optimizers.is_accumulating:
            if loss is not None:
                self.accumulate(loss)
            self._is_within_accumulation = loss is not None
            return
        with torch.no_grad():
            output = self._device.make(
                loss,
                self._scaler(scaler),
                is_whole_step=not self._is_within_accumulation,
                nominal_tokens=nominal_tokens or 0.0,
                host_fields=(compute_s, data_wait_s, float(stop_requested), float(num_saves)),
            )
            self._monitor.push(self._device.number, output)
        self._device.number += 1
        self._start_step()
        self._respond(self._monitor.settle())

    def when_local_done(self, call: Callable[[], None]) -> None:
        """Has `call` called in each backward pass that reduces, once this rank's own gradients are complete
        and before the last of them are reduced: what follows is waiting for others. DDP alone tells that."""
        if isinstance(self._device.source, DdpSource):
            self._device.source.when_local_done = call

    def flush(self) -> None:
        """Waits for the steps that are still in flight, on all ranks: incidents among them are said, and the
        ladder acts. Leaving `with guard:` does it too."""
        self._respond(self._monitor.settle(wait=True))

    def drain(self, wait: bool = False) -> list[StepRecord]:
        """Records of the steps up to `lag_steps` ago, or with `wait` of all, that were not drained before.

        Equal on all ranks; each may call it when it likes. With `wait` and without `flush` a step that was
        skipped in the last `lag_steps` has no `per_parameter`, which takes all ranks. What is not drained is
        kept up to 64 MiB; then the oldest steps are dropped, which is said once.
        """
        return self._monitor.drain(wait=wait)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, without the records still to drain. Does not synchronise."""
        return {
            "step": self._device.number,
            "loss_scale": self._device.loss_scale.state_dict(),
            **self._device.size.state_dict(),
            **({} if self._ladder is None else {"ladder": self._ladder.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave and forgets records of steps that were not drained."""
        self._device.number = state["step"]
        self._device.loss_scale.load_state_dict(state["loss_scale"])
        self._device.size.load_state_dict(state)
        if self._ladder is not None and "ladder" in state:
            self._ladder.load_state_dict(state["ladder"])
        self._monitor.clear()
        self._device.forget()
        self._start_step()

    def close(self) -> None:
        """Stops measuring; hooks that cannot be taken out go on reducing as before. Idempotent. A `step`
        after it is an error: the loop has to call the optimizer itself again."""
        self._device.close("it was closed")

    def __enter__(self) -> StepGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:  # else the other ranks are elsewhere
                self.flush()
        finally:
            self.close()

    @property
    def layout(self) -> Layout:
        """Which parameter is which row of the statistics, as of the last step."""
        return self._device.layout

    def _respond(self, settled: Iterable[Settled]) -> None:
        """Acts on steps that are known by now, as all ranks do."""
        for one in settled:
            self._device.stepper.fused_check.observe(one.step, skipped=one.skipped, clip_coef=one.clip_coef)
            for finding in one.record.findings if one.record else ():
                say(f"step {one.step}: {finding.summary()}")
            incident = None if one.record is None else Incident.of(one.record)
            if incident is not None and self._on_incident is not None:
                self._on_incident(incident)
            if self._ladder is not None and self._ladder.observe(one.record) == "rollback":
                self._monitor.clear()  # the steps that follow are of the branch that was left
                return

    def _require_one_loss(self, loss: Tensor | None) -> None:
        noted = self._device.micro_batches.num > 0 and not self._is_within_accumulation
        if (loss is None) != noted:
            raise ConfigError(
                "step() was called without a loss" if loss is None else "step() was given a loss once more",
                rule="a verdict needs this rank's loss, once",
                remedy="call step(loss); or, with micro-batches, accumulate(...) after each and then step()",
            )

    def _start_step(self) -> None:
        self._is_within_accumulation = False
        self._device.start()

    def _scaler(self, scaler: GradScaler | EllipsisType | None) -> GradScaler | None:
        """What scaled the loss: what was handed over, or accelerate's; a forgotten one is refused, once."""
        if isinstance(scaler, EllipsisType):
            scaler = self._optimizers.grad_scaler
            may_forget = self._may_have_forgotten_scaler and not self._optimizers.are_accelerated
            if scaler is None and may_forget:
                refuse_forgotten_scaler()
        self._may_have_forgotten_scaler = False
        return scaler

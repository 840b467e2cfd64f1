"""`StepGuard`: takes the place of gradient clipping and `optimizer.step()`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import EllipsisType, TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from harness.config import GuardConfig
from harness.dist.collectives import all_gather
from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability.attach import source_of
from harness.stability.buffers import Buffers
from harness.stability.checks.all import Checks, load_checks
from harness.stability.checks.attention import is_compiled
from harness.stability.checks.base import Check, StepView
from harness.stability.grad_scaler import ScaledGradients, refuse_forgotten_scaler
from harness.stability.graphed import Graphed
from harness.stability.hooks import CommHook
from harness.stability.layout import SUM_SQUARES, Layout
from harness.stability.loss_scale import LossScale
from harness.stability.micro_batches import MicroBatches
from harness.stability.monitor import Monitor
from harness.stability.optimizers import Optimizers
from harness.stability.packing import Packet, pack, unpack
from harness.stability.rank_statistics import NUM_HOST_FIELDS, Fault, build_rank_statistics
from harness.stability.stepper import OptimizerStepper
from harness.stability.verdict import Decider, Decision
from harness.stability.watch import Watch

__all__ = ["StepGuard"]


class StepGuard:
    """Measures every gradient, decides on the device what becomes of the step, and does it on all ranks.

        guard = StepGuard(model, optimizer, max_norm=1.0)
        ...
        loss.backward()
        guard.step(loss)                  # in place of clip_grad_norm_ and optimizer.step()
        optimizer.zero_grad()
        for record in guard.drain():      # what happened `lag_steps` ago
            ...

    A step with a NaN or an Inf in any rank's loss or gradient changes neither parameters nor optimizer state
    on any rank, and what its forward passes did to the model's buffers is undone. Nothing here synchronises
    with the device but `drain`, optimizers that are not fused, the step in which a fused one makes its state,
    and buffers that change their shape.

    Args:
        model: A plain module, or one under DDP or FSDP2 (`fully_shard`).
        optimizer: One or several, with one norm and one verdict for all; their parameters are the model's.
            What they hold in a step is what is measured, clipped and judged in it: groups may be added,
            layers thawed, parameters replaced. What no optimizer holds is left alone, and said once. Fused
            Adam, AdamW, SGD and Adagrad need no host. Other optimizers over other parts of the model may
            have guards of their own; a later guard of the same parameters closes the earlier one.
        max_norm: The gradient is scaled down to this L2 norm; None: never.
        nonfinite: Whether a step that is not finite is left out, or ends the run (its record says `stop`).
        spike: What to do about a finite but extraordinary loss or norm.
        comm_hook: How DDP reduces a bucket, called with the process group and the bucket;
            `bf16_compress_hook` say. Default: the plain mean, to the same bits as without a guard.
        precision: Of the arithmetic of forward and backward. With float16 the guard keeps a dynamic loss
            scale: pass losses through `scale` before `backward`.
        group: For a plain model whose gradients the caller reduces over these ranks before `step`.
        checks: Measurements of your own, each a `Check` or its name `package.module:function`.
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
        checks: Sequence[Check | str] = (),
        **settings: Any,
    ) -> None:
        named = tuple(check for check in checks if isinstance(check, str))
        self.config = GuardConfig(
            max_norm=max_norm, nonfinite=nonfinite, spike=spike, checks=named, **settings
        )
        given = [check for check in checks if not isinstance(check, str)]
        self._checks = Checks(self.config, [*load_checks(self.config), *given])
        self._optimizers = Optimizers(optimizer)
        self._watch = Watch(model, self._optimizers, on_close=self._release)
        self._source = source_of(model, self.layout, comm_hook=comm_hook, group=group)
        device = self.layout.parameters[0].device
        self._stepper = OptimizerStepper(self._optimizers, device=device)
        self._loss_scale = LossScale(
            self.config.init_loss_scale,
            growth_steps=self.config.loss_scale_growth_steps,
            device=device,
            enabled=precision == torch.float16,
        )
        self._decider = Decider(self.config, num_replicas=self._source.num_replicas)
        self._is_compiled = is_compiled(model)
        self._buffers = Buffers(model)
        self._precision = precision
        self._monitor = Monitor(
            group=self._source.group,
            num_replicas=self._source.num_replicas,
            lag_steps=self.config.lag_steps,
            checks=self._checks,
        )
        self._step = 0
        self._micro_batches = MicroBatches(device)
        self._rank_statistics = Graphed(functools.partial(_rank_statistics, self._micro_batches))
        self._decision = Graphed(
            functools.partial(_decide, self._decider, self._loss_scale), state=self._decider.size.live_state
        )
        self._may_have_forgotten_scaler = True
        self._is_gated = False
        self._take_layout()
        self._start_step()

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
    ) -> StepGuard:
        """The guard that `config` describes; `precision` is fp32, bf16 or fp16."""
        settings = {field.name: getattr(config, field.name) for field in fields(config)}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        return cls(model, optimizer, comm_hook=comm_hook, precision=dtype, group=group, **settings)

    @property
    def loss_scale(self) -> Tensor:
        """The current loss scale, 0-d fp32 on the device; 1 without loss scaling."""
        return self._loss_scale.value_t

    @property
    def next_step(self) -> int:
        """Number of the step that the next call of `step` takes."""
        return self._step

    def scale(self, loss: Tensor) -> Tensor:
        """What to call `backward` on: `loss` times the loss scale, or `loss` itself without loss scaling."""
        return loss * self._loss_scale.value_t if self._loss_scale.enabled else loss

    def accumulate(
        self,
        loss_sum: Tensor,
        num_tokens: Tensor | float = 1,
        *,
        num_correct: Tensor | float = 0,
        is_last: bool = False,
    ) -> None:
        """Notes a micro-batch after its backward pass, and what it did to the gradient.

        Args:
            loss_sum: Sum of the loss over the micro-batch's tokens, of one element, not scaled.
            num_tokens: How many tokens that were.
            num_correct: How many of them were predicted right; only passed on to the records.
            is_last: Spares a pass over the gradients, because `step` follows. Under DDP and FSDP2 the guard
                sees by itself that a micro-batch was reduced.

        Raises:
            ConfigError: the loss is not a tensor with one real number in it, or a count is not one number.
        """
        self._require_open()
        with torch.no_grad():
            self._micro_batches.add(loss_sum, num_tokens, num_correct)
            if not is_last:
                self._micro_batches.note_gradient(
                    self._source.micro_batch_rows(), self._micro_batches.num - 1
                )

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        """Put the forward pass into it, and every so many steps checks look at it: every `sample_every` steps
        at the largest attention logit of each layer. Optional; of a model that was compiled before it was
        guarded they see nothing, and one that is compiled later is compiled twice."""
        if self._is_compiled:
            yield
            return
        with self._checks.watch_forward(self._step):
            yield

    @torch.no_grad()
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
            loss: This rank's mean loss, not scaled, of a step with a single batch; with several, call
                `accumulate` after each instead. Within `accelerator.accumulate`, of each micro-batch: with
                an optimizer prepared by accelerate the step is made when accelerate makes one.
            scaler: The loop's own GradScaler, if it scales this loss: its scale is taken out of the gradients
                here, with or without `unscale_` before, and `scaler.update()` follows as ever. One that is
                in use and not handed over is an error; None says that it scales another loss.
            nominal_tokens: The constant that summed losses were divided by before the backward pass; the
                gradient becomes that of the mean over the tokens that were really there.
            compute_s, data_wait_s, stop_requested, num_saves: Passed on to the records of all ranks.

        Raises:
            ConfigError: there is no loss, neither here nor from `accumulate`, or there is one from both; a
                GradScaler is in use that was not handed over; the optimizer holds a parameter that is not the
                model's, or that DDP does not reduce; some ranks alone have called `drain`; the guard was
                closed.
        """
        self._require_open()
        self._require_one_loss(loss)
        if self._optimizers.is_accumulating:
            self._note_micro_batch(loss)
            return
        is_new_layout = self._follow_optimizers()
        scaled = self._scaled_gradients(scaler)
        if loss is not None:
            self.accumulate(loss, is_last=True)
        local, reduced = self._source.local_rows(), self._source.reduced_rows()
        is_unscaled = scaled is not None and scaled.is_unscaled
        if scaled is not None and is_unscaled and self._source.measures_backward:
            local = scaled.unscaled(local)
        host_values_t = self._from_host(
            float(self._fault()),
            compute_s,
            data_wait_s,
            float(stop_requested),
            float(num_saves),
            self._monitor.num_drained,
            *self._micro_batches.host_values(),
            float(is_unscaled),
            nominal_tokens or 0.0,
        )
        rows = torch.cat([local, reduced[:, SUM_SQUARES, None]], dim=1)
        (statistics,) = self._rank_statistics(
            local, reduced, host_values_t, self._stepper.fused_check.faults_t
        )
        view = self._view(rows)
        sent, same = ({}, {}) if view is None else self._checks.measure(view)
        packet = self._gather({"rank_statistics": statistics, **sent}, same)
        decision = Decision(*self._decision(packet["rank_statistics"], host_values_t))
        packet["summary"] = decision.summary
        if view is not None:
            self._checks.before_update(view)
        self._stepper.step(self._step, decision)
        if scaled is not None:
            scaled.note_outcome(decision.overflowed_t)
        self._buffers.restore_if_skipped(decision.skip_t)
        if is_new_layout:
            self._buffers.take_snapshot()  # those of modules that are new too
        self._monitor.push(self._step, packet, layout=self.layout, rows=rows, counts_tokens=loss is None)
        self._loss_scale.update(overflowed_t=decision.overflowed_t, skip_t=decision.skip_t)
        self._step += 1
        self._start_step()

    def drain(self, wait: bool = False) -> list[StepRecord]:
        """Records of the steps up to `lag_steps` ago, or with `wait` of all, that were not drained before.

        Equal on all ranks, which all have to call it at the same steps. What is not drained is kept up to
        64 MiB; then the oldest steps are dropped, which is said once.

        Raises:
            ConfigError: only some ranks called it.
        """
        records = self._monitor.drain(wait=wait)
        for record in records:
            self._stepper.fused_check.observe(record)
        return records

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, without the records still to drain. Does not synchronise."""
        return {
            "step": self._step,
            "loss_scale": self._loss_scale.state_dict(),
            **self._decider.size.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave and forgets records of steps that were not drained."""
        self._step = state["step"]
        self._loss_scale.load_state_dict(state["loss_scale"])
        self._decider.size.load_state_dict(state)
        self._monitor.clear()
        self._checks.forget()
        self._buffers.take_snapshot()
        self._start_step()

    def close(self) -> None:
        """Stops measuring; hooks that cannot be taken out go on reducing as before. Idempotent. A `step`
        after it is an error: the loop has to call the optimizer itself again."""
        self._watch.close("it was closed")

    def __enter__(self) -> StepGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layout(self) -> Layout:
        """Which parameter is which row of the statistics, as of the last step."""
        return self._watch.layout

    def _release(self) -> None:
        self._source.close()
        self._buffers.close()
        self._monitor.clear()

    def _note_micro_batch(self, loss: Tensor | None) -> None:
        """Within accelerate's accumulation, before the last micro-batch of a step."""
        if loss is not None:
            self.accumulate(loss)
        self._is_gated = loss is not None

    def _take_layout(self) -> None:
        self._source.watch(self.layout)
        self._stepper.reset()
        self._watch.claim()

    def _follow_optimizers(self) -> bool:
        """Takes in what they hold now, and refuses what is not reduced; whether they hold anything else."""
        has_changed = self._watch.follow()
        if has_changed:
            self._take_layout()
        self._watch.require_reduced(self._source)
        self._watch.warn_of_unused_gradients()
        return has_changed

    def _scaled_gradients(self, scaler: GradScaler | EllipsisType | None) -> ScaledGradients | None:
        """What the loop's GradScaler, if it has one, did to the gradients."""
        if isinstance(scaler, EllipsisType):
            scaler = self._optimizers.grad_scaler
            if scaler is None and self._may_have_forgotten_scaler:
                refuse_forgotten_scaler()
        self._may_have_forgotten_scaler = False
        if scaler is None or not scaler.is_enabled():
            self._loss_scale.follow(None)
            return None
        by_accelerate = scaler is self._optimizers.grad_scaler
        scaled = ScaledGradients(scaler, self._optimizers.unwrapped, updates=by_accelerate)
        self._loss_scale.follow(scaled.scale_t)
        return scaled

    def _fault(self) -> Fault:
        fault = Fault(0) if self._source.is_reduced else Fault.UNREDUCED
        if all(p.grad is None for p in self.layout.parameters):
            fault |= Fault.NO_GRADIENT
        return fault

    def _start_step(self) -> None:
        self._is_gated = False
        self._source.start_step()
        self._source.extremes = self._step % self.config.extremes_every == 0
        self._micro_batches.clear()

    def _require_open(self) -> None:
        if self._watch.closed_because is not None:
            raise ConfigError(
                f"the guard cannot be used any more: {self._watch.closed_because}",
                rule="a closed guard measures nothing, and what is not measured is not applied",
                remedy="make a new StepGuard, or call the optimizer yourself",
            )

    def _require_one_loss(self, loss: Tensor | None) -> None:
        noted = self._micro_batches.num > 0 and not self._is_gated
        if (loss is None) != noted:
            raise ConfigError(
                "step() was called without a loss" if loss is None else "step() was given a loss once more",
                rule="a verdict needs this rank's loss, once",
                remedy="call step(loss); or, with micro-batches, accumulate(...) after each and then step()",
            )

    def _from_host(self, *values: float) -> Tensor:
        """Host values, `[n]` float64 on the device, without a synchronisation."""
        on_cuda = self._loss_scale.value_t.is_cuda
        host = torch.tensor(values, dtype=torch.float64, pin_memory=on_cuda)
        return host.to(self._loss_scale.value_t.device, non_blocking=True)

    def _view(self, rows: Tensor) -> StepView | None:
        """What checks see of the step; None if none is due."""
        if not self._checks.watches(self._step):
            return None
        return StepView(
            step=self._step,
            layout=self.layout,
            rows=rows,
            state_of=self._optimizers.state_of,
            precision=self._precision,
            num_replicas=self._source.num_replicas,
        )

    def _gather(self, packet: Packet, same_on_replicas: Packet) -> Packet:
        """The step's one collective: everything from all ranks, in one message."""
        if self._source.group is None:
            return {name: tensor[None] for name, tensor in (packet | same_on_replicas).items()}
        num_shards = self._source.num_shards
        # A replica that is not sharded holds all of what is the same on all of them, and need not send it.
        flat, spec = pack(packet | same_on_replicas if num_shards > 1 else packet)
        gathered = unpack(all_gather(flat, group=self._source.group), spec)
        for name, tensor in same_on_replicas.items():
            gathered[name] = gathered[name][:num_shards] if num_shards > 1 else tensor[None]
        return gathered


def _rank_statistics(
    micro_batches: MicroBatches, local: Tensor, reduced: Tensor, host_values_t: Tensor, faults_t: Tensor
) -> tuple[Tensor]:
    """This rank's statistics.

    Args:
        host_values_t: The host fields, `MicroBatches.host_values`, whether the loop has unscaled the
            gradients, and the nominal tokens.
        faults_t: 0-d, to be added to the faults among the host fields.
    """
    host_fields, loss, number = host_values_t[:-2].split([NUM_HOST_FIELDS, 3, 1])
    host_fields = torch.cat([host_fields[:1] + faults_t, host_fields[1:]])
    micro_batches.note_gradient(local, number[0])
    statistics = build_rank_statistics(
        local,
        reduced,
        loss=micro_batches.loss_t + loss,
        micro_batch=micro_batches.suspect_t,
        host_fields=host_fields,
    )
    return (statistics,)


def _decide(
    decider: Decider, loss_scale: LossScale, per_rank: Tensor, host_values_t: Tensor
) -> tuple[Tensor, ...]:
    """The fields of a `Decision`."""
    decision = decider.decide(
        per_rank,
        loss_scale_t=loss_scale.value_t,
        is_unscaled_t=host_values_t[-2] > 0,
        nominal_tokens_t=host_values_t[-1],
    )
    return tuple(getattr(decision, field.name) for field in fields(Decision))

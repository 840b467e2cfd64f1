"""Looks at DDP's buckets before they are reduced, and reduces them to the same bits as DDP itself would.

No `from __future__ import annotations` here: DDP inspects a hook's annotations and wants the real types.
"""

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.stability.inert import Hook
from harness.stability.layout import Layout
from harness.stability.sources import RowTable
from harness.stability.statistics import bucket_statistics

__all__ = ["CommHook", "DdpSource"]

CommHook = Callable[[Any, GradBucket], Future[Tensor]]
"""A communication hook as torch's own: called with the process group and a bucket."""

_hook_of: WeakKeyDictionary[DistributedDataParallel, "_BucketHook"] = WeakKeyDictionary()
"""DDP takes one hook for its whole life, so a later guard on the same model finds the first one's."""


class DdpSource:
    """Gradients of a DDP model: each bucket is measured in the backward pass, just before its reduction.

    Args:
        comm_hook: Reduces a bucket in place of the plain all-reduce, `bf16_compress_hook` say.

    Raises:
        ConfigError: the model has a communication hook already, or another `comm_hook` from an earlier guard;
            it reduces in a way that knows no such hook; in `local_rows`: it stands in `join()`.
    """

    def __init__(self, ddp: DistributedDataParallel, layout: Layout, *, comm_hook: CommHook | None) -> None:
        self.layout = layout
        self.group: dist.ProcessGroup | None = ddp.process_group
        self.num_replicas, self.num_shards = ddp.process_group.size(), 1
        self.extremes = True
        _refuse_other_reductions(ddp)
        self._ddp = weakref.ref(ddp)  # the hook that outlives this source must not keep the model
        self._parameters = [p for p in ddp.parameters() if id(p) in layout.row_of]
        ignored = ddp.parameters_to_ignore
        self._unreduced = [
            p for name, p in ddp.module.named_parameters() if name in ignored and id(p) in layout.row_of
        ]
        """Parameters that DDP was told to leave alone: each rank's gradient is its own."""
        self._table = RowTable(layout, self._parameters[0].device)
        self._rows: Tensor | None = None
        self._is_reduced = False
        self._hook = _hook_on(ddp, comm_hook)
        self._hook.observe = self._see
        self._alone = self.num_replicas == 1 and comm_hook is None

    def micro_batch_rows(self) -> Tensor:
        if self._rows is not None:
            return self._with_unreduced(self._rows)
        return self._table.measure(self._parameters, extremes=False)

    def local_rows(self) -> Tensor:
        ddp = self._ddp()
        if ddp is not None:
            _refuse_join(ddp)
        return self._table.empty() if self._rows is None else self._with_unreduced(self._rows)

    def reduced_rows(self) -> Tensor:
        if self._alone:
            return self.local_rows()
        return self._table.measure(self._parameters, extremes=False)

    @property
    def is_reduced(self) -> bool:
        return self._is_reduced

    def start_step(self) -> None:
        self._rows = None
        self._is_reduced = False

    def close(self) -> None:
        if self._hook.observe == self._see:  # else a later guard has taken over
            self._hook.observe = None
        self._parameters, self._unreduced = [], []

    def _with_unreduced(self, rows: Tensor) -> Tensor:
        if not self._unreduced:
            return rows
        return rows + self._table.measure(self._unreduced, extremes=self.extremes)

    def _see(self, bucket: GradBucket) -> None:
        flat, parameters = bucket.buffer(), bucket.parameters()
        statistics = bucket_statistics(flat, [p.numel() for p in parameters], extremes=self.extremes)
        if self._rows is None:
            self._rows = self._table.empty()
        self._rows.index_copy_(0, self._table.index(parameters), statistics)
        self._is_reduced = bucket.is_last()


def _refuse_other_reductions(ddp: DistributedDataParallel) -> None:
    """The ways past DDP's buckets, where there would be nothing to measure."""
    ways = {
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "torch._dynamo.config.optimize_ddp = 'python_reducer'": ddp._use_python_reducer,
    }
    for way, is_used in ways.items():
        if is_used:
            raise ConfigError(
                f"DistributedDataParallel with {way}",
                rule="the guard measures gradients in the buckets that DDP itself reduces",
                remedy="leave it out",
            )
    _refuse_join(ddp)


def _refuse_join(ddp: DistributedDataParallel) -> None:
    join = ddp._join_config
    if join.enable and not join.throw_on_early_termination:
        raise ConfigError(
            "the DDP model stands in join(), for ranks with unequal numbers of batches",
            rule="every rank takes part in every step, because all of them decide on it",
            remedy="give all ranks equally many batches, as DistributedSampler does, or use "
            "join(throw_on_early_termination=True), which ends the loop on all ranks with the first that "
            "runs out",
        )


def _hook_on(ddp: DistributedDataParallel, comm_hook: CommHook | None) -> "_BucketHook":
    hook = _hook_of.get(ddp)
    if hook is None:
        hook = _hook_of[ddp] = _BucketHook(ddp, comm_hook)
    elif hook.comm_hook is not comm_hook:
        raise ConfigError(
            "the DDP model was guarded before with another comm_hook",
            rule="DDP keeps its first communication hook for life",
            remedy="give the same comm_hook again, or wrap the model in a new DistributedDataParallel",
        )
    return hook


class _BucketHook:
    """Shows each bucket to `observe`, then reduces it. Holds no reference to the DDP model."""

    def __init__(self, ddp: DistributedDataParallel, comm_hook: CommHook | None) -> None:
        self.observe: Callable[[GradBucket], None] | None = None
        self.comm_hook = comm_hook
        self._group = ddp.process_group
        self._is_power_of_two = self._group.size() & (self._group.size() - 1) == 0
        self._storage_of: dict[int, int] = {}
        try:
            ddp.register_comm_hook(None, self.reduce)
        except RuntimeError as error:
            raise ConfigError(
                f"the DDP model takes no communication hook: {error}",
                rule="the guard measures gradients in DDP's one communication hook",
                remedy="do not register a hook yourself; hand it to the guard as comm_hook",
            ) from error
        # Only DDP's Python reducer looks at this list; but it would go into copies and pickles.
        ddp._comm_hooks.pop()
        if ddp.gradient_as_bucket_view and not self._is_power_of_two:
            ddp.module.register_forward_pre_hook(Hook(self._note_storages))

    def reduce(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self.observe is not None:
            self.observe(bucket)
        if self.comm_hook is not None:
            return self.comm_hook(self._group, bucket)
        self._average(bucket)
        work = dist.all_reduce(bucket.buffer(), group=self._group, async_op=True)
        reduced: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
        return reduced

    def _average(self, bucket: GradBucket) -> None:
        """Divides by the number of ranks as DDP does without a hook, bit for bit.

        DDP multiplies by the reciprocal while it copies a gradient into its bucket, and divides a gradient
        that lives there already; for three ranks the two round differently.
        """
        world_size = self._group.size()
        if self._is_power_of_two or not self._storage_of:
            bucket.buffer().mul_(1.0 / world_size)
            return
        own = bucket.buffer().untyped_storage().data_ptr()
        for parameter, segment in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if self._storage_of.get(id(parameter)) == own:
                segment.div_(world_size)
            else:
                segment.mul_(1.0 / world_size)

    def _note_storages(self, module: nn.Module, args: object) -> None:
        # Inside DDP's forward pass: buckets have been rebuilt by now, and the backward pass has not begun.
        self._storage_of = {
            id(p): p.grad.untyped_storage().data_ptr() for p in module.parameters() if p.grad is not None
        }

"""Looks at DDP's buckets before they are reduced, and reduces them to the same bits as DDP itself would.

No `from __future__ import annotations` here: DDP inspects a hook's annotations and wants the real types.
"""

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # documented there
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.stability.inert import Hook
from harness.stability.layout import Layout
from harness.stability.sources import GradientStatistics, RowTable, unscaled
from harness.stability.statistics import bucket_statistics

__all__ = ["CommHook", "DdpSource"]

CommHook = Callable[[Any, GradBucket], Future[Tensor]]
"""A communication hook as torch's own: called with the process group and a bucket."""

_hook_of: WeakKeyDictionary[DistributedDataParallel, "_BucketHook"] = WeakKeyDictionary()
"""DDP takes one hook for its whole life, so all guards of a model share it."""


class DdpSource:
    """Gradients of a DDP model: each bucket is measured in the backward pass, just before its reduction.

    Args:
        comm_hook: Reduces a bucket in place of the plain all-reduce, `bf16_compress_hook` say.

    Raises:
        ConfigError: the model has a communication hook already, or another `comm_hook` from an earlier guard;
            it reduces in a way that knows no such hook; in `local_rows`: it stands in `join()`.
    """

    def __init__(self, ddp: DistributedDataParallel, layout: Layout, *, comm_hook: CommHook | None) -> None:
        self.group: dist.ProcessGroup | None = ddp.process_group
        self.num_replicas, self.num_shards = ddp.process_group.size(), 1
        self.extremes = True
        _refuse_other_reductions(ddp)
        self._ddp = weakref.ref(ddp)  # the hook that outlives this source must not keep the model
        self._statistics = GradientStatistics()
        self._in_buckets: set[int] = set()
        self._is_reduced = False
        self.when_local_done: Callable[[], None] | None = None
        self._hook = _hook_on(ddp, comm_hook)
        self._hook.observers.add(self)
        self.watch(layout)

    def watch(self, layout: Layout) -> None:
        self.layout = layout
        self._table = RowTable(layout)
        ddp = self._ddp()
        ignored = set() if ddp is None else ddp.parameters_to_ignore
        named = [] if ddp is None else ddp.module.named_parameters()
        self._unreduced = [p for name, p in named if name in ignored and id(p) in layout.row_of]
        """Parameters that DDP is to leave alone (`parameters_to_ignore`): each rank's gradient is its own."""

    def micro_batch_rows(self) -> Tensor:
        if not self._statistics:
            return self._table.measure(extremes=False)
        return self._with_unreduced(self._statistics.rows(self._table))

    def local_rows(self, *, unscaled_by: Tensor | None = None) -> Tensor:
        ddp = self._ddp()
        if ddp is not None:
            _refuse_join(ddp)
        if not self._statistics:
            return self._table.empty()
        # What is not reduced is measured where it lies, so what was done to it is in it already.
        return self._with_unreduced(unscaled(self._statistics.rows(self._table), unscaled_by))

    def reduced_rows(self) -> Tensor:
        return self._table.measure(extremes=False)

    @property
    def is_reduced(self) -> bool:
        return self._is_reduced

    def unreduced_parameters(self) -> list[nn.Parameter]:
        if not self._is_reduced or self._in_buckets >= self.layout.row_of.keys():
            return []
        covered = self._in_buckets.union(map(id, self._unreduced))
        return [p for p in self.layout.parameters if id(p) not in covered and p.requires_grad]

    def start_step(self) -> None:
        self._statistics.clear()
        self._is_reduced = False

    def close(self) -> None:
        self._hook.observers.discard(self)
        self._unreduced = []

    def _with_unreduced(self, rows: Tensor) -> Tensor:
        if not self._unreduced:
            return rows
        return rows + self._table.measure(self._unreduced, extremes=self.extremes)

    def see(self, bucket: GradBucket) -> None:
        """Measures a bucket that is about to be reduced. What took a gradient when DDP was made is in buckets
        for life, and nothing else ever is."""
        flat, parameters = bucket.buffer(), bucket.parameters()
        statistics = bucket_statistics(flat, [p.numel() for p in parameters], extremes=self.extremes)
        self._statistics.note(parameters, statistics)
        self._in_buckets.update(map(id, parameters))
        self._is_reduced = bucket.is_last()
        if self._is_reduced and self.when_local_done is not None:
            self.when_local_done()


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
    """Shows each bucket to its observers, then reduces it. Keeps neither the DDP model nor them alive."""

    def __init__(self, ddp: DistributedDataParallel, comm_hook: CommHook | None) -> None:
        self.observers: WeakSet[DdpSource] = WeakSet()
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
        for observer in self.observers:
            observer.see(bucket)
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

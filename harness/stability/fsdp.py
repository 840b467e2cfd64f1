"""Looks at FSDP2's gradients: the whole local ones just before the reduce-scatter, the shards after it.

FSDP2 hands a custom reduce-scatter one flat buffer per module, without a word about which parameters are in
it. It is called at the end of the group's `post_backward`, which takes the gradients out of the parameters:
what is in them just before is what the buffer will hold, in the order of the group, however the forward pass
was called. The group's attributes are not public; they are used in `_Group` and `_modules_with_groups` alone.

Legend: P parameters, S shards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from harness.dist import local_part
from harness.errors import ConfigError
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_ZERO, SUM_SQUARES, Layout
from harness.stability.sources import GradientStatistics, RowTable, unscaled
from harness.stability.statistics import bucket_statistics, tensor_statistics

__all__ = ["FsdpSource"]

_Measure = Callable[[Tensor, Sequence[nn.Parameter], float, Sequence[bool]], None]
"""Takes a reduce-scatter's input, the parameters in it, what it was divided by, and which of them add up."""


class FsdpSource:
    """Gradients of a model under `fully_shard`, on a mesh of shards or of replicas x shards (HSDP).

    Raises:
        ConfigError: parameters that are not sharded, that are sharded over several meshes or by tensor
            parallelism too; replicas of a single shard; several parameter groups in one module; shards that
            are offloaded to the CPU; an all-reduce of the caller's own. Later: a reduce-scatter that was
            set after this one.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.extremes = True
        mesh = _mesh(layout.parameters)
        self.num_replicas = mesh.size(0) if mesh.ndim == 2 else 1
        self.num_shards = mesh.size() // self.num_replicas
        self.group: dist.ProcessGroup | None = _whole_group(mesh)
        self._statistics = GradientStatistics()
        self._plan_of: dict[tuple[int, ...], _Plan] = {}
        self._groups = [
            _Group(module, num_ranks=mesh.size(), measure=self._measure)
            for module in _modules_with_groups(model)
        ]
        for group in self._groups:
            group.refuse_what_hides_gradients(is_hsdp=mesh.ndim == 2)
        self.watch(layout)

    def watch(self, layout: Layout) -> None:
        _mesh(layout.parameters)
        self.layout = layout
        self._table = RowTable(layout)

    def micro_batch_rows(self) -> Tensor:
        if self._statistics:
            return self._statistics.rows(self._table)
        pairs = [pair for group in self._groups for pair in group.unreduced()]
        if not pairs:
            return self.local_rows()
        statistics = tensor_statistics([gradient for _, gradient in pairs], extremes=False)
        return self._table.spread([p for p, _ in pairs], statistics)

    def local_rows(self, *, unscaled_by: Tensor | None = None) -> Tensor:
        """Of a gradient that is reduce-scattered in several pieces (of a micro-batch each, of a module that
        was called twice) squares and counts of NaN and Inf are added up, as if the pieces were orthogonal."""
        if self.num_shards == 1:
            return self._table.measure(extremes=self.extremes)
        for group in self._groups:
            group.refuse_replacement()
        return unscaled(self._statistics.rows(self._table), unscaled_by)

    def reduced_rows(self) -> Tensor:
        return self._table.measure(extremes=False)

    @property
    def is_reduced(self) -> bool:
        if self.num_shards == 1:
            return True
        return bool(self._statistics) and not any(group.holds_unreduced() for group in self._groups)

    def unreduced_parameters(self) -> list[nn.Parameter]:
        return []

    def start_step(self) -> None:
        self._statistics.clear()

    def close(self) -> None:
        for group in self._groups:
            group.close()
        self._groups = []

    def _measure(
        self, flat: Tensor, parameters: Sequence[nn.Parameter], divided_by: float, adds: Sequence[bool]
    ) -> None:
        """Measures a reduce-scatter's input: for each shard in turn a padded piece of each parameter."""
        plan = self._plan(parameters, flat.device)
        statistics = bucket_statistics(flat, plan.pieces * self.num_shards, extremes=self.extremes)
        by_shard = statistics.view(self.num_shards, len(plan.pieces), NUM_COLUMNS)
        rows = by_shard.sum(0)
        rows[:, MAX_ABS] = by_shard[:, :, MAX_ABS].amax(0) * divided_by
        rows[:, SUM_SQUARES] *= divided_by**2
        rows[:, NUM_ZERO] -= plan.padding
        self._statistics.note(parameters, rows, adds=adds)

    def _plan(self, parameters: Sequence[nn.Parameter], device: torch.device) -> _Plan:
        key = tuple(map(id, parameters))
        if key not in self._plan_of:
            padded = [_padded_numel(p, self.num_shards) for p in parameters]
            padding = [total - p.numel() for total, p in zip(padded, parameters, strict=True)]
            self._plan_of[key] = _Plan(
                parameters=parameters,
                pieces=[total // self.num_shards for total in padded],
                padding=torch.tensor(padding, dtype=torch.float64, device=device),
            )
        return self._plan_of[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How the buffer of a certain list of parameters is cut."""

    parameters: Sequence[nn.Parameter]
    """Kept, so that no `id` is ever given to another one."""
    pieces: list[int]
    """Elements of each parameter's padded shard."""
    padding: Tensor
    """Zeros that were added to each parameter."""


def _modules_with_groups(model: nn.Module) -> list[FSDPModule]:
    """The modules that manage parameters themselves; of those that share one group, the first."""
    by_group: dict[int, FSDPModule] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            if len(groups) > 1:
                raise ConfigError(
                    f"an FSDP module with {len(groups)} parameter groups, on meshes of their own",
                    rule="the guard measures gradients in one parameter group per module",
                )
            if groups[0] is not None:
                by_group.setdefault(id(groups[0]), module)
    return list(by_group.values())


class _Group:
    """One FSDP module's parameter group, and the reduce-scatter that is put in place of its own."""

    def __init__(
        self,
        module: Any,
        *,
        num_ranks: int,
        measure: _Measure,
    ) -> None:
        self._module = module
        self._state: Any = module._get_fsdp_state()._fsdp_param_group
        self._num_ranks = num_ranks
        self._inner: Any = self._state._reduce_scatter_comm
        self._measure: weakref.WeakMethod[_Measure] | None = weakref.WeakMethod(measure)
        """Weak: the model keeps this reduce-scatter, and must not keep a guard that was dropped."""
        self._contributors: list[nn.Parameter] = []
        self._adds: list[bool] = []
        try:
            module.set_custom_reduce_scatter(self)
        except ValueError as error:
            raise ConfigError(
                f"an FSDP module takes no custom reduce-scatter: {error}",
                rule="the guard measures gradients there, in one parameter group per module",
            ) from error
        self._inner_post_backward: Callable[..., None] = self._state.post_backward
        self._own_post_backward = self._post_backward
        self._state.post_backward = self._own_post_backward

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Memory for the collective's buffers, from whoever provided it before."""
        memory: Tensor = self._inner.allocate(*args, **kwargs)
        return memory

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **kwargs: Any) -> dist.Work | None:
        """Shows the input, then reduces it as before."""
        measure = None if self._measure is None else self._measure()
        if measure is not None:
            measure(input_tensor, self._contributors, self._divided_by(input_tensor.dtype), self._adds)
        work: dist.Work | None = self._inner(output_tensor=output_tensor, input_tensor=input_tensor, **kwargs)
        return work

    def unreduced(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with the whole gradients that this rank has accumulated and not yet reduced."""
        found = []
        for managed in self._state.fsdp_params:
            whole = getattr(managed, "_unsharded_param", None)
            gradient = managed.unsharded_accumulated_grad
            if gradient is None and whole is not None:
                gradient = whole.grad
            if gradient is not None:
                found.append((managed.sharded_param, local_part(gradient)))
        return found

    def close(self) -> None:
        self._measure = None
        if self._state.post_backward is self._own_post_backward:  # else a later guard calls this one
            self._state.post_backward = self._inner_post_backward
        if self._state._reduce_scatter_comm is self:
            self._module.set_custom_reduce_scatter(self._inner)

    def refuse_replacement(self) -> None:
        # A later guard on the same model calls this one.
        if not isinstance(self._state._reduce_scatter_comm, _Group):
            raise ConfigError(
                f"FSDP2's reduce-scatter is a {type(self._state._reduce_scatter_comm).__name__} now",
                rule="the guard measures gradients in the one that it found and wrapped",
                remedy="call set_custom_reduce_scatter and set_allocate_memory_from_process_group_for_comm "
                "before the guard is made",
            )

    def refuse_what_hides_gradients(self, *, is_hsdp: bool) -> None:
        if not is_hsdp and getattr(self._state, "_all_reduce_hook", None) is not None:
            raise ConfigError(
                "FSDP2 with set_all_reduce_hook on a mesh of one dimension",
                rule="all ranks that train together decide together, and the guard knows those of the mesh",
                remedy="give fully_shard a mesh of replicas x shards",
            )
        if any(managed.offload_to_cpu for managed in self._state.fsdp_params):
            raise ConfigError(
                "FSDP2 with CPUOffloadPolicy",
                rule="the guard judges on the device that computes, and the shards lie on another",
                remedy="leave the offload policy out",
            )

    def holds_unreduced(self) -> bool:
        """Whether the backward pass has left something that did not reach all ranks."""
        partial = getattr(self._state, "_partial_reduce_output", None)  # HSDP, reduced among the shards only
        return partial is not None or bool(self.unreduced())

    def _post_backward(self, *unused: Any) -> None:
        """Notes whose gradients the reduction, if there is one now, will take; then goes on as before."""
        unused_too = getattr(self._state, "reduce_scatter_unused_params", False)
        contributing = [
            managed
            for managed in self._state.fsdp_params
            if (whole := getattr(managed, "_unsharded_param", None)) is not None
            and (
                managed.unsharded_accumulated_grad is not None
                or whole.grad is not None
                or (unused_too and whole.requires_grad)
            )
        ]
        self._contributors = [managed.sharded_param for managed in contributing]
        # FSDP2 adds to what it has reduced before; a gradient that was cleared, step or no step, is gone.
        partial = getattr(self._state, "_partial_reduce_output", None) is not None
        self._adds = [partial or managed.sharded_param.grad is not None for managed in contributing]
        self._inner_post_backward(*unused)

    def _divided_by(self, dtype: torch.dtype) -> float:
        """What FSDP2 divides by before the reduce-scatter: about sqrt(ranks) where fp16 could overflow."""
        if dtype in (torch.float32, torch.bfloat16):
            return 1.0
        factor, before = self._state.gradient_divide_factor or float(self._num_ranks), 1.0
        while factor % before == 0 and factor / before > before:
            before *= 2
        return before


def _mesh(parameters: Sequence[nn.Parameter]) -> DeviceMesh:
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in parameters}
    mesh = meshes.pop()
    if meshes or mesh is None:
        raise ConfigError(
            "parameters that are sharded differently, or not at all",
            rule="fully_shard has to manage all of them on one mesh",
            remedy="call fully_shard on the model itself too, after its blocks",
        )
    kinds = {tuple(type(placement) for placement in p.placements) for p in parameters}  # type: ignore[attr-defined]
    if not kinds <= {(Shard,), (Replicate, Shard)}:
        raise ConfigError(
            f"parameters placed as {sorted(str(kind) for kind in kinds)}",
            rule="the guard knows FSDP2's meshes of shards, and of replicas x shards",
        )
    if mesh.ndim == 2 and mesh.size(1) == 1:
        raise ConfigError(
            f"{mesh.size(0)} replicas of a single shard",
            rule="FSDP2 makes no reduce-scatter for a single shard, so there is nothing to measure at",
            remedy="use DistributedDataParallel",
        )
    return mesh


def _whole_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh, in the mesh's order."""
    ranks = mesh.mesh.flatten()
    if not bool((ranks[1:] > ranks[:-1]).all()):
        raise ConfigError(
            f"a device mesh whose ranks are not in ascending order: {mesh}",
            rule="replicas come first and shards next to one another",
        )
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]  # it is initialised
    return mesh._flatten().get_group()


def _padded_numel(parameter: nn.Parameter, num_shards: int) -> int:
    """Elements of a whole parameter after FSDP2 has padded its sharded dimension."""
    dim: int = parameter.placements[-1].dim  # type: ignore[attr-defined]
    length = parameter.size(dim)
    return parameter.numel() // max(length, 1) * (-(-length // num_shards) * num_shards)

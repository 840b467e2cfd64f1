"""What can be saved, each brought to one form: a tree of plain data and live tensors, and back.

A module's tree is its state dict under clean names, an optimizer's is keyed by the names of its parameters.
So both are the same whether the model is plain, in DDP, sharded by FSDP2 or compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from harness.checkpoint.rng import PerRank, Rng
from harness.errors import CheckpointError
from harness.wrappers import without_wrappers

__all__ = ["Adapter", "Soundness", "Spec", "adapters"]

Spec = tuple[torch.Size, torch.dtype]
"""What has to be the same on loading."""

Soundness = Literal["finite", "not NaN"]
"""What every element of a tensor has to be."""

_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""Settings of a parameter group that say how an update is computed here, not what it is."""


class Adapter:
    """One key of the saved state: plain data, or any object with `state_dict` and `load_state_dict`."""

    def __init__(self, holder: MutableMapping[str, Any], key: str) -> None:
        self._holder = holder
        self.key = key
        self.per_rank = isinstance(holder[key], PerRank | Rng)

    @property
    def value(self) -> Any:
        """What the caller gave, without its mark."""
        held = self._holder[self.key]
        return held.value if isinstance(held, PerRank) else held

    @property
    def may_be_missing(self) -> bool:
        """Whether the value says that older checkpoints have nothing for it, and that it is left alone
        then."""
        return getattr(self.value, "may_be_missing", False)

    def tree(self) -> Any:
        """The present state."""
        value = self.value
        return value.state_dict() if hasattr(value, "state_dict") else value

    def is_everywhere(self, tensor: torch.Tensor) -> bool:
        """Whether all ranks hold this tensor, alike or in parts. Any other is taken from rank 0."""
        return isinstance(tensor, DTensor)

    def soundness(self, tensor: torch.Tensor) -> Soundness | None:
        """What a tensor has to be to be saved; None: anything."""
        return None

    def check(self, described: Any, saved: Mapping[str, Spec], live: Mapping[str, torch.Tensor]) -> None:
        """Raises `CheckpointError` if the saved tensors (by place) cannot belong to the live object."""

    def target(
        self, place: str, live: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        """The tensor to read into: `place` is its name within this key, `live` the present one there."""
        if live is None or live.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(live, dtype=dtype, requires_grad=False)

    def restore(self, tree: Any) -> None:
        """Puts a loaded tree in place."""
        held = self._holder[self.key]
        if hasattr(self.value, "load_state_dict"):
            self.value.load_state_dict(tree)
        elif isinstance(held, PerRank):
            held.value = tree
        else:
            self._holder[self.key] = tree


class ModuleAdapter(Adapter):
    """A module: read in place into its parameters and buffers."""

    def tree(self) -> dict[str, Any]:
        return {without_wrappers(name): value for name, value in _state(self.value).items()}

    def is_everywhere(self, tensor: torch.Tensor) -> bool:
        # Buffers differ between DDP's replicas (BatchNorm); rank 0's are the ones that DDP broadcasts.
        return isinstance(tensor, nn.Parameter | DTensor)

    def soundness(self, tensor: torch.Tensor) -> Soundness | None:
        # Masks of attention hold infinities, and extremes that have seen nothing yet begin with them.
        return "finite" if isinstance(tensor, nn.Parameter) else "not NaN"

    def check(self, described: Any, saved: Mapping[str, Spec], live: Mapping[str, torch.Tensor]) -> None:
        differences = [
            *(f"{place}: not in the checkpoint" for place in live if place not in saved),
            *(f"{place}: not in the model" for place in saved if place not in live),
            *(
                f"{place}: {_describe(spec)} in the checkpoint, {_describe(_spec(live[place]))} in the model"
                for place, spec in saved.items()
                if place in live and spec != _spec(live[place])
            ),
        ]
        if differences:
            raise CheckpointError(
                f"the checkpoint is of another {self.key}; {_first(differences)}",
                rule="names, shapes and dtypes of all parameters and buffers have to be the same",
            )

    def target(
        self, place: str, live: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        assert live is not None  # names, shapes and dtypes have been compared
        return live.detach()

    def restore(self, tree: Any) -> None:
        raw = {without_wrappers(name): name for name in _state(self.value)}
        _unwrapped(self.value).load_state_dict({raw.get(name, name): value for name, value in tree.items()})


class OptimizerAdapter(Adapter):
    """An optimizer: its state stands under its parameters' names instead of their numbers."""

    def __init__(self, holder: MutableMapping[str, Any], key: str, names: Mapping[int, str]) -> None:
        super().__init__(holder, key)
        self._params: dict[str, torch.Tensor] = {}
        for param in (param for group in self.value.param_groups for param in group["params"]):
            if id(param) not in names:
                raise CheckpointError(
                    f"{key} holds a parameter of shape {tuple(param.shape)} that no module has",
                    rule="optimizer state is kept by parameter names",
                    remedy="give the module that owns the parameter along, in the same call",
                )
            self._params[names[id(param)]] = param

    def tree(self) -> dict[str, Any]:
        names = list(self._params)
        numbered = self.value.state_dict()
        state = {names[number]: values for number, values in numbered["state"].items()}
        groups = [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in numbered["param_groups"]
        ]
        for group in groups:
            group.pop("param_names", None)  # torch's own names, with the wrappers' prefixes in them
        return {**numbered, "state": state, "param_groups": groups}

    def is_everywhere(self, tensor: torch.Tensor) -> bool:
        return True

    def soundness(self, tensor: torch.Tensor) -> Soundness | None:
        return "finite"

    def check(self, described: Any, saved: Mapping[str, Spec], live: Mapping[str, torch.Tensor]) -> None:
        theirs = [group["params"] for group in described["param_groups"]]
        ours = [group["params"] for group in self.tree()["param_groups"]]
        if theirs != ours:
            raise CheckpointError(
                f"{self.key}: the checkpoint has parameter groups of {[len(group) for group in theirs]} "
                f"parameters, the optimizer of {[len(group) for group in ours]}",
                rule="both have to hold the same parameters in the same groups and order",
            )

    def target(
        self, place: str, live: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        if live is not None and live.shape == shape and live.dtype == dtype:
            return live.detach()
        # state/PARAMETER/KEY: moments lie as their parameter does, step counts and the like are plain.
        parameter = place.removeprefix("state/").rpartition("/")[0]
        return super().target(place, self._params.get(parameter), shape, dtype)

    def restore(self, tree: Any) -> None:
        numbers = {name: number for number, name in enumerate(self._params)}
        state = {numbers[name]: values for name, values in tree["state"].items()}
        groups = [
            {**_as_live(group, live), "params": [numbers[name] for name in group["params"]]}
            for group, live in zip(tree["param_groups"], self.value.param_groups, strict=True)
        ]
        self.value.load_state_dict({**tree, "state": state, "param_groups": groups})
        self._undo_casts(tree["state"])

    def _undo_casts(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """`Optimizer.load_state_dict` casts moments to their parameter's dtype, which can lose bits."""
        for name, values in state.items():
            live = self.value.state[self._params[name]]
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and key != "step" and live[key].dtype != value.dtype:
                    live[key] = value.to(live[key].device)


def adapters(state: MutableMapping[str, Any]) -> list[Adapter]:
    """One adapter for each key of `state`, modules before optimizers, so that parameters have names.

    Raises:
        CheckpointError: a key is not a plain name, or an optimizer's parameters belong to no module given.
    """
    for key in state:
        if not isinstance(key, str) or not key or set(key) & set("/$@"):
            raise CheckpointError(
                f"state has the key {key!r}", rule="keys are words without '/', '$' and '@'"
            )
    modules = [ModuleAdapter(state, key) for key, value in state.items() if isinstance(value, nn.Module)]
    names = {id(param): name for name, param in reversed(list(_parameters(modules)))}
    optimizers = [
        OptimizerAdapter(state, key, names) for key, value in state.items() if isinstance(value, Optimizer)
    ]
    taken = {adapter.key for adapter in (*modules, *optimizers)}
    others = [Adapter(state, key) for key in state if key not in taken]
    return [*modules, *optimizers, *others]


def _as_live(group: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """A saved parameter group to be computed as the live one is: fused or not, on its kind of parameters.

    The saved run may have been sharded, on another device or of another release; its flags would make torch
    place step counts where this optimizer cannot use them, or take a path that it does not have.
    """
    own = {key: live[key] for key in _IMPLEMENTATION if key in live}
    return {key: value for key, value in group.items() if key not in _IMPLEMENTATION} | own


def _parameters(modules: list[ModuleAdapter]) -> Iterator[tuple[str, nn.Parameter]]:
    for module in modules:
        for name, value in module.tree().items():
            if isinstance(value, nn.Parameter):
                yield f"{module.key}/{name}", value


def _state(module: nn.Module) -> dict[str, Any]:
    """The state dict with the parameters themselves in it. FSDP2 reshards what lies gathered."""
    return dict(_unwrapped(module).state_dict(keep_vars=True))


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, DistributedDataParallel):
        module = module.module
    return module


def _spec(tensor: torch.Tensor) -> Spec:
    return tensor.shape, tensor.dtype


def _describe(spec: Spec) -> str:
    shape, dtype = spec
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _first(differences: list[str], count: int = 3) -> str:
    more = len(differences) - count
    return "; ".join(differences[:count]) + (f"; and {more} more" if more > 0 else "")

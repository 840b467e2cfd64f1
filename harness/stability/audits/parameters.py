"""Whether the parameters are still what they were: in the model, in an optimizer, of one type, tied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from harness.stability.attach import named_parameters
from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.layout import Layout

__all__ = ["AttributesAudit", "FrozenAudit", "MembershipAudit", "TiesAudit"]


class MembershipAudit(Audit):
    """The optimizer steps what is in the model no more: a part of it was rebuilt after the optimizer."""

    name = "membership"
    remedy = "make optimizer and guard from the parameters of the model as it is now"

    def look(self, scene: Scene) -> Iterable[Found]:
        present = {id(parameter) for _, parameter in named_parameters(scene.model)}
        for row, parameter in enumerate(scene.layout.parameters):
            # FSDP2 puts whole parameters in the place of shards for a while.
            if id(parameter) not in present and not isinstance(parameter, DTensor):
                yield Found(row)
                return

    def words(self, value: int, parameter: str | None) -> str:
        return f"the optimizer steps {parameter}, in whose place the model has another parameter now"


class AttributesAudit(Audit):
    """A parameter changes its type, or stops to take a gradient, in the middle of a run."""

    name = "attributes"
    remedy = "convert or freeze parameters before optimizer and guard are made"

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._dtype_of: dict[int, torch.dtype] = {}
        self._trainable: set[int] = set()
        self._frozen: set[int] = set()
        """Found frozen at the last look."""
        self._is_alternating = False

    def look(self, scene: Scene) -> Iterable[Found]:
        self._layout = scene.layout
        by_id = {id(p): row for row, p in enumerate(scene.layout.parameters)}
        held = {id(p): p for p in scene.optimizers.held}
        for key, parameter in held.items():
            if self._dtype_of.setdefault(key, parameter.dtype) != parameter.dtype:
                yield Found(by_id.get(key, -1), 1)
                break
        trainable = {key for key, parameter in held.items() if parameter.requires_grad}
        # Parts that are frozen in turn are as they are meant to be.
        self._is_alternating = self._is_alternating or bool(self._frozen & trainable)
        still_frozen = (self._frozen - trainable) & held.keys()
        if still_frozen and not self._is_alternating:
            yield Found(by_id.get(min(still_frozen), -1), 2 + len(still_frozen))
        self._frozen = (self._trainable - trainable) & held.keys()
        self._trainable |= trainable

    def words(self, value: int, parameter: str | None) -> str:
        which = parameter or "a parameter of the optimizer"
        if value == 1:
            return f"{which} has changed its type"
        return f"{value - 2} parameters of the optimizer take no gradient any more ({which})"

    def forget(self) -> None:
        self._frozen = set()


class FrozenAudit(Audit):
    """A parameter that takes no gradient is stepped all the same, by the gradient that was left in it."""

    name = "frozen"
    remedy = "set .grad of what is frozen to None, or leave it out of the optimizer"

    def __init__(self) -> None:
        self._num_steps = 0

    def before_update(self, scene: Scene) -> None:
        self._num_steps += any(not p.requires_grad and p.grad is not None for p in scene.layout.parameters)

    def look(self, scene: Scene) -> Iterable[Found]:
        for row, parameter in enumerate(scene.layout.parameters):
            if not parameter.requires_grad and parameter.grad is not None and self._num_steps > 1:
                yield Found(row, self._num_steps)
                return

    def words(self, value: int, parameter: str | None) -> str:
        return f"{parameter} is frozen, and the optimizer still moves it by a gradient from before"


class TiesAudit(Audit):
    """Two names had one parameter, and have two now; or the model's configuration says that they have one."""

    name = "ties"
    remedy = "tie the weights again (model.tie_weights()), and make the optimizer anew"

    def __init__(self) -> None:
        self._tied: list[tuple[str, str]] | None = None

    def look(self, scene: Scene) -> Iterable[Found]:
        by_name = dict(named_parameters(scene.model))
        if self._tied is None:
            self._tied = _tied(by_name)
        row_of = scene.layout.row_of
        for one, other in self._tied:
            if by_name.get(one) is not by_name.get(other):
                yield Found(row_of.get(id(by_name.get(one)), -1), 1)
                return
        if _should_be_tied(scene.model):
            yield Found()

    def words(self, value: int, parameter: str | None) -> str:
        if value:
            return f"{parameter or 'a parameter'} was shared by two modules, which have one each now"
        return "config.tie_word_embeddings is set, and input and output embeddings are two parameters"


def _tied(by_name: dict[str, nn.Parameter]) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    pairs = [(first.setdefault(id(parameter), name), name) for name, parameter in by_name.items()]
    return [(one, other) for one, other in pairs if one != other]


def _should_be_tied(model: Any) -> bool:
    model = getattr(model, "module", model)
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    try:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        return False
    weights = [getattr(end, "weight", None) for end in ends]
    return None not in weights and weights[0] is not weights[1]

"""From a copy of the state, on disk or in memory, back into live objects."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

import torch

from harness.checkpoint.adapters import Adapter, Spec, adapters
from harness.checkpoint.capture import prefix_of
from harness.checkpoint.tree import fill, flatten, tensor_names
from harness.errors import CheckpointError

__all__ = ["Restore", "Source"]

_UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What state that is not its own makes an object raise."""


class Source(Protocol):
    """Where state comes from, as one rank sees it."""

    @property
    def step(self) -> int:
        """When it was saved."""

    def donor(self, rank: int) -> int:
        """The rank whose own state `rank` takes over."""

    def holds(self, part: Adapter) -> bool:
        """Whether anything was saved under the part's key."""

    def description(self, part: Adapter, rank: int) -> Any:
        """What was saved under the part's key.

        Raises:
            CheckpointError: nothing was.
        """

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a whole tensor."""

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, plain ones and DTensors, with what was saved under their names."""


class Restore:
    """A source on its way into `state`. Making it compares the two and changes neither.

    Raises:
        CheckpointError: the source is of another model, or lacks a key of `state`.
    """

    def __init__(self, source: Source, state: MutableMapping[str, Any], rank: int) -> None:
        self._source, self._rank = source, rank
        self._parts = [part for part in adapters(state) if not part.may_be_missing or source.holds(part)]
        self._described = {part.key: source.description(part, rank) for part in self._parts}
        self._targets: dict[str, torch.Tensor] = {}
        for part in self._parts:
            try:
                self._targets.update(self._targets_of(part))
            except _UNFIT as error:
                raise self._refused(part, error) from error

    def read(self) -> None:
        """Reads this rank's share. From here on live parameters and optimizer state change.

        Raises:
            Damaged: a file cannot be read.
        """
        self._source.read(self._targets)

    def apply(self) -> None:
        """Hands every object its state.

        Raises:
            CheckpointError: an object refuses it.
        """
        for part in self._parts:
            try:
                part.restore(fill(self._described[part.key], self._targets))
                if part.per_rank and self._source.donor(self._rank) != self._rank:
                    self._diverge(part)
            except _UNFIT as error:
                raise self._refused(part, error) from error

    def _targets_of(self, part: Adapter) -> dict[str, torch.Tensor]:
        described = self._described[part.key]
        saved_prefix = prefix_of(part, self._source.donor(self._rank))
        live_prefix = prefix_of(part, self._rank)
        tensors: dict[str, torch.Tensor] = {}
        flatten(part.tree(), live_prefix, tensors)
        live = {_place(name, live_prefix): tensor for name, tensor in tensors.items()}
        names = {_place(name, saved_prefix): name for name in tensor_names(described)}
        saved = {place: self._source.spec(name) for place, name in names.items()}
        part.check(described, saved, live)
        return {names[place]: part.target(place, live.get(place), *spec) for place, spec in saved.items()}

    def _diverge(self, part: Adapter) -> None:
        if hasattr(part.value, "diverge"):
            part.value.diverge(self._rank)

    def _refused(self, part: Adapter, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{part.key} refuses its state of step {self._source.step}: {type(error).__name__}: {error}",
            rule="it has to be of the kind that was saved under this key",
        )


def _place(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lstrip("/")

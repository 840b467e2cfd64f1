"""What was done to tensors that have no memory, to be done to them later, and only where it counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Memory", "Operation", "Tape", "View", "generator_at"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A tensor without memory: the number of its storage, and how it lies there."""

    storage: int
    size_bytes: int
    """Of the storage."""
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing else lies in the storage."""
        return self.size_bytes == torch.Size(self.size).numel() * self.dtype.itemsize

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor, in memory."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation, with a `View` for each tensor without memory."""

    function: Callable[..., Any]
    leaves: Sequence[Any]
    structure: Any
    generator: torch.Generator
    generator_state: Tensor | None
    """Before it; None: it draws nothing."""
    results: Sequence[View | None]
    """Of its outputs those that lie in new storages."""
    writes: frozenset[int]
    """Storages that hold something else after it."""
    overwrites: frozenset[int]
    """Of these, the ones whose values before it do not matter."""
    reads: frozenset[int]
    """Storages whose values before it matter."""


Memory = dict[int, torch.UntypedStorage]
"""Storages in memory, by number."""


class Tape:
    """The operations in their order, and what the storages held in the beginning."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._found: dict[int, Tensor] = {}
        self._spare: dict[int, torch.UntypedStorage] = {}
        """One storage of each size that was given up: parameters come in few sizes, and freed memory of this kind
        is often not used again by the C library's allocator."""

    def begin_with(self, view: View, values: Tensor) -> None:
        """Notes what a storage holds; read when it is needed, so writes to `values` count."""
        self._found[view.storage] = values

    def add(self, operation: Operation) -> None:
        """Notes an operation. What it overwrites, and nothing has read, need not be kept."""
        for storage in operation.overwrites & self._found.keys():
            if not any(storage in other.reads for other in self._operations):
                del self._found[storage]
        self._operations.append(operation)

    def memory(self, size_bytes: int) -> torch.UntypedStorage:
        """A storage with anything in it."""
        return self._spare.pop(size_bytes, None) or torch.UntypedStorage(size_bytes)

    def give_up(self, storage: torch.UntypedStorage) -> None:
        """Takes back what is not needed any more."""
        self._spare[storage.nbytes()] = storage

    def perform(
        self, wanted: Collection[View], then: Callable[[int, torch.UntypedStorage], None] | None = None
    ) -> Memory:
        """Performs what the present values of `wanted` depend on.

        Args:
            then: Called with each of their storages once it is complete, which is then given up.

        Returns:
            The storages; with `then` none.
        """
        operations = self._needed(frozenset(view.storage for view in wanted))
        last = {storage: i for i, one in enumerate(operations) for storage in one.writes | one.reads}
        views = {view.storage: view for view in wanted}
        memory: Memory = {}
        for view in views.values():
            if then is not None and view.storage not in last:
                then(view.storage, self._storage(view, {}))
        for index, operation in enumerate(operations):
            self._run(operation, memory)
            for storage in operation.writes | operation.reads:
                if last[storage] == index and (then is not None or storage not in views):
                    complete = memory.pop(storage)
                    if then is not None and storage in views:
                        then(storage, complete)
                    self.give_up(complete)
        if then is None:
            for view in views.values():
                self._storage(view, memory)
        return memory

    def _needed(self, wanted: frozenset[int]) -> list[Operation]:
        live, needed = set(wanted), []
        for operation in reversed(self._operations):
            if operation.writes & live:
                needed.append(operation)
                live = (live - operation.overwrites) | operation.reads
        return needed[::-1]

    def _run(self, operation: Operation, memory: Memory) -> None:
        leaves = [
            self._tensor(leaf, memory, is_read=leaf.storage in operation.reads) if isinstance(leaf, View) else leaf
            for leaf in operation.leaves
        ]
        args, kwargs = tree_unflatten(leaves, operation.structure)
        with generator_at(operation.generator, operation.generator_state):
            outputs = tree_flatten(operation.function(*args, **kwargs))[0]
        for view, output in zip(operation.results, outputs, strict=True):
            if view is not None:
                view.on(self._storage(view, memory, is_read=False)).copy_(output)

    def _tensor(self, view: View, memory: Memory, *, is_read: bool) -> Tensor:
        return view.on(self._storage(view, memory, is_read=is_read))

    def _storage(self, view: View, memory: Memory, *, is_read: bool = True) -> torch.UntypedStorage:
        if view.storage not in memory:
            memory[view.storage] = self.memory(view.size_bytes)
            found = self._found.get(view.storage)
            if found is not None and is_read:
                whole = torch.empty(0, dtype=found.dtype).set_(memory[view.storage], 0, found.size(), found.stride())
                whole.copy_(found)
        return memory[view.storage]


@contextmanager
def generator_at(generator: torch.Generator, state: Tensor | None) -> Iterator[None]:
    """Within it the generator goes on from `state`, and afterwards from where it stood; None: nothing."""
    if state is None:
        yield
        return
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)

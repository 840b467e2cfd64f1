"""Buffers: what the forward passes of a skipped step did to them is undone, on the device.

A NaN in an input reaches BatchNorm's running mean in the forward pass, long before there is a verdict. So the
values that each step found are kept, and the verdict selects between them and the present ones.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.dist import local_part
from harness.stability.host_copy import HostCopy
from harness.stability.inert import Hook

__all__ = ["Buffers"]

logger = logging.getLogger(__name__)

LARGE_BYTES = 1 << 16
"""Buffers from this size on are left out while they do not change: masks, tables of positions."""

MAX_COPIED_BYTES = 1 << 30
"""Large buffers of more than this in all (quantised weights) are taken for constants at once."""

OBSERVED_STEPS = 8
"""Steps after which a large buffer that has kept every bit counts as constant."""

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element: values are compared and moved as bits."""

Table = dict[str, Tensor | None]
"""A module's buffers by name, live."""


class Buffers:
    """Keeps the values that a step finds in a model's buffers, and brings them back if the step is skipped.

    All buffers, persistent or not, of any dtype, changed in place or replaced by new tensors, in as many
    forward passes as there were since the last step; each rank its own. Costs six small kernels a step, and
    twice the memory of what changes. A buffer of 64 KiB and more that kept every bit over the first 8
    steps is left out until its version counter says that it was changed; that one change is not undone.

    Does not synchronise, but for a buffer that is replaced by a tensor of another shape, type or device, or
    by one that requires a gradient: then the verdict is read on the host, in such steps only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
        self._changing: set[tuple[int, str]] = set()
        """Large buffers that were taken for constants and then changed, by table and name."""
        self._has_warned = False
        _everybody.add(self)
        self._changed: HostCopy | None = None
        """Which of the observed ones changed, on its way to the host."""
        self.remember()

    def remember(self) -> None:
        """Takes the present values for those to go back to: after construction, after loading."""
        self._tables: list[Table] = [module._buffers for module in self._model.modules()]
        self._num_names = sum(map(len, self._tables))
        self._held = _held(self._tables)
        self._held_in: dict[int, list[_Held]] = {}
        for held in self._held:
            for table, _ in held.holders:
                self._held_in.setdefault(id(table), []).append(held)
        self._watch_loads()
        self._keep_values()

    def _keep_values(self) -> None:
        keepable = [held for held in self._held if held.words is not None]
        small = [held for held in keepable if held.size_bytes < LARGE_BYTES]
        large = [held for held in keepable if held.size_bytes >= LARGE_BYTES]
        too_large = sum(held.size_bytes for held in large) > MAX_COPIED_BYTES
        self._constants = [held for held in large if too_large and not self._is_changing(held)]
        for held in self._constants:
            held.note_version()
        copied = [_Block([held]) for held in large if held not in self._constants]
        self._observed = [block for block in copied if not self._is_changing(block.held[0])]
        self._num_observed, self._changed = 0, None
        self._blocks = [_Block(alike) for alike in _grouped(small)] + copied

    @torch.no_grad()
    def settle(self, skip_t: Tensor) -> None:
        """Brings back what the step found, if `skip_t` (0-d bool), and begins the next step."""
        if not self._held and not self._has_new_names():
            return
        self._wake()
        odd = [held for held in self._held if not held.look()]
        self._observe()
        for block in self._blocks:
            block.select(skip_t)
        for block in self._blocks:  # not before all are read: a buffer may now stand in another's place
            block.write()
        if odd and self._is_skip(skip_t):
            for held in odd:
                held.put_back()
        elif odd or self._has_new_names():
            self.remember()
        for other in _everybody:
            if other is not self:
                other._follow(self)

    def _follow(self, other: Buffers) -> None:
        """Another guard of the same model was first to decide on the last forward pass; its word holds."""
        tables = set(map(id, other._tables))
        if tables.isdisjoint(map(id, self._tables)):
            return
        for held in self._held:
            if any(id(table) in tables for table, _ in held.holders):
                held.keep()

    def close(self) -> None:
        """Lets the buffers alone, for good."""
        for handle in self._hooks.values():
            handle.remove()
        self._held_in = {}
        self._held, self._blocks, self._observed, self._constants, self._tables = [], [], [], [], []
        self._num_names = 0
        _everybody.discard(self)

    def _has_new_names(self) -> bool:
        return sum(map(len, self._tables)) != self._num_names

    def _watch_loads(self) -> None:
        """What is loaded between two steps is what the next one finds."""
        for module in self._model.modules():
            if module._buffers and module not in self._hooks:
                hook = Hook(self._loaded)
                self._hooks[module] = module.register_load_state_dict_post_hook(hook)

    def _loaded(self, module: nn.Module, incompatible_keys: object) -> None:
        loaded = self._held_in.get(id(module._buffers), [])
        if any(held.is_replaced() for held in loaded):
            self.remember()
        else:
            for held in loaded:
                held.keep()

    def _wake(self) -> None:
        """Takes in the large buffers that are constants no longer."""
        awake = [held for held in self._constants if held.is_replaced() or held.was_written()]
        if awake:
            self._constants = [held for held in self._constants if held not in awake]
            self._changing.update((id(table), name) for held in awake for table, name in held.holders)
            self._blocks += [_Block([held]) for held in awake]

    def _is_changing(self, held: _Held) -> bool:
        return any((id(table), name) in self._changing for table, name in held.holders)

    def _observe(self) -> None:
        """Finds out which large buffers never change. Reads the answer once it has arrived."""
        if self._changed is not None and self._changed.arrived:
            changed = self._changed.wait().tolist()
            constant = [block for block, yes in zip(self._observed, changed, strict=True) if not yes]
            self._blocks = [block for block in self._blocks if block not in constant]
            self._constants += [block.held[0] for block in constant]
            for held in self._constants:
                held.note_version()
            self._observed, self._changed = [], None
        if not self._observed or self._changed is not None:
            return
        for block in self._observed:
            block.note_changes()
        self._num_observed += 1
        if self._num_observed == OBSERVED_STEPS:
            device = next(self._model.parameters()).device
            flags = [block.changed_t.to(device, non_blocking=True) for block in self._observed]
            self._changed = HostCopy(torch.stack(flags))

    def _is_skip(self, skip_t: Tensor) -> bool:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a buffer was replaced by one of another shape, type or device: the guard reads its verdict "
                "on the host in such steps"
            )
        return bool(skip_t)


_everybody: weakref.WeakSet[Buffers] = weakref.WeakSet()


class _Held:
    """One buffer as the last step left it; None: a name without a tensor."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor
        self.holders: list[tuple[Table, str]] = []
        self.words = None if tensor is None else _words(tensor)
        self.now = self.words
        """Its present bits, where they can be selected."""
        self.kept: Tensor | None = None
        """The bits to go back to, a part of its block's."""
        self._version = 0

    @property
    def size_bytes(self) -> int:
        return 0 if self.words is None else self.words.numel() * self.words.element_size()

    def note_version(self) -> None:
        """From here on `was_written` tells of changes; nothing is kept."""
        self.kept = None
        self._version = self._present_version()

    def was_written(self) -> bool:
        """Whether torch counted a change in place; it counts none through `.data`, nor BatchNorm's."""
        return self._present_version() != self._version

    def is_replaced(self) -> bool:
        return any(table.get(name) is not self.tensor for table, name in self.holders)

    def look(self) -> bool:
        """Notes the present bits; False if they cannot be selected on the device.

        Another tensor of the same kind lends its values only: the one that stood here goes back to its place.
        """
        self.now = self.words
        if not self.is_replaced():
            return True
        table, name = self.holders[0]
        present = table.get(name)
        if len(self.holders) > 1 or self.words is None or not _is_alike(present, self.tensor):
            return False
        now = _words(present)
        if now is None:
            return False
        self.now, table[name] = now, self.tensor
        return True

    def put_back(self) -> None:
        """Lets the tensor stand where it stood."""
        for table, name in self.holders:
            table[name] = self.tensor

    def keep(self) -> None:
        """Takes the present values for those to go back to."""
        if self.kept is not None and self.words is not None:
            self.kept.copy_(self.words)
        self._version = self._present_version()

    def _present_version(self) -> int:
        return 0 if self.words is None or self.tensor is None else local_part(self.tensor)._version


class _Block:
    """Buffers on one device and of one size of element, kept side by side so that few kernels do."""

    def __init__(self, held: Sequence[_Held]) -> None:
        self.held = held
        self._words = [one.words for one in held if one.words is not None]
        self._kept = self._words[0].new_empty(sum(words.numel() for words in self._words))
        self._kept_views = _views(self._kept, self._words)
        # A single buffer's present bits need not be brought together.
        self._now = torch.empty_like(self._kept) if len(held) > 1 else None
        self._now_views = [] if self._now is None else _views(self._now, self._words)
        self.changed_t = torch.zeros((), dtype=torch.bool, device=self._kept.device)
        torch._foreach_copy_(self._kept_views, self._words)
        for one, view in zip(held, self._kept_views, strict=True):
            one.kept = view

    def note_changes(self) -> None:
        """Of a block of one: adds to `changed_t` whether it differs from what was kept."""
        self.changed_t |= (self._present()[0] != self._kept_views[0]).any()

    def select(self, skip_t: Tensor) -> None:
        """Unless `skip_t`, keeps what is in the buffers now."""
        now = self._present()
        device = self._kept.device
        if skip_t.device != device:
            if device.type == "cpu" and all(map(torch.equal, now, self._kept_views)):
                return  # nothing to ask for, and the answer would have to be waited for
            skip_t = skip_t.to(device, non_blocking=device.type != "cpu")
        if self._now is None:
            torch.where(skip_t, self._kept_views[0], now[0], out=self._kept_views[0])
        else:
            torch._foreach_copy_(self._now_views, now)
            torch.where(skip_t, self._kept, self._now, out=self._kept)

    def write(self) -> None:
        """Writes what is kept into the buffers."""
        torch._foreach_copy_(self._words, self._kept_views)

    def _present(self) -> list[Tensor]:
        return [one.now for one in self.held if one.now is not None]


def _held(tables: Iterable[Table]) -> list[_Held]:
    """Every buffer once, with all the places where it stands."""
    by_tensor: dict[int, _Held] = {}
    absent = []
    for table in tables:
        for name, tensor in table.items():
            held = _Held(None) if tensor is None else by_tensor.get(id(tensor))
            if held is None:
                held = by_tensor[id(tensor)] = _Held(tensor)
            if tensor is None:
                absent.append(held)
            held.holders.append((table, name))
    return [*by_tensor.values(), *absent]


def _grouped(held: Iterable[_Held]) -> list[list[_Held]]:
    groups: dict[tuple[torch.device, torch.dtype], list[_Held]] = {}
    for one in held:
        if one.words is not None:
            groups.setdefault((one.words.device, one.words.dtype), []).append(one)
    return list(groups.values())


def _words(tensor: Tensor) -> Tensor | None:
    """The bits of a buffer, as integers in its own memory; None if they cannot be written through.

    With a version counter of its own, so that a graph that somebody keeps does not see the write.
    """
    local = local_part(tensor)
    plain = type(local) in (Tensor, nn.Parameter) and local.layout == torch.strided and not local.is_quantized
    if not plain or local.is_meta or local.is_inference() or local.is_conj() or local.is_neg():
        return None
    repeats = any(step == 0 and size > 1 for step, size in zip(local.stride(), local.shape, strict=True))
    if repeats or not local.numel():
        return None
    bits = torch.view_as_real(local.data) if local.is_complex() else local.data
    integer = _INTEGER_OF.get(bits.element_size())
    return None if integer is None else bits.view(integer)


def _is_alike(one: Tensor | None, other: Tensor | None) -> TypeGuard[Tensor]:
    if one is None or other is None:
        return False
    return (
        type(one) is type(other)
        and not one.requires_grad
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    )


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

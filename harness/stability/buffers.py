"""Buffers: what the forward passes of a skipped step did to them is undone, on the device.

A NaN in an input reaches BatchNorm's running mean in the forward pass, long before there is a verdict. So the
values that each step found are copied (the snapshot), and the verdict selects between them and the present
ones.
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

STEPS_UNTIL_CONSTANT = 8
"""Steps after which a large buffer that has kept every bit counts as constant."""

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element: values are compared and moved as bits."""

Table = dict[str, Tensor | None]
"""A module's buffers by name, live."""


class Buffers:
    """Copies the values that a step finds in a model's buffers, and restores them if the step is skipped.

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
        _instances.add(self)
        self._changed_flags: HostCopy | None = None
        """Which of the candidates changed, on its way to the host."""
        self.take_snapshot()

    def take_snapshot(self) -> None:
        """Copies all present values as those to go back to: after construction, after loading."""
        self._tables: list[Table] = [module._buffers for module in self._model.modules()]
        self._num_names = sum(map(len, self._tables))
        self._tracked = _all_buffers(self._tables)
        self._buffers_of_table: dict[int, list[_Buffer]] = {}
        for buffer in self._tracked:
            for table, _ in buffer.places:
                self._buffers_of_table.setdefault(id(table), []).append(buffer)
        self._watch_loads()
        self._make_blocks()

    def _make_blocks(self) -> None:
        writable = [buffer for buffer in self._tracked if buffer.bits is not None]
        small = [buffer for buffer in writable if buffer.size_bytes < LARGE_BYTES]
        large = [buffer for buffer in writable if buffer.size_bytes >= LARGE_BYTES]
        too_large = sum(buffer.size_bytes for buffer in large) > MAX_COPIED_BYTES
        self._constants = [buffer for buffer in large if too_large and not self._is_changing(buffer)]
        for buffer in self._constants:
            buffer.note_version()
        copied = [_Block([buffer]) for buffer in large if buffer not in self._constants]
        self._candidates = [block for block in copied if not self._is_changing(block.buffers[0])]
        self._num_compared, self._changed_flags = 0, None
        self._blocks = [_Block(alike) for alike in _grouped(small)] + copied

    @torch.no_grad()
    def restore_if_skipped(self, skip_t: Tensor) -> None:
        """Restores what the step found, if `skip_t` (0-d bool), and begins the next step."""
        if not self._tracked and not self._has_new_names():
            return
        self._take_in_changed_constants()
        incompatible = [buffer for buffer in self._tracked if not buffer.read_present()]
        self._find_constants()
        for block in self._blocks:
            block.select(skip_t)
        for block in self._blocks:  # not before all are read: a buffer may now stand in another's place
            block.write()
        if incompatible and self._is_skip(skip_t):
            for buffer in incompatible:
                buffer.put_back()
        elif incompatible or self._has_new_names():
            self.take_snapshot()
        for other in _instances:
            if other is not self:
                other._accept_decision_of(self)

    def _accept_decision_of(self, other: Buffers) -> None:
        """Another guard of the same model decided first on the last forward pass; its decision holds."""
        tables = set(map(id, other._tables))
        if tables.isdisjoint(map(id, self._tables)):
            return
        for buffer in self._tracked:
            if any(id(table) in tables for table, _ in buffer.places):
                buffer.take_snapshot()

    def close(self) -> None:
        """Stops saving and restoring, for good."""
        for handle in self._hooks.values():
            handle.remove()
        self._buffers_of_table = {}
        self._tracked, self._blocks, self._candidates, self._constants, self._tables = [], [], [], [], []
        self._num_names = 0
        _instances.discard(self)

    def _has_new_names(self) -> bool:
        return sum(map(len, self._tables)) != self._num_names

    def _watch_loads(self) -> None:
        """What is loaded between two steps is what the next one finds."""
        for module in self._model.modules():
            if module._buffers and module not in self._hooks:
                hook = Hook(self._loaded)
                self._hooks[module] = module.register_load_state_dict_post_hook(hook)

    def _loaded(self, module: nn.Module, incompatible_keys: object) -> None:
        loaded = self._buffers_of_table.get(id(module._buffers), [])
        if any(buffer.is_replaced() for buffer in loaded):
            self.take_snapshot()
        else:
            for buffer in loaded:
                buffer.take_snapshot()

    def _take_in_changed_constants(self) -> None:
        """Takes in the large buffers that are constants no longer."""
        changed = [buffer for buffer in self._constants if buffer.is_replaced() or buffer.was_written()]
        if changed:
            self._constants = [buffer for buffer in self._constants if buffer not in changed]
            self._changing.update((id(table), name) for buffer in changed for table, name in buffer.places)
            self._blocks += [_Block([buffer]) for buffer in changed]

    def _is_changing(self, buffer: _Buffer) -> bool:
        return any((id(table), name) in self._changing for table, name in buffer.places)

    def _find_constants(self) -> None:
        """Finds out which large buffers never change. Reads the answer once it has arrived."""
        if self._changed_flags is not None and self._changed_flags.arrived:
            changed = self._changed_flags.wait().tolist()
            constant = [block for block, yes in zip(self._candidates, changed, strict=True) if not yes]
            self._blocks = [block for block in self._blocks if block not in constant]
            self._constants += [block.buffers[0] for block in constant]
            for buffer in self._constants:
                buffer.note_version()
            self._candidates, self._changed_flags = [], None
        if not self._candidates or self._changed_flags is not None:
            return
        for block in self._candidates:
            block.note_changes()
        self._num_compared += 1
        if self._num_compared == STEPS_UNTIL_CONSTANT:
            device = next(self._model.parameters()).device
            flags = [block.changed_t.to(device, non_blocking=True) for block in self._candidates]
            self._changed_flags = HostCopy(torch.stack(flags))

    def _is_skip(self, skip_t: Tensor) -> bool:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a buffer was replaced by one of another shape, type or device: the guard reads its verdict "
                "on the host in such steps"
            )
        return bool(skip_t)


_instances: weakref.WeakSet[Buffers] = weakref.WeakSet()


class _Buffer:
    """One buffer as the last step left it, in all its places; a tensor of None: a name without one."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor
        self.places: list[tuple[Table, str]] = []
        """Where it stands: modules may share a buffer."""
        self.bits = None if tensor is None else _bits(tensor)
        self.present = self.bits
        """Its present bits, where they can be selected."""
        self.snapshot: Tensor | None = None
        """The bits to go back to, a part of its block's."""
        self._version = 0

    @property
    def size_bytes(self) -> int:
        return 0 if self.bits is None else self.bits.numel() * self.bits.element_size()

    def note_version(self) -> None:
        """From here on `was_written` tells of changes; there is no snapshot."""
        self.snapshot = None
        self._version = self._present_version()

    def was_written(self) -> bool:
        """Whether torch counted a change in place; it counts none through `.data`, nor BatchNorm's."""
        return self._present_version() != self._version

    def is_replaced(self) -> bool:
        return any(table.get(name) is not self.tensor for table, name in self.places)

    def read_present(self) -> bool:
        """Finds the present bits; False if they cannot be selected on the device.

        Another tensor of the same kind lends its values only: the one that stood here goes back to its place.
        """
        self.present = self.bits
        if not self.is_replaced():
            return True
        table, name = self.places[0]
        present = table.get(name)
        if len(self.places) > 1 or self.bits is None or not _is_alike(present, self.tensor):
            return False
        bits = _bits(present)
        if bits is None:
            return False
        self.present, table[name] = bits, self.tensor
        return True

    def put_back(self) -> None:
        """Lets the tensor stand where it stood."""
        for table, name in self.places:
            table[name] = self.tensor

    def take_snapshot(self) -> None:
        """Copies the present values as those to go back to."""
        if self.snapshot is not None and self.bits is not None:
            self.snapshot.copy_(self.bits)
        self._version = self._present_version()

    def _present_version(self) -> int:
        return 0 if self.bits is None or self.tensor is None else local_part(self.tensor)._version


class _Block:
    """Buffers on one device and of one size of element, copied side by side so that few kernels do."""

    def __init__(self, buffers: Sequence[_Buffer]) -> None:
        self.buffers = buffers
        self._bits = [one.bits for one in buffers if one.bits is not None]
        self._snapshot = self._bits[0].new_empty(sum(bits.numel() for bits in self._bits))
        self._snapshot_views = _views(self._snapshot, self._bits)
        # A single buffer's present bits need not be brought together.
        self._present = torch.empty_like(self._snapshot) if len(buffers) > 1 else None
        self._present_views = [] if self._present is None else _views(self._present, self._bits)
        self.changed_t = torch.zeros((), dtype=torch.bool, device=self._snapshot.device)
        torch._foreach_copy_(self._snapshot_views, self._bits)
        for one, view in zip(buffers, self._snapshot_views, strict=True):
            one.snapshot = view

    def note_changes(self) -> None:
        """Of a block of one: adds to `changed_t` whether it differs from its snapshot."""
        self.changed_t |= (self._present_bits()[0] != self._snapshot_views[0]).any()

    def select(self, skip_t: Tensor) -> None:
        """Unless `skip_t`, makes what is in the buffers now the snapshot."""
        present = self._present_bits()
        device = self._snapshot.device
        if skip_t.device != device:
            if device.type == "cpu" and all(map(torch.equal, present, self._snapshot_views)):
                return  # nothing to ask for, and the answer would have to be waited for
            skip_t = skip_t.to(device, non_blocking=device.type != "cpu")
        if self._present is None:
            torch.where(skip_t, self._snapshot_views[0], present[0], out=self._snapshot_views[0])
        else:
            torch._foreach_copy_(self._present_views, present)
            torch.where(skip_t, self._snapshot, self._present, out=self._snapshot)

    def write(self) -> None:
        """Writes the snapshot into the buffers."""
        torch._foreach_copy_(self._bits, self._snapshot_views)

    def _present_bits(self) -> list[Tensor]:
        return [one.present for one in self.buffers if one.present is not None]


def _all_buffers(tables: Iterable[Table]) -> list[_Buffer]:
    """Every buffer once, with all the places where it stands."""
    by_tensor: dict[int, _Buffer] = {}
    absent = []
    for table in tables:
        for name, tensor in table.items():
            buffer = _Buffer(None) if tensor is None else by_tensor.get(id(tensor))
            if buffer is None:
                buffer = by_tensor[id(tensor)] = _Buffer(tensor)
            if tensor is None:
                absent.append(buffer)
            buffer.places.append((table, name))
    return [*by_tensor.values(), *absent]


def _grouped(buffers: Iterable[_Buffer]) -> list[list[_Buffer]]:
    groups: dict[tuple[torch.device, torch.dtype], list[_Buffer]] = {}
    for one in buffers:
        if one.bits is not None:
            groups.setdefault((one.bits.device, one.bits.dtype), []).append(one)
    return list(groups.values())


def _bits(tensor: Tensor) -> Tensor | None:
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
    values = torch.view_as_real(local.data) if local.is_complex() else local.data
    integer = _INTEGER_OF.get(values.element_size())
    return None if integer is None else values.view(integer)


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

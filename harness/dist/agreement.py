"""Doing the same thing on every rank: what fails on one fails on all, at once and with the same words."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.dist.store import default_store
from harness.errors import HarnessError, LostRankError

__all__ = [
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_from_main",
    "from_main",
    "gather",
    "on_all_ranks",
    "report_once",
]

T = TypeVar("T")

_PORTION_BYTES = 64 << 20
_FAILURES = "harness/failures"
_GRACE_S = 1.0
"""How long a rank that fails waits to hear whether others fail too."""
_LAST_READS_S = 0.2
"""How much longer rank 0 stays: the store may live in its process, and others still read it."""


def on_all_ranks(action: Callable[[], T], *, timeout_s: float | None = None) -> T:
    """Runs `action` on every rank; if it fails on one, every rank raises the error of the lowest such rank.

    Only `HarnessError`s are agreed on. Anything else is a defect and ends its process, which the launcher
    notices. One collective on the host; identity without a process group.

    Args:
        timeout_s: How much longer `action` may take on one rank than on another; None: `parallel.timeout_s`.
    """
    group = _patient_group(timeout_s)
    result: T | None = None
    mine: HarnessError | None = None
    try:
        result = action()
    except HarnessError as error:
        mine = error
    _raise_first(_exchange(mine, group))
    return result  # type: ignore[return-value]  # no rank failed, so there is one


def gather(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and gives every rank all results, by rank; fails as `on_all_ranks` does.

    Results have to be picklable. One collective on the host.
    """
    outcome: Any
    try:
        outcome = action()
    except HarnessError as error:
        outcome = error
    outcomes = _exchange(outcome)
    _raise_first(outcome if isinstance(outcome, HarnessError) else None for outcome in outcomes)
    return outcomes


def from_main(action: Callable[[], T], *, timeout_s: float | None = None) -> T:
    """Runs `action` on rank 0 and gives its result, or raises its `HarnessError`, on every rank.

    Args:
        timeout_s: How long the others wait for it; None: `parallel.timeout_s`.
    """
    group = _patient_group(timeout_s)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    outcome: Any = None
    if is_main:
        try:
            outcome = action()
        except HarnessError as error:
            outcome = error
    if dist.is_initialized():
        holder = [outcome]
        dist.broadcast_object_list(holder, src=0, group=group, device=torch.device("cpu"))
        outcome = holder[0]
    if isinstance(outcome, HarnessError):
        raise outcome
    result: T = outcome
    return result


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank. One small collective on the host."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier() -> None:
    """Waits until all ranks are here; returns at once without a process group."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` over all ranks, in place, on the device that they are on; returns them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Gives every rank rank 0's values, in place and bit for bit, of any dtype; autograd does not see it.

    One collective for each 64 MiB and device, which is also the memory that it takes.

    Args:
        tensors: Strided, of the same shapes, dtypes and order on all ranks.
    """
    if not dist.is_initialized():
        return
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor.data)
    for group in by_device.values():
        whole = [tensor.contiguous() for tensor in group]
        # As bytes, for gloo knows neither int16 nor float8.
        for pieces in _portions(tensor.view(-1).view(torch.uint8) for tensor in whole):
            flat = torch.cat(pieces)
            dist.broadcast(flat, src=0)
            for piece, values in zip(pieces, flat.split([len(piece) for piece in pieces]), strict=True):
                piece.copy_(values)
        for tensor, values in zip(group, whole, strict=True):
            if values is not tensor:
                tensor.copy_(values)


def _portions(flat_bytes: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Pieces of the tensors, at most `_PORTION_BYTES` at a time."""
    portion: list[torch.Tensor] = []
    free = _PORTION_BYTES
    for tensor in flat_bytes:
        while len(tensor):
            piece, tensor = tensor[:free], tensor[free:]
            portion.append(piece)
            free -= len(piece)
            if not free:
                yield portion
                portion, free = [], _PORTION_BYTES
    if portion:
        yield portion


@contextmanager
def report_once(report: Callable[[HarnessError], None] | None = None) -> Iterator[None]:
    """Within it an error says on which ranks it arose (`HarnessError.ranks`), so that one of them prints it.

    Where there are several ranks, the one that prints it calls `report`, and those that fail too stay until it has,
    2 seconds at most: a launcher ends them all when the first one leaves.

    Ranks that fail learn of each other through the store, without a collective: the others may be anywhere, and
    wait for nobody. A rank to which something else happens while another one fails, such as a lost connection,
    raises a `LostRankError` about that other one, which prints its own. A restart may help it as much as that one.
    """
    try:
        yield
    except HarnessError as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            if error.ranks is None:
                error.ranks = _ranks_failing_with(error)
            _report_before_leaving(error, report)
        raise
    except Exception as error:
        culprits: dict[int, str] = {}
        if dist.is_initialized() and dist.get_world_size() > 1:
            with suppress(dist.DistError, RuntimeError):  # the store is gone: this error is all there is
                culprits = _failures(enough=1)
        if not culprits:
            raise
        consequence = LostRankError(f"rank {min(culprits)} failed, and this one with it: {error}")
        consequence.ranks = (min(culprits),)
        consequence.restart_may_help = not _is_final(min(culprits))
        _report_before_leaving(consequence, report)
        raise consequence from error


def _report_before_leaving(error: HarnessError, report: Callable[[HarnessError], None] | None) -> None:
    reporter = min(error.ranks or (0,))
    reported = f"{_FAILURES}/{reporter}/reported"
    if dist.get_rank() == reporter and report is not None:
        report(error)
    with suppress(dist.DistError, RuntimeError):  # the store is gone, and with it the rank that held it
        store = default_store()
        if dist.get_rank() == reporter:
            store.set(reported, "")
        else:
            _wait_until(lambda: store.check([reported]), timeout_s=2 * _GRACE_S)
        if dist.get_rank() == 0:
            time.sleep(_LAST_READS_S)


def _ranks_failing_with(error: HarnessError) -> tuple[int, ...]:
    """The ranks that fail with the same words, this one included; empty: all of them."""
    text = str(error)
    try:
        store = default_store()
        if not error.restart_may_help:
            store.set(_final_key(dist.get_rank()), "")
        store.set(f"{_FAILURES}/{dist.get_rank()}", text)
        messages = _failures(enough=dist.get_world_size())
    except (dist.DistError, RuntimeError):  # the store is gone, and with it the rank that held it
        return (dist.get_rank(),)
    ranks = tuple(sorted({dist.get_rank(), *(rank for rank, other in messages.items() if other == text)}))
    return () if len(ranks) == dist.get_world_size() else ranks


def _is_final(rank: int) -> bool:
    """Whether the error of a rank that has failed would be there at every start."""
    with suppress(dist.DistError, RuntimeError):  # the store is gone
        return bool(default_store().check([_final_key(rank)]))
    return False


def _final_key(rank: int) -> str:
    return f"{_FAILURES}/{rank}/final"


def _failures(*, enough: int) -> dict[int, str]:
    """The messages of ranks that have failed, by rank, once so many have or the grace is over."""
    store, size = default_store(), dist.get_world_size()
    messages: dict[int, str] = {}

    def are_enough() -> bool:
        for rank in set(range(size)) - messages.keys():
            key = f"{_FAILURES}/{rank}"
            if store.check([key]):
                messages[rank] = store.get(key).decode()
        return len(messages) >= enough

    _wait_until(are_enough, timeout_s=_GRACE_S)
    return messages


def _wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Asks ever more seldom: there may be thousands of ranks, and one store."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.01
    while not condition() and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_READS_S / 4)


def _raise_first(outcomes: Iterable[HarnessError | None]) -> None:
    errors = dict(enumerate(outcomes))
    failed = {rank: error for rank, error in errors.items() if error is not None}
    if failed:
        first = failed[min(failed)]
        alike = tuple(rank for rank, error in failed.items() if str(error) == str(first))
        first.ranks = () if len(alike) == len(errors) else alike
        raise first


def _patient_group(timeout_s: float | None) -> dist.ProcessGroup | None:
    """All ranks on the host, who wait so long for each other; None: the group of everything else."""
    if timeout_s is None or not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(
        backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
    )
    return group


def _exchange(outcome: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    if not dist.is_initialized():
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group=group)
    return outcomes

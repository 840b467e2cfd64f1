"""Where the ranks of one attempt meet: a part of the launcher's store that no earlier attempt has written to.

torchrun's agent keeps one store for all attempts (torch 2.13). A program that is started again would read in
it the addresses of processes that are dead, and wait for them. So the ranks that live now agree on a prefix:

    rank 0          writes a new token under a fixed key
    any other rank  answers, under that token, with a new token of its own; again for each token it has not
                    answered yet
    rank 0          when all have answered its token, publishes their answers under it
    any other rank  goes on when its own answer is among those of the token that it answered

The token is the prefix. A stale token, answer or list fails to match, whatever order they are read in: an
answer of a dead process is not the one that its successor gave.
"""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from harness.errors import LostRankError

__all__ = ["await_store", "fresh_store"]

logger = logging.getLogger(__name__)

_TOKEN = "harness/attempt"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25
_SAY_S = 15.0
"""After so long it is said for whom a rank waits, and again after twice as long each time."""
_CONNECT_S = 5.0
_STOP_GRACE_S = 20.0
"""How long a rank that was asked to stop still waits for the others, who may be gone or still import: a stop
before the first step is committed by all. Below the 30 s after which torchrun kills."""


def fresh_store(
    store: Store,
    *,
    rank: int,
    world_size: int,
    timeout_s: float,
    stopping: Callable[[], bool],
) -> Any:
    """A store of the ranks that call this now and of nobody before; on all ranks together.

    Args:
        store: The launcher's; it may hold anything of earlier attempts.
        timeout_s: How long to wait for the others.
        stopping: Whether this process was asked to stop.

    Raises:
        LostRankError: not all came in time.
    """
    meet = _lead if rank == 0 else _follow
    token = meet(store, rank, world_size, _Waiting(timeout_s, stopping))
    return dist.PrefixStore(f"harness/{token}", store)  # type: ignore[attr-defined, arg-type]  # there at run time


def await_store(address: tuple[str, int], *, timeout_s: float, stopping: Callable[[], bool]) -> None:
    """Waits until somebody listens at the store's address. torch's own attempt to connect, which goes on for
    as long, handles no signal meanwhile; and the launcher that keeps the store may be dead.

    Args:
        timeout_s, stopping: As for `fresh_store`.

    Raises:
        LostRankError: nobody did in time.
    """
    waiting = _Waiting(timeout_s, stopping)
    while not _is_open(address):
        waiting.once_more(f"whoever keeps the store at {address[0]}:{address[1]}")


def _is_open(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


class Store(Protocol):
    """What is asked of torch's stores here."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class _Waiting:
    """Waits in short pauses, in which signals are handled; not in the store, which prints every time-out."""

    def __init__(self, timeout_s: float, stopping: Callable[[], bool]) -> None:
        self._began = time.monotonic()
        self._ends, self._stopping = self._began + timeout_s, stopping
        self._pause_s, self._say_s = _FIRST_PAUSE_S, _SAY_S

    def once_more(self, waiting_for: str) -> None:
        if self._stopping():
            self._ends = min(self._ends, time.monotonic() + _STOP_GRACE_S)
            self._stopping = _never
        if time.monotonic() > self._ends:
            raise LostRankError(
                f"{waiting_for} did not come to the start",
                rule="all processes of an attempt meet before anything else",
                remedy="look at what the others said; parallel.timeout_s is how long they are waited for",
            )
        if time.monotonic() > self._began + self._say_s:
            left_s = self._ends - time.monotonic()
            logger.warning("waiting for %s for %.0f s, for %.0f s more", waiting_for, self._say_s, left_s)
            self._say_s *= 2
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _never() -> bool:
    return False


def _lead(store: Store, rank: int, world_size: int, waiting: _Waiting) -> str:
    token = uuid.uuid4().hex
    store.set(_TOKEN, token)
    others = range(1, world_size)
    for other in others:
        while not store.check([_answer_key(token, other)]):
            waiting.once_more(f"rank {other}")
    answers = [store.get(_answer_key(token, other)).decode() for other in others]
    store.set(_answers_key(token), json.dumps(answers))
    return token


def _follow(store: Store, rank: int, world_size: int, waiting: _Waiting) -> str:
    token, mine = "", ""
    while not (token and store.check([_answers_key(token)]) and mine in _answers(store, token)):
        if store.check([_TOKEN]):
            newest = store.get(_TOKEN).decode()
            if newest != token:
                token, mine = newest, uuid.uuid4().hex
                store.set(_answer_key(token, rank), mine)
        waiting.once_more("rank 0, or another that it waits for")
    return token


def _answers(store: Store, token: str) -> list[str]:
    answers: list[str] = json.loads(store.get(_answers_key(token)))
    return answers


def _answer_key(token: str, rank: int) -> str:
    return f"{token}/answer/{rank}"


def _answers_key(token: str) -> str:
    return f"{token}/answers"

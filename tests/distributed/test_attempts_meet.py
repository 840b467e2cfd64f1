"""The ranks of an attempt meet, whatever dead attempts have left in the launcher's store."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
from torch.distributed import TCPStore

from harness.dist.rendezvous import await_store, fresh_store
from harness.errors import LostRankError

WORLD_SIZE = 3


def attempt(port: int, delays: list[float], *, dead: int | None = None) -> dict[int, str]:
    """One attempt; what rank 0 tells each rank over the store that they share. `dead` never comes."""
    heard: dict[int, str] = {}
    word = str(random.random())

    def rank_main(rank: int) -> None:
        time.sleep(delays[rank])
        client = TCPStore("127.0.0.1", port, is_master=False)
        try:
            timeout_s = 20.0 if dead is None else 0.3
            store = fresh_store(
                client, rank=rank, world_size=WORLD_SIZE, timeout_s=timeout_s, stopping=lambda: False
            )
        except LostRankError:
            return
        if rank == 0:
            store.set("word", word)
        heard[rank] = "the word" if store.get("word").decode() == word else "a dead attempt's"

    ranks = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(WORLD_SIZE) if rank != dead]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    return heard


@pytest.mark.parametrize("seed", range(3))
def test_ranks_meet_their_own_attempt_in_whatever_order_they_come(seed: int) -> None:
    draw = random.Random(seed)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number in range(6):
        delays = [draw.choice([0.0, 0.0, 0.05, 0.2]) for _ in range(WORLD_SIZE)]
        dead = draw.choice([None, *range(WORLD_SIZE)]) if number % 2 == 0 else None
        heard = attempt(server.port, delays, dead=dead)
        if dead is None:
            assert heard == dict.fromkeys(range(WORLD_SIZE), "the word")


def test_a_rank_that_is_missing_is_named_after_the_time_that_was_set() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(LostRankError, match=r"rank 1 did not come.*timeout_s"):
        fresh_store(server, rank=0, world_size=2, timeout_s=0.1, stopping=lambda: False)


def test_a_rank_that_is_to_stop_does_not_wait_for_a_launcher_that_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.dist.rendezvous._STOP_GRACE_S", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        began = time.monotonic()
        with pytest.raises(LostRankError, match=r"the store at 127\.0\.0\.1"):
            await_store(taken.getsockname(), timeout_s=100.0, stopping=lambda: True)
    assert time.monotonic() - began < 50.0


def test_a_rank_that_is_to_stop_does_not_wait_for_those_that_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.dist.rendezvous._STOP_GRACE_S", 0.1)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    with pytest.raises(LostRankError):
        fresh_store(server, rank=0, world_size=2, timeout_s=100.0, stopping=lambda: True)
    assert time.monotonic() - began < 50

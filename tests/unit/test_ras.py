"""Asking NCCL's RAS subsystem: a server that answers as NCCL's does, one that hangs, and none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from harness import env
from harness.dist.ras import ask_ras, write_ras_report

REPORT = "NCCL version 2.29.2\n\nJob summary\n===========\n\n  Nodes  Processes\n      1          8\n"


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()
        thread.join(10.0)


def as_nccl(client: socket.socket) -> None:
    """Line by line, the connection closed after the report, as src/ras/client_support.cc of NCCL has it."""
    for line in client.makefile("r"):
        command = line.strip().lower()
        if command.startswith("client protocol "):
            client.sendall(b"SERVER PROTOCOL 2\n")
        elif command.startswith("timeout ") and command.split()[1].isdigit():
            client.sendall(b"OK\n")
        elif command == "verbose status":
            client.sendall(REPORT.encode())
            return
        else:
            client.sendall(f"ERROR: Unknown command {command}\n".encode())


def test_the_report_is_what_stands_between_the_protocols_own_words() -> None:
    with serving(as_nccl) as address:
        assert ask_ras(address, timeout_s=5.0) == REPORT


def test_what_has_come_of_a_report_is_kept_when_the_rest_does_not_come_in_time() -> None:
    release = threading.Event()

    def hang(client: socket.socket) -> None:
        client.sendall(b"SERVER PROTOCOL 2\nOK\nNCCL version 2.29.2\n")
        release.wait(10.0)

    with serving(hang) as address:
        began = time.monotonic()
        assert ask_ras(address, timeout_s=0.3) == "NCCL version 2.29.2\n"
        assert time.monotonic() - began < 5.0
        release.set()


def test_nothing_comes_of_a_port_that_is_closed_or_somebody_elses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()
    assert ask_ras(closed, timeout_s=1.0) == ""
    with serving(lambda client: client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")) as address:
        assert ask_ras(address, timeout_s=1.0) == ""


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("", ("localhost", 28028)),
        ("10.0.0.7:4000", ("10.0.0.7", 4000)),
        ("[::1]:4000", ("::1", 4000)),
        ("nonsense", ("localhost", 28028)),
    ],
)
def test_the_address_is_that_of_nccls_own_variable(
    said: str, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_RAS_ADDR", said)
    assert env.nccl_ras_address() == address


def test_a_file_is_written_where_nccl_is_used_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ras_report(tmp_path, timeout_s=1.0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with serving(as_nccl) as (host, port):
        monkeypatch.setenv("NCCL_RAS_ADDR", f"{host}:{port}")
        write_ras_report(tmp_path, timeout_s=5.0)
    assert (tmp_path / "nccl-ras.txt").read_text() == REPORT

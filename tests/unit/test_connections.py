"""Connections to machines that are gone are ended, and to processes that are slow are not."""

from __future__ import annotations

import socket
import time

from harness.dist.connections import Connections


def test_a_connection_whose_other_end_does_not_read_is_left_alone() -> None:
    """As that of a rank which is still in its evaluation, or stopped."""
    connections = Connections(0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        other, _ = server.accept()
        with other:
            one.setblocking(False)
            sent = 0
            while True:
                try:
                    sent += one.send(bytes(1 << 20))
                except BlockingIOError:
                    break
            ends = time.monotonic() + 1.5  # Linux asks by then whether more may be sent
            while time.monotonic() < ends:
                assert connections.look() == []
                time.sleep(0.05)
            other.settimeout(10.0)
            received = 0
            while received < sent:
                received += len(other.recv(1 << 20))


def test_every_connection_asks_the_other_end_now_and_then_and_blocks_as_before() -> None:
    connections = Connections(8.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        before = one.getblocking()
        connections.look()
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
        assert one.getblocking() == before

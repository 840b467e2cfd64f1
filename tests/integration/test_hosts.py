"""Two machines: connections to one that is cut off are ended, and a machine knows its own address."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.network import address_towards, interface_towards, is_here
from tests.support.hosts import Hosts, why_no_hosts
from tests.support.runs import ROOT, wait_for


@pytest.fixture
def hosts() -> None:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)


# Without the package, whose import of torch would take longer than the test.
LISTENS = """
import socket, sys
server = socket.create_server((sys.argv[1], 4711))
print("listening", flush=True)
kept = [server.accept() for _ in range(2)]
while True:
    for connection, _ in kept:
        connection.recv(1)
"""
WAITS = """
import importlib.util, pathlib, socket, sys, time
spec = importlib.util.spec_from_file_location("connections", sys.argv[2])
connections = importlib.util.module_from_spec(spec)
spec.loader.exec_module(connections)
idle, busy = (socket.create_connection((sys.argv[1], 4711)) for _ in range(2))
with connections.Connections(2.0) as watched:
    idle.send(b".")
    busy.send(b".")
    time.sleep(2.5)
    assert not watched.lost
    print("cut", flush=True)
    while not pathlib.Path(sys.argv[3]).exists():
        time.sleep(0.01)
    busy.send(b".")
    began = time.monotonic()
    assert busy.recv(1) == idle.recv(1) == b""
    print(f"ended {time.monotonic() - began:.1f} {watched.lost}", flush=True)
"""


@pytest.mark.usefixtures("hosts")
def test_connections_to_a_machine_that_is_cut_off_are_ended_whether_or_not_data_is_under_way(
    tmp_path: Path,
) -> None:
    here, there, is_cut = tmp_path / "here", tmp_path / "there", tmp_path / "is-cut"
    module = ROOT / "harness" / "dist" / "connections.py"
    with Hosts(2) as hosts:
        hosts[1].start([sys.executable, "-c", LISTENS, hosts[1].address], there)
        wait_for(lambda: "listening" in there.read_text(), what="the other machine")
        hosts[0].start([sys.executable, "-c", WAITS, hosts[1].address, str(module), str(is_cut)], here)
        wait_for(lambda: "cut" in here.read_text(), what="the connections")
        hosts[1].cut()
        is_cut.touch()
        # A warning for each connection stands beside it.
        wait_for(lambda: "{'10.77.0.2'}\n" in here.read_text(), what="their end")


def test_a_machine_finds_the_address_that_others_reach_it_by() -> None:
    assert (address_towards("127.0.0.1"), interface_towards("127.0.0.1")) == ("127.0.0.1", None)
    assert is_here("127.0.0.1")
    assert address_towards("no-such-host.invalid") is None
    assert not is_here("no-such-host.invalid")

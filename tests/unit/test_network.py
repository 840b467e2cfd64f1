"""Whether a host is this machine, where its own name leads to 127.0.1.1."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from harness import network


def test_a_machine_whose_name_is_a_loopback_address_is_here_and_tells_no_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve = socket.getaddrinfo

    def own_name_is_loopback(host: Any, *arguments: Any, **more: Any) -> Any:
        return resolve("127.0.1.1" if host == "node-7" else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", own_name_is_loopback)
    network._main("node-7")
    assert capsys.readouterr().out.split() == ["1"]


def test_a_machine_knows_its_own_name_where_nothing_resolves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*arguments: Any, **more: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    for host, said in (("node-7", ["1"]), ("node-8", ["0"])):
        network._main(host)
        assert capsys.readouterr().out.split() == said

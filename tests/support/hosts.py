"""Hosts on one machine: Linux network namespaces with a name and an address each, on one switch.

They share processors, memory and disks, so their file system is the shared one of a cluster. All is gone
with the context, whatever happened in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.support.runs import ROOT, wait_for

__all__ = ["Host", "Hosts", "why_no_hosts"]

_NAMED = 'hostname "$0" && exec "$@"'
_counter = 0


def why_no_hosts() -> str | None:
    """Why there can be no hosts here; None: there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    try:
        with Hosts(1):
            return None
    except FileNotFoundError as error:
        return f"no {error.filename} here: install iproute2 and util-linux"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"


class Hosts:
    """So many hosts and the switch between them; a context manager. Host n is 10.77.0.(n + 1).

    Raises:
        FileNotFoundError: a program that makes them is not installed.
        subprocess.CalledProcessError: it is not permitted.
    """

    def __init__(self, count: int) -> None:
        global _counter
        _counter += 1
        stem = f"hosts-{os.getpid()}-{_counter}"
        self._switch = f"{stem}-switch"
        self._hosts = [Host(f"{stem}-{number}", number, self._switch) for number in range(count)]

    def __enter__(self) -> list[Host]:
        try:
            _ip("netns", "add", self._switch)
            _ip("link", "add", "switch", "type", "bridge", netns=self._switch)
            _ip("link", "set", "switch", "up", netns=self._switch)
            for host in self._hosts:
                host.make()
        except BaseException:
            self._remove()
            raise
        return self._hosts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for host in self._hosts:
            host.kill()
        for name in (*(host.namespace for host in self._hosts), self._switch):
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                _ip("netns", "del", name)


class Host:
    """One of them."""

    def __init__(self, namespace: str, number: int, switch: str) -> None:
        self.namespace, self.name, self.address = namespace, f"host{number}", f"10.77.0.{number + 1}"
        self._switch, self._port = switch, f"port{number}"
        self._started: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        """The namespace, and a cable from it to the switch."""
        _ip("netns", "add", self.namespace)
        _ip("link", "set", "lo", "up", netns=self.namespace)
        peer = ("peer", "name", "eth0", "netns", self.namespace)
        _ip("link", "add", self._port, "type", "veth", *peer, netns=self._switch)
        _ip("link", "set", self._port, "master", "switch", "up", netns=self._switch)
        _ip("addr", "add", f"{self.address}/24", "dev", "eth0", netns=self.namespace)
        _ip("link", "set", "eth0", "up", netns=self.namespace)

    def start(self, command: Sequence[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on this host, in a session of its own; what it says is appended to `output`."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _NAMED, self.name]
        with output.open("ab") as file:
            process = subprocess.Popen(
                [*inside, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def cut(self) -> None:
        """Takes the cable out: nothing comes through, and neither side is told."""
        _ip("link", "set", self._port, "nomaster", netns=self._switch)

    def mend(self) -> None:
        """Puts it back in."""
        _ip("link", "set", self._port, "master", "switch", netns=self._switch)

    def lose(self) -> None:
        """The host is gone, and can say goodbye to nobody."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """Kills whatever runs on it, and waits for that."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.pids(), timeout_s=10.0)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)

    def pids(self) -> list[int]:
        """The processes on it that live."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [pid for pid in map(int, found.stdout.split()) if _lives(pid)]


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _ip(*arguments: str, netns: str | None = None) -> None:
    where = ["-n", netns] if netns else []
    subprocess.run(["ip", *where, *arguments], check=True, capture_output=True, text=True)

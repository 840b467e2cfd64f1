"""Ends connections to machines that are gone without a word: no power, a broken link.

One that only waits for such a machine would wait for ever, and one with unsent data for a quarter of an hour.
Linux asks an idle connection's other end by itself (keep-alive); where data is on its way it only sends that
again, so a thread looks whether anything of it was answered. TCP_USER_TIMEOUT would do that too, but ends
connections to a process that is slow to read as well.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import struct
import sys
import threading
import time
from types import TracebackType
from typing import Self

__all__ = ["Connections"]

logger = logging.getLogger(__name__)

_PROBES = 3
"""In the time that a machine may be silent."""
_MOST_PROBES = 10
"""After which Linux itself ends a connection, and says nothing."""
_LOOKS = 10
"""Looks in the time that a machine may be silent."""
_SHARE = 100
"""There may be thousands of connections: looking takes one part in so many of a processor's time, or is done
once in `silent_s`."""
_TCP_INFO = struct.Struct("=BxBB40xI8xI")
"""Of linux/tcp.h: state, retransmits, probes, milliseconds since data was last sent and since anything was
acknowledged."""
_ESTABLISHED = 1


class Connections:
    """Looks after the TCP connections of this process, also those that are made later. A context manager.

    It is the machine that has to answer: that of a process which hangs, or is stopped, answers still. Other
    systems than Linux are left to themselves.

    Args:
        silent_s: How long a machine may answer nothing.
    """

    def __init__(self, silent_s: float) -> None:
        self.lost: set[str] = set()
        """Addresses of machines to which connections were ended."""
        self._silent_s = silent_s
        self._every_s = silent_s / _LOOKS
        between_s = max(1, round(silent_s / (_PROBES + 1)))
        self._options = (
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _MOST_PROBES),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between_s),
            (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 0), between_s),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        )
        self._unanswered: dict[int, float] = {}
        """Descriptors of connections whose other end owes an answer, and since when."""
        # Python's socket objects would change how a descriptor of gloo's blocks.
        self._libc = ctypes.CDLL(None)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> list[str]:
        """Ends the connections to machines that are silent; their addresses."""
        unanswered = {descriptor: self._unanswered_since(descriptor) for descriptor in _descriptors()}
        self._unanswered = {one: since for one, since in unanswered.items() if since is not None}
        now = time.monotonic()
        silent = {self._end(one) for one, since in self._unanswered.items() if now - since >= self._silent_s}
        return sorted(silent - {""})

    def _run(self) -> None:
        took_s = 0.0
        while not self._closed.wait(min(self._silent_s, max(self._every_s, _SHARE * took_s))):
            started = time.thread_time()  # not what a busy machine makes of it
            for address in self.look():
                logger.error(
                    "%s has not answered for %g s (parallel.silent_s): its machine or the network is gone;"
                    " whatever waits for it fails now",
                    address,
                    self._silent_s,
                )
            took_s = time.thread_time() - started

    def _keep_alive(self, descriptor: int) -> bool:
        """Has Linux ask the other end now and then; False if it is no connection over TCP."""
        for level, option, value in self._options:
            word = ctypes.c_int(value)
            if self._libc.setsockopt(descriptor, level, option, ctypes.byref(word), ctypes.sizeof(word)):
                return False
        return True

    def _unanswered_since(self, descriptor: int) -> float | None:
        """Since when the other end owes an answer, by `time.monotonic`; None: it owes none."""
        info, size = ctypes.create_string_buffer(_TCP_INFO.size), ctypes.c_uint(_TCP_INFO.size)
        place = (descriptor, socket.IPPROTO_TCP, socket.TCP_INFO)
        if not self._keep_alive(descriptor) or self._libc.getsockopt(*place, info, ctypes.byref(size)):
            return None
        state, retransmits, probes, since_sent_ms, since_answer_ms = _TCP_INFO.unpack(info.raw)
        if state != _ESTABLISHED:
            return None
        now = time.monotonic()
        # Linux leaves a single probe unanswered that comes within half a second of another.
        if probes > 1:
            return now - float(since_answer_ms) / 1000
        if retransmits and since_answer_ms > since_sent_ms:
            # Not since the last answer: before the data was sent there was nothing to be answered.
            return self._unanswered.get(descriptor, now)
        return None

    def _end(self, descriptor: int) -> str:
        """Ends a connection for whoever uses it; its other end's address, empty if it has ended meanwhile."""
        try:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                address = str(connection.getpeername()[0]).removeprefix("::ffff:")
                self.lost.add(address)  # first, for whoever uses it fails at once
                connection.shutdown(socket.SHUT_RDWR)
                return address
        except OSError:
            return ""


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]

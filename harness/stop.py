"""Requests to stop, made by signals: finish the step, commit a checkpoint, leave.

| signal | who sends it |
|---|---|
| SIGINT | Ctrl-C; a second one leaves at once |
| SIGTERM | schedulers, launchers, `kill` |
| SIGUSR1 | schedulers that announce the end of a job (Slurm's `--signal`) |
| SIGHUP | a terminal that is gone |
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

_ABORTED_BY_CTRL_C = 128 + signal.SIGINT
_OURS = (signal.SIGINT, signal.SIGTERM)
_OURS_BY_DEFAULT = (signal.SIGUSR1, signal.SIGHUP)
"""Taken where they would end the process: nohup ignores SIGHUP, and a caller's handler is the caller's."""
_OUTPUTS = (1, 2)


class StopRequest:
    """Notes the first signal that asks for the end; a context manager that gives the old handlers back.

    The request of one rank reaches all others with the guard's gather, so that all leave at the same step.
    Outside the main thread no signal can be handled, and none is.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the signal that asked first, or why the run is done; None: nobody has asked."""
        self.is_done = False
        """Whether the run has reached what it is for, so that nothing is left to go on with."""
        self.is_over = False
        """Whether the run is ending already: a signal then changes nothing, and nothing is said of it."""
        self._interrupts = 0
        self._old: dict[int, Any] = {}
        self._terminals = [fd for fd in _OUTPUTS if os.isatty(fd)]

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    @requested.setter
    def requested(self, wanted: bool) -> None:
        """For callbacks: the run is to go on later, as after a signal."""
        self.reason = (self.reason or "a callback") if wanted else None

    def finish(self, reason: str) -> None:
        """For callbacks: the run is done before its last step, and ends as `finished` for this `reason`."""
        self.reason, self.is_done = reason, True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            by_default = [n for n in _OURS_BY_DEFAULT if signal.getsignal(n) is signal.SIG_DFL]
            for number in (*_OURS, *by_default):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Launchers send SIGTERM after a terminal's Ctrl-C: only a second SIGINT is a second Ctrl-C.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(_ABORTED_BY_CTRL_C)
        if number == signal.SIGHUP:
            self._forget_terminal()
        if self.reason is None and not self.is_over:
            self.reason = signal.Signals(number).name
            _say(f"{self.reason}: finishing the step and saving a checkpoint; Ctrl-C again ends at once")

    def _forget_terminal(self) -> None:
        """What is printed after a terminal's end would raise, in the middle of the last step."""
        for fd in self._terminals:
            if not os.isatty(fd):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)


def _say(text: str) -> None:
    # Neither logging nor print: the signal may have come while the main thread was writing with them.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())

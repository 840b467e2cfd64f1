"""Helper processes that run on what the others leave: a trainer beside them must not get slower.

Where Linux groups processes by session ("autogroup", sched(7)) it shares the processors out in two stages:
first among the sessions, all alike, and only then by niceness among the processes of one. A helper in a
session of its own gets as much as the whole trainer then, however nice it is, unless its session is made
nice too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

__all__ = ["pass_on_to", "stop_yielding", "yield_to_others"]

_NICEST = 19
_NUM_TRIES, _RETRY_S = 20, 0.1
"""Linux takes one change of a session's niceness every 0.1 s, from anybody."""


def yield_to_others() -> None:
    """Gives way to all other processes: to be called first thing, before there are threads.

    Threads and processes started later inherit it; one that begins a session needs `pass_on_to` too. Where
    this process leads no session, the niceness of the session is left as it is: it is not ours alone.
    """
    os.nice(_NICEST)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox that forbids it
            # It takes no processor from anybody when it wakes up. SCHED_IDLE would leave it a fifth of what
            # niceness leaves it where all are busy: too little to start in minutes, and that for good.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _set_session_niceness(os.getpid(), _NICEST)


def stop_yielding() -> None:
    """Takes a fair share again, among sessions: those to whom it gave way are gone, and others may be busy.

    Niceness within a session cannot be taken back without privileges.
    """
    _set_session_niceness(os.getpid(), 0)


def pass_on_to(pid: int) -> None:
    """Makes the session that our child `pid` leads as nice as this process's; quiet where it leads none.

    May take a second where many sessions are changed at once.
    """
    with contextlib.suppress(OSError, ValueError):  # a kernel without autogroup
        _set_session_niceness(pid, _session_niceness(os.getpid()))


def _session_niceness(pid: int) -> int:
    """From a line like `/autogroup-26 nice 0`."""
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


def _set_session_niceness(pid: int, niceness: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # a kernel without autogroup, or the process is gone
        if os.getsid(pid) == pid and _session_niceness(pid) != niceness:
            _write_patiently(Path(f"/proc/{pid}/autogroup"), str(niceness))


def _write_patiently(path: Path, text: str) -> None:
    for _ in range(_NUM_TRIES):
        try:
            path.write_text(text)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            time.sleep(_RETRY_S)

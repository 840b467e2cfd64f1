"""Processes whose launcher is killed: they would wait for each other, or train on as orphans."""

from __future__ import annotations

import ctypes
import signal
import sys

from harness import env

__all__ = ["stop_with_launcher"]

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def stop_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies; elsewhere, and without a launcher, does nothing.

    To be called first thing, since a launcher that is dead already sends no signal.
    """
    if sys.platform == "linux" and env.has_launcher():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

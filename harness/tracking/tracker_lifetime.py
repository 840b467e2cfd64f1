"""How long a tracker lives, and where: closed at the end of the program, silent in other processes."""

from __future__ import annotations

import atexit
import functools
import sys
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

__all__ = ["Lifetime"]


class Lifetime(ABC):
    """The part of `ExperimentTracker` that is its life as an object."""

    is_main: bool

    @abstractmethod
    def close(self, state: str = "finished") -> None:
        """Ends the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("stopped" if issubclass(kind, KeyboardInterrupt) else "crashed")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, as of a file: a run has one writer."""
        return self

    def _close_at_exit(self) -> None:
        """For those who forget to close."""
        # Weak, so that being registered does not keep a forgotten tracker alive.
        self._at_exit = functools.partial(_close_forgotten, weakref.ref(self))
        if self.is_main:
            atexit.register(self._at_exit)

    def _forget_exit(self) -> None:
        atexit.unregister(self._at_exit)


def _close_forgotten(tracker: weakref.ref[Lifetime]) -> None:
    """The run ended well unless an exception ended the program."""
    live = tracker()
    if live is not None:
        live.close("crashed" if hasattr(sys, "last_value") else "finished")

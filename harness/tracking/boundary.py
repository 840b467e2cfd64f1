"""Nothing that logging does ends a training: what goes wrong stops here, and is said once of each kind."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from harness.errors import HarnessError

__all__ = ["Complaints", "harmless", "words_of"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
MOST = 100
"""Kinds that are said of a method: a program may make up a name at every step."""


class Complaints:
    """Says what went wrong, each kind once: a loop calls the same method ten thousand times."""

    def __init__(self) -> None:
        self._said: defaultdict[str, set[tuple[object, ...]]] = defaultdict(set)

    def once(self, method: str, *kind: object, message: str) -> None:
        """Logs an error, unless one of this method and kind has been logged before."""
        said = self._said[method]
        if kind in said or len(said) > MOST:
            return
        said.add(kind)
        if len(said) <= MOST:
            logger.error("%s; training goes on, and this is said once", message.rstrip("."))
        else:
            logger.error("%s: more errors than %d; the others are not shown", method, MOST)

    def failed(self, method: str, error: Exception, *about: object) -> None:
        """A method failed: its name and the cause, once for each kind of error, and of what it is about."""
        self.once(method, type(error), *about, message=f"{method} failed: {words_of(error)}")
        logger.debug("details", exc_info=error)


def harmless(
    answer: Callable[[Any], T],
) -> Callable[[Callable[Concatenate[Any, P], T]], Callable[Concatenate[Any, P], T]]:
    """Makes a method return instead of raise. `KeyboardInterrupt` and the like still pass.

    Args:
        answer: From the object, what the method returns when it fails: something of the usual kind, from
            memory alone, for nothing catches what fails here. The object has its `complaints`.
    """

    def decorate(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(method)
        def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001  (whatever it is, training is worth more)
                self._complaints.failed(method.__name__.lstrip("_"), error)
                return answer(self)

        return guarded

    return decorate


def words_of(error: BaseException) -> str:
    """The error in words; an error whose own words fail is named by its type."""
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (an object's `__str__` may fail in any way)
        return kind
    return text if isinstance(error, HarnessError) else f"{kind}: {text[:1000]}"

"""Which run the ranks of one program log: rank 0 finds it, the others hear of it."""

from __future__ import annotations

import collections
import json
import logging
import sys
from collections.abc import Callable

from harness.errors import TrackingError
from harness.tracking.boundary import words_of
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.places import RunPlace, find_place, place_of

__all__ = ["SharedPlace"]

logger = logging.getLogger(__name__)

WAIT_S = 60.0
_made: collections.Counter[str] = collections.Counter()
"""How many trackers of an experiment this process has made; all ranks make them in the same order."""


class SharedPlace:
    """Rank 0's run and its first step, made known to the others through the process group's store.

    No collective: a program may make its tracker on rank 0 alone. Without a process group the other ranks
    have to guess, and are right where `run_name` or `run_id` says which run it is.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._key = f"harness/tracker/{config.experiment_name}/{_made[config.experiment_name]}"
        _made[config.experiment_name] += 1

    def of_main(self, open_run: Callable[[RunPlace], int]) -> tuple[RunPlace, int]:
        """On rank 0: finds the run and opens it.

        Args:
            open_run: Opens it and returns the step that comes next.

        Raises:
            TrackingError: there is no such run, or it cannot be written; the other ranks raise it too.
        """
        try:
            place = find_place(self._config, create=True)
            step = open_run(place)
        except Exception as error:
            said = _explained(error)
            self._leave({"error": [said.problem, said.rule, said.remedy]})
            if said is error:
                raise
            raise said from error
        self._leave({"name": place.name, "step": step})
        return place, step

    def of_another(self) -> tuple[RunPlace, int]:
        """On another rank: what rank 0 has found."""
        word = self._hear()
        if word is None:
            return find_place(self._config, create=False), 0
        heard = json.loads(word)
        if "error" in heard:
            problem, rule, remedy = heard["error"]
            raise TrackingError(problem, rule=rule, remedy=remedy)
        return place_of(self._config, heard["name"]), heard["step"]

    def _leave(self, said: dict[str, object]) -> None:
        if "torch" in sys.modules:  # or there is no process group, and nothing to load it for
            from harness.dist import set_from_main

            set_from_main(self._key, json.dumps(said))

    def _hear(self) -> str | None:
        if "torch" not in sys.modules:
            return None
        from harness.dist import wait_for_main

        return wait_for_main(self._key, timeout_s=WAIT_S)


def _explained(error: Exception) -> TrackingError:
    if isinstance(error, TrackingError):
        return error
    return TrackingError(
        f"the run cannot be opened: {words_of(error)}", remedy="resume_run=False starts a new run"
    )

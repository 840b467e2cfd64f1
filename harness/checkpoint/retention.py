"""Which checkpoints stay: the last n, the best, every m-th, and always the last healthy one."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from harness.checkpoint.store import Saved, Store
from harness.errors import CheckpointError

__all__ = ["Retainer", "Retention"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept. The last healthy checkpoint is, whatever stands here."""

    keep_last: int
    """Newest checkpoints."""
    keep_best: int
    """Checkpoints with the lowest metric."""
    keep_every: int
    """Checkpoints whose step is a multiple of this are kept for ever; 0: none."""


class Retainer:
    """Applies a retention to a store, after a commit and never before. What cannot be done is reported, and
    tried again next time."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store, self._retention = store, retention
        self._metrics: dict[Saved, float | None] = {}

    def abandon(self, newest: Saved) -> None:
        """Sets aside what is newer than the checkpoint just committed, for its branch was left. To be called
        before the next commit, which is newer too."""
        try:
            self._store.abandon(after=newest.step)
        except OSError as error:
            logger.warning("checkpoints of a branch that was left could not be set aside: %s", error)

    def delete_outdated(self) -> None:
        """Deletes what need not stay; of abandoned branches that is what a healthy one has overtaken."""
        try:
            saved = self._store.saved()
            kept = self._kept(saved)
            overtaken = max((c.step for c in saved if c.healthy), default=-1)
            outdated = [c for c in saved if c not in kept]
            outdated += [c for c in self._store.abandoned() if c.step <= overtaken]
            for checkpoint in outdated:
                self._store.delete(checkpoint)
        except OSError as error:
            logger.warning("old checkpoints could not be put away: %s", error)

    def _kept(self, saved: list[Saved]) -> set[Saved]:
        rule = self._retention
        newest = list({checkpoint.step: checkpoint for checkpoint in saved}.values())  # of each step
        kept = set(newest[-rule.keep_last :])
        kept.update([checkpoint for checkpoint in saved if checkpoint.healthy][-1:])
        if rule.keep_every:
            kept.update(checkpoint for checkpoint in newest if checkpoint.step % rule.keep_every == 0)
        if rule.keep_best:
            kept.update(self._best(newest))
        return kept

    def _best(self, saved: list[Saved]) -> list[Saved]:
        for checkpoint in saved:
            if checkpoint not in self._metrics:
                self._metrics[checkpoint] = _metric(checkpoint)
        measured = [(metric, c) for c in saved if (metric := self._metrics[c]) is not None]
        return [checkpoint for _, checkpoint in sorted(measured)[: self._retention.keep_best]]


def _metric(checkpoint: Saved) -> float | None:
    try:
        return checkpoint.manifest().metric
    except CheckpointError:
        return None  # damaged: found and reported when it is loaded or verified

"""Finding a checkpoint that is intact, and loading it: every decision is rank 0's or all ranks' together."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from harness.checkpoint.manifest import Damaged, Manifest
from harness.checkpoint.reading import OnDisk
from harness.checkpoint.restore import Restore, Source
from harness.checkpoint.shards import check_file
from harness.checkpoint.store import DAMAGED, Saved, Store
from harness.dist import HostGroup
from harness.errors import CheckpointError

__all__ = ["Loader"]

logger = logging.getLogger(__name__)

_LOOK_AT_THEM = "look at those set aside as damaged-*, ask for another step, or start anew under another name"


class Loader:
    """Loads from `store`; every method is called by all ranks of `group` together."""

    def __init__(self, store: Store, group: HostGroup) -> None:
        self._store, self._group = store, group

    def load(
        self,
        state: MutableMapping[str, Any],
        *,
        step: int | None,
        healthy: bool,
        pick: Callable[[list[Saved]], list[Saved]] | None = None,
    ) -> Manifest | None:
        """Loads the newest intact checkpoint that fits; its manifest, or None if there is none.

        Raises:
            CheckpointError: none of those that are there is intact, or it is of another model.
        """
        candidates = self._group.from_main(
            lambda: pick(self._store.saved()) if pick else self._candidates(step, healthy)
        )
        damages = []
        for saved in candidates:
            try:
                return self._load(saved, state)
            except Damaged as damage:
                damages.append(f"{saved.path.name}: {damage.problem}")
                self._set_aside(saved, damage)
        if damages:
            raise CheckpointError(
                f"no intact checkpoint in {self._store.directory} ({'; '.join(damages)})",
                rule="one of those asked for has to be as it was written",
                remedy=_LOOK_AT_THEM,
            )
        if not candidates:
            self._group.from_main(self._refuse_a_silent_start)
        return None

    def _refuse_a_silent_start(self) -> None:
        """An attempt before this one may have set the last of them aside; then this is no fresh start."""
        damaged = self._store.set_aside_as_damaged()
        if damaged and not self._store.saved():
            raise CheckpointError(
                f"all checkpoints in {self._store.directory} are damaged: {', '.join(damaged)}",
                rule="a run that had checkpoints does not begin again from nothing by itself",
                remedy=_LOOK_AT_THEM,
            )

    def _candidates(self, step: int | None, healthy: bool) -> list[Saved]:
        """What may be loaded, the best first."""
        saved = list(reversed(self._store.saved()))
        wanted = [s for s in saved if step in (None, s.step) and (s.healthy or not healthy)]
        if step is not None and not wanted:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self._store.directory}",
                rule=f"there are {sorted({s.step for s in saved})}",
            )
        return wanted

    def _load(self, saved: Saved, state: MutableMapping[str, Any]) -> Manifest:
        manifest = self._group.from_main(saved.manifest)
        self._group.on_all_ranks(lambda: self._check_share(saved, manifest))
        self.restore(OnDisk(saved.path, manifest), state)
        return manifest

    def restore(self, source: Source, state: MutableMapping[str, Any]) -> None:
        """Brings `source` into `state`, each phase on all ranks before the next begins on any.

        Raises:
            CheckpointError: it does not fit; nothing live has been changed then, unless an object refused it.
        """
        restore = self._group.on_all_ranks(lambda: Restore(source, state, self._group.rank))
        self._group.on_all_ranks(restore.read)
        self._group.on_all_ranks(restore.apply)

    def _check_share(self, saved: Saved, manifest: Manifest) -> None:
        """Every file is read by one rank, whatever the world size was."""
        for name in sorted(manifest.files)[self._group.rank :: self._group.size]:
            check_file(saved.path / name, manifest.files[name])

    def _set_aside(self, saved: Saved, damage: Damaged) -> None:
        if self._group.is_main:
            kept = self._store.set_aside(saved, DAMAGED)
            logger.error(
                "the checkpoint %s is damaged: %s It is kept as %s",
                saved.path.name,
                damage,
                kept or saved.path,
            )

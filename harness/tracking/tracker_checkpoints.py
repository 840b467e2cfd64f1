"""The experiment tracker with checkpoints: where `harness.tracking` and `harness.checkpoint` meet."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoint import Checkpointer
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.store import Saved
from harness.dist import HostGroup
from harness.errors import CheckpointError
from harness.tracking.checkpoint_names import Wanted, checkpoint_name
from harness.tracking.checkpointing import SaveEnd
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.model_state import nonfinite_tensors
from harness.tracking.saved_event import saved_event
from harness.tracking.tracker import ExperimentTracker as BareTracker

__all__ = ["ExperimentTracker", "TrackerCheckpoints"]

logger = logging.getLogger(__name__)

_KEY = "training"
_NONFINITE = "num_nonfinite_tensors"
TIMEOUT_S = 1800.0


class TrackerCheckpoints:
    """State dictionaries as verified checkpoints in one folder; all are kept. All ranks make it together.

    Args:
        folder: Where they lie; rank 0's counts.
    """

    def __init__(self, folder: Path) -> None:
        self._calls = HostGroup(error=CheckpointError, timeout_s=TIMEOUT_S)
        self._folder = self._calls.from_main(lambda: folder)
        self._checkpointer = Checkpointer(self._folder, keep_all=True)

    def save(self, step: int, build: Callable[[], dict[str, Any]]) -> list[str]:
        """Copies the state that `build` gives now and writes it in the background.

        Reads every floating tensor once; synchronises with the device, as the copy does.

        Returns:
            Names of the tensors that are not finite, on any rank.
        """
        step = self._calls.from_main(lambda: step)
        state = {**self._calls.on_all_ranks(build), "step": step}
        parts = {key: value for key, value in state.items() if key.endswith("_state_dict")}
        found = self._calls.gather(lambda: nonfinite_tensors(parts))
        names = sorted({name for some in found for name in some})
        self._checkpointer.save(step, {_KEY: state}, meta={_NONFINITE: len(names)})
        return names

    def ended(self) -> list[SaveEnd]:
        """The saves that have ended since the last call, in order. Local."""
        return [SaveEnd(outcome.step, saved_event(outcome)) for outcome in self._checkpointer.outcomes()]

    def load(self, wanted: Wanted) -> dict[str, Any]:
        """The state of the checkpoint that is meant; without a name the newest that is finite, if one is.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = self._calls.from_main(lambda: self._folder_of(wanted))
        holder: dict[str, Any] = {_KEY: {}}
        pick = functools.partial(_pick, wanted=wanted, folder=folder)
        if folder == self._folder:
            self._checkpointer.load(holder, pick=pick)
        else:
            with Checkpointer(folder, keep_all=True) as other:
                other.load(holder, pick=pick)
        state: dict[str, Any] = holder[_KEY]
        return state

    def close(self) -> None:
        """Waits for the save under way."""
        self._checkpointer.close()

    def _folder_of(self, wanted: Wanted) -> Path:
        """A path may name the run's folder, or the one that holds it, as a prefix of `model_save_dir`."""
        given = wanted.folder
        if given is None or given.resolve() in (self._folder.resolve(), self._folder.resolve().parent):
            return self._folder
        return given


def _pick(saved: list[Saved], *, wanted: Wanted, folder: Path) -> list[Saved]:
    """Which checkpoints may be loaded, the best first; asked on rank 0."""
    near = [each for each in saved if wanted.step in (None, each.step)]
    manifests = {each: _manifest(each) for each in near if wanted.saved_as in (None, each.path.name)}
    found = [each for each, manifest in manifests.items() if wanted.epoch is None or _fits(wanted, manifest)]
    if not found:
        raise _missing(wanted, saved, folder)
    found.sort(key=lambda each: _created(manifests[each]), reverse=True)
    best = sorted(found, key=lambda each: not _is_finite(manifests[each]))
    if best[0] != found[0]:
        logger.warning("%s is not finite: the one before, %s, is loaded", found[0].path, best[0].path.name)
    return best


def _missing(wanted: Wanted, saved: list[Saved], folder: Path) -> CheckpointError:
    what = wanted.saved_as or "checkpoint"
    if wanted.epoch is not None and wanted.step is not None:
        what = checkpoint_name(wanted.epoch, wanted.step)
    there = [checkpoint_name(_epoch(_manifest(each)) or 0, each.step) for each in saved[-5:]]
    return CheckpointError(
        f"there is no {what} in {folder}",
        rule=f"the last ones there are {', '.join(there)}" if there else "nothing is saved there",
        remedy="a new run begins with none: ExperimentConfig(resume_run=True, run_id=...) goes on with the "
        "run that saved it; load_checkpoint takes a path, too",
    )


def _manifest(saved: Saved) -> Manifest | None:
    """None if it is damaged: whoever loads that checkpoint finds out, and reports it."""
    try:
        return saved.manifest()
    except CheckpointError:
        return None


def _fits(wanted: Wanted, manifest: Manifest | None) -> bool:
    return manifest is None or _epoch(manifest) in (None, wanted.epoch)


def _epoch(manifest: Manifest | None) -> int | None:
    state = manifest.state.get(_KEY) if manifest is not None else None
    epoch = state.get("epoch") if isinstance(state, dict) else None
    return epoch if isinstance(epoch, int) else None


def _created(manifest: Manifest | None) -> float:
    return 0.0 if manifest is None else manifest.created


def _is_finite(manifest: Manifest | None) -> bool:
    return manifest is None or not manifest.meta.get(_NONFINITE)


class ExperimentTracker(BareTracker):
    """`harness.tracking.tracker.ExperimentTracker` whose checkpoints go through `harness.checkpoint`.

    Args:
        config: What the experiment is called and what is logged.
        rank: This process's rank; default: what the launcher says. Only rank 0 logs.
    """

    def __init__(self, config: ExperimentConfig | None = None, *, rank: int | None = None) -> None:
        super().__init__(config, rank=rank, checkpoints=TrackerCheckpoints)

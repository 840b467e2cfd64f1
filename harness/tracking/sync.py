"""Completes or rebuilds a run's mirrors from its log: `harness sync`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.runlog.reader import open_run
from harness.tracking.mirrors import complete_mirrors
from harness.tracking.registry import only
from harness.tracking.settings import MirrorSettings

__all__ = ["sync_run"]

TIMEOUT_S = 600.0


def sync_run(
    run_dir: str | Path,
    settings: MirrorSettings | None = None,
    *,
    rebuild: bool = False,
    timeout_s: float = TIMEOUT_S,
    mirrors: Sequence[str] = (),
    **changes: Any,
) -> list[str]:
    """Brings the mirrors that the settings name up to the log's end. Idempotent.

    Args:
        run_dir: The run; while its trainer lives, its own side process keeps the mirrors.
        settings: Which mirrors; default: those that the run had.
        rebuild: Begins again from the log's first record. W&B rows of a run that was offline are sent to
            the same run under the same numbers, so that none is there twice.
        timeout_s: How long a mirror may take, or be in another process's hands.
        mirrors: Only these, by name, whether the run had them or not; default: what the settings name.
        **changes: Fields of `MirrorSettings`, such as `wandb="online"`.

    Returns:
        The names of the mirrors that are complete now.

    Raises:
        TrackingError: there is no run, or a mirror could not be completed.
    """
    run = open_run(run_dir)
    if run.state() == "running":
        raise TrackingError(
            f"{run_dir} is still running", rule="a running trainer's side process keeps the mirrors"
        )
    settings = dataclasses.replace(settings or MirrorSettings.kept(Path(run_dir)), **changes)
    if mirrors:
        settings = only(settings, mirrors)
    outcome = complete_mirrors(Path(run_dir).resolve(), settings, rebuild=rebuild, timeout_s=timeout_s)
    for name, trouble in outcome.items():
        if trouble is not None:
            raise TrackingError(
                f"{name} of {run_dir} is not complete",
                rule=trouble,
                remedy="mend that and sync again; nothing is lost",
            )
    return list(outcome)

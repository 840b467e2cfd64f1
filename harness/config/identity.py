"""Which settings make a run the run that it is, and which may change when it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config.keys import flatten
from harness.config.load import read_yaml, to_dict
from harness.config.train import TrainConfig
from harness.errors import ConfigError

__all__ = ["check_same_run"]

# Changing one of these would make the rest of the run another experiment under the same name.
_IDENTITY = (
    "seed",
    "task",
    "task_args",
    "data.paths",
    "data.sequence_length",
    "data.val_frac",
    "loop.global_batch",
)
_IDENTITY_SECTIONS = ("model.", "optim.", "muon.", "schedule.")
_MAY_CHANGE = ("schedule.steps", "optim.fused")


def check_same_run(config: TrainConfig, saved: Path, *, within: Path | None = None) -> None:
    """Checks that `config` continues the run whose resolved configuration is the file `saved`.

    Length, micro-batch, parallelism, guard, checkpoints and tracking may change between attempts, and so may
    the length of the learning-rate schedule and, with `data.allow_change`, the paths of the data. No link to
    `saved` is followed below `within`; see `harness.files.open_file`.

    Raises:
        ConfigError: a setting that defines the run differs; the first such setting is named.
    """
    before, now = _identity(flatten(read_yaml(saved, within=within))), _identity(flatten(to_dict(config)))
    for key in now:
        if key == "data.paths" and config.data.allow_change:
            continue
        if key in before and before[key] != now[key]:
            raise ConfigError(
                f"{saved.parent} holds a run with {key} = {before[key]!r}, and now it is {now[key]!r}",
                rule="a run goes on only with the settings that it began with",
                remedy=f"choose another --name, or set --{key} {before[key]}",
            )


def _identity(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if (key in _IDENTITY or key.startswith(_IDENTITY_SECTIONS)) and key not in _MAY_CHANGE
    }

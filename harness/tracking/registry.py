"""Which mirrors there are: those of Harness by name, your own as `package.module:Class`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from harness import env
from harness.errors import TrackingError
from harness.tracking.mirror import Mirror
from harness.tracking.settings import MirrorSettings

__all__ = ["MIRRORS", "load", "mirrors_of", "only"]


class _Kind(NamedTuple):
    """A mirror of Harness; it is switched on by the setting `tracking.NAME`."""

    home: str
    """Module and class; imported in the side process only, with the library that it needs."""
    on: bool | str = True
    """Value of the setting with which `harness sync --mirror NAME` switches it on."""
    off: bool | str = False
    is_live: bool = False
    """It shows a run while that goes on; there is nothing to complete later."""


MIRRORS = {
    "tensorboard": _Kind("harness.tracking.tensorboard:TensorBoardMirror"),
    "wandb": _Kind("harness.tracking.wandb:WandbMirror", on="offline", off="off"),
    "trackio": _Kind("harness.tracking.trackio:TrackioMirror"),
    "prometheus": _Kind("harness.tracking.prometheus:PrometheusMirror", is_live=True),
}


_TRAIN_JOB = "harness.tracking.kubeflow:TrainJobMirror"


def mirrors_of(settings: MirrorSettings, *, live: bool = True) -> list[str]:
    """The names of the mirrors that the settings ask for, and of a TrainJob's status where there is one.

    Args:
        live: With those that show a run only while it goes on.
    """
    asked = [name for name, kind in MIRRORS.items() if _is_on(settings, name) and (live or not kind.is_live)]
    asked += settings.mirrors
    return asked + ([_TRAIN_JOB] if env.train_job_endpoint() is not None else [])


def only(settings: MirrorSettings, names: Iterable[str]) -> MirrorSettings:
    """Settings that ask for these mirrors and no others.

    Raises:
        TrackingError: there is no mirror of such a name.
        ConfigError: a name with a colon is no `package.module:Class`.
    """
    names = list(names)
    for name in names:
        kept = [one for one, kind in MIRRORS.items() if not kind.is_live]
        if name not in kept and ":" not in name:
            raise TrackingError(
                f"there is no mirror {name!r}",
                rule=f"it is one of {', '.join(kept)}, or package.module:Class",
            )
    wanted: dict[str, Any] = {name: kind.off for name, kind in MIRRORS.items()}
    for name in MIRRORS.keys() & names:
        wanted[name] = getattr(settings, name) if _is_on(settings, name) else MIRRORS[name].on
    own = tuple(name for name in names if ":" in name)
    return dataclasses.replace(settings, mirrors=own, **wanted)


def load(name: str) -> type[Mirror]:
    """The class of a mirror.

    Raises:
        ImportError: its module, or a library that it needs, is not there.
        TrackingError: what is there is no mirror.
    """
    home = MIRRORS[name].home if name in MIRRORS else name
    module, _, attribute = home.partition(":")
    kind = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Mirror)):
        raise TrackingError(
            f"{home} is {kind!r}", rule="a mirror is a class made from harness.tracking.mirror.Mirror"
        )
    return kind


def _is_on(settings: MirrorSettings, name: str) -> bool:
    return bool(getattr(settings, name) != MIRRORS[name].off)

"""Complete configurations that come with the package, each by its name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from harness.errors import ConfigError

__all__ = ["configuration_file", "own_configurations", "preset_file", "preset_names"]

_FOLDER = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """In alphabetical order. A file in the folder is a preset."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The file of a preset; it need not exist."""
    return _FOLDER / f"{name}.yaml"


def _is_presets_folder(folder: Path) -> bool:
    """Whether it is, perhaps by a link, the presets' folder of this or another copy of the package."""
    return folder.resolve().parts[-2:] == _FOLDER.parts[-2:]


def own_configurations(folder: str | Path = "configs") -> Path:
    """Where the user's own configurations are kept: `folder`, or `my-configs` beside it where that holds the
    package's presets, as `configs` does in a checkout of the repository."""
    folder = Path(folder)
    return folder.with_name(f"my-{folder.name}") if _is_presets_folder(folder) else folder


def configuration_file(given: str) -> Path:
    """What `--config` means: a path, or the name of a preset, which has no suffix. A file of the working
    directory comes first.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(given)
    if os.path.isfile(given):
        return path
    if given in preset_names():
        return preset_file(given)
    if os.path.exists(given):
        return path  # a folder or a device, about which its reader has something to say
    near = difflib.get_close_matches(path.stem, preset_names(), n=1)
    raise ConfigError(
        f"there is no configuration {given!r}",
        rule=f"--config names a YAML file, or one of the presets {', '.join(preset_names())}",
        remedy=f"did you mean {near[0]}?" if near else "",
    )

"""A run's configuration from the command line and from files, and back to plain data and YAML.

Parser and YAML are imported when they are used: a guard in somebody's loop needs its settings, and neither
jsonargparse nor PyYAML.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config.train import TrainConfig

__all__ = ["dump_yaml", "parse_arguments", "read_yaml", "to_dict"]

_DESCRIPTION = (
    "Trains a model and watches its numbers. Without arguments: a small decoder on the "
    "source of the Python standard library."
)


def parse_arguments(argv: Sequence[str], *, prog: str = "harness train") -> TrainConfig:
    """Reads `[--config FILE] [--section.key value]...`; later values win. FILE may be a preset's name.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type or an impossible value.
        SystemExit: after `--help` or `--print_config`.
    """
    from harness.config import parser

    return parser.parse(TrainConfig, argv, prog=prog, description=_DESCRIPTION)


def read_yaml(path: Path, *, within: Path | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, its keys checked; missing keys stay missing.

    Args:
        path: A regular file.
        within: See `harness.files.open_file`.

    Raises:
        ConfigError: no such file, not plain YAML, not a mapping, or an unknown key.
    """
    from harness.config import parser

    return parser.read_mapping(TrainConfig, path, within=within)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain data, tuples as lists: what YAML and JSON would give back."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def dump_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML that `--config` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

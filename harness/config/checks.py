"""The checks that sections share. A failure names the key as it is written on the command line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from harness.errors import ConfigError

__all__ = ["require", "require_not_negative", "require_positive"]


def require(condition: bool, key: str, value: Any, rule: str, remedy: str = "") -> None:
    """Raises `ConfigError` naming `key` and `value` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}", rule=rule, remedy=remedy)


def require_positive(section: str, config: object, names: Collection[str]) -> None:
    """Each of the fields `names` of `config` has to be greater than zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", value, "it has to be greater than 0")


def require_not_negative(section: str, config: object, names: Collection[str]) -> None:
    """Each of the fields `names` of `config` has to be zero or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name}", value, "it has to be 0 or more")

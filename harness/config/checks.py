"""The checks that sections share. A failure names the key as it is written on the command line."""

from __future__ import annotations

from typing import Any, Protocol

from harness.errors import ConfigError

__all__ = ["require", "require_not_negative", "require_positive"]


class _Section(Protocol):
    """Something with settings."""

    @property
    def SECTION(self) -> str:
        """What stands before the names of its settings in their keys: `guard`; empty for none."""


def require(config: _Section, field: str, holds: bool, rule: str, remedy: str = "", **given: Any) -> None:
    """Raises `ConfigError` that names a field of a section, and its value, unless the rule holds.

    Args:
        **given: `value`, where it is a part of the field's that breaks the rule.
    """
    if not holds:
        key = f"{config.SECTION}.{field}".lstrip(".")
        value = given.get("value", getattr(config, field))
        raise ConfigError(f"{key} is {value!r}", rule=rule, remedy=remedy)


def require_positive(config: _Section, *fields: str) -> None:
    """Each of the fields has to be greater than zero."""
    for field in fields:
        require(config, field, getattr(config, field) > 0, "it has to be greater than 0")


def require_not_negative(config: _Section, *fields: str) -> None:
    """Each of the fields has to be zero or more."""
    for field in fields:
        require(config, field, getattr(config, field) >= 0, "it has to be 0 or more")

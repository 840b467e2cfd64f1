"""The dotted keys of a configuration, read off the fields of its dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from typing import Any

from harness.errors import ConfigError

__all__ = ["FREE", "check_key", "flatten", "is_free", "key_types", "nearest_key", "switches"]

FREE = ("task_args",)
"""Settings of `TrainConfig` that are mappings: their keys are a user's own."""


@functools.cache
def key_types(schema: type) -> Mapping[str, Any]:
    """Each key with its type, in the order of the fields; sections are keys too, before those within them."""
    hints = typing.get_type_hints(schema)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        hint = keys[field.name] = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = key_types(typing.cast(type, hint))
            keys.update({f"{field.name}.{key}": kind for key, kind in inner.items()})
    return keys


def switches(schema: type) -> list[str]:
    """The keys that are booleans."""
    return [key for key, kind in key_types(schema).items() if kind is bool]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` to `{"optim.lr": 1}`; lists, and what `FREE` names, stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and prefix + key not in FREE:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_key(schema: type, key: str, *, where: str = "") -> None:
    """Checks that there is such a key.

    Args:
        schema: The configuration's class.
        key: As it was written.
        where: What the error says after the key, such as the file that it stands in.

    Raises:
        ConfigError: there is none; the nearest that exist are named.
    """
    if key in key_types(schema) or is_free(schema, key):
        return
    positive = key.replace("no_", "", 1).replace("no-", "", 1)
    if positive != key and positive in switches(schema):
        raise ConfigError(
            f"unknown key {key!r}{where}",
            rule="a boolean has one name",
            remedy=f"write --{positive} false",
        )
    nearest = nearest_key(schema, key)
    raise ConfigError(
        f"unknown key {key!r}{where}",
        rule="only keys of the schema are read",
        remedy=f"did you mean {' or '.join(nearest)}?" if nearest else "`harness train --help` lists them",
    )


def is_free(schema: type, key: str) -> bool:
    """Whether it lies in a setting that takes a mapping of any keys: `task_args.noise`."""
    parts = key.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts)))
    kinds = (key_types(schema).get(name) for name in above)
    return any(kind is Any or typing.get_origin(kind) is dict for kind in kinds)


def nearest_key(schema: type, key: str) -> list[str]:
    """Keys that are spelled nearly so, else those of the same name in whichever section."""
    known = list(key_types(schema))
    return difflib.get_close_matches(key, known, n=3, cutoff=0.5) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]

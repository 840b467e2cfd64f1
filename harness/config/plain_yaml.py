"""Reads YAML that anybody may have written, at a bounded cost: plain data or one error.

PyYAML's safe loader runs nothing, but gives whoever walks its result unbounded work: aliases that stand for
ever more of one another, cycles, depth, numbers of a million digits. Here the parser's events are counted
first, aliases for as much as they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError
from harness.files import read_file

__all__ = ["MAX_BYTES", "check_bounded", "plain_yaml", "plain_yaml_file"]

MAX_BYTES = 256 << 10
"""A run's configuration has some 5 kB."""
MAX_NODES = 20_000
"""Scalars, lists and mappings, aliases written out."""
MAX_DEPTH = 32
LONGEST_NUMBER = 200
"""Characters; however they are read, a float can hold it."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
)
_NUMBER_BEGINS = re.compile(r"[-+.0-9]")


def plain_yaml_file(path: Path, *, within: Path | None = None) -> Any:
    """What `plain_yaml` makes of a file.

    Args:
        path: A regular file.
        within: See `harness.files.open_file`.

    Raises:
        ConfigError: as for `plain_yaml`; or the file is too long.
        OSError: it cannot be read.
    """
    content = read_file(path, most_bytes=MAX_BYTES, within=within)
    return plain_yaml(content, name=str(path))


def plain_yaml(content: bytes | str, *, name: str) -> Any:
    """None, booleans, numbers, text, dates, and lists and mappings of them.

    Args:
        content: UTF-8, or UTF-16 with a byte order mark.
        name: What errors call it.

    Raises:
        ConfigError: it is not YAML, has a tag, a cycle, too many nodes or too many levels.
    """
    try:
        _check(yaml.parse(content, Loader=_Loader))
        return yaml.load(content, Loader=_Loader)
    except _TooMuch as error:
        raise ConfigError(
            f"{name} is refused: {error}", rule="it holds plain data of bounded size"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        # Beside YAMLError: dates and numbers that look like some and are none.
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from error


def check_bounded(text: str, *, name: str) -> None:
    """For text that somebody else is going to read as YAML: refuses what would be unbounded work.

    What is no YAML at all is left to them.

    Raises:
        ConfigError: it is too much.
    """
    try:
        if len(text) > MAX_BYTES:
            raise _TooMuch(f"longer than {MAX_BYTES} characters")
        _check(yaml.parse(text, Loader=_Loader))
    except _TooMuch as error:
        raise ConfigError(f"{name} is too much for a setting: {error}") from error
    except (yaml.YAMLError, ValueError):
        return


class _TooMuch(ValueError):
    """More than plain data of bounded size."""


def _check(events: Iterable[Any]) -> None:
    """Raises ValueError where the document is more than plain data of bounded size."""
    sizes: dict[str, int | None] = {}
    """Nodes that an anchor stands for; None while they are still being counted."""
    begun: list[tuple[str | None, int]] = []
    num_nodes = 0
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                sizes[anchor] = num_nodes - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        num_nodes += _size(event, sizes)
        if num_nodes > MAX_NODES:
            raise _TooMuch(f"more than {MAX_NODES} values, aliases written out")
        if isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, num_nodes - 1))
            if event.anchor is not None:
                sizes[event.anchor] = None
            if len(begun) > MAX_DEPTH:
                raise _TooMuch(f"more than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            sizes[event.anchor] = 1


def _size(event: Any, sizes: dict[str, int | None]) -> int:
    """How many nodes an event stands for."""
    if isinstance(event, yaml.AliasEvent):
        size = sizes.get(event.anchor or "", 1)  # an unknown one is the loader's error
        if size is None:
            raise _TooMuch(f"{event.anchor!r} stands for itself")
        return size
    if event.tag is not None and event.tag not in _TAGS:
        raise ValueError(f"the tag {event.tag!r} is none of plain data")
    if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_NUMBER:
        may_be_number = event.implicit[0] or event.tag is not None
        if may_be_number and _NUMBER_BEGINS.match(event.value):
            raise _TooMuch(f"a number of {len(event.value)} digits")
    return 1

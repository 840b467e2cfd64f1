"""From a YAML file and dotted overrides to a checked `TrainConfig`, and back.

jsonargparse parses and checks the types; the names of keys are checked before it sees them, so that an
unknown one is answered with the nearest that exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from harness.config.plain_yaml import plain_yaml_file
from harness.config.schema import TrainConfig
from harness.errors import ConfigError

__all__ = ["config_keys", "dump_yaml", "flatten", "parse_arguments", "read_yaml", "to_dict"]

# Switches of the parser itself, beside the keys of the schema.
_SWITCHES = ("config", "print_config", "help", "h")


def parse_arguments(argv: Sequence[str], *, prog: str = "harness train") -> TrainConfig:
    """Reads `[--config FILE] [--section.key value]...`; later values win.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type or an impossible value.
        SystemExit: after `--help` or `--print_config`.
    """
    _check_argument_names(argv)
    parser = _parser(prog)
    try:
        namespace = parser.parse_args(list(_spell_out_switches(argv)))
        settings = parser.instantiate(namespace).as_dict()
    except argparse.ArgumentError as error:
        raise _readable(error) from error
    settings.pop("config")
    settings.pop("print_config", None)
    return TrainConfig(**settings)


def read_yaml(path: Path, *, within: Path | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, its keys checked against the schema; missing keys stay missing.

    Args:
        path: A regular file.
        within: See `harness.files.open_file`.

    Raises:
        ConfigError: no such file, not plain YAML, not a mapping, or an unknown key.
    """
    try:
        content = plain_yaml_file(path, within=within)
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}",
            rule="--config names a YAML file",
            remedy="complete ones are in configs/",
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}", rule="a configuration is a mapping of keys"
        )
    for key in flatten(content):
        _check_key(key, where=f" in {path}")
    return content


def config_keys(schema: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, sections included."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` to `{"optim.lr": 1}`; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain data, tuples as lists: what YAML and JSON would give back."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def dump_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML that `--config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _parser(prog: str) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Trains a model and watches its numbers. Without arguments: a small decoder on the "
        "source of the Python standard library.",
    )
    parser.add_argument("--config", action="config", help="A YAML file; configs/ holds complete ones.")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def _check_argument_names(argv: Sequence[str]) -> None:
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        if name == "--config":
            read_yaml(Path(value or (argv[position + 1] if position + 1 < len(argv) else "")))
        elif name.removeprefix("--").split("+")[0] not in _SWITCHES and not name.endswith(".help"):
            _check_key(name.removeprefix("--").rstrip("+"), where="")


def _check_key(key: str, *, where: str) -> None:
    known = list(config_keys())
    if key in known:
        return
    positive = key.replace("no_", "", 1).replace("no-", "", 1)
    if positive != key and positive in _switch_keys():
        raise ConfigError(
            f"unknown key {key!r}{where}",
            rule="a boolean has one name",
            remedy=f"write --{positive} false",
        )
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    raise ConfigError(
        f"unknown key {key!r}{where}",
        rule="only keys of the schema are read",
        remedy=f"did you mean {' or '.join(nearest)}?" if nearest else "`harness train --help` lists them",
    )


def _spell_out_switches(argv: Sequence[str]) -> Iterator[str]:
    """The name of a boolean alone, as in `--debug`, means `--debug true`."""
    switches = {f"--{key}" for key in _switch_keys()}
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        yield argument
        if following.startswith("-") and argument in switches:
            yield "true"


def _switch_keys() -> list[str]:
    """The keys of the schema that are booleans."""
    return [key for key in config_keys() if _type_of(key) is bool]


def _type_of(key: str) -> Any:
    found: Any = TrainConfig
    for name in key.split("."):
        found = typing.get_type_hints(found)[name]
    return found


def _readable(error: argparse.ArgumentError) -> ConfigError:
    """jsonargparse's message on one line, with types as a person would write them."""
    text = " ".join(str(error.message).split()).replace("Parser key ", "")
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"a typing\.Literal\[([^]]*)\]", r"one of \1", text)
    return ConfigError(text, remedy="`harness train --help` gives each key's type")

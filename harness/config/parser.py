"""From a YAML file and dotted overrides to a configuration of any dataclass.

jsonargparse parses and checks the types; the names of keys are checked before it sees them, so that an
unknown one is answered with the nearest that exists.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from harness.config.keys import check_key, flatten, switches
from harness.config.plain_yaml import plain_yaml_file
from harness.config.presets import configuration_file, preset_names
from harness.errors import ConfigError

__all__ = ["argument_parser", "parse", "read_mapping"]

Settings = TypeVar("Settings")

# Arguments of the parser itself, beside the keys of the schema.
_OWN_ARGUMENTS = ("config", "print_config", "help", "h")


def parse(
    schema: type[Settings], argv: Sequence[str], *, prog: str = "harness train", description: str = ""
) -> Settings:
    """Reads `[--config FILE] [--section.key value]...`; later values win. FILE may be a preset's name.

    Args:
        schema: The configuration's class: a dataclass of settings and of sections, which are dataclasses.
        argv: The arguments.
        prog: The program's name in `--help`.
        description: What `--help` says of it.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type or an impossible value.
        SystemExit: after `--help` or `--print_config`.
    """
    argv = list(_with_files(argv))
    _check_argument_names(schema, argv)
    parser = argument_parser(schema, prog=prog, description=description)
    try:
        namespace = parser.parse_args(list(_spell_out_switches(schema, argv)))
        settings = parser.instantiate(namespace).as_dict()
    except argparse.ArgumentError as error:
        raise _readable(error) from error
    settings.pop("config")
    settings.pop("print_config", None)
    return schema(**settings)


def argument_parser(schema: type, *, prog: str, description: str) -> jsonargparse.ArgumentParser:
    """Knows an argument for each key; its help is the text under the field."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, description=description)
    parser.add_argument(
        "--config", action="config", help=f"A YAML file, or a preset: {', '.join(preset_names())}."
    )
    parser.add_class_arguments(schema, None)
    return parser


def read_mapping(schema: type, path: Path, *, within: Path | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, its keys checked against the schema; missing keys stay missing.

    Args:
        schema: The configuration's class.
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
            rule="--config names a YAML file, or a preset",
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}", rule="a configuration is a mapping of keys"
        )
    for key in flatten(content):
        check_key(schema, key, where=f" in {path}")
    return content


def _with_files(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with files in place of what `--config` names."""
    previous = ""
    for argument in argv:
        name, is_given, value = argument.partition("=")
        if name == "--config" and is_given:
            yield f"--config={configuration_file(value)}"
        elif previous == "--config":
            yield str(configuration_file(argument))
        else:
            yield argument
        previous = argument


def _check_argument_names(schema: type, argv: Sequence[str]) -> None:
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        if name == "--config":
            read_mapping(schema, Path(value or (argv[position + 1] if position + 1 < len(argv) else "")))
        elif name.removeprefix("--").split("+")[0] not in _OWN_ARGUMENTS and not name.endswith(".help"):
            check_key(schema, name.removeprefix("--").rstrip("+"))


def _spell_out_switches(schema: type, argv: Sequence[str]) -> Iterator[str]:
    """The name of a boolean alone, as in `--debug`, means `--debug true`."""
    names = {f"--{key}" for key in switches(schema)}
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        yield argument
        if following.startswith("-") and argument in names:
            yield "true"


def _readable(error: argparse.ArgumentError) -> ConfigError:
    """jsonargparse's message on one line, with types as a person would write them."""
    text = " ".join(str(error.message).split()).replace("Parser key ", "")
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"a typing\.Literal\[([^]]*)\]", r"one of \1", text)
    return ConfigError(text, remedy="`harness train --help` gives each key's type")

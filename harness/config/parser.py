"""From a YAML file and dotted overrides to a configuration of any dataclass.

jsonargparse parses and checks the types; the names of keys are checked before it sees them, so that an
unknown one is answered with the nearest that exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from harness.config.keys import check_key, flatten, is_free, switches
from harness.config.plain_yaml import plain_yaml_file
from harness.config.presets import configuration_file, preset_names
from harness.errors import ConfigError

__all__ = ["argument_parser", "parse", "parse_values", "read_mapping"]

Settings = TypeVar("Settings")

# Arguments of the parser itself, beside the keys of the schema.
_OWN_ARGUMENTS = ("config", "print_config", "help", "h")


def parse(
    schema: type[Settings], argv: Sequence[str], *, prog: str = "harness train", description: str = ""
) -> Settings:
    """Reads `[--config FILE] [--section.key value]...`; later values win. FILE may be a preset's name.
    A key within a free mapping, as in `--task_args.noise 0.1`, changes that one value of all that is given.

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
    argv, within_free = _without_free(schema, list(_spell_out_switches(schema, argv)))
    try:
        namespace = parser.parse_args(argv)
        settings = parser.instantiate(namespace).as_dict()
    except argparse.ArgumentError as error:
        raise _readable(error) from error
    settings.pop("config")
    settings.pop("print_config", None)
    for key, text in within_free:
        _put(settings, key, _value(text))
    return schema(**settings)


def parse_values(schema: type, values: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """The values by name, each of the type of its field; classes are made from mappings.

    Args:
        schema: A dataclass. A mapping within `values` makes one where the field's type is one.
        values: Plain data; what is missing has its default.
        key: The setting that they are, for errors.

    Raises:
        ConfigError: a name that is no field's, one that is missing, or a value of another type.
    """
    for name in flatten(values):
        check_key(schema, name, where=f" in {key}")
    parser = argument_parser(schema, prog=key, description="")
    try:
        made = parser.instantiate(parser.parse_object(dict(values))).as_dict()
    except argparse.ArgumentError as error:
        raise _readable(error, prefix=f"{key}.") from error
    return {field.name: made[field.name] for field in dataclasses.fields(schema)}


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


def _without_free(schema: type, argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments without those of keys within free mappings; these as pairs of key and text."""
    rest: list[str] = []
    found: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        name, is_given, value = argument.partition("=")
        key = name.removeprefix("--")
        if name.startswith("--") and is_free(schema, key):
            found.append((key, value if is_given else next(arguments, "null")))
        else:
            rest.append(argument)
    return rest, found


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Sets `settings["a"]["b"]` for the key `a.b`; what is no mapping on the way becomes one."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = settings.get(parent)
        settings[parent] = dict(inner) if isinstance(inner, Mapping) else {}
        settings = settings[parent]
    settings[last] = value


def _value(text: str) -> Any:
    """What a text on the command line stands for where any type will do."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Any)
    return parser.parse_args([f"--value={text}"]).value


def _readable(error: argparse.ArgumentError, *, prefix: str = "") -> ConfigError:
    """jsonargparse's message on one line, with types as a person would write them."""
    text = " ".join(str(error.message).split())
    text = re.sub(r'Parser key "([^"]*)"', rf'"{prefix}\1"', text)
    text = text.replace("are required: ", f"are required: {prefix}")
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"a typing\.Literal\[([^]]*)\]", r"one of \1", text)
    remedy = "" if prefix else "`harness train --help` gives each key's type"
    return ConfigError(text, remedy=remedy)

"""The configuration as a form: what can be set, in which sections, with which help; and the way back.

All of it comes from the schema, so that a new key appears by itself. What is filled in is parsed like
arguments of the command line, with the same error messages.

Configurations are saved as `NAME.yaml` in a folder of the working directory, `configs_folder`; the presets of
the package are there to start from too, unless a file of that name is.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import yaml

from harness.atomic import write_atomically
from harness.config import TrainConfig, flatten, parse_arguments, to_dict
from harness.config.plain_yaml import check_bounded
from harness.config.presets import own_configurations, preset_file, preset_names
from harness.errors import ConfigError

__all__ = [
    "DEFAULTS",
    "Field",
    "Kind",
    "Section",
    "arguments",
    "configs_folder",
    "preset",
    "presets",
    "read",
    "save",
    "sections",
    "values_of",
    "yaml_of",
]

DEFAULTS = "defaults"
"""The preset that is no file: the schema's own values."""

Kind = Literal["bool", "choice", "integer", "number", "text", "list"]
_KINDS: dict[Any, Kind] = {bool: "bool", int: "integer", float: "number", str: "text"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One key of the schema as something to fill in."""

    key: str
    """As on the command line: `optim.lr`."""
    kind: Kind
    """bool: True or False; choice: one of `choices`; list: YAML text, also of a mapping; empty for none."""
    optional: bool = False
    """It may be left empty, which is null: None or blank text."""
    choices: tuple[str, ...] = ()
    default: Any
    """As `values_of` gives it."""
    help: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Fields that belong together."""

    name: str
    """Of the keys: `optim`; empty for the run's own."""
    title: str
    fields: tuple[Field, ...]


@functools.cache
def sections() -> tuple[Section, ...]:
    """The whole schema: the run's own settings first, then each section in its order."""
    hints, helps = typing.get_type_hints(TrainConfig), _helps(TrainConfig)
    nested = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    own = _section("", "Run", TrainConfig, leave_out=nested)
    return own, *(_section(name, helps[name].rstrip("."), hints[name]) for name in nested)


def values_of(config: TrainConfig) -> dict[str, Any]:
    """What the form shows for `config`: a value for every key."""
    return dict(_form_values(config))


def read(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that has been filled in; keys that are missing have their defaults.

    Numbers may be numbers or text, and lists may be lists or YAML text.

    Raises:
        ConfigError: as on the command line.
    """
    texts = {key: _argument(_field(key), value) for key, value in values.items()}
    defaults = {key: _argument(_field(key), _field(key).default) for key in values}
    # Defaults need not be parsed, which would take as long as all the rest.
    changed = {key: text for key, text in texts.items() if text != defaults[key]}
    for key, text in changed.items():
        check_bounded(text, name=key)
    return parse_arguments([f"--{key}={text}" for key, text in changed.items()])


def arguments(config: TrainConfig) -> list[str]:
    """The arguments of `harness train` for `config`: `--key=value` for all that is not the default."""
    changed = flatten(_changes(config))
    return [f"--{key}={_argument(_field(key), value)}" for key, value in changed.items()]


def yaml_of(config: TrainConfig, *, only_changes: bool = False) -> str:
    """As YAML for `--config`: all of it, or what differs from the schema's defaults."""
    return _dump(_changes(config) if only_changes else to_dict(config), flow=False)


def configs_folder() -> Path:
    """Where the working directory keeps the user's own configurations."""
    return own_configurations()


def presets(folder: Path | None = None) -> list[str]:
    """The names of the configurations to start from: the defaults first, then those of the folder, which is
    `configs_folder` if none is given, and the package's."""
    files = (folder or configs_folder()).glob("*.yaml")
    names = {path.stem for path in files if not path.name.startswith(".")}
    names.update(preset_names())
    return [DEFAULTS, *sorted(names - {DEFAULTS})]


def preset(name: str, folder: Path | None = None) -> TrainConfig:
    """The configuration called `name`.

    Raises:
        ConfigError: there is none, or its file is wrong.
    """
    if name == DEFAULTS:
        return TrainConfig()
    path = _path(name, folder or configs_folder())
    return TrainConfig.from_file(preset_file(name) if name in preset_names() and not path.exists() else path)


def save(config: TrainConfig, name: str, *, overwrite: bool = False, folder: Path | None = None) -> Path:
    """Writes what `config` changes to `name`.yaml in the folder, which is made if need be. Atomic.

    Raises:
        ConfigError: no name for a file, a name that is taken, or a folder that cannot be written.
    """
    path = _path(name, folder or configs_folder())
    if name == DEFAULTS:
        raise ConfigError(
            f"the name is {name!r}",
            rule="that name stands for the default values",
            remedy="choose another name",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml_of(config, only_changes=True), overwrite=overwrite, sync=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} already exists",
            rule="a configuration is overwritten only if that is asked for",
            remedy="choose another name, or tick `overwrite`",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}",
            rule="configurations are saved in that folder",
            remedy=f"start the dashboard where the folder `{path.parent}` can be written",
        ) from error
    return path


def _section(name: str, title: str, schema: type, *, leave_out: typing.Collection[str] = ()) -> Section:
    helps, defaults = _helps(schema), dict(_form_values(schema()))
    prefix = f"{name}." if name else ""
    hints = {key: hint for key, hint in typing.get_type_hints(schema).items() if key not in leave_out}
    fields = [
        Field(**_kind(hint), key=prefix + key, default=defaults[key], help=helps.get(key, ""))
        for key, hint in hints.items()
    ]
    return Section(name=name, title=title, fields=tuple(fields))


def _kind(hint: Any) -> dict[str, Any]:
    """What a `Field` says of its type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        return {**_kind(inner), "optional": True}
    if typing.get_origin(hint) is Literal:
        return {"kind": "choice", "choices": typing.get_args(hint)}
    return {"kind": "list" if typing.get_origin(hint) in (tuple, dict) else _KINDS[hint]}


def _helps(schema: type) -> dict[str, str]:
    """The text under each field of a class."""
    texts = docstring_parser.parse_from_object(schema).params
    return {text.arg_name: " ".join((text.description or "").split()) for text in texts}


def _form_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _form_values(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple | dict):
            yield prefix + field.name, _dump(_changes(value), flow=None).strip() if value else ""
        elif value is None and _kind(typing.get_type_hints(type(config))[field.name])["kind"] == "text":
            yield prefix + field.name, ""
        else:
            yield prefix + field.name, value


def _changes(value: Any) -> Any:
    """Plain data without what a class would set by itself."""
    if isinstance(value, tuple):
        return [_changes(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    values = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {field.name: _changes(mine) for field, mine in values.items() if mine != _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _fields() -> dict[str, Field]:
    return {field.key: field for section in sections() for field in section.fields}


def _field(key: str) -> Field:
    """Nothing but a field's key ever becomes an argument's name."""
    if key not in _fields():
        raise ConfigError(
            f"unknown key {key!r}",
            rule="only keys of the schema are read",
            remedy="`harness train --help` lists them",
        )
    return _fields()[key]


def _argument(field: Field, value: Any) -> str:
    """The value as it is written on the command line."""
    if isinstance(value, str) and (field.optional or field.kind != "text"):
        value = value.strip()
    if value is None or value == "":
        return "null" if field.optional else "[]" if field.kind == "list" else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return _dump(value, flow=True).strip()
    if isinstance(value, list | tuple):
        return _dump(list(value), flow=True).strip()
    if field.kind == "integer" and isinstance(value, float) and value.is_integer():
        return str(int(value))  # a box for numbers gives 400.0
    return str(value)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the configuration's reader would take for a number, such as the name 1e-3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


def _dump(data: Any, *, flow: bool | None) -> str:
    """YAML: a line for each item, all on one line, or (None) a line for what holds no other collection."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=1 << 20
    )


def _path(name: str, folder: Path) -> Path:
    stem = name.removesuffix(".yaml")
    if not stem or stem.startswith(".") or set(stem) & set("/\\") or not stem.isprintable():
        raise ConfigError(
            f"the configuration's name is {name!r}",
            rule="it is a file name, without slashes, control characters or a leading dot",
            remedy="choose another name",
        )
    return folder / f"{stem}.yaml"

"""`task_args`: what a task's function takes besides the configuration, checked against its parameters."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from harness.config.keys import check_key
from harness.errors import ConfigError

__all__ = ["checked_arguments"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def checked_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], *, key: str = "task_args"
) -> dict[str, Any]:
    """The arguments by which `function(config, **arguments)` is called.

    Its parameters after the first say which there are; annotations give their types, which may be
    dataclasses: a mapping becomes one. A parameter without an annotation takes anything, `**more` any name.

    Args:
        function: A function or a class.
        values: Plain data by name, as it is written in a file.
        key: The setting that they are, for errors.

    Raises:
        ConfigError: a name that is no parameter's, a value of another type, or none for a parameter that has
            no default.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in _BY_NAME}
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    unnamed = {name: value for name, value in values.items() if name not in named}
    if unnamed and not takes_more:
        _refuse(next(iter(unnamed)), _schema(function, named), key)
    for name, parameter in named.items():
        if name not in values and parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{key}.{name} is missing",
                rule="the task's function has no default for it",
                remedy=f"set --{key}.{name}",
            )
    given = {name: value for name, value in values.items() if name in named}
    if not given:
        return unnamed
    from harness.config.parser import parse_values

    schema = _schema(function, {name: named[name] for name in given})
    return {**parse_values(schema, given, key=key), **unnamed}


def _refuse(name: str, schema: type, key: str) -> None:
    if not dataclasses.fields(schema):
        raise ConfigError(
            f"{key}.{name} is set", rule="the task's function takes the configuration and nothing else"
        )
    check_key(schema, name, where=f" in {key}")


def _schema(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> type:
    """A dataclass with a field for each of the parameters."""
    source = function.__init__ if inspect.isclass(function) else function
    return dataclasses.make_dataclass(
        "Arguments", [(name, _hint(source, name)) for name in parameters], kw_only=True
    )


def _hint(function: Callable[..., Any], name: str) -> Any:
    """The type of one parameter; one whose name is imported for type checkers only takes anything."""
    function = inspect.unwrap(function)
    try:
        alone = types.SimpleNamespace(__annotations__={name: function.__annotations__[name]})
        return typing.get_type_hints(alone, getattr(function, "__globals__", {}))[name]
    except (LookupError, AttributeError, NameError, TypeError):
        return Any

"""Spike rules by name. The bundled ones are in `rules/`, a file each."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from harness.config import GuardConfig
from harness.config.guard import SPIKE_RULES
from harness.errors import ConfigError
from harness.stability import rules
from harness.stability.rules.base import SpikeDetection, SpikeRule
from harness.user_code import load_function, user_code

__all__ = ["RULES", "SpikeDetection", "SpikeRule", "configured_rule", "make_rule"]

_TRUTH = {"true": True, "false": False}


def configured_rule(config: GuardConfig) -> SpikeRule:
    """The rule that `config` names, fresh, with its settings.

    Raises:
        ConfigError: there is no such rule, it has no such setting, or the setting has an impossible value.
        TaskError: a rule of a user's own raised something.
    """
    if config.spike_rule == "robust":
        return make_rule(
            "robust",
            threshold=config.spike_threshold,
            window=config.spike_window,
            warmup=config.spike_warmup,
        )
    rule = _rule_class(config.spike_rule)
    given = dict(argument.split("=", 1) for argument in config.spike_args)
    texts = {name.strip(): value.strip() for name, value in given.items()}
    _require_known(config.spike_rule, rule, texts)
    hints = typing.get_type_hints(rule.__init__)
    settings = {name: _value(name, text, hints.get(name, str)) for name, text in texts.items()}
    return make_rule(config.spike_rule, **settings)


def make_rule(name: str, **settings: Any) -> SpikeRule:
    """The rule `name`, fresh, with `settings` in place of its defaults (see the rule's class).

    Args:
        name: Of a bundled rule, or `package.module:Class`.

    Raises:
        ConfigError: there is no such rule, the rule has no such setting, or the setting has an impossible
            value.
        TaskError: a rule of a user's own raised something.
    """
    rule = _rule_class(name)
    _require_known(name, rule, settings)
    with user_code(f"spike rule {name!r}", rule="it takes its settings by name"):
        return rule(**settings)


def _rule_class(name: str) -> type[SpikeRule]:
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        raise ConfigError(
            f"spike rule {name!r}", rule=f"the rules are {', '.join(RULES)}, or package.module:Class"
        )
    rule = load_function(name, key="guard.spike_rule")
    if not (isinstance(rule, type) and issubclass(rule, SpikeRule)):
        raise ConfigError(
            f"guard.spike_rule {name!r} is no spike rule",
            rule="it is a subclass of harness.stability.detectors.SpikeRule",
        )
    return rule


def _bundled(name: str) -> type[SpikeRule]:
    """The rule of the file `rules/NAME.py`."""
    module = importlib.import_module(f"{rules.__name__}.{name}")
    (rule,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, SpikeRule) and value.__module__ == module.__name__
    )
    return rule


RULES: Mapping[str, type[SpikeRule]] = {name: _bundled(name) for name in SPIKE_RULES}


def _require_known(name: str, rule: type[SpikeRule], settings: Mapping[str, Any]) -> None:
    known = inspect.signature(rule).parameters
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"spike rule {name} has no setting {', '.join(unknown)}",
            rule=f"its settings are {', '.join(known) or 'none'}",
        )


def _value(name: str, text: str, kind: Any) -> Any:
    """A setting of the type that the rule's `__init__` gives it: a number, a truth value or a string."""
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"guard.spike_args has {name}={text}", rule=f"it is of type {getattr(kind, '__name__', kind)}"
        ) from error

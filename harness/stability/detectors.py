"""Spike rules by name. The rules themselves are in `rules/`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from harness.errors import ConfigError
from harness.stability.rules.base import SpikeDetection, SpikeRule
from harness.stability.rules.persistent import PersistentRule
from harness.stability.rules.robust import RobustRule
from harness.stability.rules.sigma import SigmaRule
from harness.stability.rules.zclip import ZClipRule

__all__ = ["RULES", "SpikeDetection", "SpikeRule", "make_rule"]

RULES: Mapping[str, type[SpikeRule]] = {
    "robust": RobustRule,
    "zclip": ZClipRule,
    "persistent": PersistentRule,
    "sigma": SigmaRule,
}


def make_rule(name: str, **settings: Any) -> SpikeRule:
    """The rule `name`, fresh, with `settings` in place of its defaults (see the rule's class).

    Raises:
        ConfigError: there is no such rule, or the rule has no such setting.
    """
    if name not in RULES:
        raise ConfigError(f"spike rule {name!r}", rule=f"the rules are {', '.join(RULES)}")
    known = inspect.signature(RULES[name]).parameters
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"spike rule {name} has no setting {', '.join(unknown)}",
            rule=f"its settings are {', '.join(known)}",
        )
    return RULES[name](**settings)

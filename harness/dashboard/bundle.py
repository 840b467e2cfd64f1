"""The page's own files, and its scripts as one: a page that is opened from a file cannot import modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ASSETS", "bundled"]

ASSETS = Path(__file__).parent / "assets"

_IMPORT = re.compile(r'^import (?:(\{[^}]*\}) from )?"\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (\{[^}]*\}|\w+))", re.MULTILINE)


def bundled(entry: str, *, instead: Mapping[str, str]) -> str:
    """A module of `assets/` and those that it imports as one script; each keeps its names to itself.

    Args:
        entry: The module's name, without its suffix.
        instead: Modules that stand in for others, by the names of those.
    """
    done: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in done:
            return
        text = (ASSETS / f"{instead.get(name, name)}.js").read_text(encoding="utf-8")
        for _, imported in _IMPORT.findall(text):
            visit(imported)
        exported = ", ".join(names.strip("{} ") for names in _EXPORT.findall(text))
        text = _EXPORT.sub("", _IMPORT.sub(_as_constant, text))
        done[name] = f"modules.{name} = (() => {{\n{text}return {{ {exported} }};\n}})();\n"

    visit(entry)
    return "(() => {\n'use strict';\nconst modules = {};\n" + "".join(done.values()) + "})();\n"


def _as_constant(statement: re.Match[str]) -> str:
    names, module = statement.groups()
    return f"const {names} = modules.{module};\n" if names else ""

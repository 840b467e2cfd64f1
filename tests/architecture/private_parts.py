"""The table of other packages' private parts in docs/architecture.md, and the uses of such in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "Row", "private_uses", "rows", "users_of"]

ROOT = Path(__file__).parents[2]
TITLE = "## Other packages' private parts"
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}
"""Names with an underscore that Python documents: of named tuples, and `os._exit`."""
_BY_NAME = {"delattr", "getattr", "hasattr", "setattr"}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    modules: tuple[str, ...]
    """Paths below `harness/`."""
    parts: tuple[str, ...]
    """Dotted: `Module._buffers`."""
    tests: tuple[str, ...]
    """Names in test_private_parts.py."""


@cache
def rows() -> list[Row]:
    """In the order of the page."""
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.partition(TITLE + "\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]] for line in lines]
    return [Row(tuple(modules), tuple(parts), tuple(tests)) for modules, parts, _, tests in cells]


def users_of(name: str) -> str:
    """The modules that use a part, by its last name."""
    found = {m for row in rows() if name in map(last_name, row.parts) for m in row.modules}
    return ", ".join(f"harness/{module}" for module in sorted(found))


def last_name(part: str) -> str:
    return part.removesuffix("()").rpartition(".")[2]


def private_uses(module: str, text: str) -> set[str]:
    """Names with one leading underscore that a module (a path below `harness/`) takes from others.

    Attributes of `self`, `cls` and `super()` are its own. So is a name that it defines, unless
    the table lists it: then somebody else has one of that name too.
    """
    tree = ast.parse(text)
    listed = {
        name for row in rows() if module in row.modules for part in row.parts for name in part.split(".")
    }
    own = set(_defined(tree)) - listed
    return {name for name in _taken(tree) if _is_private(name)} - own - PUBLIC


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _taken(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
            yield from (str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id

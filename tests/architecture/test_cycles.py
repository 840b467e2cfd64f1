"""No module needs one that needs it, be it lazily or for its types alone."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.test_layers import MODULES, ROOT

# harness/__init__.py is left out: it loads its names when they are used.
NAMES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
    for path in MODULES
    if path != Path("harness/__init__.py")
}


def needed(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it, or from which it takes a name."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found = submodule if submodule in NAMES else node.module
                if found in NAMES:
                    yield found


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: set(needed(path)) for name, path in NAMES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules of a circle

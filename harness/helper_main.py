"""The program of every helper process: `python -P harness/helper_main.py [--yield-to-others] MODULE ...`.

It loads the package that it lies in, whatever else of that name can be imported, and calls the module's
`main` with the arguments that follow.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Runs the module that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--yield-to-others", action="store_true")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    _load_package(Path(__file__).resolve().parent)
    if options.yield_to_others:  # before the module's own imports, which may take a second
        importlib.import_module("harness.priority").yield_to_others()
    sys.exit(importlib.import_module(options.module).main(options.arguments))


def _load_package(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "harness", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    main()

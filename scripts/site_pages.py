"""Pages of the site that are made from the code: every option, every command, the public interface.

A hook of mkdocs (`mkdocs.yml`), called while the site is built.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import harness
from harness.cli.main import COMMANDS, main
from harness.dashboard.form import Field, sections

BENCHMARKS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
_HELD_BACK = {"train"}
"""Its help is the page of the options."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    pages: dict[str, Callable[[], str]] = {
        "configuration": configuration,
        "commands": commands,
        "api": interface,
        "benchmarks": benchmarks,
    }
    for name, page in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def configuration() -> str:
    """A table for each section."""
    lines = [
        "# Configuration",
        "Every option of `harness train`: in a YAML file, or `--section.key value` on the command line. "
        "A wrong key, type or combination is answered before anything starts.",
    ]
    for section in sections():
        lines += ["", f"## {section.name or 'The run'}", "", f"{section.title}.", ""]
        lines += ["| key | default | what |", "|---|---|---|"]
        lines += [f"| `{field.key}` | {_default(field)} | {_what(field)} |" for field in section.fields]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The help of each command."""
    lines = ["# Commands", "", "One command, `harness`, with these behind it."]
    for name, command in COMMANDS.items():
        lines += ["", f"## harness {name}", ""]
        if name in _HELD_BACK:
            lines += [f"{command.what[0].upper()}{command.what[1:]}: [configuration](configuration.md)."]
        else:
            lines += ["```text", _help(name), "```"]
    return "\n".join(lines) + "\n"


def interface() -> str:
    """What `from harness import ...` gives."""
    lines = ["# Python", "", "Everything else is private."]
    for name in sorted(harness.__all__):
        public = getattr(harness, name)
        lines += ["", f"::: {public.__module__}.{public.__qualname__}"]
    return "\n".join(lines) + "\n"


def benchmarks() -> str:
    """Links to the tables of measured figures."""
    lines = [
        "# Measured figures",
        "",
        "Each table says which machine it is of; `scripts/` measures them anew.",
        "",
    ]
    for path in sorted(BENCHMARKS.glob("*.md")):
        lines.append(f"* [{path.stem}](../benchmarks/{path.name})")
    return "\n".join(lines) + "\n"


def _default(field: Field) -> str:
    if field.default is None or field.default == "":
        return ""
    return f"`{field.default}`".replace("|", "\\|")


def _what(field: Field) -> str:
    text = re.sub(r"\s+", " ", field.help).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text)


def _help(name: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([name, "--help"])
    return printed.getvalue().strip()

"""How long functions and files are: a reader sees one at a time."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_layers import MODULES, ROOT

MAX_BODY_LINES = 60
P90_BODY_LINES = 20
LONG_FILE_LINES = 400
MAX_LONG_FILES = 4
"""Seldom, in a number: one more is a reason to split one."""
MAX_FILE_LINES = 500


def body_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with the lines of its body, without docstring, blank lines and comments."""
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body:
            code = lines[body[0].lineno - 1 : node.end_lineno]
            num_lines = sum(1 for line in code if line.strip() and not line.strip().startswith("#"))
            yield f"{path}:{node.lineno} {node.name}", num_lines


def num_lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    long = {name: lines for name, lines in body_lines(path) if lines > MAX_BODY_LINES}
    assert not long


def test_nine_of_ten_functions_are_short() -> None:
    lengths = sorted(lines for path in MODULES for _, lines in body_lines(path))
    assert lengths[len(lengths) * 9 // 10] <= P90_BODY_LINES


def test_files_are_seldom_long() -> None:
    long = {str(path): num_lines(path) for path in MODULES if num_lines(path) > LONG_FILE_LINES}
    assert len(long) <= MAX_LONG_FILES, long
    assert max(long.values(), default=0) <= MAX_FILE_LINES, long

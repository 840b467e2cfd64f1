"""The table of features in docs/tracking.md names modules and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = (ROOT, ROOT / "harness" / "tracking", ROOT / "harness" / "runlog")


def rows() -> list[tuple[str, str, str]]:
    table = (ROOT / "docs" / "tracking.md").read_text().partition("| feature | where |")[2]
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [(feature.strip(), where.strip(), tests.strip()) for feature, where, tests in cells]


def names_in(name: str) -> str:
    [path] = (ROOT / "tests").glob(f"*/test_tracking_{name}.py")
    return "\n".join(re.findall(r"^def (test_\w+)", path.read_text(), re.M))


@pytest.mark.parametrize(("feature", "where", "tests"), rows(), ids=lambda cell: cell[:40])
def test_each_feature_has_its_module_and_its_tests(feature: str, where: str, tests: str) -> None:
    for module in re.findall(r"`([\w/]+\.py)`", where):
        assert any((folder / module).exists() for folder in HOMES)
    for part in tests.split(";"):
        file, _, names = part.strip().partition(":")
        for name in re.findall(r"`(\w+)`", names):
            assert name in names_in(file), f"{feature}: no test in {file} is called {name}"
        assert names_in(file)

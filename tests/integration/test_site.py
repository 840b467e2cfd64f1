"""The documentation as a site: it builds without a warning, no link leads nowhere, no option is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra [docs]")

ROOT = Path(__file__).parents[2]
OPTIONS = ROOT / "tests" / "architecture" / "options.txt"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a page outside the navigation, a link or an anchor that leads nowhere are errors."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_option_and_its_help_are_on_the_page_of_the_configuration(site: Path) -> None:
    page = (site / "reference" / "configuration.html").read_text()
    keys = [line.partition(":")[0] for line in OPTIONS.read_text().splitlines()[1:]]
    assert [key for key in keys if "[]" not in key and f"<code>{key}</code>" not in page] == []


def test_the_public_names_are_on_the_page_of_the_interface(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    for name in ("StepGuard.step", "Checkpointer.save", "ExperimentTracker"):
        assert re.search(rf'id="harness[\w.]*\.{re.escape(name)}"', page), name


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert loaded == [], page


@pytest.mark.parametrize("name", ["three-lines"])
def test_the_programs_of_a_page_run(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{name}.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})

"""The page for everybody: axe-core finds nothing, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import re
from itertools import product
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, expect

from tests.browser.actions import picture
from tests.browser.conftest import Dashboard

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
WIDTHS = (1440, 800, 400)
ELEMENTS = "harness-runs, harness-monitor, harness-compare, harness-output"


def findings(page: Page) -> list[str]:
    """Of our own elements, at every width, in light and dark; what surrounds them is Gradio's."""
    return [
        f"{width} {scheme} {found['id']}: {node['html'][:200]}"
        for width, scheme in product(WIDTHS, SCHEMES)
        for found in _violations(page, width, scheme)
        for node in found["nodes"]
    ]


def _violations(page: Page, width: int, scheme: Scheme) -> list[dict[str, Any]]:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("body")).to_have_class(
        re.compile(r"\bdark\b" if scheme == "dark" else r"^(?!.*\bdark\b)")
    )
    context = {"include": [[one] for one in ELEMENTS.split(", ")]}
    violations: list[dict[str, Any]] = axe.Axe().run(page, context=context).response["violations"]
    return violations


def test_axe_finds_nothing(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    page.goto(dashboard.address)
    expect(page.get_by_role("button", name=trained[0], exact=True)).to_be_visible()
    assert findings(page) == []
    page.goto(f"{dashboard.address}#tab=Monitoring&run={trained[0]}")
    page.reload()
    expect(picture(page, "loss").locator("canvas").first).to_be_visible()
    for title in ("Checkpoints", "More metrics", "Last values", "Configuration"):
        page.locator("harness-monitor summary", has_text=title).click()
    assert findings(page) == []
    page.goto(f"{dashboard.address}#tab=Compare&compare={trained[0]}&compare={trained[1]}")
    page.reload()
    expect(page.locator("harness-compare .h-parting")).to_be_visible()
    assert findings(page) == []
    page.goto(f"{dashboard.address}#tab=Training")
    page.reload()
    expect(page.get_by_role("button", name="Kill")).to_be_visible()
    assert findings(page) == []

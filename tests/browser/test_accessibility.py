"""The page for everybody: axe-core finds nothing, in light and dark, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.actions import picture
from tests.browser.conftest import Dashboard, watched_page

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
ELEMENTS = "harness-runs, harness-monitor, harness-compare, harness-output"


@pytest.fixture(params=[("light", 1440), ("dark", 800), ("light", 400)], ids=str)
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    with watched_page(context) as one:
        yield one
    context.close()


def findings(page: Page) -> list[str]:
    """Of our own elements; what surrounds them is Gradio's."""
    results = axe.Axe().run(page, context={"include": [[one] for one in ELEMENTS.split(", ")]})
    return [
        f"{found['id']}: {node['html'][:200]}"
        for found in results.response["violations"]
        for node in found["nodes"]
    ]


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

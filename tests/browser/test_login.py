"""Who is let in, and what those may do who are."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qs

import pytest
from playwright.sync_api import Page, expect

from tests.browser.actions import go_to, toast
from tests.browser.conftest import Dashboard, Place

TOKEN = "correct horse battery"


@pytest.fixture(scope="module")
def guarded(place: Place) -> Iterator[tuple[Dashboard, Dashboard]]:
    """A dashboard on this machine alone, and one that everybody can reach; started side by side."""
    both = (
        Dashboard(place.path, "--token", "auto"),
        Dashboard(place.path, "--host", "0.0.0.0", HARNESS_DASHBOARD_TOKEN=TOKEN),
    )
    yield both
    for one in both:
        one.close()


def test_the_token_of_the_printed_address_opens_the_page_and_then_is_gone_from_it(
    page: Page, guarded: tuple[Dashboard, Dashboard]
) -> None:
    address, _, token = guarded[0].address.partition("?")
    for wrong in ("", "?token=", "?token=wrong", f"?{token}x"):
        answer = page.request.get(address + wrong)
        assert (answer.status, "with ?token= in it" in answer.text()) == (401, True)
    page.goto(f"{address}?{token}")
    expect(page.locator("harness-runs table")).to_be_visible()
    assert page.url == address
    page.reload()
    expect(page.locator("harness-runs table")).to_be_visible()
    go_to(page, "Training")
    expect(page.locator("#start")).to_be_enabled()


def test_whoever_comes_from_elsewhere_with_the_token_only_looks(
    page: Page, guarded: tuple[Dashboard, Dashboard]
) -> None:
    address, _, query = guarded[1].address.partition("?")
    assert parse_qs(query) == {"token": [TOKEN]}
    for path in ("", "api/runs", "tensorboard/"):
        assert page.request.get(address + path).status == 401
    page.goto(f"{address}?{query}")
    expect(page.locator("harness-runs table")).to_be_visible()
    go_to(page, "Training")
    for button in ("start", "demonstrate", "stop", "resume", "kill"):
        expect(page.locator(f"#{button}")).to_be_disabled()
    # The page is not what holds it back: the order is refused as well.
    page.evaluate("document.querySelector('#demonstrate').disabled = false")
    page.locator("#demonstrate").click()
    expect(toast(page)).to_contain_text("this dashboard is read-only")

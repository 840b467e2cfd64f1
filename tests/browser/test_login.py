"""Who is let in, and what those may do who are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.actions import go_to, toast
from tests.browser.conftest import Dashboard, Place, watched_page

PASSWORD = "correct horse battery"


@contextlib.contextmanager
def logged_in(browser: Browser, password: str) -> Iterator[Page]:
    """A page of somebody who types a password when asked for one."""
    context = browser.new_context(http_credentials={"username": "ann", "password": password})
    with watched_page(context) as page:
        yield page
    context.close()


@pytest.fixture(scope="module")
def guarded(place: Place) -> Iterator[tuple[Dashboard, Dashboard]]:
    """A dashboard with a token, and one with a password that everybody can reach; started side by side."""
    both = (
        Dashboard(place.path, "--token", "auto"),
        Dashboard(place.path, "--host", "0.0.0.0", "--user", "ann", HARNESS_DASHBOARD_PASSWORD=PASSWORD),
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


def test_a_password_is_asked_for_and_whoever_knows_it_only_looks(
    browser: Browser, guarded: tuple[Dashboard, Dashboard]
) -> None:
    address = guarded[1].address
    for wrong in ("", "wrong", PASSWORD + "x"):
        with logged_in(browser, wrong) as page:
            answer = page.request.get(address)
            assert (answer.status, answer.text()) == (401, "a user and a password are needed")
    with logged_in(browser, PASSWORD) as page:
        page.goto(address)
        expect(page.locator("harness-runs table")).to_be_visible()
        go_to(page, "Training")
        for button in ("start", "demonstrate", "stop", "resume", "kill"):
            expect(page.locator(f"#{button}")).to_be_disabled()
        # The page is not what holds it back: the order is refused as well.
        page.evaluate("document.querySelector('#demonstrate').disabled = false")
        page.locator("#demonstrate").click()
        expect(toast(page)).to_contain_text("this dashboard only shows")

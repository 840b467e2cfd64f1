"""What a person does on the page."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Dashboard

__all__ = ["choose", "fill", "go_to", "hover", "open_run", "picture", "shown", "toast", "wait_on"]


def open_run(page: Page, dashboard: Dashboard, run: str) -> Locator:
    """From the table of runs to the run's own page."""
    page.goto(dashboard.address)
    page.locator("harness-runs").get_by_role("button", name=run, exact=True).click()
    monitor = page.locator("harness-monitor")
    expect(monitor).to_have_attribute("data-run", run)
    expect(monitor).to_have_attribute("data-ready", "true")
    return monitor


def go_to(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def choose(page: Page, box: str, option: str) -> None:
    """Picks an option of one of the lists."""
    page.locator(f"{box} input").first.click()
    page.get_by_role("option", name=re.compile(rf"(^|\W){re.escape(option)}$")).click()


def fill(page: Page, key: str, value: str) -> None:
    """Fills in a field of the form, and leaves it."""
    box = page.locator(f'[id="field-{key}"]').locator("input, textarea")
    box.fill(value)
    box.blur()


def wait_on(page: Page, is_so: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Waits for something that the page's own events bring about: requests that are held, for one."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        page.wait_for_timeout(50)


def toast(page: Page) -> Locator:
    """The newest message in the corner."""
    return page.get_by_test_id("toast-text").last


def picture(page: Page, title: str) -> Locator:
    """A chart of the page by its title."""
    return page.locator(f'harness-monitor figure[data-plot="{title}"]')


def hover(page: Page, chart: Locator, share: float) -> None:
    """Points at a place of a chart, from 0, its left end, to 1."""
    over = chart.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + min(share * box["width"], box["width"] - 1), box["y"] + box["height"] / 2)


def shown(chart: Locator) -> dict[str, str]:
    """The legend of a chart: values under the pointer by name."""
    names = chart.locator(".u-legend .u-label").all_inner_texts()
    values = chart.locator(".u-legend .u-value").all_inner_texts()
    return {name.rstrip(":"): value for name, value in zip(names, values, strict=True)}

"""What is shown is in the address: a reload, back and forward, and a link show the same."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from harness.tracking import RunLog
from tests.browser.actions import choose, go_to, open_run, picture, wait_on
from tests.browser.conftest import Dashboard, Place, watched_page

LAYERS = ("grad_norm", "weight_norm")


def zoom(page: Page, title: str, left: float, right: float) -> None:
    over = picture(page, title).locator(".u-over").bounding_box()
    assert over is not None
    page.mouse.move(over["x"] + left * over["width"], over["y"] + 40)
    page.mouse.down()
    page.mouse.move(over["x"] + right * over["width"], over["y"] + 60, steps=5)
    page.mouse.up()


def test_a_reload_and_a_link_show_the_same_run_axis_smoothing_and_zoom(
    page: Page, context: BrowserContext, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    monitor.get_by_label("x axis").select_option("tokens")
    monitor.get_by_label("smoothing").fill("0.5")
    monitor.get_by_label("log axes").check()
    expect(picture(page, "loss").locator(".u-legend .u-label").first).to_have_text("tokens")
    zoom(page, "loss", 0.3, 0.7)
    expect(page).to_have_url(re.compile("zoom="))

    def is_the_same(there: Page) -> None:
        monitor = there.locator("harness-monitor")
        expect(monitor).to_have_attribute("data-run", trained[0])
        expect(monitor.get_by_label("x axis")).to_have_value("tokens")
        expect(monitor.get_by_label("smoothing")).to_have_value("0.5")
        expect(monitor.get_by_label("log axes")).to_be_checked()
        expect(monitor.get_by_role("button", name="Whole run")).to_be_enabled()
        expect(picture(there, "loss")).not_to_have_attribute("data-first", "0")
        expect(there.get_by_role("tab", name="Monitoring", exact=True)).to_have_attribute(
            "aria-selected", "true"
        )

    page.reload()
    is_the_same(page)
    expect(page.locator("#chosen-run input")).to_have_value(trained[0])
    with watched_page(context) as colleague:
        colleague.goto(page.url)
        is_the_same(colleague)


def test_back_and_forward_go_through_runs_zooms_and_tabs(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    expect(picture(page, "loss")).to_have_attribute("data-first", "0")
    zoom(page, "loss", 0.4, 0.8)
    expect(picture(page, "loss")).not_to_have_attribute("data-first", "0")
    go_to(page, "Runs")
    page.get_by_role("button", name=trained[1], exact=True).click()
    expect(monitor).to_have_attribute("data-run", trained[1])
    page.go_back()  # to the table
    expect(page.get_by_role("tab", name="Runs", exact=True)).to_have_attribute("aria-selected", "true")
    page.go_back()
    expect(monitor).to_have_attribute("data-run", trained[0])
    expect(picture(page, "loss")).not_to_have_attribute("data-first", "0")
    page.go_back()  # out of the zoom
    expect(picture(page, "loss")).to_have_attribute("data-first", "0")
    page.go_forward()
    expect(picture(page, "loss")).not_to_have_attribute("data-first", "0")


def test_an_answer_about_what_was_shown_before_is_not_drawn_over_what_is_shown_now(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    open_run(page, dashboard, trained[0])
    loss = picture(page, "loss")
    expect(loss).to_have_attribute("data-first", "0")
    held: list[Route] = []

    def hold(route: Route) -> None:
        if "first=" in route.request.url:
            held.append(route)
        else:
            route.abort()

    page.route("**/api/run?*", hold)
    zoom(page, "loss", 0.4, 0.8)
    wait_on(page, lambda: bool(held))
    page.go_back()
    with page.expect_request("**/api/run?*"):  # which follows on the answer
        held[0].continue_()
    expect(loss).to_have_attribute("data-first", "0")
    page.go_forward()
    expect(loss).not_to_have_attribute("data-first", "0")  # from the answer that came too late


@pytest.mark.parametrize("address", ["", "#tab=Compare"])
def test_a_tab_that_is_chosen_before_the_scripts_have_come_stays(
    page: Page, dashboard: Dashboard, address: str
) -> None:
    late: list[Route] = []
    page.route("**/own/dashboard.js", lambda route: late.append(route))
    page.goto(dashboard.address + address)
    training = page.get_by_role("tab", name="Training", exact=True)
    training.click()
    expect(training).to_have_attribute("aria-selected", "true")
    wait_on(page, lambda: bool(late))
    late[0].continue_()
    expect(page).to_have_url(re.compile("tab=Training"))
    expect(training).to_have_attribute("aria-selected", "true")
    expect(page.locator("harness-output pre")).to_be_visible()


def test_monitoring_without_a_choice_shows_the_newest_run(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    page.goto(f"{dashboard.address}#tab=Monitoring")
    expect(page.locator("harness-monitor")).to_have_attribute("data-run", re.compile("."))
    newest = page.evaluate(
        "fetch('/api/runs').then((it) => it.json())"
        ".then(({ runs }) => runs.reduce((a, b) => ((a.updated ?? 0) >= (b.updated ?? 0) ? a : b)).id)"
    )
    expect(page.locator("harness-monitor")).to_have_attribute("data-run", newest)


def test_the_list_of_runs_shows_the_run_that_was_shown_before_the_one_from_the_table(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[1])
    for _ in range(2):
        choose(page, "#chosen-run", trained[0])
        expect(monitor).to_have_attribute("data-run", trained[0])
        page.go_back()
        expect(monitor).to_have_attribute("data-run", trained[1])
        expect(page.locator("#chosen-run input")).to_have_value(trained[1])


def test_on_a_narrow_page_tabs_are_in_a_menu_and_in_the_address_too(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(f"{dashboard.address}#tab=Compare&compare={trained[0]}&compare={trained[1]}")
    parting = page.locator("harness-compare .h-parting")
    expect(parting).to_be_visible()
    page.locator(".overflow-menu > button").click()
    page.locator(".overflow-dropdown").get_by_role("button", name="Training", exact=True).click()
    expect(page.get_by_role("button", name="Kill", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile("tab=Training"))
    page.reload()
    expect(page.get_by_role("button", name="Kill", exact=True)).to_be_visible()
    page.go_back()
    expect(parting).to_be_visible()
    page.get_by_role("tab", name="Runs", exact=True).click()
    page.get_by_role("button", name=trained[0], exact=True).click()
    expect(picture(page, "loss").locator("canvas").first).to_be_visible()
    expect(page).to_have_url(re.compile("tab=Monitoring"))


def test_a_link_shows_the_same_statistic_layer_metrics_and_story(
    page: Page, context: BrowserContext, dashboard: Dashboard, place: Place
) -> None:
    with RunLog(place.runs / "linked") as log:
        for step in range(10):
            log.write("step", {"train/loss": 1.0, "my/metric": 2.0, "my/other": 2.0}, step=step)
            log.write("layers", {name: {"a.weight": 1.0, "b.weight": 2.0} for name in LAYERS}, step=step)
        log.write("event", {"name": "incident", "kind": "loss spike", "reason": "it rose"}, step=4)
        log.end("finished")
    monitor = open_run(page, dashboard, "linked")
    monitor.get_by_label("statistic of the layers").select_option(LAYERS[1])
    height = monitor.locator(".h-heat").evaluate("(heat) => heat.clientHeight")
    monitor.locator(".h-heat").click(position={"x": 20, "y": 0.75 * height})
    monitor.get_by_text("More metrics").click()
    monitor.get_by_label("search all metrics").fill("metric")
    monitor.get_by_label("search all metrics").press("Enter")
    monitor.locator(".h-incidents tbody tr").click()
    expect(monitor.locator(".h-story")).to_contain_text("it rose")
    with watched_page(context) as colleague:
        colleague.goto(page.url)
        monitor = colleague.locator("harness-monitor")
        expect(monitor.get_by_label("statistic of the layers")).to_have_value(LAYERS[1])
        expect(picture(colleague, f"b.weight: {LAYERS[1]}")).to_be_visible()
        expect(monitor.locator(".h-heat-mark")).to_be_visible()
        expect(picture(colleague, "my/metric")).to_be_visible()
        expect(picture(colleague, "my/other")).to_have_count(0)
        expect(monitor.locator(".h-story")).to_contain_text("it rose")
        monitor.get_by_role("button", name="Close the story").click()
        expect(colleague).not_to_have_url(re.compile("incident="))
        colleague.go_back()
        expect(monitor.locator(".h-story")).to_contain_text("it rose")

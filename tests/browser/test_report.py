"""The report, opened from its file by a browser without a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from harness.dashboard.report import write_report
from harness.tracking import RunLog
from tests.browser.actions import hover, picture, shown
from tests.browser.conftest import watched_page

HOSTILE = "</script><img src=x onerror=document.title='broken'>"
NUM_STEPS, SPIKE, ODD = 5000, 3333, 4000


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that is longer than a curve has points, with a spike, an incident and hostile texts."""
    run_dir = tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", "")
    info = {"host": HOSTILE, "command": ["train", HOSTILE], "config": {"optim": {"lr": 0.1}, HOSTILE: 1}}
    with RunLog(run_dir, info=info) as log:
        for step in range(NUM_STEPS):
            loss = {SPIKE: 1000.0, ODD: math.nan}.get(step, 1.0)
            values = {"train/loss": loss, "train/tokens": 10 * (step + 1), HOSTILE: 1.0}
            log.write("step", values, step=step)
            if step % 50 == 0:
                log.write("layers", {"grad_norm": {"a.weight": loss, "b.weight": float(step)}}, step=step)
                log.write("ranks", {"loss": [1.0, 2.0]}, step=step)
        log.write("eval", {"val/loss": 2.5}, step=NUM_STEPS - 1)
        log.write("event", {"name": "incident", "summary": HOSTILE, "parameter": "a.weight"}, step=ODD)
        log.write("event", {"name": "rollback", "summary": "went back"}, step=ODD + 1)
        log.write("system", {"system/cpu_frac": 0.5})
    return write_report(run_dir)


@pytest.fixture(scope="module")
def opened(browser: Browser, report: Path) -> Iterator[Page]:
    """The page, of which nothing but its own file may be asked for."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, offline=True)
    asked: list[str] = []
    with watched_page(context) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        expect(page.locator("harness-monitor")).to_have_attribute("data-ready", "true")
        yield page
    context.close()
    assert asked == [report.as_uri()]


@pytest.fixture
def monitor(opened: Page) -> Locator:
    return opened.locator("harness-monitor")


def section(monitor: Locator, title: str) -> Locator:
    """A part of the page, opened."""
    part = monitor.locator("details", has=monitor.page.get_by_text(title, exact=True))
    if part.get_attribute("open") is None:
        part.locator("summary").click()
    return part


def cells(part: Locator, row: str) -> list[str]:
    first = part.locator("tr", has_text=row).first
    expect(first).to_be_visible()
    return first.locator("td").all_inner_texts()


def test_it_tells_what_became_of_the_run(monitor: Locator, report: Path) -> None:
    expect(monitor.locator("h2")).to_have_text(f"{report.parent.name} finished")
    facts = dict(
        zip(
            monitor.locator(".h-fact span").all_inner_texts(),
            monitor.locator(".h-fact b").all_inner_texts(),
            strict=True,
        )
    )
    expected = {
        "steps": "5,000",
        "loss": "1",
        "held out": "2.5",
        "best held out": "2.5",
        "steps with NaN or Inf": "1",
        "incidents": "1",
        "rollbacks": "1",
        "attempts": "1",
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["host"] == HOSTILE
    assert re.match(r"20\d\d-", facts["started"])
    expect(monitor.get_by_text(f"train {HOSTILE}")).to_be_visible()


def test_it_has_the_incidents_the_events_and_what_was_set(monitor: Locator) -> None:
    assert cells(section(monitor, "Incidents"), "a.weight")[0] == str(ODD)
    events = section(monitor, "Events")
    assert cells(events, "went back")[1:] == ["rollback", str(ODD + 1), "went back"]
    assert cells(section(monitor, "Configuration"), "optim.lr") == ["optim.lr", "0.1"]
    assert cells(section(monitor, "Configuration"), "img") == [HOSTILE, "1"]
    assert cells(section(monitor, "Last values"), "val/loss") == ["val/loss", "2.5"]
    assert cells(section(monitor, "Ranks, last step"), "1")[:2] == ["0", "1"]


def test_text_of_the_run_is_no_html(monitor: Locator) -> None:
    assert monitor.page.title() != "broken"
    assert monitor.page.locator("img").count() == 0
    assert monitor.page.locator("script").count() == 2


def test_its_pictures_are_those_of_the_dashboard(monitor: Locator) -> None:
    page = monitor.page
    shown_plots = monitor.locator("figure:visible").evaluate_all("all => all.map(one => one.dataset.plot)")
    assert set(shown_plots) >= {"loss", "ranks: loss"}
    for title, metric in (("Host and devices", "cpu_frac"), ("More metrics", HOSTILE)):
        section(monitor, title)
        expect(monitor.locator("figure", has_text=metric).locator("canvas").first).to_be_visible()
    monitor.locator(".h-heat").click(position={"x": 20, "y": 2})
    layer = picture(page, "a.weight: grad_norm")
    expect(layer).to_have_attribute("data-points", "100")
    assert layer.get_attribute("data-nonfinite") == "1"


def test_it_zooms_and_counts_on_other_axes(monitor: Locator) -> None:
    page = monitor.page
    loss = picture(page, "loss")
    assert int(loss.get_attribute("data-points") or "") <= 2000
    assert (loss.get_attribute("data-nonfinite"), loss.get_attribute("data-marks")) == ("1", "2")
    page.evaluate("window.scrollTo(0, 0)")
    over = loss.locator(".u-over").bounding_box()
    assert over is not None
    left, right = (over["x"] + over["width"] * share for share in (0.65, 0.68))
    page.mouse.move(left, over["y"] + 40)
    page.mouse.down()
    page.mouse.move(right, over["y"] + 60, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "() => Number(document.querySelector('figure[data-plot=loss]').dataset.first) > 3000"
    )
    first, last = (int(loss.get_attribute(f"data-{end}") or "") for end in ("first", "last"))
    assert 3200 < first < SPIKE < last < 3450
    hover(page, loss, (SPIKE - first) / (last - first))
    assert shown(loss)["training max"] == "1,000"
    monitor.get_by_label("x axis").select_option("tokens")
    expect(loss.locator(".u-legend .u-label").first).to_have_text("tokens")
    hover(page, loss, 0.0)
    assert float(shown(loss)["tokens"].rstrip("k")) == pytest.approx((first + 1) / 100, abs=0.03)  # a pixel
    monitor.get_by_role("button", name="Whole run").click()
    expect(loss).to_have_attribute("data-first", "0")

"""One run as a person sees it: live, by another axis, smoothed, zoomed, layer by layer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from subprocess import Popen

import pytest
from playwright.sync_api import Locator, Page, expect

from harness.tracking import RunLog
from tests.browser.actions import hover, open_run, picture, shown
from tests.browser.conftest import Dashboard, Place
from tests.support.runs import PROGRAM, start

NAN = "--faults=[{step: 30, kind: nan, target: gradient}]"
LAST_STEP = "Number(document.querySelector('harness-monitor').dataset.lastStep)"
# Where something is drawn in a curve's blue near a picture's upper edge, from 0, the plot's left end, to 1.
PEAKS = """(canvas) => {
  const over = canvas.closest('.uplot').querySelector('.u-over').getBoundingClientRect();
  const all = canvas.getBoundingClientRect();
  const scale = canvas.width / all.width;
  const top = Math.round((over.top - all.top + over.height / 10) * scale);
  const left = Math.round((over.left - all.left) * scale);
  const [width, height] = [Math.round(over.width * scale), Math.round((over.height / 10) * scale)];
  const { data } = canvas.getContext('2d').getImageData(left, top, width, height);
  const isBlue = (at) => data[at + 3] > 40 && data[at + 2] > data[at] + 40;
  const columns = [...Array(width).keys()];
  return columns
    .filter((x) => [...Array(height).keys()].some((y) => isBlue(4 * (y * width + x))))
    .map((x) => x / width);
}"""
NUM_PAINTED = """(canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, at) => at % 4 === 3 && value > 0).length;
}"""


@pytest.fixture
def endless(place: Place) -> Iterator[Popen[str]]:
    """A run from elsewhere that trains until it is ended, with a NaN at step 30."""
    arguments = place.arguments("live", "--loop.steps=100000", "--checkpoint.every=0", NAN)
    process = start([sys.executable, PROGRAM, *arguments])
    reader = threading.Thread(target=process.communicate)  # a pipe that is full would hold the training up
    reader.start()
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    reader.join()


def test_a_run_that_trains_is_seen_live_and_its_nan_is_named(
    page: Page, dashboard: Dashboard, endless: Popen[str]
) -> None:
    monitor = open_run(page, dashboard, "live")
    expect(monitor).to_have_attribute("data-state", "running")
    page.wait_for_function(f"{LAST_STEP} > 0")  # it says that it runs before it trains
    before = page.evaluate(LAST_STEP)
    page.wait_for_function(f"before => {LAST_STEP} > before", arg=before)
    row = monitor.locator(".h-incidents tbody tr").first
    expect(row).to_contain_text("non-finite gradient")
    expect(row.locator("td").nth(0)).to_have_text("30")
    expect(row.locator("td").nth(2)).to_have_text("0")
    expect(row).to_contain_text("token_embedding.weight")
    expect(row).to_contain_text("skip")
    os.killpg(endless.pid, signal.SIGKILL)
    expect(monitor).to_have_attribute("data-state", "crashed")


def test_a_section_opened_later_shows_its_pictures_though_the_run_has_ended(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    monitor.get_by_text("More metrics").click()
    expect(picture(page, "val/perplexity").locator("canvas").first).to_be_visible()


def test_layers_lead_to_their_history(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    monitor = open_run(page, dashboard, trained[0])
    expect(monitor.locator(".h-heat-box")).to_have_attribute("data-columns", "6")
    monitor.locator(".h-heat").click(position={"x": 20, "y": 2})
    expect(picture(page, "token_embedding.weight: grad_norm")).to_have_attribute("data-points", "6")


def test_the_heat_map_is_cleared_where_nothing_was_measured(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    """Of other steps, and of another run."""
    num_layers = 200  # more than there is room to name
    for name, has_layers in (("heat/layers", True), ("heat/none", False)):
        with RunLog(place.runs / name) as log:
            for step in range(101):
                log.write("step", {"train/loss": 1.0}, step=step)
                if has_layers and step % 20 == 0:
                    values = {f"layer.{number}": 1.0 + number for number in range(num_layers)}
                    log.write("layers", {"grad_norm": values}, step=step)
            log.end("finished")
    monitor = open_run(page, dashboard, "heat/layers")
    heat = monitor.locator(".h-heat")
    names = monitor.locator(".h-heat-rows span")
    assert heat.evaluate(NUM_PAINTED) > 0
    expect(names.first).to_have_text("layer.0")
    page.evaluate("location.hash += '&zoom=3-7'")
    expect(monitor.locator(".h-heat-tip")).to_have_text("no grad_norm was measured in these steps")
    assert heat.evaluate(NUM_PAINTED) == 0
    expect(names).to_have_count(0)
    heat.focus()
    page.keyboard.press("ArrowDown")
    expect(monitor.locator(".h-heat-tip")).to_have_text("no grad_norm was measured in these steps")
    monitor.get_by_role("button", name="Whole run").click()
    expect(names.first).to_have_text("layer.0")
    assert heat.evaluate(NUM_PAINTED) > 0
    page.get_by_role("tab", name="Runs", exact=True).click()
    page.get_by_role("button", name="heat/none", exact=True).click()
    expect(monitor).to_have_attribute("data-run", "heat/none")
    expect(heat).not_to_be_visible()
    assert heat.evaluate(NUM_PAINTED) == 0


def test_the_last_picture_of_a_run_is_there_before_the_server_has_answered(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    open_run(page, dashboard, trained[0])
    loss = picture(page, "loss").locator("canvas").first
    expect(loss).to_be_visible()
    page.get_by_role("tab", name="Runs", exact=True).click()
    page.get_by_role("button", name=trained[1], exact=True).click()
    expect(page.locator("harness-monitor h2")).to_contain_text(trained[1])
    page.route("**/api/run?*", lambda route: None)  # which never answers
    page.get_by_role("tab", name="Runs", exact=True).click()
    page.get_by_role("button", name=trained[0], exact=True).click()
    expect(page.locator("harness-monitor h2")).to_contain_text(trained[0])
    expect(loss).to_be_visible()
    page.unroute_all(behavior="ignoreErrors")


def test_the_x_axis_counts_tokens_or_hours(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    loss = picture(page, "loss")
    hover(page, loss, 1.0)
    expect(loss.locator(".u-legend .u-value").first).to_have_text("11")
    monitor.get_by_label("x axis").select_option("tokens")
    expect(loss.locator(".u-legend .u-label").first).to_have_text("tokens")
    hover(page, loss, 1.0)
    assert shown(loss)["tokens"] == "3,072"  # of 12 steps with 8 samples of 32
    monitor.get_by_label("x axis").select_option("hours")
    expect(loss.locator(".u-legend .u-label").first).to_have_text("hours")
    hover(page, loss, 1.0)
    assert shown(loss)["hours"].endswith(" h")


@pytest.fixture(scope="module")
def ramp(place: Place) -> str:
    """A run whose loss is the number of its step."""
    with RunLog(place.runs / "ramp") as log:
        for step in range(5):
            log.write("step", {"train/loss": float(step)}, step=step)
        log.end("finished")
    return "ramp"


def test_smoothing_is_an_average_and_leaves_the_curve_visible(
    page: Page, dashboard: Dashboard, ramp: str
) -> None:
    monitor = open_run(page, dashboard, ramp)
    loss = picture(page, "loss")
    monitor.get_by_label("smoothing").fill("0.5")
    expect(loss.locator(".u-legend .u-label")).to_have_text(["step", "training raw", "training"])
    hover(page, loss, 1.0)
    weights = [0.5 ** (4 - step) for step in range(5)]
    average = sum(step * weight for step, weight in enumerate(weights)) / sum(weights)
    assert shown(loss) == {"step": "4", "training raw": "4", "training": f"{average:.4g}"}


def test_logarithmic_axes_leave_out_what_has_no_logarithm(
    page: Page, dashboard: Dashboard, ramp: str
) -> None:
    monitor = open_run(page, dashboard, ramp)
    loss = picture(page, "loss")
    hover(page, loss, 0.0)
    assert shown(loss) == {"step": "0", "training": "0"}
    monitor.get_by_label("log axes").check()
    expect(loss.get_by_role("button", name="log")).to_have_attribute("aria-pressed", "true")
    hover(page, loss, 0.0)
    assert shown(loss) == {"step": "0", "training": "–"}
    hover(page, loss, 1.0)
    assert shown(loss) == {"step": "4", "training": "4"}


def test_logarithmic_axes_are_those_of_pictures_made_later_too(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    open_run(page, dashboard, trained[0])
    page.goto(f"{page.url}&log=1")
    page.reload()
    monitor = page.locator("harness-monitor")
    monitor.get_by_text("More metrics").click()
    for title in ("loss", "val/perplexity"):
        log = picture(page, title).get_by_role("button", name="log")
        expect(log).to_have_attribute("aria-pressed", "true")
    monitor.get_by_label("log axes").uncheck()
    expect(picture(page, "val/perplexity").get_by_role("button", name="log")).to_have_attribute(
        "aria-pressed", "false"
    )


def test_no_spike_is_hidden_and_dragging_zooms_to_the_steps_themselves(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    num_steps, spike = 5000, 3333
    with RunLog(place.runs / "long") as log:
        for step in range(num_steps):
            log.write("step", {"train/loss": 1000.0 if step == spike else 1.0}, step=step)
        log.end("finished")
    monitor = open_run(page, dashboard, "long")
    loss = picture(page, "loss")
    assert int(loss.get_attribute("data-points") or "") < 1000
    peaks = loss.locator("canvas").evaluate(PEAKS)
    assert peaks
    assert peaks == pytest.approx([spike / num_steps] * len(peaks), abs=0.01)
    assert "1,000" in largest_near(page, loss, spike / num_steps)

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
    assert 3200 < first < spike < last < 3450
    assert int(loss.get_attribute("data-points") or "") == last - first + 1
    hover(page, loss, (spike - first) / (last - first))
    assert shown(loss) == {"step": "3,333", "training": "1,000"}
    monitor.get_by_role("button", name="Whole run").click()
    expect(loss).to_have_attribute("data-first", "0")


def largest_near(page: Page, chart: Locator, share: float) -> set[str]:
    """What the legend of a reduced curve gives as the largest values around a place."""
    found = set()
    for offset in range(-8, 9):
        hover(page, chart, share + offset / 2000)
        found.add(shown(chart).get("training max", ""))
    return found

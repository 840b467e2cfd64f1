"""Real runs, ordered from the page."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
from playwright.sync_api import Locator, Page, expect

from harness.runlog.paths import tensorboard_dir
from harness.runlog.reader import open_run as open_log
from tests.browser.actions import choose, fill, go_to, toast
from tests.browser.conftest import Dashboard, Place, watched_page
from tests.support.runs import wait_for

START_MS = 60_000
LAST_OF_LOSS = "Number(document.querySelector('figure[data-plot=loss]').dataset.last)"
POINTS_OF_LOSS = "Number(document.querySelector('figure[data-plot=loss]').dataset.points)"
NAME = 'it\'s <b>"formed": $(id) 1e-3'


@pytest.fixture(autouse=True)
def _nothing_is_left_running(place: Place) -> Iterator[None]:
    yield
    place.end_programs()


def printed(page: Page) -> Locator:
    return page.locator("harness-output pre")


def losses(run: Path) -> list[int]:
    """The steps that a run has a loss of."""
    return [int(step) for step in open_log(run).scalars("train/loss").steps]


def keep_tiny(place: Place) -> None:
    """A configuration to start from, as somebody would keep it for small runs."""
    flat = dict(argument.removeprefix("--").split("=", 1) for argument in place.arguments("unnamed"))
    sections: dict[str, dict[str, str]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
    lines = [
        f"{section}: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}"
        for section, keys in sections.items()
    ]
    (place.path / "configs").mkdir(exist_ok=True)
    (place.path / "configs" / "tiny.yaml").write_text("\n".join(lines))


@pytest.mark.slow
def test_a_run_of_the_form_is_seen_live_with_its_nan_then_stopped_and_resumed_without_a_gap(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    keep_tiny(place)
    page.goto(dashboard.address)
    go_to(page, "Configuration")
    choose(page, "#preset", "tiny")
    expect(page.locator(".cm-content").first).to_contain_text("sequence_length: 32")
    fill(page, "name", NAME)
    fill(page, "loop.steps", "100000")
    fill(page, "faults", "[{step: 5, kind: nan, target: gradient}]")
    expect(page.locator("#verdict")).to_have_text("This configuration is valid.")
    go_to(page, "Training")
    page.locator("#start").click()
    expect(toast(page)).to_contain_text(f"{NAME} is started")

    # It has not begun yet: it turns up in the list that is open already.
    go_to(page, "Monitoring")
    page.locator("#chosen-run input").click()
    page.get_by_role("option", name=re.compile(f"{re.escape(NAME)}$")).click(timeout=START_MS)
    monitor = page.locator("harness-monitor")
    expect(monitor).to_have_attribute("data-state", "running")
    incident = monitor.locator(".h-incidents tbody tr").first.locator("td")
    expect(incident.nth(0)).to_have_text("5")
    expect(incident.nth(1)).to_have_text("non-finite gradient")
    expect(incident.nth(3)).to_have_text("token_embedding.weight")
    last_step = "Number(document.querySelector('harness-monitor').dataset.lastStep)"
    before = page.evaluate(last_step)
    page.wait_for_function(f"before => {last_step} > before", arg=before)

    # Somebody else stops it, from a page that was opened later.
    with watched_page(page.context) as other:
        other.goto(dashboard.address)
        go_to(other, "Training")
        choose(other, "#controlled-run", NAME)
        expect(printed(other)).to_contain_text("step ")
        other.locator("#stop").click()
        expect(toast(other)).to_contain_text(f"{NAME} will finish its step")
    go_to(page, "Training")
    expect(printed(page)).to_contain_text("stopped by SIGTERM:", timeout=30_000)
    reached = int(
        re.findall(r"stopped by SIGTERM: ([\d,]+) steps", printed(page).inner_text())[0].replace(",", "")
    )
    assert losses(place.runs / NAME) == list(range(reached))
    go_to(page, "Monitoring")
    expect(monitor).to_have_attribute("data-state", "stopped")
    expect(monitor).to_have_attribute("data-last-step", str(reached - 1))

    go_to(page, "Training")
    page.locator("#new-steps input").fill(str(reached + 8))
    page.locator("#resume").click()
    expect(printed(page)).to_contain_text("finished:", timeout=START_MS)
    expect(printed(page)).to_contain_text(f"going on at step {reached}")
    assert losses(place.runs / NAME) == list(range(reached + 8))
    go_to(page, "Monitoring")
    expect(monitor).to_have_attribute("data-state", "finished")
    expect(monitor).to_have_attribute("data-last-step", str(reached + 7))
    last = page.evaluate(LAST_OF_LOSS)
    steps_per_point = math.ceil((reached + 8) / page.evaluate(POINTS_OF_LOSS))  # more than one if it got far
    assert reached + 8 - steps_per_point <= last < reached + 8
    expect(monitor.locator(".h-fact", has_text="attempts").locator("b")).to_have_text("2")


@pytest.mark.slow
def test_a_run_is_forked_with_a_change_and_the_fork_is_killed(
    page: Page, dashboard: Dashboard, place: Place, trained: tuple[str, str]
) -> None:
    page.goto(dashboard.address)
    go_to(page, "Training")
    choose(page, "#controlled-run", trained[0])
    page.get_by_role("button", name=re.compile("^Fork the run")).click()
    page.locator("#fork-name textarea, #fork-name input").fill("child")
    page.locator("#fork-changes textarea").fill("optim.lr: 0.02\nloop.steps: 100000")
    page.locator("#fork").click()
    expect(printed(page)).to_contain_text("step 4/", timeout=START_MS)
    assert "lr: 0.02" in (place.runs / "child" / "config.yaml").read_text()

    page.locator("#kill").click()
    expect(page.locator("#kill-question")).to_contain_text("Kill child?")
    page.locator("#spare-it").click()
    expect(page.locator("#kill-it")).not_to_be_visible()
    page.locator("#kill").click()
    page.locator("#kill-it").click()
    expect(toast(page)).to_contain_text("child is killed")
    expect(printed(page)).to_contain_text("[ended by Killed, signal 9]")
    go_to(page, "Runs")
    expect(page.locator('harness-runs tr[data-run="child"] .h-state')).to_have_text("crashed")
    go_to(page, "Training")
    page.locator("#kill").click()
    page.locator("#kill-it").click()
    expect(toast(page)).to_contain_text("there is no program")
    choose(page, "#controlled-run", trained[0])
    page.locator("#fork").click()
    expect(toast(page)).to_contain_text("already exists")


def test_tensorboard_is_started_for_a_run_and_stopped(
    page: Page, dashboard: Dashboard, place: Place, trained: tuple[str, str]
) -> None:
    mirror = tensorboard_dir(place.runs / trained[0])
    wait_for(mirror.is_dir, timeout_s=60, what="the mirror, which is written beside the training")
    page.goto(dashboard.address)
    go_to(page, "TensorBoard")
    choose(page, "#tensorboard-runs", trained[0])
    page.keyboard.press("Escape")
    page.locator("#tensorboard-start").click()
    link = page.locator("#tensorboard-link a")
    expect(link).to_be_visible(timeout=START_MS)
    address = urljoin(dashboard.address, link.get_attribute("href"))

    def tags() -> dict[str, list[str]]:
        with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=10) as answer:
            return dict(json.load(answer))

    wait_for(lambda: bool(tags()), timeout_s=10, what="the run in TensorBoard")
    assert list(tags()) == [trained[0]]
    assert "train/loss" in tags()[trained[0]]
    with page.expect_popup() as opened:
        link.click()
    expect(opened.value.get_by_text(trained[0]).first).to_be_visible(timeout=START_MS)
    opened.value.close()
    page.reload()
    expect(link).to_be_visible()  # what runs is known when the page is opened again
    page.locator("#tensorboard-stop").click()
    expect(page.locator("#tensorboard-link")).to_contain_text("TensorBoard is not running")
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=5)

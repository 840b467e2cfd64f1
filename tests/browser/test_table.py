"""The table of runs: what is found in it, in which order, and runs side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

from playwright.sync_api import Locator, Page, expect

from harness.tracking import RunLog
from tests.browser.actions import open_run
from tests.browser.conftest import Dashboard, Place

HOSTILE = "<img src=x onerror=document.title='broken'>"


def write_run(place: Place, name: str, losses: Sequence[float], **tracking: object) -> None:
    """A finished run with a loss for each step."""
    with RunLog(place.runs / name, info={"config": {"tracking": tracking}}) as log:
        for step, loss in enumerate(losses):
            log.write("step", {"train/loss": loss}, step=step)
        log.end("finished")


def rows_of(page: Page, word: str) -> Locator:
    """The rows that are left when the table is filtered by a word."""
    page.get_by_label("filter runs").fill(word)
    return page.locator("harness-runs tr[data-run]")


def test_runs_are_filtered_sorted_and_grouped(page: Page, dashboard: Dashboard, place: Place) -> None:
    for name, loss, group in (("apple", 2.0, "round"), ("pear", 1.0, "long"), ("plum", 3.0, "round")):
        write_run(place, f"fruit/{name}", [loss], group=group, tags=["ripe" if loss > 1 else "green"])
    page.goto(dashboard.address)
    rows = rows_of(page, "fruit/")
    expect(rows).to_have_count(3)
    page.get_by_role("button", name="loss", exact=True).click()
    expect(rows.locator(".h-link")).to_have_text(["fruit/pear", "fruit/apple", "fruit/plum"])
    page.get_by_role("button", name="loss ▲").click()
    expect(rows.locator(".h-link")).to_have_text(["fruit/plum", "fruit/apple", "fruit/pear"])

    page.get_by_label("group by").select_option("group")
    lines = page.locator("harness-runs tbody tr")
    expect(lines).to_contain_text(["long", "pear", "round", "plum", "apple"])
    page.get_by_label("group by").select_option("folder")
    expect(page.locator("harness-runs .h-group")).to_have_text(["fruit"])
    expect(rows_of(page, "fruit ripe p")).to_have_count(2)
    expect(rows_of(page, "fruit round plum")).to_have_count(1)
    expect(rows_of(page, "fruit no such word")).to_have_count(0)


def compared(page: Page, *runs: str) -> Locator:
    for run in runs:
        page.get_by_label(f"compare {run}", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    return page.locator(".h-compare")


def test_the_first_step_at_which_runs_part_is_named(page: Page, dashboard: Dashboard, place: Place) -> None:
    write_run(place, "part/first", [1.0] * 20)
    write_run(place, "part/later", [1.0] * 7 + [1.5] * 13)
    write_run(place, "part/never", [1.0] * 20)
    page.goto(dashboard.address)
    said = compared(page, "part/first", "part/later", "part/never").locator("p")
    expect(said).to_have_text(
        [
            "part/first and part/later part at step 7: train/loss is 1.0 and 1.5",
            "part/first and part/never are equal, bit for bit, on all 20 steps that both have",
        ]
    )


def test_two_trained_runs_are_compared(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    page.goto(dashboard.address)
    panel = compared(page, *trained)
    # With another rate, the first step is the same until it is taken; the machine's own speed says nothing.
    expect(panel.locator(".h-parting")).to_have_text(
        re.compile(f"^{trained[0]} and {trained[1]} part at step 0: train/lr is ")
    )
    setting = panel.get_by_role("row").filter(has=page.get_by_role("cell", name="optim.lr", exact=True))
    expect(setting.get_by_role("cell")).to_have_text(["optim.lr", "0.001", "0.01"])
    loss = panel.locator('figure[data-plot="train/loss"]')
    expect(loss).to_have_attribute("data-points", "12")
    expect(loss.locator(".u-legend .u-label")).to_have_text(["step", *trained])


def test_hostile_names_and_damaged_logs_are_shown_safely(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    hostile = HOSTILE.replace("/", "")
    with RunLog(place.runs / hostile, info={"host": HOSTILE, "command": [HOSTILE]}) as log:
        log.write("hparams", {HOSTILE: HOSTILE})
        for step in range(20):
            log.write("step", {"train/loss": 1.0, HOSTILE: float(step), "constructor": 1.0}, step=step)
        log.write(
            "event", {"name": "incident", "summary": HOSTILE, "kind": HOSTILE, "parameter": HOSTILE}, step=3
        )
    segment = next((place.runs / hostile / "log").glob("*.jsonl"))
    with segment.open("ab") as file:
        file.write(b'{"kind":"step"\n\xff\xfe\n[1,2\n{"kind":"step","attempt":0,"step":21,"ti')
    (place.runs / "torn" / "log").mkdir(parents=True)
    (place.runs / "torn" / "log" / "00000000.jsonl").write_bytes(b'{"kind":"st')
    monitor = open_run(page, dashboard, hostile)
    expect(monitor.locator("h2")).to_contain_text(hostile)
    expect(monitor.locator(".h-incidents")).to_contain_text(HOSTILE)
    expect(monitor.locator("> .h-note")).to_contain_text("3 lines of the log cannot be read")
    monitor.get_by_text("More metrics").click()
    expect(page.locator("harness-monitor figure", has_text=HOSTILE)).to_be_visible()
    assert page.title() == "Harness"
    assert page.locator("img").count() == 0

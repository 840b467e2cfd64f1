"""The table of runs: what is found in it, in which order, and runs side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, Route, expect

from harness.tracking import RunLog
from tests.browser.actions import hover, open_run
from tests.browser.actions import shown as legend
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


def compare_page(page: Page, dashboard: Dashboard, *runs: str, **more: str) -> Locator:
    what = urlencode([("tab", "Compare"), *(("compare", run) for run in runs), *more.items()])
    page.goto(f"{dashboard.address}#{what}")
    page.reload()
    return page.locator("harness-compare")


def test_columns_are_under_the_runs_that_were_asked_for_though_the_baseline_changes_meanwhile(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    write_run(place, "slow/one", [1.0])
    write_run(place, "slow/two", [2.0])

    def late(route: Route) -> None:
        answer = route.fetch()
        page.wait_for_timeout(600)
        route.fulfill(response=answer)

    panel = compare_page(page, dashboard, "slow/one", "slow/two")
    expect(panel.locator(".h-parting")).to_be_visible()
    page.route("**/api/compare?*", late)
    panel.get_by_label("baseline", exact=True).select_option("slow/two")
    page.wait_for_timeout(100)
    panel.get_by_label("baseline", exact=True).select_option("slow/one")
    page.wait_for_timeout(2000)
    panel.get_by_text("last values").click()
    heads = panel.locator("details", has_text="last values").locator("th")
    values = panel.locator("details", has_text="last values").locator("td")
    shown = dict(zip(heads.all_inner_texts(), values.all_inner_texts(), strict=True))
    assert (shown["slow/one"], shown["slow/two"]) == ("1", "2")


def test_less_the_baseline_goes_step_by_step_or_says_that_it_does_not(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    write_run(place, "less/short", [float(step) for step in range(1000)])
    write_run(place, "less/long", [float(step) for step in range(3000)])
    write_run(place, "less/huge", [float(step) for step in range(5000)])
    panel = compare_page(page, dashboard, "less/long", "less/short", difference="1")
    loss = panel.locator('figure[data-plot="train/loss"]')
    expect(loss).to_have_attribute("data-points", "3000")
    for share in (0.05, 0.1, 0.2):
        hover(page, loss, share)
        assert legend(loss)["less/short"] == "0"
    panel.get_by_label("x axis").select_option("hours")
    expect(panel.get_by_role("status")).to_contain_text("not less the baseline")
    panel = compare_page(page, dashboard, "less/huge", "less/short", difference="1")
    expect(panel.get_by_role("status")).to_contain_text("zoom in")
    hover(page, loss, 1.0)
    assert legend(loss)["less/huge"] != "0"


def test_a_metric_is_added_to_a_comparison_and_removed(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    for name in ("added/one", "added/two"):
        write_run(place, name, [1.0])
    panel = compare_page(page, dashboard, "added/one", "added/two", axis="nothing", **{"compare-zoom": "a-b"})
    expect(panel.locator(".h-parting, p")).to_contain_text("equal, bit for bit")
    panel.get_by_label("another metric").fill("no/such")
    panel.get_by_label("another metric").press("Enter")
    expect(panel.get_by_role("status")).to_have_text("no run has no/such")
    panel.get_by_role("button", name="remove no/such").click()
    expect(panel.get_by_role("status")).to_have_text("")


def test_a_comparison_stays_where_the_server_does_not_answer_and_is_said_to_be_old(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    for name in ("stays/one", "stays/two"):
        write_run(place, name, [1.0, 2.0])
    panel = compare_page(page, dashboard, "stays/one", "stays/two")
    loss = panel.locator('figure[data-plot="train/loss"]')
    expect(loss).to_have_attribute("data-points", "2")
    page.route("**/api/curves?*", lambda route: route.fulfill(status=502, body="{}"))
    expect(panel).to_have_attribute("data-old", "true")
    expect(panel.get_by_role("status")).to_contain_text("the server answered 502; what is shown is of ")
    expect(loss.locator("canvas")).to_be_visible()
    page.unroute("**/api/curves?*")
    expect(panel).not_to_have_attribute("data-old", "true")


def test_more_runs_than_can_be_compared_are_refused_in_words(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    for number in range(13):
        write_run(place, f"many/{number:02}", [1.0])
    page.goto(dashboard.address)
    rows = rows_of(page, "many/")
    expect(rows).to_have_count(13)
    for row in rows.all():
        row.get_by_role("checkbox").check()
    expect(page.get_by_role("button", name="Compare: 13 are chosen, 12 at most")).to_be_disabled()
    rows.first.get_by_role("checkbox").uncheck()
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()


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

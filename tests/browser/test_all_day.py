"""A page that is left open: nothing moves under the hand, and pictures can be trusted."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from itertools import product
from typing import Literal

import pytest
from playwright.sync_api import Page, Route, expect

from harness.tracking import RunLog
from tests.browser.actions import go_to, open_run, picture
from tests.browser.conftest import Dashboard, Place
from tests.browser.test_table import write_run

WIDTHS = (1440, 800, 400)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
# Whether something is drawn in a curve's blue, for each thousandth of the plot's width; below its upper edge.
BLUE_COLUMNS = """(canvas) => {
  const over = canvas.closest('.uplot').querySelector('.u-over').getBoundingClientRect();
  const all = canvas.getBoundingClientRect();
  const scale = canvas.width / all.width;
  const [left, top] = [Math.round((over.left - all.left) * scale), Math.round((over.top - all.top) * scale)];
  const [width, height] = [Math.round(over.width * scale), Math.round(over.height * scale)];
  const { data } = canvas.getContext('2d').getImageData(left, top, width, height);
  const isBlue = (at) => data[at + 3] > 100 && data[at + 2] > data[at] + 60;
  const column = (x) => [...Array(height).keys()].some((y) => isBlue(4 * (y * width + x)));
  return [...Array(1000).keys()].map((share) => column(Math.floor((share * width) / 1000)));
}"""


@pytest.fixture
def moving(place: Place) -> Iterator[str]:
    """A run that gets a step every 50 ms."""
    stop = threading.Event()

    def write() -> None:
        with RunLog(place.runs / "moving") as log:
            step = 0
            while not stop.wait(0.05):
                log.write("step", {"train/loss": 1.0 + step % 7}, step=step)
                step += 1

    thread = threading.Thread(target=write)
    thread.start()
    yield "moving"
    stop.set()
    thread.join()


def test_no_click_and_no_key_on_a_live_table_is_lost(
    page: Page, dashboard: Dashboard, place: Place, moving: str
) -> None:
    """200 of each, on a desk, a tablet and a phone, in light and dark, while figures are new every time."""
    for number in range(2):
        write_run(place, f"still/{number}", [1.0])
    page.goto(dashboard.address)
    row = page.locator('tr[data-run="moving"]').element_handle()
    boxes = [page.get_by_label(f"compare still/{number}", exact=True) for number in range(2)]
    steps = page.locator('tr[data-run="moving"] .h-progress-cell')
    num_clicks = num_presses = 0
    for width, scheme in product(WIDTHS, SCHEMES):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        before = steps.inner_text()
        boxes[0].scroll_into_view_if_needed()
        for turn in range(17):
            page.evaluate("document.querySelector('harness-runs').poll.soon()")
            for box in boxes:
                box.click(timeout=2000)
                assert box.is_checked() == (turn % 2 == 0), (width, scheme, turn)
                page.keyboard.press("Space")
                assert box.is_checked() == (turn % 2 == 1), (width, scheme, turn)
                page.keyboard.press("Space")
            num_clicks, num_presses = num_clicks + 2, num_presses + 4
        page.keyboard.press("Space")
        boxes[0].click()
        expect(steps).not_to_have_text(before)
        assert boxes[0].evaluate("(box) => document.activeElement === box")
    assert (num_clicks, num_presses) == (204, 408)
    assert row is not None
    assert row.evaluate("(row) => row.isConnected")  # the very row, though its figures are new


@pytest.fixture(scope="module")
def troubled(place: Place) -> str:
    """A run with 199 incidents, the last of which has a story."""
    with RunLog(place.runs / "troubled") as log:
        for step in range(400):
            log.write(
                "step",
                {"train/loss": 1.0, "train/lr": 3.5e-4 + step * 1e-9, "huge": 1e300 * (step + 1)},
                step=step,
            )
            if step % 2:
                name = "head.weight" if step % 4 == 1 else "tail.weight"
                log.write(
                    "event",
                    {
                        "name": "incident",
                        "kind": "non-finite gradient",
                        "parameter": name,
                        "reason": f"at {step}",
                    },
                    step=step,
                )
        log.end("finished")
    story = place.runs / "troubled" / "incidents" / "step-00000399" / "story.md"
    story.parent.mkdir(parents=True)
    story.write_text("the attention of block 2 overflowed")
    return "troubled"


def test_incidents_are_counted_folded_and_lead_to_their_place_and_story(
    page: Page, dashboard: Dashboard, troubled: str
) -> None:
    monitor = open_run(page, dashboard, troubled)
    rows = monitor.locator(".h-incidents tbody tr")
    expect(rows).to_have_count(10)
    expect(monitor.get_by_text("100 × non-finite gradient in head.weight")).to_be_visible()
    expect(monitor.get_by_text("100 × non-finite gradient in tail.weight")).to_be_visible()
    rows.first.get_by_role("button", name="399").click()
    expect(monitor.locator(".h-story")).to_contain_text("the attention of block 2 overflowed")
    expect(picture(page, "loss")).to_have_attribute("data-first", "369")
    monitor.get_by_role("button", name="all 200").click()
    expect(rows).to_have_count(200)
    box = monitor.locator(".h-incident-box > .h-scroll")
    assert box.evaluate("(box) => box.scrollHeight > box.clientHeight")


def test_the_group_that_is_chosen_can_be_released_though_others_are_more_frequent_by_now(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    with RunLog(place.runs / "groups") as log:
        log.write("step", {"train/loss": 1.0}, step=0)
        for number in range(12):
            log.write("event", {"name": "incident", "kind": f"kind {number}"}, step=number)
        log.sync()
        monitor = open_run(page, dashboard, "groups")
        chosen = monitor.get_by_role("button", name="1 × kind 11", exact=True)
        chosen.click()
        rows = monitor.locator(".h-incidents tbody tr")
        expect(rows).to_have_count(1)
        for step in (12, 13):
            log.write("event", {"name": "incident", "kind": "another"}, step=step)
        log.end("finished")
    expect(monitor.get_by_role("button", name="2 × another")).to_be_visible()
    expect(chosen).to_have_attribute("aria-pressed", "true")
    chosen.click()
    expect(rows).to_have_count(10)
    expect(chosen).to_have_count(0)  # one of the many again


def test_a_story_tells_of_every_incident_of_its_step_and_why_it_cannot_be_read(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    with RunLog(place.runs / "twice") as log:
        log.write("step", {"train/loss": 1.0}, step=0)
        for kind in ("loss spike", "gradient spike"):
            log.write("event", {"name": "incident", "kind": kind, "reason": f"the {kind}"}, step=0)
        log.end("finished")
    monitor = open_run(page, dashboard, "twice")
    page.route("**/api/story?*", lambda route: route.fulfill(status=502, body="{}"))
    row, story = monitor.locator(".h-incidents tbody tr").last, monitor.locator(".h-story")
    row.click()
    expect(story).to_contain_text("step 0: the loss spike; the gradient spike")
    expect(story).to_contain_text("cannot be read: the server answered 502")
    expect(story).not_to_contain_text("is kept")
    page.unroute("**/api/story?*")
    row.click()
    expect(story).to_contain_text("No story of step 0 is kept")


def test_close_marks_leave_the_picture_to_the_curve(page: Page, dashboard: Dashboard, troubled: str) -> None:
    open_run(page, dashboard, troubled)
    red = """(canvas) => {
      const height = Math.round(canvas.height / 2);
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, height);
      let count = 0;
      for (let at = 0; at < data.length; at += 4) count += data[at + 3] > 40 && data[at] > data[at + 2] + 60;
      return count / (data.length / 4);
    }"""
    loss = picture(page, "loss")
    expect(loss).to_have_attribute("data-marks", "200")
    assert loss.locator("canvas").first.evaluate(red) < 0.01


@pytest.mark.parametrize("title", ["learning rate", "huge"])
def test_labels_of_an_axis_are_whole_at_every_size(
    page: Page, dashboard: Dashboard, troubled: str, title: str
) -> None:
    """The axis is as wide as its widest label; the very text is drawn, and not a part of it."""
    page.add_init_script(
        """
        const draw = CanvasRenderingContext2D.prototype.fillText;
        window.drawn = [];
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
          const width = this.measureText(text).width;
          const left = this.textAlign === 'right' || this.textAlign === 'end' ? x - width : x;
          window.drawn.push({ text, left, title: this.canvas.closest('figure')?.dataset.plot });
          return draw.call(this, text, x, y, ...rest);
        };
        """
    )
    monitor = open_run(page, dashboard, troubled)
    monitor.get_by_text("More metrics").click()
    expect(picture(page, title).locator("canvas").first).to_be_visible()
    page.wait_for_function(f"() => window.drawn.some((one) => one.title === {title!r})")
    drawn = page.evaluate(f"() => window.drawn.filter((one) => one.title === {title!r})")
    labels = {one["text"] for one in drawn if "e" in one["text"]}
    assert len(labels) >= 2, drawn
    assert [one for one in drawn if one["left"] < 0] == []


def test_a_log_axis_says_what_it_has_no_place_for(page: Page, dashboard: Dashboard, place: Place) -> None:
    write_run(place, "signed", [-1.0, 0.0, 1.0, 10.0])
    monitor = open_run(page, dashboard, "signed")
    monitor.get_by_label("log axes").check()
    expect(picture(page, "loss")).to_contain_text("left out without a logarithm: 2")


def test_a_curve_has_a_gap_where_a_value_has_no_place(page: Page, dashboard: Dashboard, place: Place) -> None:
    """No line leads through it, and a value between two gaps is a point."""
    losses = [1.0] * 40 + [0.0] * 40 + [1.0] + [0.0] * 39 + [1.0] * 80
    write_run(place, "gaps", losses)
    monitor = open_run(page, dashboard, "gaps")
    loss = picture(page, "loss")
    monitor.get_by_label("log axes").check()
    expect(loss).to_contain_text("left out without a logarithm: 79")
    drawn = loss.locator("canvas").evaluate(BLUE_COLUMNS)
    assert drawn[100]
    assert drawn[700]
    assert not any(drawn[230:370])  # steps 40 to 80
    assert any(drawn[390:410])  # step 80
    assert not any(drawn[430:570])


def test_what_is_selected_in_the_output_stays_selected(page: Page, dashboard: Dashboard) -> None:
    page.goto(f"{dashboard.address}#tab=Training")
    lines = [f"step {number}\n" for number in range(50)]

    def answer(route: Route) -> None:
        route.fulfill(json={"text": lines.pop(0), "offset": 50 - len(lines)})

    page.route("**/api/output?*", answer)
    page.locator("harness-output").evaluate("(it) => { it.run = 'x'; }")
    printed = page.locator("harness-output pre")
    expect(printed).to_contain_text("step 0")
    printed.evaluate("(pre) => getSelection().setBaseAndExtent(pre.firstChild, 0, pre.firstChild, 6)")
    for _ in range(2):
        seen = printed.inner_text()
        page.locator("harness-output").evaluate("(it) => it.poll.soon()")
        expect(printed).not_to_have_text(seen)
    assert page.evaluate("getSelection().toString()") == "step 0"


def pressed(keys: str) -> dict[str, object]:
    """A press of keys such as Control+-, for the page alone: the browser itself does nothing."""
    modifier, key = keys.split("+", 1)
    held = {"Control": "ctrlKey", "Meta": "metaKey", "Alt": "altKey"}[modifier]
    return {"key": key, held: True, "bubbles": True, "cancelable": True}


def test_a_picture_is_read_by_keyboard(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    open_run(page, dashboard, trained[0])
    loss = picture(page, "loss")
    loss.locator(".h-chart-body").focus()
    page.keyboard.press("ArrowRight")
    expect(loss.locator(".u-legend .u-value").first).to_have_text("0")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(loss.locator(".u-legend .u-value").first).to_have_text("3")
    page.keyboard.press("+")
    expect(loss).not_to_have_attribute("data-last", "11")
    last = loss.get_attribute("data-last") or ""
    page.keyboard.press("-")
    expect(loss).not_to_have_attribute("data-last", last)
    page.keyboard.press("Escape")
    expect(loss).to_have_attribute("data-last", "11")
    for key in ("Control++", "Control+-", "Meta+-", "Alt+-", "Alt+ArrowLeft"):  # the browser's own
        loss.locator(".h-chart-body").dispatch_event("keydown", pressed(key))
    expect(page).not_to_have_url(re.compile("zoom="))
    expect(loss.locator(".u-legend .u-value").first).to_have_text("3")
    heat = page.locator(".h-heat")
    heat.dispatch_event("keydown", pressed("Alt+ArrowDown"))
    expect(page.locator(".h-heat-mark")).not_to_be_visible()
    heat.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".h-heat-mark")).to_be_visible()
    expect(picture(page, "token_embedding.weight: grad_norm")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".h-heat-tip")).to_contain_text("token_embedding.weight, step 8: grad_norm")


def test_figures_of_a_server_that_is_gone_are_said_to_be_old(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    page.route("**/api/**", lambda route: route.abort())
    expect(monitor).to_have_attribute("data-old", "true")
    words = monitor.locator("> .h-note")
    expect(words).to_contain_text("the server does not answer; what is shown is of")
    monitor.locator("summary").last.scroll_into_view_if_needed()
    expect(words).to_be_in_viewport()
    page.unroute("**/api/**")
    expect(monitor).not_to_have_attribute("data-old", "true")
    go_to(page, "Runs")
    page.route("**/api/**", lambda route: route.abort())
    expect(page.locator("harness-runs").get_by_role("status")).to_contain_text("what is shown is of")


def test_a_run_whose_folder_is_gone_is_said_to_be_gone_with_the_time_of_what_is_shown(
    page: Page, dashboard: Dashboard, place: Place
) -> None:
    write_run(place, "gone", [1.0, 2.0])
    monitor = open_run(page, dashboard, "gone")
    shutil.rmtree(place.runs / "gone")
    words = monitor.locator("> .h-note")
    expect(words).to_contain_text(
        re.compile(r"^(there is no run|the log of) '?gone.*[^.]; what is shown is of \d\d:\d\d:\d\d$")
    )
    expect(monitor).to_have_attribute("data-old", "true")
    monitor.locator("summary").last.scroll_into_view_if_needed()
    expect(words).to_be_in_viewport()
    expect(picture(page, "loss").locator("canvas")).to_have_count(1)  # what there was stays
    go_to(page, "Runs")
    expect(page.locator('harness-runs tr[data-run="gone"]')).to_have_count(0)


def test_an_empty_folder_says_what_to_do_first(page: Page, dashboard: Dashboard) -> None:
    empty = {"runs": [], "now": 0, "folder": "runs", "reading": 0}
    page.route("**/api/runs?*", lambda route: route.fulfill(json=empty))
    page.goto(dashboard.address)
    expect(page.locator("harness-runs").get_by_role("status")).to_contain_text(
        "start one in the tab Training"
    )
    go_to(page, "Monitoring")
    expect(page.locator("harness-monitor > .h-note")).to_contain_text("start one in the tab Training")


def test_pictures_turn_dark_with_the_page(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    open_run(page, dashboard, trained[0])
    canvas = picture(page, "loss").locator("canvas")
    light = canvas.evaluate("(it) => it.toDataURL()")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "(light) => document.querySelector('figure[data-plot=loss] canvas').toDataURL() !== light", arg=light
    )

"""A page that is left open: nothing moves under the hand, and pictures can be trusted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from harness.tracking import RunLog
from tests.browser.actions import open_run, picture
from tests.browser.conftest import Dashboard, Place
from tests.browser.test_table import write_run

LABELS = "(figure) => [...figure.querySelectorAll('.u-axis')].map((one) => one.getBoundingClientRect().width)"


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
    for number in range(3):
        write_run(place, f"still/{number}", [1.0])
    page.goto(dashboard.address)
    boxes = [page.get_by_label(f"compare still/{number}", exact=True) for number in range(3)]
    expect(boxes[2]).to_be_visible()
    row = page.locator('tr[data-run="moving"]').element_handle()
    for click in range(100):
        boxes[click % 3].click(timeout=2000)
        assert boxes[click % 3].is_checked() == (click // 3 % 2 == 0), click
    boxes[0].focus()
    for press in range(100):
        page.keyboard.press("Space")
        assert boxes[0].is_checked() == (press % 2 == 0), press
    page.wait_for_timeout(2500)
    assert boxes[0].evaluate("(box) => document.activeElement === box")
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


def test_a_picture_is_read_by_keyboard(page: Page, dashboard: Dashboard, trained: tuple[str, str]) -> None:
    open_run(page, dashboard, trained[0])
    loss = picture(page, "loss")
    loss.locator(".h-chart-body").focus()
    page.keyboard.press("ArrowRight")
    expect(loss.locator(".u-legend .u-value").first).to_have_text("0")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(loss.locator(".u-legend .u-value").first).to_have_text("3")
    heat = page.locator(".h-heat")
    heat.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".h-heat-mark")).to_be_visible()
    expect(picture(page, "token_embedding.weight: grad_norm")).to_be_visible()


def test_figures_of_a_server_that_is_gone_are_said_to_be_old(
    page: Page, dashboard: Dashboard, trained: tuple[str, str]
) -> None:
    monitor = open_run(page, dashboard, trained[0])
    page.route("**/api/**", lambda route: route.abort())
    expect(monitor).to_have_attribute("data-old", "true")
    expect(monitor.locator("> .h-note")).to_contain_text("what is shown is of")
    page.unroute("**/api/**")
    expect(monitor).not_to_have_attribute("data-old", "true")

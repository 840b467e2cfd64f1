"""Text of other people's stays text: in the report, in what the page is told, and in the page itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.dashboard.report import write_report
from harness.tracking import RunLog

ASSETS = Path(__file__).parents[2] / "harness" / "dashboard" / "assets"
PAYLOAD = "\"'></td></script></style><script>alert(1)</script><img src=x onerror=alert(1)>"
PAYLOAD += "$\\frac{${{7*7}}`javascript:`"
OWN_TAGS = ["html", "head", "meta", "meta", "meta", "title", "style", "body", "noscript", "harness-monitor"]
OWN_TAGS += ["script", "script"]


class Tags(HTMLParser):
    """Which tags there are, and which attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run in which every text is hostile."""
    run_dir = tmp_path / PAYLOAD.replace("/", "\\")
    info = {"host": PAYLOAD, "command": [PAYLOAD], "config": {PAYLOAD: PAYLOAD}}
    with RunLog(run_dir, info=info) as log:
        for step in range(3):
            log.write("step", {PAYLOAD: 1.0, "train/loss": 1.0, f"system/gpu0/{PAYLOAD}": 1.0}, step=step)
            log.write("layers", {"grad_norm": {PAYLOAD: 1.0}, PAYLOAD: {PAYLOAD: 2.0}}, step=step)
            log.write("ranks", {PAYLOAD: [1.0, 2.0]}, step=step)
        for name in (PAYLOAD, "incident"):
            log.write("event", {"name": name, "summary": PAYLOAD, PAYLOAD: PAYLOAD}, step=1)
        log.write("hparams", {PAYLOAD: PAYLOAD})
        log.write("end", {"state": PAYLOAD, "reason": PAYLOAD})
    (run_dir / "config.yaml").write_text(f"{PAYLOAD!r}: 1\n")
    return run_dir


def test_the_report_holds_no_tag_but_its_own(run_dir: Path) -> None:
    found = Tags()
    found.feed(write_report(run_dir).read_text())
    assert found.tags == OWN_TAGS
    assert found.attributes <= {"lang", "charset", "name", "http-equiv", "content", "type", "id"}


def test_the_page_makes_no_html_of_text() -> None:
    sinks = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc")
    scripts = list(ASSETS.glob("*.js"))
    assert len(scripts) > 5
    assert [script.name for script in scripts if sinks.search(script.read_text())] == []

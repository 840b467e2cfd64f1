"""One HTML file that tells a run's whole story, opens without a network, and can be mailed."""

from __future__ import annotations

import base64
import html
import io
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import TrackingError
from harness.runlog.names import EventName, Metric, Prefix
from harness.runlog.paths import report_file
from harness.runlog.reader import Event, Run, open_run
from harness.tracking.compare import settings_of
from harness.tracking.overview import summarise
from harness.tracking.panels import draw_layers, draw_metrics, draw_ranks
from harness.tracking.plots import draw_run
from harness.tracking.text import age, damage, number, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report_html", "write_report"]

MAX_EVENTS = 500

SPEED = (
    ("tokens/s", [Metric.TOKENS_PER_S]),
    ("seconds", [Metric.STEP_S, Metric.COMPUTE_S, Metric.DATA_WAIT_S, Metric.CHECKPOINT_BLOCKED_S]),
    ("MFU", [Metric.MFU_FRAC]),
)
MACHINE = (
    ("processor", [Metric.CPU_FRAC, Metric.PROCESS_CPU_CORES]),
    ("memory (GB)", [Metric.RAM_USED_GB, Metric.PROCESS_RAM_GB]),
    ("GPU use", [f"{Prefix.SYSTEM}gpu{i}/util_frac" for i in range(16)]),
    ("GPU memory (GB)", [f"{Prefix.SYSTEM}gpu{i}/memory_used_gb" for i in range(16)]),
    ("GPU temperature (°C)", [f"{Prefix.SYSTEM}gpu{i}/temperature_c" for i in range(16)]),
    ("GPU power (W)", [f"{Prefix.SYSTEM}gpu{i}/power_w" for i in range(16)]),
)

STYLE = """
:root { --ink: #1f2430; --faint: #6b7280; --line: #e6e8ee; --accent: #3566d6; --bad: #cf3a3a; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 1120px;
  padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.state { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; color: white; font-size: .85rem;
  background: var(--accent); vertical-align: middle; margin-left: .6rem; }
.crashed, .stale { background: var(--bad); }
.finished { background: #2c9a68; }
.about { color: var(--faint); overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.numbers div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.numbers b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--faint); font-size: .85rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
td:not(:last-child), th { white-space: nowrap; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; position: sticky; top: 0; background: white; }
.abandoned { color: var(--faint); }
"""


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report; default: `report.html` in the run directory.

    Raises:
        TrackingError: there is no such run, or the file cannot be written.
    """
    run = open_run(run_dir)
    target = Path(path) if path is not None else report_file(run.path)
    try:
        target.write_text(report_html(run), encoding="utf-8")
    except OSError as error:
        raise TrackingError(f"{target} cannot be written: {error.strerror}") from error
    return target


def report_html(run: Run) -> str:
    """The report as one HTML document; pictures are inside it."""
    name = printable(run.path.resolve().name)
    sections = [
        _headline(run, name),
        _section(
            "Training",
            _picture(lambda: draw_run(run), "Loss, gradient norm, learning rate, non-finite values"),
        ),
        _section("Incidents and other events", _events(run.events())),
        _section(
            "Layers", _picture(lambda: draw_layers(run), "Gradient norm of every parameter over the steps")
        ),
        _section("Ranks", _picture(lambda: draw_ranks(run), "Least, mean and greatest over the ranks")),
        _section("Speed", _picture(lambda: draw_metrics(run, SPEED, by_time=False), "Speed over the steps")),
        _section(
            "Machine",
            _picture(lambda: draw_metrics(run, MACHINE, by_time=True), "Use of the machine over time"),
        ),
        _section("Last values", _table(["metric", "value"], _last_values(run))),
        _section("Configuration", _table(["setting", "value"], _settings(run))),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>\n{''.join(sections)}</body></html>\n"
    )


def _headline(run: Run, name: str) -> str:
    summary = summarise(run)
    events = summary["events"]
    shown = {
        "steps": number(summary["num_steps"]),
        "last training loss": number(run.last(Metric.TRAIN_LOSS)),
        "best held-out loss": number(summary["best_val/loss"]),
        "tokens/s": number(run.last(Metric.TOKENS_PER_S)),
        "steps with non-finite values": number(summary["num_nonfinite_steps"]),
        "steps skipped": number(run.last(Metric.SKIPS)),
        "incidents": str(events.get(EventName.INCIDENT, 0)),
        "outlier batches": str(events.get(EventName.OUTLIER, 0)),
        "rollbacks": str(events.get(EventName.ROLLBACK, 0)),
        "attempts": str(summary["attempts"]),
        "duration": age(summary["duration_s"]),
    }
    boxes = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
        for label, value in shown.items()
        if value != "-"
    )
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started or 0.0))
    about = [
        f"started {started}",
        str(run.info.get("host", "")),
        " ".join(map(str, run.info.get("command", []))),
        damage(run.num_damaged) if run.num_damaged else "",
    ]
    return (
        f'<h1>{html.escape(name)}<span class="state {run.state()}">{run.state()}</span></h1>'
        f'<div class="about">{_cell(" · ".join(part for part in about if part))}</div>'
        f'<div class="numbers">{boxes}</div>\n'
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}\n" if content else ""


def _picture(draw: Callable[[], Figure | None], description: str) -> str:
    """Inside an `img`, so that the names within one picture cannot meet those of another.

    Numbers may be anything, and near the end of their range matplotlib fails in many ways: that costs one
    picture.
    """
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            figure = draw()
            if figure is None:
                return ""
            figure.savefig(file, format="svg")
    except Exception as error:  # noqa: BLE001  (said in the report)
        reason = printable(f"{type(error).__name__}: {error}")
        return f'<p class="about">This picture cannot be drawn ({html.escape(reason)}).</p>'
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">'


def _events(events: Sequence[Event]) -> str:
    shown = [event for event in events if event.name != EventName.CHECKPOINT][-MAX_EVENTS:]
    rows = [
        (
            _cell(event.name),
            _cell("" if event.step is None else event.step),
            _cell("abandoned" if event.abandoned else ""),
            _cell(event.text),
        )
        for event in shown
    ]
    return _table(["event", "step", "branch", "details"], rows)


def _last_values(run: Run) -> Iterable[tuple[str, str]]:
    return [(_cell(name), _cell(number(run.last(name)))) for name in run.names()]


def _settings(run: Run) -> Iterable[tuple[str, str]]:
    return [(_cell(name), _cell(value)) for name, value in settings_of(run).items()]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells that are already escaped."""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>' if body else ""


def _cell(value: Any) -> str:
    return html.escape(printable(str(value), longest=2000))

"""One HTML file that tells a run's whole story, opens without a network, and can be mailed.

It is the dashboard's page of the run with the answers of the server inside. Nothing here needs a server: no
Gradio, no FastAPI.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import orjson

from harness.atomic import output_file, write_atomically
from harness.dashboard.bundle import ASSETS, bundled
from harness.dashboard.stories import read_stories
from harness.dashboard.views import embedded_curves, embedded_layers, run_view, settings_view
from harness.errors import TrackingError
from harness.runlog.digest import Digest
from harness.runlog.names import Prefix, main_first, page_names
from harness.runlog.paths import report_file
from harness.runlog.preview import open_whole
from harness.tracking.text import printable

__all__ = ["report_html", "write_report"]

MAX_CURVES, MAX_STATISTICS = 2000, 20
MAX_POINTS, MAX_COLUMNS = 2000, 300
"""Of a curve, and of a heat map, where there are few of them."""
TOTAL_POINTS, TOTAL_CELLS = 150_000, 200_000
"""Of all curves together, and of all heat maps; a point is 10 to 35 bytes, a cell 10."""
FEWEST = 4
"""Points or columns, however many curves there are."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head>
<body><noscript>{title}: this report is drawn by JavaScript, which is turned off here.</noscript>
<harness-monitor></harness-monitor>
<script type="application/json" id="harness-report">{data}</script>
<script>{script}</script>
</body></html>
"""


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report; default: `report.html` in the run directory.

    Raises:
        TrackingError: there is no such run, or the file cannot be written.
    """
    target = Path(path) if path is not None else report_file(run_dir)
    page = report_html(open_whole(run_dir))
    try:
        write_atomically(target if path is None else output_file(target), page)
    except OSError as error:
        raise TrackingError(f"{target} cannot be written: {error.strerror}") from error
    return target


def report_html(digest: Digest) -> str:
    """The report as one HTML document."""
    name = printable(digest.path.resolve().name)
    script = (ASSETS / "uPlot.iife.min.js").read_text(encoding="utf-8")
    script += bundled("report", instead={"api": "embedded"})
    style = "\n".join(
        (ASSETS / f"{one}.css").read_text("utf-8") for one in ("uPlot.min", "dashboard", "report")
    )
    return PAGE.format(
        policy=_policy(script),
        title=html.escape(name),
        style=style,
        data=_inside_script({"run": name, **report_data(digest)}),
        script=script,
    )


def report_data(digest: Digest) -> dict[str, Any]:
    """All that the page may ask of the run, as `assets/embedded.js` answers it, in bounded size."""
    names = main_first(digest.names())[:MAX_CURVES]
    view = run_view(digest)
    curves = embedded_curves(digest, names, max_points=_share(TOTAL_POINTS, len(names), MAX_POINTS))
    rows = sum(name.startswith(Prefix.LAYERS) for name in digest.names())
    columns = _share(TOTAL_CELLS, rows, MAX_COLUMNS)
    layers = {}
    for statistic in view["statistics"][:MAX_STATISTICS]:
        layers[statistic] = embedded_layers(digest, statistic, max_columns=columns)
        curves["xs"].append(layers[statistic].pop("x"))
        layers[statistic]["x"] = len(curves["xs"]) - 1
    return {
        "names": page_names(),
        "version": str(digest.updated),
        "view": view,
        "curves": curves,
        "layers": layers,
        "settings": settings_view(digest),
        "stories": read_stories(digest),
    }


def _share(total: int, among: int, most: int) -> int:
    return min(most, max(FEWEST, total // max(1, among)))


def _inside_script(data: dict[str, Any]) -> str:
    """JSON that no parser of HTML mistakes for the end of a script, and that no terminal obeys."""
    text = orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()
    return re.sub("[<>&]|[^ -~]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    if char in "<>&":
        return f"\\u{ord(char):04x}"
    return char if char.isprintable() else json.dumps(char)[1:-1]


def _policy(script: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"

"""What the dashboard takes to show long runs and many, and what a training beside it notices.

    python scripts/bench_dashboard.py [--steps 1000000] [--metrics 100] [--runs 500]

Makes a folder with that many short runs and one long one, starts `harness dashboard` on it, and measures in
a real browser (Debian's Chromium, without a window) how long it takes from the click on the long run to its
pictures: at once, when the log has been read, and after the dashboard was started again. Then a network
trains on all cores, in turns without and with the dashboard and somebody who watches that very run, who asks
for what the page asks for as often as the page does; the time that a browser takes to draw is not the
dashboard's and is left out there. `--only-training` takes this figure alone, without a browser, on the cores
that it may use (`taskset`). Writes docs/benchmarks/dashboard.json and .md, and dashboard-training.json and
.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
LONG = "a/long one"
WATCHED = [
    *("train/loss", "val/loss", "train/accuracy", "train/lr", "train/grad_norm", "train/grad_norm_clipped"),
    *("guard/num_nan", "guard/num_inf", "guard/skips", "guard/clip_frac", "guard/spike_score"),
    *("speed/tokens_per_s", "time/step_s", "time/compute_s", "time/data_wait_s"),
]
ASK_EVERY_S = 1.2
NUM_PAIRS, BLOCK_S = 24, 4.0


def make_runs(folder: Path, *, num_runs: int, num_steps: int, num_metrics: int) -> int:
    """Short runs and a long one; returns the size of the long one's log in bytes."""
    rng = np.random.default_rng(0)
    for number in range(num_runs):
        write_run(folder / f"group {number % 10}" / f"run {number}", rng, 200 + 3 * number, WATCHED)
    names = [*WATCHED, *(f"metric/{number}" for number in range(num_metrics - len(WATCHED)))]
    write_run(folder / LONG, rng, num_steps, names)
    return sum(file.stat().st_size for file in (folder / LONG / "log").glob("*.jsonl"))


def write_run(run_dir: Path, rng: np.random.Generator, num_steps: int, names: list[str]) -> None:
    from harness.runlog.codec import encode
    from harness.runlog.process import identity
    from harness.runlog.segments import SegmentWriter

    log = SegmentWriter(run_dir / "log")
    began = time.time() - num_steps
    about = {**identity(), "config": {"loop": {"steps": num_steps}, "guard": {"max_norm": 1.0}}}
    log.append(encode("run", about, attempt=0, step=None, time=began))
    for first in range(0, num_steps, 1000):
        rows = rng.standard_normal((min(1000, num_steps - first), len(names))).tolist()
        for step, row in enumerate(rows, first):
            values = dict(zip(names, row, strict=True))
            log.append(encode("step", values, attempt=0, step=step, time=began + step))
    log.append(encode("end", {"state": "finished"}, attempt=0, step=None, time=time.time()))
    log.close()


class Dashboard:
    """`harness dashboard` and the processes that it starts."""

    def __init__(self, runs: Path) -> None:
        program = "from harness.cli.main import main; raise SystemExit(main())"
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "dashboard", "--runs", str(runs), "--port", "0"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.address = next(word for word in said.split() if word.startswith("http://"))
        self.start_s = time.perf_counter() - began

    def ask(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters, doseq=True)
        with urllib.request.urlopen(f"{self.address}api/{path}?{query}", timeout=60) as answer:
            return json.load(answer)

    def all(self) -> list[psutil.Process]:
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def memory_mb(self) -> list[float]:
        """Of the server, and of those that it has started."""
        return [process.memory_info().rss / 1e6 for process in self.all()]

    def signal(self, number: int) -> None:
        for process in self.all():
            process.send_signal(number)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def wait_for(condition: Callable[[], bool], *, every_s: float = 0.05) -> float:
    """Seconds until it holds."""
    began = time.perf_counter()
    while not condition():
        time.sleep(every_s)
    return time.perf_counter() - began


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


def first_picture(chromium: Any, dashboard: Dashboard) -> dict[str, float]:
    """Seconds until the page stands, and from the click on the long run until its curves are drawn."""
    page = chromium.new_page(viewport={"width": 1440, "height": 1000})
    began = time.perf_counter()
    page.goto(dashboard.address)
    link = page.locator("harness-runs").get_by_role("button", name=LONG, exact=True)
    link.wait_for()
    page_s = time.perf_counter() - began
    began = time.perf_counter()
    link.click()
    page.locator('harness-monitor[data-ready="true"] figure[data-plot="loss"] canvas').wait_for()
    seconds = time.perf_counter() - began
    page.close()
    return {"page (s)": page_s, "first picture (s)": seconds}


def showing(runs: Path, *, num_runs: int) -> dict[str, dict[str, float]]:
    """How long everything takes: from nothing, when the log has been read, and after a start."""
    rows: dict[str, dict[str, float]] = {}
    with browser() as chromium:
        dashboard = Dashboard(runs)
        began = time.perf_counter()
        table_s = wait_for(lambda: len(dashboard.ask("runs")["runs"]) == num_runs + 1)
        rows["never read before"] = {"start (s)": dashboard.start_s, "table (s)": table_s}
        rows["never read before"] |= first_picture(chromium, dashboard)
        wait_for(lambda: not dashboard.ask("run", run=LONG)["is_preview"], every_s=1.0)
        rows["never read before"]["read whole (s)"] = time.perf_counter() - began
        rows["read"] = first_picture(chromium, dashboard)
        rows["read"] |= zip(("server (MB)", "its reader (MB)"), dashboard.memory_mb(), strict=False)
        dashboard.close()
        dashboard = Dashboard(runs)
        table_s = wait_for(lambda: len(dashboard.ask("runs")["runs"]) == num_runs + 1)
        rows["started again"] = {"start (s)": dashboard.start_s, "table (s)": table_s}
        rows["started again"] |= first_picture(chromium, dashboard)
        rows["started again"] |= zip(("server (MB)", "its reader (MB)"), dashboard.memory_mb(), strict=False)
        close_s = time.perf_counter()
        curves = dashboard.ask("curves", run=LONG, name=WATCHED, first=1000, last=1700)
        rows["started again"]["close look (s)"] = time.perf_counter() - close_s
        assert len(curves["xs"][0]["steps"]) == 701
        dashboard.close()
    return rows


def training_beside(runs: Path) -> dict[str, float]:
    """Throughput of a training that is watched, as a share of its throughput alone; they take turns."""
    import torch

    from harness.tracking import RunLog

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(512, 512)
    shutil.rmtree(runs / "watched", ignore_errors=True)  # of another time
    dashboard = Dashboard(runs)
    wait_for(lambda: dashboard.ask("runs")["reading"] == 0, every_s=1.0)
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", dashboard.address, "watched"], stdin=subprocess.PIPE
    )
    with RunLog(runs / "watched") as log:
        step = 0

        def train() -> float:
            """Steps per second."""
            nonlocal step
            began, num_steps = time.perf_counter(), 0
            while (seconds := time.perf_counter() - began) < BLOCK_S:
                loss = (model(batch) - batch).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                log.write("step", dict.fromkeys(WATCHED, loss.item()), step=step)
                step, num_steps = step + 1, num_steps + 1
            return num_steps / seconds

        train()
        ratios, alone = [], []
        cpu_before = cpu_s(dashboard)
        for _ in range(NUM_PAIRS):
            for process in (*dashboard.all(), psutil.Process(watcher.pid)):
                process.suspend()
            alone.append(train())
            for process in (psutil.Process(watcher.pid), *dashboard.all()):
                process.resume()
            ratios.append(train() / alone[-1])
    watched_s = NUM_PAIRS * BLOCK_S
    assert watcher.poll() is None
    watcher.kill()
    watcher.wait()
    used = [after - before for before, after in zip(cpu_before, cpu_s(dashboard), strict=True)]
    dashboard.close()
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "steps per second, alone": statistics.median(alone),
        "throughput, watched against alone": quartiles[1],
        "lower quartile": quartiles[0],
        "upper quartile": quartiles[2],
        "server, share of a core": used[0] / watched_s,
        "its reader, share of a core": used[1] / watched_s,
    }


def cpu_s(dashboard: Dashboard) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in dashboard.all()]


def watch(address: str, run: str) -> None:
    """Asks for what the page asks for while it shows a run that is live, over one connection like a browser;
    does nothing with the answers."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)
    seen = ""
    while True:
        asked = {"run": run, "seen": seen, "name": WATCHED, "statistic": "grad_norm", "points": 400}
        try:
            connection.request("GET", "/api/run?" + urllib.parse.urlencode(asked, doseq=True))
            answer = connection.getresponse().read()
        except (http.client.HTTPException, ConnectionError):  # kept too long: a browser opens another one too
            connection.close()
            continue
        seen = re.findall(rb'"version":"([^"]*)"', answer[:200])[0].decode()
        time.sleep(ASK_EVERY_S)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--metrics", type=int, default=100)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="keeps the runs there, for the next time")
    parser.add_argument("--only-training", action="store_true")
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        watch(*arguments.watch)
        return
    import torch
    from results import write_results

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        runs = arguments.folder or Path(temporary, "runs")
        about = {"steps": arguments.steps, "metrics": arguments.metrics, "runs": arguments.runs}
        if not runs.exists():
            make_runs(runs, num_runs=arguments.runs, num_steps=arguments.steps, num_metrics=arguments.metrics)
        about["log (MB)"] = sum(f.stat().st_size for f in (runs / LONG / "log").glob("*.jsonl")) // 10**6
        if not arguments.only_training:
            rows = showing(runs, num_runs=arguments.runs)
            write_results("dashboard", rows, device=torch.device("cpu"), about=about)
        rows = {"a training beside it": training_beside(runs)}
        write_results("dashboard-training", rows, device=torch.device("cpu"), about=about)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

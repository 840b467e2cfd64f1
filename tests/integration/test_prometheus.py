"""A real Prometheus scrapes a real run; `promtool` finds nothing to say about the names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, start, tiny, wait_for
from tests.unit.test_prometheus import free_port, scrape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: apt install prometheus"),
]
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs: [{{job_name: harness, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""


def answer(port: int, query: str) -> list[dict[str, Any]]:
    address = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return found
    except OSError:
        return []


def test_prometheus_scrapes_a_run_and_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    endpoint, port = free_port(), free_port()
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(port=endpoint))
    slow = "--faults=[{step: 9, kind: slow, seconds: 40}, {step: 3, kind: nan}]"
    settings = [
        "--tracking.prometheus=true",
        f"--tracking.prometheus_port={endpoint}",
        "--checkpoint.healthy_after=1",
    ]
    run = start([sys.executable, str(ROOT / "harness/train.py"), *tiny(tmp_path, *settings, slow)])
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: bool(answer(port, "harness_skipped_steps_total == 1")), timeout_s=80, what="a scrape"
        )
        wait_for(lambda: bool(answer(port, "harness_step >= 6")), timeout_s=60, what="step 6")
        text = scrape(endpoint)
        lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert (lint.returncode, lint.stderr) == (0, "")
        dashboard = json.loads((ROOT / "harness/launch/grafana.json").read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        names = {name for query in queries for name in re.findall(r"harness_\w+", query)}
        absent = {"harness_rank_skew_ratio", "harness_rank_compute_seconds", "harness_rank_data_wait_seconds"}
        for name in names - absent:  # those of several ranks
            assert answer(port, name), name
    finally:
        server.kill()
        run.kill()
        server.wait()
        run.communicate()

"""The metrics endpoint: what a scrape gets, in Prometheus's format and by its rules for names."""

from __future__ import annotations

import math
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.runlog.codec import Record
from harness.runlog.paths import HEALTHY, MANIFEST, checkpoints_dir
from harness.runlog.writer import RunLog
from harness.tracking.mirror import MirroredRun
from harness.tracking.mirrors import start_mirrors
from harness.tracking.prometheus import CONTENT_TYPE, PrometheusMirror
from harness.tracking.settings import MirrorSettings
from tests.support.runs import wait_for

SAMPLE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        return str(answer.read().decode())


def parsed(text: str) -> dict[str, float]:
    """Values by name, with the last label's value for those that have several."""
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            name, labels, value = match.groups()
            others = [word for word in re.findall(r'(\w+)="([^"]*)"', labels) if word[0] != "run"]
            values[name + "".join(f"/{label}" for _, label in others[:1])] = float(value)
    return values


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def record(kind: str, values: dict[str, Any], step: int | None = None, attempt: int = 0) -> Record:
    return Record(kind, attempt, step, 1.7e9, values)


@pytest.fixture
def run(tmp_path: Path) -> MirroredRun:
    settings = MirrorSettings(prometheus=True, prometheus_port=free_port(), name='a "run"\\')
    return MirroredRun(tmp_path, settings)


@pytest.fixture
def mirror(run: MirroredRun) -> Iterator[PrometheusMirror]:
    mirror = PrometheusMirror(run, {})
    yield mirror
    mirror.abandon()


STORY = [
    record("run", {"pid": 1}),
    record("step", {"train/loss": 2.0, "speed/tokens_per_s": 100.0}, 0),
    record("step", {"train/loss": math.nan}, 1),
    record("event", {"name": "incident", "kind": "spike", "verdict": "skip"}, 1),
    record("event", {"name": "outlier", "kind": "outlier batch"}, 1),
    record("event", {"name": "checkpoint", "num_steps": 2}, 1),
    record("event", {"name": "rollback"}, 0),
    record("run", {"pid": 2}, attempt=1),
    record("ranks", {"compute_s": [1.0, 3.0, 2.0], "data_wait_s": [0.0, 0.5, 0.0]}, 1),
    record("ledger", {"seconds": {"compute": 6.0, "start": 2.0}, "steps_made": 2}),
    record("system", {"system/cpu_frac": 0.5}, attempt=-1),
]


def test_a_scrape_tells_what_the_log_says(mirror: PrometheusMirror, run: MirroredRun) -> None:
    for one in STORY:
        mirror.take(one)
    saved = checkpoints_dir(run.directory) / "step-00000002"
    saved.mkdir(parents=True)
    (saved / MANIFEST).touch()
    (saved / HEALTHY).touch()
    mirror.commit()
    values = parsed(scrape(run.settings.prometheus_port))
    assert math.isnan(values["harness_train_loss"])
    healthy_at = values.pop("harness_last_healthy_checkpoint_timestamp_seconds")
    assert healthy_at == pytest.approx((saved / MANIFEST).stat().st_mtime)
    expected = {
        "harness_step": 1,
        "harness_tokens_per_second": 100,
        "harness_steps_total": 2,
        "harness_skipped_steps_total": 1,
        "harness_incidents_total/spike": 1,
        "harness_outliers_total": 1,
        "harness_checkpoints_total": 1,
        "harness_rollbacks_total": 1,
        "harness_restarts_total": 1,
        "harness_rank_skew_ratio": 3,
        "harness_slowest_rank": 1,
        "harness_time_seconds/compute": 6,
        "harness_goodput_ratio": 0.75,
        "harness_last_record_timestamp_seconds": 1.7e9,
    }
    assert {name: values[name] for name in expected} == expected


def test_names_and_types_follow_prometheus_rules(mirror: PrometheusMirror, run: MirroredRun) -> None:
    for one in STORY:
        mirror.take(one)
    lines = scrape(run.settings.prometheus_port).splitlines()
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    helped = {line.split()[2] for line in lines if line.startswith("# HELP")}
    assert helped == set(types)
    for name, kind in types.items():
        assert re.fullmatch(r"harness_[a-z0-9_]+", name)
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"(_s|_ms|_frac|_percent)$", name), name
    assert all('run="a \\"run\\"\\\\"' in line for line in lines if not line.startswith("#"))


def test_counters_go_on_where_the_side_process_was_killed(run: MirroredRun) -> None:
    first = PrometheusMirror(run, {})
    for one in STORY[:6]:
        first.take(one)
    state = first.commit()
    first.abandon()
    second = PrometheusMirror(run, state)
    for one in STORY[6:]:
        second.take(one)
    values = parsed(scrape(run.settings.prometheus_port))
    second.close(None)
    assert values["harness_steps_total"] == 2
    assert values["harness_restarts_total"] == 1
    assert values["harness_incidents_total/spike"] == 1


def test_nothing_else_is_served(mirror: PrometheusMirror, run: MirroredRun) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(run.settings.prometheus_port, "/etc/passwd")


def test_the_side_process_serves_a_run_until_its_end(tmp_path: Path) -> None:
    port = free_port()

    def shown() -> dict[str, float]:
        try:
            return parsed(scrape(port))
        except OSError:
            return {}

    with RunLog(tmp_path) as log:
        mirrors = start_mirrors(tmp_path, prometheus=True, prometheus_port=port, tensorboard=False)
        log.write("step", {"train/loss": 1.5}, step=7)
        wait_for(lambda: shown().get("harness_train_loss") == 1.5, what="the scrape")
    assert mirrors.close()
    assert shown() == {}

"""Rules speak when they should, once, and a webhook that hangs or refuses holds up nothing."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.config import AlertConfig
from harness.errors import ConfigError
from harness.runlog.codec import Record
from harness.runlog.nodes import NodeLog
from harness.runlog.reader import open_run
from harness.runlog.writer import RunLog
from harness.tracking.alerts import AlertMirror, Rule, Webhook


def step(number: int, value: float, name: str = "train/loss", time: float | None = None) -> Record:
    return Record("step", 0, number, float(number) if time is None else time, {name: value})


def spoken(config: AlertConfig, values: list[float], name: str = "train/loss") -> list[int]:
    """The steps at which the rule speaks."""
    rule = Rule(config)
    return [i for i, value in enumerate(values) if rule.judge(step(i, value, name))]


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        (AlertConfig(kind="nonfinite", cooldown_s=0), [1.0, math.nan, 2.0, -math.inf], [1, 3]),
        (AlertConfig(kind="above", value=2.0, cooldown_s=0), [1.0, 2.0, 2.1, math.nan], [2]),
        (AlertConfig(kind="below", value=2.0, cooldown_s=0), [3.0, 2.0, 1.9, math.nan], [2]),
        (AlertConfig(kind="spike", value=3.0, window=8), [1.0, 9.0, 1.0, 1.0, 4.0], [4]),
        (AlertConfig(kind="spike", value=3.0, window=8), [1.0, 1.0, math.nan, 1.0, 1.1], []),
        (AlertConfig(kind="drop", value=0.5, window=8), [10.0, 10.0, 11.0, 6.0, 4.0], [4]),
        (AlertConfig(kind="plateau", value=0.01, window=4), [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], []),
        (AlertConfig(kind="plateau", value=0.01, window=4), [5.0, 2.0, 2.1, 2.0, 2.0, 2.0], [5]),
        (AlertConfig(kind="nonfinite", metric="val/*"), [math.nan], []),
        (AlertConfig(kind="nonfinite", metric="train/*"), [math.nan], [0]),
    ],
)
def test_rules_on_metrics(config: AlertConfig, values: list[float], expected: list[int]) -> None:
    assert spoken(config, values) == expected


def test_a_rule_is_silent_while_it_cools_down() -> None:
    values = [math.nan] * 25
    assert spoken(AlertConfig(kind="nonfinite", cooldown_s=10.0), values) == [0, 10, 20]


def test_what_a_rule_kept_to_itself_is_counted_and_said() -> None:
    rule = Rule(AlertConfig(kind="nonfinite", cooldown_s=10.0))
    said = [rule.judge(step(number, math.nan)) for number in range(12)]
    assert said[0] == "train/loss at step 0 is nan"
    assert said[10] == "train/loss at step 10 is nan (9 more since the last alert)"
    assert rule.swallowed(now=15.0) is None
    assert rule.swallowed(now=20.0) == "1 more since the last alert of this rule"
    assert rule.swallowed(now=30.0) is None


def test_all_metrics_of_a_record_are_counted() -> None:
    values = {"train/loss": math.nan, "train/lr": 0.1, "val/loss": math.inf, "val/bits": math.nan}
    said = Rule(AlertConfig(kind="nonfinite", metric="*")).judge(Record("step", 0, 3, 1.0, values))
    assert said == "train/loss at step 3 is nan, and 2 more metrics"


def test_the_end_of_a_run_tells_what_is_left(tmp_path: Path) -> None:
    RunLog(tmp_path).close()
    mirror = AlertMirror(
        (AlertConfig(kind="event", metric="incident"),), node_log=NodeLog(tmp_path), webhook=None, run="here"
    )
    for number in range(4):
        mirror.take(Record("event", 0, number, float(number), {"name": "incident"}))
    mirror.close({"state": "finished"})
    said = [event.details["message"] for event in open_run(tmp_path).events("alert")]
    assert said == ["incident at step 0", "3 more since the last alert of this rule"]


def test_a_rule_on_events_names_the_event_and_its_details() -> None:
    rule = Rule(AlertConfig(kind="event", metric="incident"))
    incident = Record("event", 0, 7, 1.0, {"name": "incident", "rank": 1, "parameter": None})
    assert rule.judge(incident) == "incident at step 7: rank 1"
    assert rule.judge(Record("event", 0, 8, 2.0, {"name": "checkpoint"})) is None


def test_a_stall_is_noticed_by_the_clock() -> None:
    rule = Rule(AlertConfig(kind="stall", value=60.0))
    assert rule.judge_silence(last_record=100.0, now=150.0) is None
    assert rule.judge_silence(last_record=100.0, now=161.0) == "nothing has been logged for 61 s"


def test_layers_and_system_samples_can_be_ruled_on() -> None:
    rule = Rule(AlertConfig(kind="below", metric="system/*disk_free_gb", value=1.0))
    assert rule.judge(Record("system", -1, None, 1.0, {"system/node-1/disk_free_gb": 0.5}))
    rule = Rule(AlertConfig(kind="nonfinite", metric="layers/*"))
    assert rule.judge(Record("layers", 0, 3, 1.0, {"grad_norm": {"a": math.inf}}))


@pytest.mark.parametrize("wrong", [{"window": 0}, {"kind": "spike", "value": 0.0}, {"cooldown_s": -1.0}])
def test_rules_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AlertConfig(**{"kind": "above", **wrong})


class Receiver:
    """A local HTTP server that keeps what it is sent."""

    def __init__(self, delay_s: float = 0.0, status: int = 200) -> None:
        self.received: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                time.sleep(delay_s)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append({"type": self.headers["Content-Type"], **json.loads(body)})
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_an_alert_is_said_logged_and_posted(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    RunLog(tmp_path).close()
    rules = (AlertConfig(kind="nonfinite", metric="*"),)
    mirror = AlertMirror(rules, node_log=NodeLog(tmp_path), webhook=receiver.url, run="here")
    mirror.take(step(41, 1.0))
    mirror.take(step(42, math.nan))
    mirror.close({"state": "finished"})
    assert caplog.messages == ["alert: train/loss at step 42 is nan"]
    [event] = open_run(tmp_path).events("alert")
    assert (event.step, event.details["rule"], event.abandoned) == (42, "nonfinite", False)
    [posted] = receiver.received
    assert posted["type"] == "application/json"
    assert (posted["run"], posted["step"], posted["message"]) == ("here", 42, "train/loss at step 42 is nan")


def test_a_trainer_gone_without_a_word_is_an_alert(tmp_path: Path, receiver: Receiver) -> None:
    mirror = AlertMirror((), node_log=NodeLog(tmp_path), webhook=receiver.url, run="here")
    mirror.close(None)
    assert [m["rule"] for m in receiver.received] == ["crashed"]


def test_a_webhook_that_hangs_holds_up_nobody_and_says_what_it_drops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Receiver(delay_s=3.0)
    webhook = Webhook(slow.url)
    for i in range(150):
        webhook.post({"i": i})
    assert len(slow.received) < 5  # each takes 3 s
    assert any("does not keep up" in message for message in caplog.messages)
    slow.close()


def test_a_webhook_that_refuses_is_tried_again_and_then_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("harness.tracking.alerts.time.sleep", lambda _: None)
    refusing = Receiver(status=503)
    webhook = Webhook(refusing.url)
    webhook.post({"name": "alert"})
    webhook.close()
    refusing.close()
    assert len(refusing.received) == 3
    assert any("takes no alerts" in message for message in caplog.messages)

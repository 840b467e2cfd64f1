"""Rules on metrics and events that tell people: on the terminal, in the log, at W&B, at a webhook.

Runs in the side process, as a mirror like the others: it looks at every record once, over restarts too.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from fnmatch import fnmatchcase
from queue import Full, Queue
from typing import Any

from harness.config import AlertConfig
from harness.runlog.codec import Record
from harness.runlog.events import Alert, event_text
from harness.runlog.names import EventName
from harness.runlog.nodes import NodeLog
from harness.runlog.scalars import scalars_of
from harness.tracking.mirror import Mirror

__all__ = ["AlertMirror", "Rule", "Webhook"]

logger = logging.getLogger(__name__)

POST_TIMEOUT_S = 10.0
POST_TRIES = 3
POST_WAITING = 100


class Rule:
    """One rule and what it remembers of the metrics that it watches."""

    def __init__(self, config: AlertConfig) -> None:
        self.config = config
        self._windows: dict[str, deque[float]] = {}
        self._watched: dict[str, bool] = {}
        self._spoke_at = -math.inf
        self._num_swallowed = 0

    def judge(self, record: Record) -> str | None:
        """What there is to say about the record, unless the rule spoke a short while ago; what it kept to
        itself since then is counted and said along."""
        said = self._event(record) if self.config.kind == "event" else self._metrics(record)
        return self._unless_cooling(said, record.time)

    def judge_silence(self, last_record: float, now: float) -> str | None:
        """What there is to say about nothing having been logged since `last_record`."""
        if self.config.kind != "stall" or now - last_record < self.config.value:
            return None
        if now - self._spoke_at < self.config.cooldown_s:
            return None  # still the same silence, which is asked about again and again
        return self._unless_cooling(f"nothing has been logged for {now - last_record:.0f} s", now)

    def swallowed(self, now: float | None = None) -> str | None:
        """How much was kept back since the rule spoke, once its silence is over; None: at the run's end."""
        if not self._num_swallowed or (now is not None and now - self._spoke_at < self.config.cooldown_s):
            return None
        return f"{self._take_swallowed()} since the last alert of this rule"

    def _unless_cooling(self, said: str | None, now: float) -> str | None:
        if said is None:
            return None
        if now - self._spoke_at < self.config.cooldown_s:
            self._num_swallowed += 1
            return None
        self._spoke_at = now
        return f"{said} ({self._take_swallowed()} since the last alert)" if self._num_swallowed else said

    def _take_swallowed(self) -> str:
        count, self._num_swallowed = self._num_swallowed, 0
        return f"{count} more"

    def _event(self, record: Record) -> str | None:
        if record.kind != "event" or not fnmatchcase(str(record.values.get("name")), self.config.metric):
            return None
        at = "" if "summary" in record.values else f" at step {record.step}"
        details = event_text(record.values)
        return f"{record.values['name']}{at}" + (f": {details}" if details else "")

    def _metrics(self, record: Record) -> str | None:
        if self.config.kind == "stall":
            return None
        said = []
        for name, value in scalars_of(record).items():
            complaint = self._metric(name, value) if self._watches(name) else None
            if complaint:
                said.append(
                    name + ("" if record.step is None else f" at step {record.step}") + f" {complaint}"
                )
        if len(said) < 2:
            return said[0] if said else None
        return f"{said[0]}, and {len(said) - 1} more metrics"

    def _watches(self, name: str) -> bool:
        """Remembered by name: the same names come with every step."""
        watched = self._watched.get(name)
        if watched is None:
            watched = name == self.config.metric or fnmatchcase(name, self.config.metric)
            self._watched[name] = watched
        return watched

    def _metric(self, name: str, value: float) -> str | None:
        kind, limit = self.config.kind, self.config.value
        if kind == "nonfinite":
            return None if math.isfinite(value) else f"is {value}"
        if kind == "above":
            return f"is {value:g}, above {limit:g}" if value > limit else None
        if kind == "below":
            return f"is {value:g}, below {limit:g}" if value < limit else None
        if kind in ("spike", "drop", "plateau") and math.isfinite(value):
            return self._against_window(name, value)
        return None

    def _against_window(self, name: str, value: float) -> str | None:
        config = self.config
        window = self._windows.setdefault(name, deque(maxlen=config.window))
        before = list(window)
        window.append(value)
        if config.kind == "plateau":
            return _plateau(before, value, config)
        if len(before) < max(2, config.window // 4):
            return None
        usual = statistics.median(before)
        if config.kind == "spike" and value > config.value * usual:
            return f"is {value:g}, more than {config.value:g} x the usual {usual:g}"
        if config.kind == "drop" and value < config.value * usual:
            return f"is {value:g}, less than {config.value:g} x the usual {usual:g}"
        return None


def _plateau(before: list[float], value: float, config: AlertConfig) -> str | None:
    """The window's oldest value has not been undercut by the wanted fraction since."""
    if len(before) < config.window:
        return None
    oldest, best = before[0], min([*before[1:], value])
    if best > oldest - config.value * abs(oldest):
        return f"has only gone from {oldest:g} to {best:g} in {config.window} points"
    return None


class AlertMirror(Mirror):
    """Judges every record and tells people.

    Args:
        rules: What to look for.
        node_log: Where alerts are written down; readers and mirrors find them there.
        webhook: Address for a POST of each alert, or None.
        run: Name of the run, as said to the webhook.
    """

    def __init__(
        self, rules: tuple[AlertConfig, ...], *, node_log: NodeLog, webhook: str | None, run: str
    ) -> None:
        self._rules = [Rule(config) for config in rules]
        self._node_log = node_log
        self._webhook = Webhook(webhook) if webhook else None
        self._run = run
        self._last_record = time.time()
        self._last_step: int | None = None

    def take(self, record: Record) -> None:
        if record.kind == "event" and record.values.get("name") == EventName.ALERT:
            return
        if record.kind != "system":  # the node's samples go on when training stalls
            self._last_record = max(self._last_record, record.time)
            self._last_step = record.step if record.step is not None else self._last_step
        for rule in self._rules:
            self._tell(rule, rule.judge(record))

    def idle(self) -> None:
        """Called while there is nothing to take."""
        now = time.time()
        for rule in self._rules:
            self._tell(rule, rule.judge_silence(self._last_record, now) or rule.swallowed(now))

    def commit(self) -> dict[str, Any]:
        return {}

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        if end is None:
            self._speak("crashed", "*", "the training process is gone without a word", "error")
        for rule in self._rules:
            self._tell(rule, rule.swallowed())
        if self._webhook:
            self._webhook.close()
        return {}

    def _tell(self, rule: Rule, message: str | None) -> None:
        if message is not None:
            self._speak(rule.config.kind, rule.config.metric, message, "warning")

    def _speak(self, rule: str, metric: str, message: str, level: str) -> None:
        logger.warning("alert: %s", message)
        alert = Alert(rule=rule, metric=metric, message=message, level=level).to_values()
        self._node_log.write("event", alert, step=self._last_step)
        if self._webhook:
            self._webhook.post({**alert, "run": self._run, "step": self._last_step, "time": time.time()})


class Webhook:
    """Sends JSON to an address from a thread of its own: an address that hangs holds up nothing."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: Queue[dict[str, Any] | None] = Queue(POST_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def post(self, message: dict[str, Any]) -> None:
        """Hands the message over; dropped, and said so, if a hundred wait already."""
        try:
            self._waiting.put_nowait(message)
        except Full:
            logger.warning("the webhook %s does not keep up: an alert was not sent", self._url)

    def close(self) -> None:
        """Sends what waits, for as long as one message may take."""
        try:
            self._waiting.put_nowait(None)
        except Full:
            return
        self._thread.join(POST_TRIES * POST_TIMEOUT_S)

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            self._send(json.dumps(message).encode())

    def _send(self, body: bytes) -> None:
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        for attempt in range(POST_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=POST_TIMEOUT_S):
                    return
            except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
                reason = error
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
            time.sleep(2**attempt)
        logger.warning("the webhook %s takes no alerts: %s", self._url, reason)

"""A request to stop is noted, whatever signal brings it, and is honoured at every point of a run."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.cli.train import run as run_program
from harness.runlog.reader import open_run
from harness.stop import StopRequest
from harness.training import Callback, train
from tests.support.runs import tiny, tiny_config

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_that_asks_for_the_end_is_noted_and_its_handler_given_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


def test_a_signal_that_somebody_ignores_or_handles_is_left_to_them() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGHUP)
            assert (heard, stop.requested) == ([signal.SIGUSR1], False)
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGHUP, ignored)


def test_a_terminal_that_is_gone_raises_nowhere() -> None:
    controller, terminal = os.openpty()
    kept = os.dup(2)
    os.dup2(terminal, 2)
    os.close(terminal)
    try:
        with StopRequest() as stop:
            os.close(controller)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(2, b"x")
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason == "SIGHUP"
            assert os.write(2, b"into nowhere") == 12
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_outside_the_main_thread_a_run_is_possible_without_signals() -> None:
    requests: list[StopRequest] = []

    def other_thread() -> None:
        with StopRequest() as stop:
            requests.append(stop)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(requests) == 1


class _StopsAt(Callback):
    """Asks for the end at a hook; counts what the loop still did."""

    def __init__(self, hook: str, at: int) -> None:
        self.hook, self.at = hook, at
        self.steps = 0

    def on_step(self, run: Any, record: Any) -> None:
        self.steps += 1
        if self.hook == "step" and record.step == self.at:
            run.stop.requested = True

    def on_eval(self, run: Any, step: int, metrics: Any) -> None:
        if self.hook == "eval":
            run.stop.requested = True

    def on_saved(self, run: Any, outcome: Any) -> None:
        if self.hook == "save":
            run.stop.requested = True


def _outcome(folder: Path) -> tuple[list[float], list[float]]:
    run = open_run(folder / "tiny")
    return run.scalars("train/loss").values.tolist(), run.scalars("val/loss").values.tolist()


WHOLE = ["--loop.steps=9", "--loop.eval_every=3", "--checkpoint.every=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float]]:
    """The losses of the run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(folder, *WHOLE))
    return _outcome(folder / "runs")


@pytest.mark.parametrize(("hook", "at"), [("start", 0), ("step", 2), ("step", 5), ("eval", 0), ("save", 0)])
def test_a_stop_at_any_point_is_committed_and_the_run_goes_on_as_if_it_had_not_been(
    hook: str, at: int, tmp_path: Path, whole: tuple[list[float], list[float]]
) -> None:
    parts = [f"--runs_dir={tmp_path / 'parts'}", *WHOLE]
    stop = StopRequest()
    stop.requested = hook == "start"
    stopped = train(tiny_config(tmp_path, *parts), stop=stop, callbacks=[_StopsAt(hook, at)])
    assert (stopped.status, stopped.reason) == ("stopped", "a callback")
    assert len(_outcome(tmp_path / "parts")[0]) == stopped.steps <= 9
    assert (tmp_path / f"parts/tiny/checkpoints/step-{stopped.steps:08d}").is_dir()
    assert train(tiny_config(tmp_path, *parts)).status == "finished"
    assert _outcome(tmp_path / "parts") == whole


class _Done(Callback):
    """Says that the run is done."""

    def on_step(self, run: Any, record: Any) -> None:
        if record.step == 1:
            run.stop.requested = True  # a signal would do the same
            run.stop.finish("a loss that is low enough")


def test_a_run_that_a_callback_calls_done_is_finished_and_says_why(tmp_path: Path) -> None:
    assert run_program([*tiny(tmp_path), "--callbacks=[tests.unit.test_stop:_Done]"]) == 0
    end = open_run(tmp_path / "runs" / "tiny").end
    assert end == {"state": "finished", "reason": "a loss that is low enough"}
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_bytes())
    assert (summary["status"], summary["reason"]) == ("finished", "a loss that is low enough")
    assert (tmp_path / f"runs/tiny/checkpoints/step-{summary['steps']:08d}").is_dir()


def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--loop.steps=6", "--loop.eval_every=3", "--loop.micro_batch=1", "--loop.eval_samples=40"]
    whole = [f"--runs_dir={tmp_path / 'whole'}", *common]
    train(tiny_config(tmp_path, *whole))
    from harness.training import evaluate as module

    stop, evaluated = StopRequest(), 0
    run_loss = module.run_loss

    def counted(*args: Any) -> Any:
        nonlocal evaluated
        evaluated += 1
        stop.requested = stop.requested or evaluated > 5
        return run_loss(*args)

    monkeypatch.setattr(module, "run_loss", counted)
    parts = [f"--runs_dir={tmp_path / 'parts'}", *common]
    stopped = train(tiny_config(tmp_path, *parts), stop=stop)
    monkeypatch.undo()
    assert (stopped.status, stopped.steps, evaluated) == ("stopped", 3, 6)
    assert train(tiny_config(tmp_path, *parts)).status == "finished"
    assert _outcome(tmp_path / "parts") == _outcome(tmp_path / "whole")

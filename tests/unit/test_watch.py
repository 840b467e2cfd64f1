"""`harness watch` on a real terminal, of every size and while that changes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runlog.reader import open_run
from harness.tracking import RunLog
from harness.tracking.watch import CLEAR, FORMER_SCREEN, _own_screen, frame
from tests.support.runs import ROOT

NAME = "quickstart"
SIZES = [(24, 10), (40, 12), (80, 24), (24, 10)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run that goes on, with every metric that is watched and many events."""
    with RunLog(tmp_path / NAME) as log:
        for step in range(50):
            values = {"train/loss": 3.125 - step / 1000, "train/lr": 1e-4, "train/grad_norm": -1.2345e-300}
            values |= {"speed/tokens_per_s": 123456.0, "time/step_s": 0.1, "guard/skips": 3.0}
            log.write("step", values, step=step)
            if step % 5 == 0:
                log.write("event", {"name": "incident", "parameter": "weight" * 20}, step=step)
        log.sync()
        yield log.run_dir
        log.end("finished")


def resize(terminal: int, columns: int, lines: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def said_until(terminal: int, is_enough: str, *, timeout_s: float = 60.0) -> str:
    """What is written to a terminal, up to a pattern."""
    said, deadline = "", time.monotonic() + timeout_s
    while not re.search(is_enough, said, re.DOTALL):
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], said
        said += os.read(terminal, 1 << 16).decode(errors="replace")
    return said


def test_name_step_and_loss_stay_at_every_size_and_while_it_changes(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    resize(ours, *SIZES[0])
    program = "from harness.cli.main import main; raise SystemExit(main())"
    watching = subprocess.Popen(
        [sys.executable, "-c", program, "watch", str(run_dir), "--every", "30"],
        stdout=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    try:
        for columns, lines in SIZES:
            resize(ours, columns, lines)
            watching.send_signal(signal.SIGWINCH)  # as a terminal does to those that it controls
            last_line = re.escape(CLEAR) + ".*step 45"
            screen = said_until(ours, last_line).rsplit(CLEAR, 1)[1].split("\r\n")
            text = "\n".join(screen)
            assert len(screen) <= lines, text
            assert max(map(len, screen)) <= columns, text
            assert text.startswith(NAME)
            assert re.search(r"running +step 49\b", text), text
            assert re.search(r"^loss +3\.076\b", text, re.MULTILINE), text
        watching.send_signal(signal.SIGINT)
        # What was on the terminal before comes back, and the last frame stays below it.
        assert NAME in said_until(ours, re.escape(FORMER_SCREEN) + ".*step 45").rsplit(FORMER_SCREEN, 1)[1]
        assert watching.wait(timeout=30) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_gives_the_terminal_back(run_dir: Path, ending: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    resize(ours, *SIZES[0])
    program = "import sys; from harness.tracking.watch import watch_run; watch_run(sys.argv[1], every_s=30)"
    watching = subprocess.Popen([sys.executable, "-c", program, run_dir], stdout=theirs, cwd=ROOT)
    os.close(theirs)
    try:
        said_until(ours, re.escape(CLEAR) + ".*step 45")
        watching.send_signal(ending)
        said_until(ours, re.escape(FORMER_SCREEN) + ".*step 45")
        assert watching.wait(timeout=30) == 128 + ending
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)


def test_handlers_of_signals_come_back_and_what_is_ignored_stays_ignored(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
    try:
        with os.fdopen(theirs, "w") as stream, _own_screen(stream):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)
        os.close(ours)


@pytest.mark.parametrize("width", [1, 10, 24, 40, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 10, 24])
def test_a_frame_is_never_larger_than_the_terminal(run_dir: Path, width: int, height: int) -> None:
    lines = frame(open_run(run_dir), width, height).split("\n")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_number_is_whole_where_its_label_has_no_room(run_dir: Path) -> None:
    assert "\ngradient no -1.2345e-300\n" in frame(open_run(run_dir), 24)


def test_wide_letters_count_twice(tmp_path: Path) -> None:
    with RunLog(tmp_path / ("训练" * 10)) as log:
        log.write("step", {"train/loss": 1.0}, step=0)
        assert frame(open_run(log.run_dir), 24).split("\n")[0] == "训练" * 5 + "训…"

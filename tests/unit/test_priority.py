"""Helper processes that give way: in their own session, and not at the cost of another's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")
needs_autogroup = pytest.mark.skipif(
    not AUTOGROUP.exists(), reason="this kernel does not group processes by session"
)

TELL = """
import os, pathlib, sys, threading
from harness.priority import yield_to_others
yield_to_others()
"""
POLICY_OF_A_THREAD = """
def tell(): print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))
thread = threading.Thread(target=tell); thread.start(); thread.join()
"""
SESSION = "print(pathlib.Path('/proc/self/autogroup').read_text().split()[-1])\n"
SESSION_OF_A_CHILD = """
import subprocess
from harness.priority import pass_on_to
child = subprocess.Popen(['sleep', '60'], start_new_session=True)
pass_on_to(child.pid)
print(pathlib.Path(f'/proc/{child.pid}/autogroup').read_text().split()[-1])
child.kill(); child.wait()
"""


def start(program: str, *, new_session: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=new_session)


def said(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            with process:
                process.kill()  # one that hangs; else this does nothing
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


@needs_linux
def test_threads_started_later_give_way_too() -> None:
    assert said([start(TELL + POLICY_OF_A_THREAD)]) == [f"{os.SCHED_BATCH} 19"]


@needs_autogroup
def test_the_session_of_the_helper_is_made_nice_even_when_many_ask_at_once() -> None:
    assert said([start(TELL + SESSION) for _ in range(4)]) == ["19"] * 4


@needs_autogroup
def test_a_child_in_a_session_of_its_own_gets_what_its_parent_has() -> None:
    assert said([start(TELL + SESSION_OF_A_CHILD)]) == ["19"]


@needs_autogroup
def test_a_helper_whose_trainer_is_gone_takes_its_share_again() -> None:
    again = "from harness.priority import stop_yielding\nstop_yielding()\n"
    assert said([start(TELL + again + SESSION)]) == ["0"]


@needs_autogroup
def test_a_session_that_others_share_is_left_alone() -> None:
    before = AUTOGROUP.read_text()
    said([start(TELL, new_session=False)])
    assert AUTOGROUP.read_text() == before


def test_a_kernel_without_autogroup_is_no_trouble(tmp_path: Path) -> None:
    missing = "import harness.priority as p; p.Path = lambda _: __import__('pathlib').Path('/nowhere')\n"
    assert said([start(missing + TELL + "print('well')")]) == ["well"]

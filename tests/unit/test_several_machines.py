"""What a program on several machines needs of its launcher, and of an attempt that has not ended yet."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import TrackingError
from harness.parent import RENDEZVOUS_SETTINGS, missing_settings
from harness.runlog.writer import RunLog
from tests.support.runs import ROOT

HOLDS = """
import sys
from harness.runlog.writer import RunLog
log = RunLog(sys.argv[1])
print(flush=True)
input()
"""


def test_a_new_attempt_waits_for_the_end_of_the_writer_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(TrackingError, match="being written by"):
            RunLog(tmp_path)
        began = time.monotonic()
        with pytest.raises(TrackingError, match="being written by"):
            RunLog(tmp_path, wait_s=0.3)
        assert time.monotonic() - began >= 0.3
        writer.stdin.write(b"\n")
        writer.stdin.flush()
        RunLog(tmp_path, wait_s=60.0).close()


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "1"}, []),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "GROUP_WORLD_SIZE": "2"}, []),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"},
            ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", f"--rdzv-conf {RENDEZVOUS_SETTINGS}"],
        ),
        (
            {
                "TORCHELASTIC_MAX_RESTARTS": "3",
                "GROUP_WORLD_SIZE": "2",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "PET_RDZV_CONF": "keep_alive_interval=2",
            },
            [],
        ),
    ],
)
def test_it_is_said_what_agents_lack(
    variables: dict[str, str], missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.parent._is_launcher", lambda pid: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert missing_settings() == missing


def test_the_launch_file_of_several_machines_has_what_the_program_asks_for() -> None:
    text = (ROOT / "harness" / "launch" / "torchrun.sh").read_text()
    assert RENDEZVOUS_SETTINGS in text
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text

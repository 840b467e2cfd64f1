"""A process computes with its share of the cores, unless somebody has said how many threads it shall have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.config import ParallelConfig
from harness.dist import threads, use_threads
from harness.errors import ConfigError

ROOT = Path(__file__).parents[2]
ASK = "from harness import env; print(env.threads_are_users())"
LAUNCH = f"""
import os, subprocess, sys
told = dict(word.split("=") for word in sys.argv[1:])
subprocess.run([sys.executable, "-c", {ASK!r}], env={{**os.environ, **told}}, check=True)
"""
TORCHRUN = ["LOCAL_RANK=0", "TORCHELASTIC_RUN_ID=x"]
ACCELERATE = ["ACCELERATE_MIXED_PRECISION=no"]


@pytest.mark.parametrize(
    ("users", "launchers", "is_users"),
    [
        ({}, [], False),
        ({"OMP_NUM_THREADS": "1"}, [], True),
        ({"MKL_NUM_THREADS": "3"}, [], True),
        ({}, [*TORCHRUN, "OMP_NUM_THREADS=1"], False),
        ({}, [*ACCELERATE, "OMP_NUM_THREADS=1"], False),
        ({"OMP_NUM_THREADS": "1"}, [*TORCHRUN, "OMP_NUM_THREADS=1"], True),
        ({"OMP_NUM_THREADS": "1"}, [*ACCELERATE, "OMP_NUM_THREADS=1"], True),
        ({"MKL_NUM_THREADS": "1"}, [*ACCELERATE, "OMP_NUM_THREADS=1"], True),
        ({"OMP_NUM_THREADS": "4"}, [*TORCHRUN, "OMP_NUM_THREADS=4"], True),
        ({}, [*ACCELERATE, "OMP_NUM_THREADS=6"], True),  # --num_cpu_threads_per_process
        ({}, TORCHRUN, False),
    ],
)
def test_a_users_word_is_told_from_a_launchers(
    users: dict[str, str], launchers: list[str], is_users: bool
) -> None:
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH")
    clean = {name: value for name, value in os.environ.items() if name in keep}
    command = [sys.executable, "-c", LAUNCH, *launchers]
    environment = {**clean, "PYTHONPATH": str(ROOT), **users}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(is_users)


def group(root: Path, path: str, **files: str) -> None:
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / path / name.replace("__", ".")).write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b": {"cpu__max": "150000 100000\n"}}, 1.5),
        ("0::/a/b\n", {"a/b": {"cpu__max": "max 100000\n"}, "a": {"cpu__max": "400000 100000\n"}}, 4.0),
        ("0::/of/the/host\n", {"": {"cpu__max": "200000 100000"}}, 2.0),
        ("0::/\n", {"": {"cpu__max": "max 100000\n"}}, float("inf")),
        ("0::/\n", {}, float("inf")),
        ("0::/\n", {"": {"cpu__max": "garbage"}}, float("inf")),
        (
            "4:cpu,cpuacct:/a\n3:memory:/b\n0::/\n",
            {"cpu,cpuacct/a": {"cpu__cfs_quota_us": "300000\n", "cpu__cfs_period_us": "100000\n"}},
            3.0,
        ),
        (
            "4:cpu:/a\n",
            {"cpu/a": {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}},
            float("inf"),
        ),
    ],
)
def test_a_control_groups_quota_limits_the_cores(
    membership: str, files: dict[str, dict[str, str]], cores: float, tmp_path: Path
) -> None:
    for path, content in files.items():
        group(tmp_path, path, **content)
    assert threads._quota(membership, tmp_path) == cores


@pytest.mark.parametrize(
    ("mine", "launchers", "local_world_size", "share"),
    [
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (8, 8, 3, 2),
        (2, 2, 4, 1),
        (8, 64, 8, 8),
        (32, 64, 8, 8),
        (1, 64, 1, 1),
        (8, 1, 2, 4),
    ],
)
def test_cores_are_divided_once(
    mine: int, launchers: int, local_world_size: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda pid: mine if pid == os.getpid() else launchers)
    assert threads._share(local_world_size) == share


def test_the_setting_wins_and_what_was_set_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    use_threads(0, local_world_size=1)
    assert torch.get_num_threads() == 1
    assert use_threads(3, local_world_size=1) == "3 threads per process, as parallel.threads says"
    assert torch.get_num_threads() == 3
    use_threads(0, local_world_size=1000)
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "as OMP_NUM_THREADS says" in use_threads(0, local_world_size=1)
    with pytest.raises(ConfigError, match=r"parallel\.threads"):
        ParallelConfig(threads=-1)


SAY = """
import torch
from harness import env
from harness.dist import use_threads
print(use_threads(0, local_world_size=env.launched().local_world_size), torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, "1"])
@pytest.mark.parametrize(
    "launcher", [["accelerate", "launch"], ["torchrun", "--standalone", "--nproc-per-node=2"]]
)
def test_launchers_leave_no_core_idle(launcher: list[str], own: str | None, tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(SAY)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if own is None else {"OMP_NUM_THREADS": own})
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(script)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    processes = 2 if launcher[0] == "torchrun" else 1
    expected = threads._share(processes) if own is None else 1
    assert said.split()[-1] == str(expected)
    assert said.count("OMP_NUM_THREADS says") == (0 if own is None else processes)

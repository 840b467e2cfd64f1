"""One program, many launchers: each starts the world that it was told to, and the run comes to its end."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from harness.runlog.reader import open_run
from tests.support.runs import PROGRAM, ROOT, program, tiny

BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch"]
ACCELERATE_FILE = ROOT / "harness" / "launch" / "accelerate.yaml"
TORCHRUN = [str(BIN / "torchrun"), "--standalone"]

LAUNCHERS = {
    "python file": ([sys.executable], PROGRAM, 1),
    "python -m": ([sys.executable, "-m"], "harness.train", 1),
    "harness command": ([str(BIN / "harness")], "train", 1),
    "accelerate": ([*ACCELERATE, "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"], PROGRAM, 1),
    "torchrun 1": ([*TORCHRUN, "--nproc-per-node=1"], PROGRAM, 1),
    "torchrun 2": ([*TORCHRUN, "--nproc-per-node=2"], PROGRAM, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_starts_its_world_and_the_run_finishes(name: str, tmp_path: Path) -> None:
    launcher, target, world_size = LAUNCHERS[name]
    code, output = program(tiny(tmp_path, "--loop.steps=4"), launcher=launcher, target=target)
    assert code == 0, output
    assert open_run(tmp_path / "runs/tiny").info["world_size"] == world_size
    assert re.search(r"\b\d+ threads per process", output), output


@pytest.mark.slow
def test_the_accelerate_configuration_starts_ddp_over_gloo_where_there_is_no_gpu(tmp_path: Path) -> None:
    settings = yaml.safe_load(ACCELERATE_FILE.read_text())
    assert (settings["distributed_type"], settings["mixed_precision"]) == ("MULTI_GPU", "bf16")
    launcher = [*ACCELERATE, f"--config_file={ACCELERATE_FILE}", "--num_processes=2"]
    code, output = program(
        tiny(tmp_path, "--loop.steps=4", "--parallel.device=cpu"),
        launcher=[*launcher, "--main_process_port=0"],
    )
    assert code == 0, output
    assert open_run(tmp_path / "runs/tiny").info["world_size"] == 2


@pytest.mark.slow
def test_the_program_needs_no_installation_and_shadows_no_module(tmp_path: Path) -> None:
    """Else `harness/` itself would stay on the path, and its env.py and logs.py be found as modules."""
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "import importlib.util as u, os\n"
        "def leave(code): raise SystemExit(code)\n"
        "leaving, os._exit = os._exit, leave\n"
        f"try: runpy.run_path({PROGRAM!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('shadows', [n for n in ('errors', 'env', 'logs', 'records') if u.find_spec(n)])\n"
        "twice = [n for n in sys.modules if n in ('config', 'errors', 'dist')]; print('twice', twice)"
    )
    script = tmp_path / "start.py"
    script.write_text(code)
    exit_code, output = program([], target=str(script), cwd=tmp_path)
    assert exit_code == 0, output
    assert "shadows []" in output
    assert "twice []" in output

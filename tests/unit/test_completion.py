"""What `harness completion` prints, asked as the shells ask it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.cli.completion import SHELLS, completed_commands
from harness.cli.main import COMMANDS, main
from harness.config.presets import preset_names


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    commands = completed_commands()
    return {name: make(commands) for name, make in SHELLS.items()}


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    asked = f"COMP_WORDS=({shlex.join(['harness', *words])}); COMP_CWORD={len(words)}; _harness"
    program = f'source {script}; {asked}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return set(subprocess.check_output(["bash", "-c", program], text=True, cwd=script.parent).split())


def test_bash_completes_commands_options_values_and_runs(scripts: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(scripts["bash"])
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "re") == {"replay", "report"}
    assert completed(script, "train", "--loop.st") == {"--loop.steps"}
    assert completed(script, "train", "--config", "") == set(preset_names())
    assert completed(script, "export", "--format", "") >= {"csv", "hf", "json", "parquet", "safetensors"}
    assert completed(script, "launch", "--print", "slu") == {"slurm"}
    assert completed(script, "show", "m") == {"mine"}
    assert completed(script, "completion", "") == {"bash", "fish", "zsh"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_reads_its_script(scripts: dict[str, str], shell: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(scripts[shell])
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_the_command_prints_the_script_of_the_shell(
    scripts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "fish"]) == 0
    assert capsys.readouterr().out.rstrip() == scripts["fish"]
    for name in COMMANDS:
        assert f"-a {name} " in scripts["fish"]

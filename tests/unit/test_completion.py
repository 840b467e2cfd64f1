"""What `harness completion` prints, asked as the shells ask it."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
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
    return set(filter(None, bash(program, script.parent).splitlines()))


def bash(program: str, folder: Path) -> str:
    # Where CDPATH is set, cd prints what it finds.
    environment = {**os.environ, "CDPATH": str(folder)}
    return subprocess.check_output(["bash", "-c", program], text=True, cwd=folder, env=environment)


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


HOSTILE = ("$(touch ran)", "`touch ran`", "a;touch ran", "my run", "*", "it's", "-n")


def make_runs(folder: Path) -> None:
    for name in HOSTILE:
        (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / "file").touch()


def test_bash_takes_names_of_runs_for_what_they_are(scripts: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(scripts["bash"])
    assert completed(script, "show", "") == set()
    (tmp_path / "runs").mkdir()
    assert completed(script, "show", "") == set()
    make_runs(tmp_path)
    offered = completed(script, "show", "")
    typed = bash(f"printf '%s\\n' {' '.join(offered)}", tmp_path)
    assert sorted(typed.splitlines()) == sorted(HOSTILE)
    assert completed(script, "show", "my r") == completed(script, "show", r"my\ r") == {r"my\ run"}
    assert not (tmp_path / "ran").exists()


def test_fish_takes_names_of_runs_for_what_they_are(scripts: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "completion").write_text(scripts["fish"])
    asked = "source completion; complete -C 'harness show '"
    (tmp_path / "runs").mkdir()
    assert fish(asked, tmp_path) == []
    make_runs(tmp_path)
    assert sorted(fish(asked, tmp_path)) == sorted(HOSTILE)
    assert not (tmp_path / "ran").exists()


def fish(program: str, folder: Path) -> list[str]:
    environment = {**os.environ, "HOME": str(folder), "CDPATH": str(folder)}
    command = ["fish", "--no-config", "-c", program + "; echo $PWD"]
    *offered, last = subprocess.check_output(command, text=True, cwd=folder, env=environment).splitlines()
    assert last == str(folder)  # the shell stays where it was
    return offered


COMPINIT = "autoload -Uz compinit && compinit -u -D"


@pytest.mark.parametrize("start", ["fpath=($PWD $fpath); " + COMPINIT, COMPINIT + "; source ./_harness"])
def test_the_first_tab_in_zsh_completes(scripts: dict[str, str], start: str, tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_harness").write_text(scripts["zsh"] + "\n")
    make_runs(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(tmp_path)})
    try:
        os.write(terminal, f"{start}; echo rea''dy\n".encode())
        assert is_shown(terminal, b"ready\r")
        os.write(terminal, b"harness show m\t")
        assert is_shown(terminal, rb"my\ run")
    finally:
        os.close(terminal)  # which ends the shell
        os.waitpid(pid, 0)
    assert not (tmp_path / "ran").exists()


def is_shown(terminal: int, text: bytes, *, timeout_s: float = 60) -> bool:
    """Whether a terminal shows `text` before long."""
    shown, until = b"", time.monotonic() + timeout_s
    while text not in shown and time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1 << 16)
    return text in shown


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

"""Files that are replaced, locks and helper processes: each in one place for everybody."""

import json
import multiprocessing
import os
import subprocess
import threading
from pathlib import Path

import pytest

from harness.atomic import output_file, replacing, write_atomically
from harness.env import child_environment
from harness.helper import start_helper
from harness.locks import LockHeldError, ProcessLock, locked


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as unfinished:  # noqa: PT012  (the block is what fails)
        unfinished.write_text("half of the n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    write_atomically(path, b"new", sync=True)
    assert path.read_bytes() == b"new"


def test_a_file_that_is_there_is_replaced_only_where_that_is_wanted(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "first", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", "second", overwrite=False)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a", "first")]


def test_a_path_from_the_command_line_is_written_through_links_and_only_to_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "to nowhere").symlink_to("new")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for name, meant in (("link", "file"), ("to nowhere", "new"), ("file", "file")):
        write_atomically(output_file(tmp_path / name), name)
        assert (tmp_path / meant).read_text() == name
    assert (tmp_path / "link").is_symlink()
    for other in (".", "/", "", "/dev/null", tmp_path, tmp_path / "circle", tmp_path / "pipe"):
        with pytest.raises(OSError, match=r"directory|not a regular file"):
            output_file(other)


def test_many_who_write_one_file_at_once_leave_one_whole_one(tmp_path: Path) -> None:
    def write(letter: str) -> None:
        for _ in range(50):
            write_atomically(tmp_path / "a", letter * 10_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "a").read_text())) == 1
    assert len((tmp_path / "a").read_text()) == 10_000
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def _count(folder: Path) -> None:
    for _ in range(50):
        with locked(folder / "lock"):
            (folder / "count").write_text(str(int((folder / "count").read_text()) + 1))


def test_a_lock_keeps_processes_and_threads_apart(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    others = [
        context.Process(target=_count, args=(tmp_path,)),
        threading.Thread(target=_count, args=(tmp_path,)),
    ]
    for other in others:
        other.start()
    _count(tmp_path)
    for other in others:
        other.join()
    assert (tmp_path / "count").read_text() == "150"


def test_a_process_lock_says_who_holds_it(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / "lock")
    with pytest.raises(LockHeldError, match="itself"):
        ProcessLock(tmp_path / "lock")
    lock.release()
    ProcessLock(tmp_path / "lock").release()


def test_a_helper_runs_the_package_of_its_starter_whatever_else_is_called_so(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "harness"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('this is another package')")
    (tmp_path / "runs").mkdir()
    process = start_helper(
        "harness.dashboard.indexer",
        ["--runs", tmp_path / "runs", "--cache", tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        yields=True,
        environment=child_environment(PYTHONPATH=str(other.parent)),
    )
    answers, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(answers.splitlines()[0]) == {"runs": []}

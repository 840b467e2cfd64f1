"""Text: what is read, how it is split, that it is prepared once, and the errors of bad input."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config import DataConfig
from harness.data import load_text
from harness.data.corpus import list_files, prepare, standard_library
from harness.data.text import Windows
from harness.errors import DataError


def write_texts(folder: Path, count: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_bytes(f"text number {number}, ".encode() * 20)
    return folder


def load(*paths: Path, cache: Path, length: int = 16, val_frac: float = 0.1) -> tuple[Windows, Windows]:
    config = DataConfig(paths=tuple(map(str, paths)), sequence_length=length, val_frac=val_frac)
    return load_text(config, cache_dir=cache)


def parts(*paths: Path, cache: Path, val_frac: float = 0.1) -> tuple[set[bytes], set[bytes]]:
    """The pieces of text in the training and in the validation part."""
    corpus = prepare(list_files(map(str, paths)), val_frac=val_frac, cache_dir=cache)
    train, val = (set(part.path.read_bytes().split(b"\0")[:-1]) for part in (corpus.train, corpus.val))
    return train, val


def test_all_text_is_in_one_part_and_files_end_with_a_0_byte(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    train, val = parts(folder, cache=tmp_path / "cache")
    assert train
    assert val
    assert not train & val
    assert train | val == {path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_in_the_same_part_under_any_name_in_any_order_and_company(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    train, val = parts(folder, cache=tmp_path / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)[:50]):
        (moved / f"{number}.md").write_bytes(path.read_bytes())
    moved_train, moved_val = parts(moved, cache=tmp_path / "cache")
    assert moved_train <= train
    assert moved_val <= val


def test_copies_of_a_file_are_never_on_both_sides(tmp_path: Path) -> None:
    for number in range(40):
        write_texts(tmp_path / "texts" / str(number), count=2)
    train, val = parts(tmp_path / "texts", cache=tmp_path / "cache", val_frac=0.5)
    assert len(train) == len(val) == 1
    assert train != val


def test_a_single_long_file_is_split_by_pieces(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(b"".join(b"line %d\n" % number for number in range(20_000)))
    train, val = parts(file, cache=tmp_path / "cache", val_frac=0.05)
    assert sum(map(len, train | val)) == file.stat().st_size
    assert 0 < sum(map(len, val)) < 0.2 * file.stat().st_size


def test_hidden_and_binary_files_in_folders_are_left_out_but_not_those_named(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=2)
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "program").write_bytes(b"\x7fELF\0")
    train, val = parts(folder, cache=tmp_path / "cache")
    assert len(train | val) == 2
    named_train, named_val = parts(folder, folder / ".hidden", cache=tmp_path / "cache")
    assert b"hidden" in named_train | named_val


def test_the_standard_library_is_there_without_installed_packages() -> None:
    files = standard_library()
    assert sum(file.num_bytes for file in files) > 5_000_000
    assert not [file for file in files if "site-packages" in file.path or not file.path.endswith(".py")]


def test_each_byte_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    text = bytes(range(1, 54))
    (tmp_path / "bytes").write_bytes(text)
    whole, rest = Windows(tmp_path / "bytes", 10), Windows(tmp_path / "bytes", 10, keep_rest=True)
    assert (len(whole), len(rest)) == (5, 6)
    batch = rest.__getitems__(range(6))
    targets = batch["targets"].flatten()
    assert targets[targets != -100].tolist() == list(text[1:])
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    assert batch["inputs"][5].tolist() == [51, 52, 53, 0, 0, 0, 0, 0, 0, 0]
    assert batch["targets"][5].tolist() == [52, 53] + [-100] * 8
    assert torch.equal(whole.__getitems__([4])["inputs"][0], batch["inputs"][4])
    assert torch.equal(whole[4]["targets"], batch["targets"][4])


def test_windows_travel_to_workers_by_name_not_by_content(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(100_000))
    windows = Windows(tmp_path / "bytes", 10)
    windows[0]
    travelled = pickle.dumps(windows)
    assert len(travelled) < 1000
    assert len(pickle.loads(travelled)[5]["inputs"]) == 10


def test_a_second_start_prepares_nothing_and_a_changed_file_anew(tmp_path: Path) -> None:
    folder, cache = write_texts(tmp_path / "texts"), tmp_path / "cache"
    load(folder, cache=cache)
    first = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    load(folder, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == first
    (folder / "new.txt").write_text("one more")
    load(folder, cache=cache)
    assert len(list(cache.rglob("*.bin"))) == 2 * len(first)


def prepared_bytes(folder: Path, cache: Path) -> bytes:
    train, val = load(folder, cache=cache)
    return bytes(np.memmap(train._path)) + bytes(np.memmap(val._path))


def test_several_processes_prepare_it_once(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap(prepared_bytes, [(folder, tmp_path / "cache")] * 4)
    assert len(set(results)) == 1
    assert len(list((tmp_path / "cache").glob("text-*"))) == 2  # the corpus and its lock


KILLED_HALFWAY = """
import os, signal, sys
from pathlib import Path
from harness.data import corpus

written = []
def write_and_die(out):
    written.append(out)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
corpus.sync_file = write_and_die
corpus.prepare(corpus.list_files([sys.argv[1]]), val_frac=0.1, cache_dir=Path(sys.argv[2]))
"""


def test_what_a_killed_process_left_is_neither_believed_nor_kept(tmp_path: Path) -> None:
    folder, cache = write_texts(tmp_path / "texts"), tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", KILLED_HALFWAY, str(folder), str(cache)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(cache.glob("*.tmp-*"))) == 1
    assert prepared_bytes(folder, cache) == prepared_bytes(folder, tmp_path / "other_cache")
    assert not list(cache.glob("*.tmp-*"))


def test_missing_and_unreadable_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path, problem in [
        ("nothing/here", "cannot read .*nothing/here: No such file"),
        ("texts", "cannot read .*dangling.txt: No such file"),
        ("pipe", "pipe is neither a file nor a folder"),
        ("empty", "has 0 bytes"),
        ("blank", "has 0 bytes"),
    ]:
        with pytest.raises(DataError, match=problem):
            load(tmp_path / path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    files = list_files([str(folder)])
    (folder / "007.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*007.txt"):
        prepare(files, val_frac=0.1, cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_text_that_cannot_fill_a_sample_or_be_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"has 5 bytes.*sequence_length \+ 1 = 17"):
        load(tmp_path / "short.txt", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="a single piece of 5 bytes"):
        load(tmp_path / "short.txt", cache=tmp_path / "cache", length=2)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "program").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="no text in the 1 non-empty files"):
        load(tmp_path / "binary", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_cache_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write prepared data to .*--data.cache_dir"):
        load(folder, cache=tmp_path / "cache")

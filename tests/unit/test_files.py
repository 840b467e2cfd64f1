"""What is opened on somebody's behalf is a regular file where it seems to be, and nothing waits for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.files import file_status, list_folder, open_file, read_file

SECRET = b"not yours"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with `a/b/file`, and a secret beside it."""
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "root" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"mine")
    return tmp_path / "root"


def test_a_regular_file_is_read_with_and_without_a_limit(root: Path) -> None:
    path = root / "a" / "b" / "file"
    for within in (None, root, path.parent):
        assert read_file(path, most_bytes=4, within=within) == b"mine"
        assert file_status(path, within=within).st_size == 4
        with pytest.raises(OSError, match="longer than 3 bytes"):
            read_file(path, most_bytes=3, within=within)
    assert list_folder(root / "a" / "b", within=root) == (["file"], [])
    assert list_folder(root, within=root) == ([], ["a"])


def _link_to_the_file(root: Path) -> Path:
    (root / "a" / "b" / "file").unlink()
    (root / "a" / "b" / "file").symlink_to(root.parent / "secret")
    return root / "a" / "b" / "file"


def _link_to_a_folder(root: Path) -> Path:
    (root.parent / "outside" / "b").mkdir(parents=True)
    (root.parent / "outside" / "b" / "file").write_bytes(SECRET)
    (root / "a").rename(root / "was")
    (root / "a").symlink_to(root.parent / "outside")
    return root / "a" / "b" / "file"


def _link_inside(root: Path) -> Path:
    (root / "other").symlink_to(root / "a")
    return root / "other" / "b" / "file"


@pytest.mark.parametrize("make", [_link_to_the_file, _link_to_a_folder, _link_inside])
def test_no_link_is_followed_within(make: Callable[[Path], Path], root: Path) -> None:
    path = make(root)
    assert read_file(path, most_bytes=100) in (SECRET, b"mine")
    for ask in (open_file, file_status):
        with pytest.raises(OSError):
            ask(path, within=root)
    found = list_folder(path.parent, within=root)
    assert path.name not in found.files


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "a/b/../../../secret"])
def test_nothing_outside_is_named(path: str, root: Path) -> None:
    with pytest.raises(OSError):
        open_file(root / path, within=root)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [_pipe, _socket, _folder, _device, _dangling, _loop])
@pytest.mark.parametrize("is_within", [False, True])
def test_what_is_no_regular_file_is_an_error_at_once(
    make: Callable[[Path], None], is_within: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # a socket's path is short
    make(Path("odd"))
    with pytest.raises(OSError):
        open_file(root / "odd", within=root if is_within else None)
    assert "odd" not in list_folder(root, within=root if is_within else None).files


def test_a_name_of_any_bytes_is_listed_and_read(root: Path) -> None:
    for name in (b"\xff\xfe", b"line\nbreak", "\u202etxt".encode()):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        path.write_bytes(b"x")
        assert path.name in list_folder(root, within=root).files
        assert read_file(path, most_bytes=1, within=root) == b"x"


def test_a_folder_that_is_not_there_lists_nothing(root: Path) -> None:
    for folder in (root / "no", root / "a" / "b" / "file"):
        for within in (None, root):
            assert list_folder(folder, within=within) == ([], [])

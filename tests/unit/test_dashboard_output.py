"""What programs print, made readable: pieces join to the whole, bars become lines, nothing hostile stays."""

import os
import random
import time
from pathlib import Path

import pytest

from harness.dashboard.output import LONGEST_BYTES, plain_text, read_output


def age(path: Path, seconds: float = 10.0) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.mark.parametrize(
    ("printed", "text"),
    [
        (b"one\r\ntwo\n", "one\ntwo\n"),
        (b"\r 1%\r 50%\r100%\ndone\n", "100%\ndone\n"),
        (b"\r 1%\r 2%\r", " 2%\n"),
        (b"\x1b[1;31mred\x1b[0m \x1b[2K\x1b[Aup\n", "red up\n"),
        (b"\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1b]0;open\nc\n", "ab\nc\n"),
        (b"\x1b\x1b[\x1b]\x1b(B\x1b\n", "\n"),
        (b"a\0b\x08\x7f\x9b\xff\xc3\n", "ab\ufffd\ufffd\ufffd\n"),
        ("ü→\u202eevil\u2066\u0085\n".encode(), "ü→evil\n"),
        (b"tab\tstays <b>&\n", "tab\tstays <b>&\n"),
    ],
)
def test_what_a_terminal_would_have_acted_on_is_gone(printed: bytes, text: str) -> None:
    assert plain_text(printed) == text


def test_any_bytes_at_all_are_readable_at_once() -> None:
    draw = random.Random(0)
    alphabet = [*range(256), *([0x1B, 0x5B, 0x5D, 0x0D, 0x0A, 0x3B] * 40)]
    for _ in range(200):
        text = plain_text(bytes(draw.choices(alphabet, k=500)))
        assert not {c for c in text if ord(c) < 32 and c not in "\n\t"}
    for nasty in (b"\x1b]" * 100_000, b"\x1b[" + b";" * 200_000, b"\r" * 200_000, b"\x1b" * 200_000):
        began = time.process_time()
        plain_text(nasty)
        assert time.process_time() - began < 10


def test_pieces_join_to_the_whole_and_half_a_line_waits(tmp_path: Path) -> None:
    path, whole = tmp_path / "out", "".join(f"line {n} ü\n" for n in range(500)).encode()
    text, offset = "", 0
    for end in range(0, len(whole) + 7, 7):
        path.write_bytes(whole[:end])
        more, offset = read_output(path, offset)
        text += more
        assert text.endswith("\n") or not text
    assert (text, offset) == (whole.decode(), len(whole))
    assert read_output(path, offset) == ("", offset)


def test_a_last_line_without_an_end_is_shown_when_it_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"one\nKilled")
    assert read_output(path, 0) == ("one\n", 4)
    age(path)
    assert read_output(path, 4) == ("Killed", 10)


def test_a_bar_that_is_drawn_on_stands_on_its_own_line(tmp_path: Path) -> None:
    path, text, offset, printed = tmp_path / "out", "", 0, b""
    for percent in (1, 2, 3):
        printed += f"\r{percent}%".encode()
        path.write_bytes(printed)
        age(path)
        more, offset = read_output(path, offset)
        text += more
    assert text.split() == ["1%", "2%", "3%"]


def test_of_very_much_the_end_is_read_and_the_rest_is_owned_up_to(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"".join(b"%09d\n" % n for n in range(1_000_000)))
    text, offset = read_output(path, 0)
    assert offset == 10_000_000
    assert text.startswith(f"[{10_000_000 - LONGEST_BYTES} bytes are left out]\n")
    assert text.endswith("000999999\n")
    assert len(text) < LONGEST_BYTES + 100


def test_a_line_longer_than_a_piece_does_not_hold_it_up(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"x" * LONGEST_BYTES)
    assert read_output(path, 0)[1] == LONGEST_BYTES


@pytest.mark.parametrize("offset", [-1, 10**30])
def test_an_offset_of_another_file_begins_anew(offset: int, tmp_path: Path) -> None:
    assert read_output(tmp_path / "none", offset) == ("", 0)
    (tmp_path / "out").write_bytes(b"new\n")
    assert read_output(tmp_path / "out", offset) == ("new\n", 4)

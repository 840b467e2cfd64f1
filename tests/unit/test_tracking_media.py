"""Images of every usual kind become the right pixels, and nothing leaves the run directory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.errors import TrackingError
from harness.runlog import paths
from harness.runlog.codec import Record
from harness.tracking import media
from harness.tracking.media import save_image, to_picture
from harness.tracking.mirror import MirroredRun
from harness.tracking.names import folder_name
from harness.tracking.settings import MirrorSettings
from harness.tracking.tensorboard import TensorBoardMirror


@pytest.mark.parametrize(
    ("image", "mode", "size"),
    [
        (np.zeros((4, 6)), "L", (6, 4)),
        (np.zeros((4, 6, 3), np.uint8), "RGB", (6, 4)),
        (torch.zeros(3, 4, 6), "RGB", (6, 4)),
        (torch.zeros(1, 4, 6, dtype=torch.bfloat16, requires_grad=True), "L", (6, 4)),
        (torch.zeros(4, 4, 6), "RGBA", (6, 4)),
        (torch.zeros(5, 3, 4, 6), "RGB", (20, 9)),
        (Image.new("P", (6, 4)), "RGB", (6, 4)),
    ],
)
def test_shapes_and_kinds(image: Any, mode: str, size: tuple[int, int]) -> None:
    picture = to_picture(image)
    assert (picture.mode, picture.size) == (mode, size)


def test_floats_are_shades_and_what_goes_beyond_is_stretched() -> None:
    assert np.asarray(to_picture(np.array([[0.0, 0.5, 1.0]]))).tolist() == [[0, 128, 255]]
    assert np.asarray(to_picture(np.array([[-1.0, 0.0, 1.0]]))).tolist() == [[0, 128, 255]]
    odd = np.array([[math.nan, math.inf, -math.inf, 0.25]])
    assert np.asarray(to_picture(odd)).tolist() == [[0, 255, 0, 64]]


def test_colours_stay_where_they_are() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0, 0, 1] = 200
    assert np.asarray(to_picture(image))[0, 1].tolist() == [200, 0, 0]


@pytest.mark.parametrize("wrong", [np.zeros((2, 5, 7)), np.zeros(3), np.zeros((0, 3)), np.array(["a"]), None])
def test_what_is_no_image_is_refused(wrong: Any) -> None:
    with pytest.raises(TrackingError, match="image"):
        to_picture(wrong)


def test_an_image_is_kept_once_under_its_content(tmp_path: Path) -> None:
    first = save_image(tmp_path, np.zeros((2, 2)))
    assert save_image(tmp_path, np.zeros((2, 2))) == first
    assert to_picture(tmp_path / first["file"]).size == (2, 2)
    assert [p.suffix for p in (tmp_path / "log" / "media").iterdir()] == [".png"]


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "..", ".hidden", "a\0b", "a\nb", "", "   ", "x" * 5000, "ü" * 300, "CON\\x"],
)
def test_no_name_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / folder_name(name)
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()
    assert not folder.name.startswith(".")


def test_different_names_stay_different_and_plain_ones_stay_themselves() -> None:
    assert folder_name("lr-3e-4 (b)") == "lr-3e-4 (b)"
    assert len({folder_name(name) for name in ("a/b", "a\\b", "a_b", "a:b", "x" * 200, "x" * 201)}) == 6


def test_no_longer_file_than_a_mirror_holds_becomes_part_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = save_image(tmp_path, np.random.default_rng(0).random((64, 64)))
    size = (tmp_path / kept["file"]).stat().st_size
    for limit, is_taken in ((size, True), (size - 1, False)):
        monkeypatch.setattr(paths, "MEDIA_BYTES", limit)
        monkeypatch.setattr(media, "MEDIA_BYTES", limit)
        mirror = TensorBoardMirror(
            MirroredRun(tmp_path, MirrorSettings(tensorboard_dir=str(tmp_path / f"shown{limit}"))), {}
        )
        mirror.take(Record("image", 0, 1, 1.0, {"picture": kept}))
        mirror.take(Record("graph", 0, 1, 1.0, {"file": kept["file"]}))
        mirror.close(None)
        [events] = (tmp_path / f"shown{limit}").iterdir()
        assert (events.stat().st_size > 2 * size) == is_taken
    assert "too long" in caplog.text
    with pytest.raises(TrackingError, match=f"at most {size - 1}"):
        save_image(tmp_path, np.random.default_rng(1).random((64, 64)))


@pytest.mark.parametrize("name", ["none", "../outside", "/etc/passwd", "pipe", "link", "a\0b"])
def test_only_regular_files_of_the_run_are_media(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "outside").write_text("x")
    (run_dir / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(run_dir / "pipe")
    (run_dir / "fine").write_text("x")
    assert paths.media_bytes(run_dir, {"file": name}) is None
    assert paths.media_bytes(run_dir, {"file": "fine"}) == b"x"

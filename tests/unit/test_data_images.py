"""Images: arrays of either layout, split by content, and the errors of bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import DataConfig
from harness.data import load_images
from harness.data.images import Images
from harness.errors import DataError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 255, (50, 5, 6), dtype=np.uint8)
LABELS = np.arange(50) % 7


def load(folder: Path, *, val_frac: float = 0.2, **arrays: Any) -> tuple[Images, Images]:
    np.savez(folder / "data.npz", **arrays)
    return load_images(DataConfig(paths=(str(folder / "data.npz"),), val_frac=val_frac))


def everything(images: Images) -> dict[str, torch.Tensor]:
    return images.__getitems__(range(len(images)))


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, None], RANDOM.normal(size=(50, 3, 4, 5))])
def test_both_layouts_become_scaled_channels_first_images(tmp_path: Path, images: Any) -> None:
    train, val = load(tmp_path, images=images, labels=LABELS)
    batch = everything(train)
    assert len(train) + len(val) == 50
    assert len(val) > 0
    assert train.num_classes == 7
    assert train.image_shape == (images[:, None] if images.ndim == 3 else images).shape[1:]
    assert batch["images"].shape == (len(train), *train.image_shape)
    assert (batch["images"].dtype, batch["labels"].dtype) == (torch.float32, torch.int64)
    assert abs(batch["images"].mean()) < 1e-5
    assert abs(batch["images"].std() - 1) < 1e-2
    assert torch.equal(train[3]["images"], batch["images"][3])


def test_the_split_follows_the_content_not_the_order(tmp_path: Path) -> None:
    _, val = load(tmp_path, images=IMAGES, labels=LABELS)
    _, reversed_val = load(tmp_path, images=IMAGES[::-1], labels=LABELS[::-1])
    labels, reversed_labels = everything(val)["labels"], everything(reversed_val)["labels"]
    assert torch.equal(labels, reversed_labels.flip(0))


def test_copies_of_an_image_are_never_on_both_sides(tmp_path: Path) -> None:
    train, val = load(
        tmp_path, images=np.tile(IMAGES[:2], (20, 1, 1)), labels=np.arange(40) % 2, val_frac=0.5
    )
    assert set(everything(train)["labels"].tolist()).isdisjoint(everything(val)["labels"].tolist())


def test_the_digits_are_real_and_split(tmp_path: Path) -> None:
    train, val = load_images(DataConfig())
    assert (len(train) + len(val), train.num_classes, train.image_shape) == (1797, 10, (1, 8, 8))
    assert len(val) > 50


def test_without_scikit_learn_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'stability-harness\[vision\]'"):
        load_images(DataConfig())


NAN = IMAGES.astype(np.float32)
NAN[17, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"images": IMAGES}, "no array 'labels"),
        ({"images": IMAGES[:, 0], "labels": LABELS}, r"images has shape \[50, 6\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no dimension of length 0"),
        ({"images": IMAGES, "labels": LABELS[:9]}, "one label for each of 50 images"),
        ({"images": IMAGES, "labels": LABELS - 1}, "the smallest label is -1"),
        ({"images": IMAGES, "labels": LABELS * 0.5}, "labels has dtype float64"),
        ({"images": IMAGES.astype(str), "labels": LABELS}, "images has dtype <U3"),
        ({"images": NAN, "labels": LABELS}, "image 17 has NaN or Inf"),
        ({"images": IMAGES * 0, "labels": LABELS}, "all images are the same"),
        ({"images": IMAGES.astype(object), "labels": LABELS}, "allow_pickle=False"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load(tmp_path, **arrays)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "single.npy", IMAGES)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for name in ("text.npz", "single.npy", "cut.npz", "missing.npz", "."):
        with pytest.raises(DataError, match="cannot read"):
            load_images(DataConfig(paths=(str(tmp_path / name),)))
    with pytest.raises(DataError, match="names 2 paths"):
        load_images(DataConfig(paths=("a.npz", "b.npz")))

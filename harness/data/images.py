"""Image classification from arrays that fit into memory."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from harness.config import DataConfig
from harness.data.split import content_rank, val_limit
from harness.data.task import Batch, LossSum, cross_entropy
from harness.errors import DataError

__all__ = ["Images", "class_loss", "load_images"]

Array = NDArray[Any]


def load_images(config: DataConfig) -> tuple[Images, Images]:
    """Training and validation images of the .npz in `config.paths`, or else scikit-learn's digits.

    Pixels are shifted and scaled so that those of the training images have mean 0 and deviation 1.

    Raises:
        DataError: the arrays are missing, unreadable or malformed, or scikit-learn is not installed.
    """
    images, labels = _checked(*(_read_npz(config.paths) if config.paths else _digits()))
    held_out = _held_out(images, config.val_frac)
    mean = images[~held_out].mean(dtype=np.float64)
    deviation = images[~held_out].std(dtype=np.float64) or 1.0
    num_classes = int(labels.max()) + 1
    name = config.paths[0] if config.paths else "digits"

    def part(chosen: NDArray[np.bool_]) -> Images:
        scaled = ((images[chosen] - mean) / deviation).astype(np.float32)
        # Of what was read: processors may differ in the last bit of what was scaled.
        digest = _digest(images[chosen], labels[chosen])
        rows = np.flatnonzero(chosen)
        return Images(scaled, labels[chosen], num_classes=num_classes, digest=digest, name=name, rows=rows)

    return part(~held_out), part(held_out)


def class_loss(model: nn.Module, batch: Batch) -> LossSum:
    """Cross entropy of the class in nats, summed over the images."""
    return cross_entropy(model(batch["images"]), batch["labels"])


class Images:
    """Images float32 `[N, C, H, W]` with labels `[N]` in `[0, num_classes)`.

    Args:
        name: What they come from.
        rows: Which rows of it they are; None: all.
    """

    def __init__(
        self,
        images: NDArray[np.float32],
        labels: Array,
        *,
        num_classes: int,
        digest: str | None = None,
        name: str = "images",
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._name, self._rows = name, np.arange(len(labels)) if rows is None else rows
        self.num_classes = num_classes
        self._digest = digest or _digest(images, labels)
        self.image_shape: tuple[int, int, int] = images.shape[1:]
        self._images = torch.from_numpy(images)
        self._labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> str:
        """Tells images and labels from any others."""
        return self._digest

    def source_of(self, index: int) -> str:
        """Where an image stands: `FILE[ROW]`."""
        return f"{self._name}[{self._rows[index]}]"

    def __getitem__(self, index: int) -> Batch:
        return {"images": self._images[index], "labels": self._labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """`images` float32 `[len(indices), C, H, W]` and `labels` int64 `[len(indices)]`."""
        chosen = torch.tensor(indices)
        return {"images": self._images[chosen], "labels": self._labels[chosen]}


def _digest(images: Array, labels: Array) -> str:
    """xxh3_128 over dtypes, shapes and all bytes; 10 GB/s."""
    digest = xxhash.xxh3_128()
    for array in (images, labels):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _digits() -> tuple[Array, Array]:
    """1,797 handwritten digits of 8 x 8 pixels, shipped inside scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the handwritten digits come with scikit-learn, which is not installed",
            remedy="run pip install 'stability-harness[vision]', or name an .npz with --data.paths",
        ) from error
    digits = load_digits()
    return digits.images, digits.target


def _read_npz(paths: Sequence[str]) -> tuple[Array, Array]:
    if len(paths) != 1:
        raise DataError(f"data.paths names {len(paths)} paths", rule="task images takes a single .npz file")
    path = Path(paths[0]).expanduser()
    try:
        # Pickled objects could run code; arrays of numbers need none.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    except KeyError as error:
        raise DataError(
            f"{path} has no array {error}", rule="it has to hold `images` and `labels`"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path}: {error}",
            rule="it has to be an .npz file of plain numbers",
            remedy="write it with numpy.savez(path, images=images, labels=labels)",
        ) from error


def _checked(images: Array, labels: Array) -> tuple[Array, Array]:
    """Images as `[N, C, H, W]` and labels, after everything that is assumed later has been checked."""
    _require(images.ndim in (3, 4), f"images has shape {list(images.shape)}", "[N, H, W] or [N, C, H, W]")
    _require(images.size > 0, f"images has shape {list(images.shape)}", "no dimension of length 0")
    _require(images.dtype.kind in "biuf", f"images has dtype {images.dtype}", "real numbers")
    finite = np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
    _require(bool(finite.all()), f"image {int(finite.argmin())} has NaN or Inf in it", "finite numbers")
    shape = f"labels has shape {list(labels.shape)}"
    _require(labels.shape == images.shape[:1], shape, f"one label for each of {len(images)} images")
    _require(labels.dtype.kind in "iu", f"labels has dtype {labels.dtype}", "whole numbers")
    _require(int(labels.min()) >= 0, f"the smallest label is {labels.min()}", "classes counted from 0")
    return (images if images.ndim == 4 else images[:, None]), labels


def _require(condition: bool, problem: str, wanted: str) -> None:
    if not condition:
        raise DataError(problem, rule=f"the array has to hold {wanted}")


def _held_out(images: Array, val_frac: float) -> NDArray[np.bool_]:
    """Which images are validation images; copies of an image stay together."""
    ranks = np.array([content_rank(image.tobytes()) for image in images])
    limit = val_limit(ranks.tolist(), val_frac)
    if limit is None:
        raise DataError("all images are the same one", rule="at least one other is needed to be held out")
    held_out: NDArray[np.bool_] = ranks < limit
    return held_out

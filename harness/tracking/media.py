"""Images, of whatever kind people have them, as PNG files beside the log."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from harness.atomic import write_atomically
from harness.errors import TrackingError
from harness.runlog.paths import MEDIA_BYTES, media_dir

__all__ = ["save_image", "save_media", "to_picture"]

Pixels = npt.NDArray[np.uint8]


def save_image(run_dir: Path, image: Any) -> dict[str, Any]:
    """Stores the image once, whatever its name, and returns what an `image` record says of it.

    Args:
        run_dir: The run.
        image: See `to_picture`.

    Raises:
        TrackingError: it is no image.
    """
    picture = to_picture(image)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "file": save_media(run_dir, file.getvalue(), "png"),
        "width": picture.width,
        "height": picture.height,
        "channels": len(picture.getbands()),
    }


def save_media(run_dir: Path, data: bytes, suffix: str) -> str:
    """Stores bytes under their digest; returns the path relative to the run directory.

    Raises:
        TrackingError: there are more than a mirror takes.
    """
    if len(data) > MEDIA_BYTES:
        raise TrackingError(
            f"a file of {len(data)} bytes", rule=f"images and graphs have at most {MEDIA_BYTES} bytes"
        )
    path = media_dir(run_dir) / f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return str(path.relative_to(run_dir))


def to_picture(image: Any) -> Image.Image:
    """A PIL image from one, from a file's path, a matplotlib figure, or an array or tensor.

    Arrays are `[height, width]`, `[height, width, channel]`, `[channel, height, width]`, or a batch or a list
    of such, which becomes a grid. Floats are taken as 0 to 1, or are stretched if they go beyond; uint8 as
    they are.
    """
    if isinstance(image, Image.Image):
        return image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return to_picture(opened.copy())
        except OSError as error:
            raise TrackingError(f"the image {str(image)!r} cannot be read: {error}") from error
    if isinstance(image, list | tuple) and image and all(map(_is_picture, image)):
        return _tiled([to_picture(each) for each in image])
    if hasattr(image, "savefig"):
        file = io.BytesIO()
        image.savefig(file, format="png")
        return to_picture(Image.open(file))
    return Image.fromarray(_pixels(_array(image)))


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or getattr(item, "ndim", 0) >= 2


def _array(image: Any) -> npt.NDArray[Any]:
    if hasattr(image, "detach"):  # a tensor; numpy knows no bfloat16
        image = image.detach().to_dense().cpu()
        image = image.float() if image.is_floating_point() else image
        image = image.numpy()
    array = np.asarray(image)
    if array.dtype.kind not in "bifu" or array.ndim not in (2, 3, 4) or array.size == 0:
        raise TrackingError(
            f"an image of shape {array.shape} and dtype {array.dtype}",
            rule="it has to be [height, width], with 1, 3 or 4 channels first or last, or a batch of such",
        )
    return array


def _pixels(array: npt.NDArray[Any]) -> Pixels:
    if array.ndim == 4:
        return _grid([_channels_last(each) for each in _bytes(array)])
    return _squeezed(_channels_last(_bytes(array)))


def _bytes(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64), posinf=np.inf, neginf=-np.inf)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if low < 0.0 or high > 1.0:
        values = (values - low) / max(high - low, 1e-12)
    return (values.clip(0.0, 1.0) * 255).round().astype(np.uint8)


def _channels_last(image: Pixels) -> Pixels:
    if image.ndim == 2:
        return image[:, :, None]
    if image.shape[2] in (1, 3, 4):
        return image
    if image.shape[0] in (1, 3, 4):
        return np.moveaxis(image, 0, 2)
    raise TrackingError(f"an image of shape {image.shape}", rule="it has to have 1, 3 or 4 channels")


def _grid(images: list[Pixels]) -> Pixels:
    """Near square, with a pixel of space between."""
    height, width, channels = images[0].shape
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return _squeezed(grid)


def _tiled(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of any sizes and kinds, near square, with a pixel of space between."""
    mode = pictures[0].mode if len({picture.mode for picture in pictures}) == 1 else "RGB"
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True))
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new(mode, (columns * (width + 1) - 1, rows * (height + 1) - 1))
    for i, picture in enumerate(pictures):
        grid.paste(picture.convert(mode), (i % columns * (width + 1), i // columns * (height + 1)))
    return grid


def _squeezed(image: Pixels) -> Pixels:
    return image[:, :, 0] if image.shape[2] == 1 else image

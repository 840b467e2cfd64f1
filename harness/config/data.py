"""The section `data`."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    SECTION = "data"

    paths: tuple[str, ...] = ()
    """Files or folders of text (task text), or one .npz with `images` and `labels` (task images). Empty: the
    Python standard library's source, or scikit-learn's handwritten digits."""
    sequence_length: int = 256
    """Bytes that the model sees at once (task text)."""
    val_frac: float = 0.05
    """Share of the files (text) or samples (images) held out, chosen by a hash of their content."""
    cache_dir: str | None = None
    """Where prepared data is kept. Default: $HARNESS_CACHE or the user's cache directory."""
    quarantine: tuple[int | str, ...] = ()
    """Samples that are never trained on, in whose places stand others: indices, names as incidents show them,
    or text files with one of these a line. May change from attempt to attempt."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process."""
    allow_change: bool = False
    """Go on with a run whose data is not what it was when its checkpoint was written; otherwise an error."""

    def __post_init__(self) -> None:
        require_positive(self, "sequence_length")
        require_not_negative(self, "num_workers")
        require(self, "val_frac", 0 < self.val_frac < 1, "it has to lie between 0 and 1")

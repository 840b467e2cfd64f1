"""Samples by name: where they come from, and that quarantined ones are never handed out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from harness.config import DataConfig
from harness.data import Loader, find_quarantined, load_text, source_of
from harness.errors import DataError
from harness.tasks.hf.mixture import Mixture, Part
from tests.support.own_tasks import Points
from tests.support.runs import corpus


class Named(Points):
    def source_of(self, index: int) -> str:
        return f"rows.parquet#{index}"


class Nameless(Points):
    def source_of(self, index: int) -> str:
        raise KeyError("no such column")


def test_a_sample_is_named_through_torchs_own_wrappers() -> None:
    data = ConcatDataset([Subset(Named(10), [7, 3]), Named(4)])
    assert [source_of(data, index) for index in range(4)] == [
        "rows.parquet#7",
        "rows.parquet#3",
        "rows.parquet#0",
        "rows.parquet#1",
    ]


def test_a_data_set_without_names_or_with_broken_ones_gives_none() -> None:
    assert source_of(Points(), 3) is None
    assert source_of(Nameless(), 3) is None


def test_windows_of_text_are_named_by_file_and_offset_and_found_by_them(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus", num_files=12)
    (folder / "long.txt").write_text("x y z " * 4000)
    config = DataConfig(paths=(str(folder),), sequence_length=100)
    for data in load_text(config, cache_dir=tmp_path / "cache"):
        names = [data.source_of(index) for index in range(len(data))]
        assert len(set(names)) == len(names)
        assert [data.index_of(name) for name in names] == list(range(len(data)))
        assert data.indices_of(names) == {name: [index] for index, name in enumerate(names)}
        for index, name in enumerate(names):
            path, _, offset = name.partition(", ")[0].rpartition(":")
            of_window = (
                bytes(data[index]["inputs"].numpy().astype(np.uint8)).lstrip(b"\0").partition(b"\0")[0]
            )
            assert Path(path).read_bytes()[int(offset) :].startswith(of_window)
    assert data.index_of(f"{folder}/nowhere.txt:0") is None
    assert data.index_of("nonsense") is None


def handed_out(
    quarantined: tuple[int, ...], *, world_size: int, steps: int, first: int = 0
) -> list[list[int]]:
    """The samples of each step, over all ranks."""
    loaders = [
        Loader(
            Points(40),
            global_batch=8,
            micro_batch=2,
            rank=rank,
            world_size=world_size,
            seed=5,
            quarantined=quarantined,
        )
        for rank in range(world_size)
    ]
    for loader in loaders:
        loader.skip(first * 8)
    found = []
    for _ in range(steps):
        batches = [batch for loader in loaders for batch in loader.next()]
        found.append([round(float(x) * 40) for batch in batches for x in batch["x"][:, 0]])
    return found


def test_quarantined_samples_are_never_handed_out_and_the_others_keep_their_places() -> None:
    bad = (3, 17, 18, 39)
    steps = 25  # 5 epochs
    clean, without = handed_out((), world_size=1, steps=steps), handed_out(bad, world_size=1, steps=steps)
    for before, after in zip(clean, without, strict=True):
        assert not set(after) & set(bad)
        assert [a for b, a in zip(before, after, strict=True) if b not in bad] == [
            b for b in before if b not in bad
        ]
    replacements = {a for b, a in zip(chain(*clean), chain(*without), strict=True) if b in bad}
    assert len(replacements) > 10, "each place draws its own"


def test_the_order_without_quarantined_samples_is_the_same_at_another_world_size_and_after_resuming() -> None:
    bad = (0, 1, 2, 11)
    whole = handed_out(bad, world_size=1, steps=12)
    assert handed_out(bad, world_size=4, steps=12) == whole
    assert handed_out(bad, world_size=2, steps=5, first=7) == whole[7:]


def test_one_sample_may_be_all_that_is_left() -> None:
    assert handed_out(tuple(range(39)), world_size=1, steps=5) == [[39] * 8] * 5


def test_a_quarantine_list_is_indices_names_and_files_of_them(tmp_path: Path) -> None:
    listed = tmp_path / "bad.txt"
    listed.write_text("# found on Monday\n12  # rows.parquet#12\n\nrows.parquet#5\n".replace("#5", "@5"))

    class At(Points):
        def source_of(self, index: int) -> str:
            return f"rows.parquet@{index}"

    assert find_quarantined(At(20), [3, "rows.parquet@19", str(listed), "12"]) == (3, 5, 12, 19)


def test_a_name_means_all_samples_that_have_it() -> None:
    class Shared(Points):
        def source_of(self, index: int) -> str:
            return f"row {index % 4}"

    assert find_quarantined(Shared(10), ["row 1", "2"]) == (1, 2, 5, 9)


def test_a_number_is_a_name_where_names_are_numbers() -> None:
    class Numbered(Points):
        def source_of(self, index: int) -> str:
            return str(100 - index)

    assert find_quarantined(Numbered(20), ["95", "3"]) == (3, 5)
    with pytest.raises(DataError, match="'30'"):
        find_quarantined(Numbered(20), ["95", "30"])


def test_a_row_of_a_mixture_goes_wherever_it_stands() -> None:
    rows = [np.zeros((count, 1, 2), dtype=np.int64) for count in (3, 8)]
    store: Any = None
    parts = [Part(store, row, source=number, weight=0.5) for number, row in enumerate(rows)]  # type: ignore[arg-type]
    data = Mixture(parts, length=4, pad=0, digest="")
    assert len(data) == 16
    assert find_quarantined(data, [data.source_of(4), "source 1, row 0"]) == (1, 4, 7, 8)
    for wrong in ("source 0, row 3", "source 2, row 0", "row 1"):
        with pytest.raises(DataError, match=wrong):
            find_quarantined(data, [wrong])


@pytest.mark.parametrize(
    ("entries", "told"),
    [(["20"], "'20'"), (["nowhere"], "'nowhere'"), ([str(n) for n in range(20)], "every sample")],
)
def test_a_quarantine_list_that_names_no_sample_is_an_error(entries: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        find_quarantined(Named(20), entries)

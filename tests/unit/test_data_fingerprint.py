"""What is trained on has a fingerprint, and a run goes on with the data that it began with."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from harness.config import DataConfig, TrainConfig
from harness.data import Loader, Task, fingerprint, load_images
from harness.data.corpus import list_files, prepare
from harness.data.fingerprint import _hash_of_indices
from harness.errors import DataError
from tests.support.own_tasks import Drawing, Points, own_config, points_task, run_loop
from tests.support.runs import corpus, tiny_config


class Named(Points):
    def fingerprint(self) -> str:
        return f"version {self.shift}"


class Labelled(Points):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "label": {"name": str(self.shift), "ids": [1, index]}}


class Unseeded(Points):
    """Draws from a generator of its own."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.generator = np.random.default_rng()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.generator.random(4)}


@pytest.mark.parametrize("kind", [Points, Named, Labelled, Drawing])
def test_a_fingerprint_tells_data_apart_and_is_the_same_for_the_same(kind: Any) -> None:
    prints = {fingerprint(kind(40)), fingerprint(kind(41)), fingerprint(kind(40, shift=1.0))}
    assert len(prints) == 3
    assert fingerprint(kind(40)) in prints
    assert fingerprint(kind(40), in_worker=True) in prints


def test_every_index_of_a_subset_counts() -> None:
    order = list(range(5000))
    other = [*order[:77], 78, 77, *order[79:]]
    assert fingerprint(Subset(Points(6000), order)) != fingerprint(Subset(Points(6000), other))


def test_a_subset_is_the_same_however_its_indices_are_kept() -> None:
    order = list(range(40, 0, -2))
    kinds = [order, tuple(order), range(40, 0, -2), np.array(order, np.int32), torch.tensor(order)]
    assert len({fingerprint(Subset(Points(60), kind)) for kind in kinds}) == 1
    named = Subset(Subset(Points(60), order), ["b", "a"])
    assert _hash_of_indices(named) != _hash_of_indices(Subset(named.dataset, ["a", "b"]))


class Summed(Points):
    """A sum of so many numbers that its last bits depend on the number of threads."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.linspace(0.1, 1.7, 200_003) ** (1 + index / 40)
        return {"x": (x - x.mean()) / x.std()}


def test_a_fingerprint_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    prints = set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            prints.add(fingerprint(Summed()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert prints == {fingerprint(Summed(), in_worker=True)}


class Killed(Points):
    def __getitem__(self, index: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_worker_that_is_killed_while_it_samples_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"a loader worker failed.*--data.num_workers"):
        fingerprint(Killed(), in_worker=True)


def test_what_is_drawn_anew_each_time_does_not_count_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="harness"):
        assert fingerprint(Unseeded(7)) == fingerprint(Unseeded(7)) != fingerprint(Unseeded(8))
    assert "generator of its own" in caplog.text


@pytest.mark.parametrize("change", ["label", "pixel", "more"])
def test_images_are_told_apart_by_every_byte(change: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (50, 4, 4)), np.arange(50) % 3

    def prints() -> list[str]:
        np.savez(tmp_path / "data.npz", images=images, labels=labels)
        config = DataConfig(paths=(str(tmp_path / "data.npz"),))
        return [fingerprint(part) for part in load_images(config)]

    before = prints()
    assert prints() == before
    if change == "label":
        labels[17] += 1
    elif change == "pixel":
        images[17, 2, 2] ^= 1
    else:
        images, labels = np.concatenate([images, images[:1] + 1]), np.append(labels, 0)
    assert prints() != before


def test_a_file_that_grows_after_it_was_listed_gives_the_same_corpus(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "text", num_files=9)
    (folder / "long.txt").write_text("abcd efgh " * 300_000)
    files = list_files([str(folder)])
    before = prepare(files, val_frac=0.2, cache_dir=tmp_path / "one")
    for path in folder.iterdir():
        with open(path, "a") as file:
            file.write("and on it goes\0")
    after = prepare(files, val_frac=0.2, cache_dir=tmp_path / "other")
    assert (before.train.digest, before.val.digest) == (after.train.digest, after.val.digest)
    assert before.train.path.read_bytes() == after.train.path.read_bytes()


def test_a_file_that_shrinks_after_it_was_listed_is_an_error(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "text", num_files=9)
    files = list_files([str(folder)])
    (folder / "004.txt").write_text("short")
    with pytest.raises(DataError, match=r"004.txt was changed while it was read"):
        prepare(files, val_frac=0.2, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("content", ["", "[]", '{"train": "x"}', None])
def test_prepared_text_that_was_damaged_is_an_error_with_a_remedy(
    content: str | None, tmp_path: Path
) -> None:
    files = list_files([str(corpus(tmp_path / "text", num_files=9))])
    folder = prepare(files, val_frac=0.2, cache_dir=tmp_path / "cache").train.path.parent
    (folder / "digests.json").unlink()
    if content is not None:
        (folder / "digests.json").write_text(content)
    with pytest.raises(DataError, match=r"is damaged.*Remove that folder"):
        prepare(files, val_frac=0.2, cache_dir=tmp_path / "cache")


def growing(config: TrainConfig) -> Task:
    """Data that is in files beside the run."""
    count, shift = (Path(config.runs_dir).parent / "data").read_text().split()
    return points_task(train_data=Points(int(count)), val_data=Points(8, shift=float(shift)))


@pytest.mark.parametrize(("data", "part"), [("41 0.5", "training"), ("40 0.6", "validation")])
def test_a_run_whose_data_has_changed_goes_on_only_if_it_is_told_to(
    data: str, part: str, tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("40 0.5")
    run_loop(own_config(tmp_path, growing, "--loop.steps=2"))
    run_loop(own_config(tmp_path, growing, "--loop.steps=3"))
    (tmp_path / "data").write_text(data)
    with pytest.raises(DataError, match=r"data.allow_change"):
        run_loop(own_config(tmp_path, growing, "--loop.steps=4"))
    run = run_loop(own_config(tmp_path, growing, "--loop.steps=4", "--data.allow_change=true"))
    assert (run.counters.step, run.loader.position) == (4, 32)
    assert run_loop(own_config(tmp_path, growing)).counters.step == 6  # it is the run's data now


def test_an_edited_text_is_noticed_and_a_touched_one_is_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--loop.steps=2")
    run_loop(config)
    text = tmp_path / "corpus/000.txt"
    text.touch()
    run_loop(config)
    text.write_text(text.read_text().swapcase())
    with pytest.raises(DataError, match=r"data was .* when the checkpoint was written"):
        run_loop(config)


def test_a_checkpoint_from_before_there_were_fingerprints_is_taken(tmp_path: Path) -> None:
    loader = Loader(Points(), global_batch=8, fingerprints={"training": "x"})
    loader.load_state_dict({"position": 8, "num_samples": 40, "seed": 0})
    assert loader.position == 8


def test_a_run_may_go_back_past_a_change_of_data_that_it_accepted(caplog: pytest.LogCaptureFixture) -> None:
    old = Loader(Points(40), global_batch=8, fingerprints={"training": "old"}).state_dict()
    accepting = Loader(Points(41), global_batch=8, fingerprints={"training": "new"}, allow_change=True)
    accepting.load_state_dict(old)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    later = Loader(Points(41), global_batch=8, fingerprints={"training": "new"})
    with pytest.raises(DataError):
        later.load_state_dict(old)
    later.load_state_dict(accepting.state_dict())
    later.load_state_dict(old)  # of an attempt before the change
    with pytest.raises(DataError, match=r"Bring back the seed, or start"):
        later.load_state_dict({**old, "seed": 1})

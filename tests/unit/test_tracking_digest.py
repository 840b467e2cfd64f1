"""A run as bounded curves: the same as the log where it is short, no spike lost where it is long."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from harness.runlog import digest as digests
from harness.runlog.digest import Bands, Digest
from harness.runlog.digest_cache import digest_file, load_digest, save_digest
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import log_dir
from harness.runlog.preview import preview
from harness.runlog.reader import open_run
from harness.runlog.segments import segments
from harness.runlog.series import Series
from harness.runlog.writer import RunLog


def read(run_dir: Path) -> Digest:
    digest = Digest(run_dir)
    assert digest.refresh()
    return digest


def random_log(run_dir: Path, seed: int, *, num_steps: int = 300, segment_bytes: int = 9000) -> None:
    """Restarts, rollbacks, values that are not finite, names that come and go, steps written twice."""
    draw = random.Random(seed)
    step = 0
    for _ in range(draw.randint(1, 4)):
        with RunLog(run_dir, segment_bytes=segment_bytes) as log:
            if step:
                step = draw.randint(step // 2, step)
                log.rewind(step)
            for _ in range(num_steps):
                if draw.random() < 0.01 and step > 20:
                    step -= draw.randint(1, 20)
                    log.rewind(step)
                odd = draw.choice([math.nan, math.inf, -math.inf])
                value = odd if draw.random() < 0.05 else draw.gauss(0, 1)
                values = {"train/loss": value, "train/lr": 1e-3 * step, "state": "fine"}
                log.write("step", values if draw.random() < 0.9 else {"train/lr": 0.5}, step=step)
                if draw.random() < 0.05:
                    log.write("eval", {"val/loss": draw.random()}, step=step)
                step += 1


def in_full(run_dir: Path, name: str, within: tuple[int, int] | None = None) -> Series:
    series = open_run(run_dir).scalars(name)
    low, high = within or (0, 10**9)
    return series.at((series.steps >= low) & (series.steps <= high))


def assert_exact(bands: Bands, series: Series) -> None:
    np.testing.assert_array_equal(bands.steps, series.steps)
    np.testing.assert_array_equal(bands.times, series.times)
    finite = np.where(np.isfinite(series.values), series.values, np.nan)
    for column in (bands.low, bands.mean, bands.high):
        np.testing.assert_array_equal(column, finite)
    np.testing.assert_array_equal(bands.num_nan, np.isnan(series.values))
    np.testing.assert_array_equal(bands.num_inf, np.isinf(series.values))


def assert_same_bands(first: Digest, second: Digest, **how: int) -> None:
    assert first.names() == second.names()
    for name in first.names():
        for ours, theirs in zip(first.bands(name, **how), second.bands(name, **how), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(8))
def test_a_short_run_is_shown_as_its_log_has_it(seed: int, tmp_path: Path) -> None:
    random_log(tmp_path, seed)
    digest, run = read(tmp_path), open_run(tmp_path)
    assert digest.names() == run.names()
    for name in run.names():
        assert_exact(digest.bands(name, max_points=10**6), run.scalars(name))
        np.testing.assert_equal(digest.last(name), run.last(name))
    assert (digest.last_step, digest.state(), digest.attempts) == (run.last_step, run.state(), run.attempts)
    assert digest.events() == run.events()


@pytest.mark.parametrize("seed", range(8))
def test_a_long_run_keeps_every_extreme_and_every_step_that_is_not_finite(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 32)
    random_log(tmp_path, seed)
    digest = read(tmp_path)
    series, bands = in_full(tmp_path, "train/loss"), digest.bands("train/loss", max_points=10)
    assert len(bands.steps) <= 10
    finite = series.values[np.isfinite(series.values)]
    assert (np.nanmin(bands.low), np.nanmax(bands.high)) == (finite.min(), finite.max())
    assert bands.num_nan.sum() == np.isnan(series.values).sum()
    assert bands.num_inf.sum() == np.isinf(series.values).sum()
    assert bands.num_points.sum() == len(series.values)
    num_finite = bands.num_points - bands.num_nan - bands.num_inf
    assert np.nansum(bands.mean * num_finite) == pytest.approx(finite.sum(), abs=1e-9)
    np.testing.assert_equal(digest.last("train/loss"), series.values[-1])
    assert digest.last_step == open_run(tmp_path).last_step


@pytest.mark.parametrize("seed", range(8))
def test_a_close_look_at_a_long_run_shows_the_steps_themselves(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 32)
    random_log(tmp_path, seed)
    digest = read(tmp_path)
    last = digest.last_step or 0
    for within in ((0, 20), (last // 2, last // 2 + 37), (last - 10, last)):
        for name in ("train/loss", "train/lr", "val/loss"):
            assert_exact(digest.bands(name, within=within), in_full(tmp_path, name, within))


@pytest.mark.parametrize("most", [32, 8192])
def test_a_log_read_as_it_grows_gives_what_reading_it_at_once_gives(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", most)
    growing = Digest(tmp_path)
    draw = random.Random(1)
    with RunLog(tmp_path) as log:
        for step in range(700):
            log.write("step", {"train/loss": draw.gauss(0, 1)}, step=step)
            if step == 400:
                log.rewind(333)
            if draw.random() < 0.1:
                growing.refresh()
    growing.refresh()
    assert_same_bands(growing, read(tmp_path), max_points=50)


def test_a_digest_that_was_kept_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MOST", 64)
    run_dir, path = tmp_path / "run", digest_file(tmp_path / "kept", "a/b\udcff")
    random_log(run_dir, 3)
    with RunLog(run_dir, info={"config": {"x": math.nan}}) as log:
        log.write("hparams", {"lr": math.inf})
        log.write("event", {"name": "incident", "loss": math.nan}, step=100)
        log.write("ranks", {"loss": [1.0, math.nan]}, step=101)
    first = read(run_dir)
    assert save_digest(first, path)
    with RunLog(run_dir) as log:
        for step in range(50):
            log.write("step", {"train/loss": float(step), "new": 1.0}, step=500 + step)
    second = load_digest(run_dir, path)
    assert second is not None
    assert 0 < second.read_frac < 1
    assert second.refresh()
    assert first.refresh()
    assert_same_bands(second, first, max_points=100)
    assert_same_bands(second, read(run_dir), max_points=100)
    assert str((second.info, second.hparams, second.end)) == str((first.info, first.hparams, first.end))
    assert str((second.events(), second.ranks())) == str((first.events(), first.ranks()))
    assert (second.started, second.updated, second.state()) == (first.started, first.updated, first.state())


def headed(header: bytes) -> bytes:
    """A file of kept digests that holds nothing but this header."""
    return b"harness digest 1\n" + len(header).to_bytes(8, "little") + header


def test_a_kept_digest_that_is_damaged_or_of_another_log_is_none(tmp_path: Path) -> None:
    run_dir, path = tmp_path / "run", tmp_path / "kept.digest"
    random_log(run_dir, 0)
    assert load_digest(run_dir, path) is None
    assert save_digest(read(run_dir), path)
    whole = path.read_bytes()
    cut = (b"", whole[:10], whole[:200], whole[:-40], whole[:-80], whole + bytes(80))
    wrong = (b"x" + whole[1:], whole[:25] + b"}" * 500, headed(b"[]"), headed(b'{"head": "", "places": []}'))
    for damaged in (*cut, *wrong):
        path.write_bytes(damaged)
        assert load_digest(run_dir, path) is None
    path.write_bytes(whole)
    for file in segments(log_dir(run_dir)):
        file.unlink()
    random_log(run_dir, 0)
    assert load_digest(run_dir, path) is None


def test_a_run_begun_anew_under_the_same_name_is_shown_from_its_beginning(tmp_path: Path) -> None:
    random_log(tmp_path, 0)
    digest = read(tmp_path)
    for file in segments(log_dir(tmp_path)):
        file.unlink()
    with RunLog(tmp_path) as log:
        log.write("step", {"train/loss": 1.0}, step=0)
    digest.refresh()
    assert (digest.names(), digest.last_step) == (["train/loss"], 0)


def test_layers_and_ranks_are_metrics_too(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(10):
            norms = {"a.weight": float(step), "b.bias": math.nan if step == 3 else 2.0}
            log.write("layers", {"grad_norm": norms}, step=step)
            log.write("ranks", {"loss": [1.0, 5.0, float(step)]}, step=step)
    digest, run = read(tmp_path), open_run(tmp_path)
    assert digest.bands("layers/grad_norm/a.weight").high.tolist() == list(map(float, range(10)))
    assert digest.bands("ranks/loss/max").high.tolist() == [5.0] * 6 + [6.0, 7.0, 8.0, 9.0]
    assert digest.bands("ranks/loss/max_rank").high.tolist() == [1.0] * 6 + [2.0] * 4
    assert digest.ranks() == {"loss": [1.0, 5.0, 9.0]}
    layers, full = digest.layers("grad_norm"), run.layers("grad_norm")
    assert (layers.names, layers.steps.tolist()) == (full.names, full.steps.tolist())
    np.testing.assert_array_equal(layers.values, np.where(np.isnan(full.values), np.inf, full.values))
    columns = digest.layers("grad_norm", max_columns=5)
    assert columns.values[:, 0].tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert columns.values[:, 1].tolist() == [2.0, math.inf, 2.0, 2.0, 2.0]


def test_samples_of_a_node_get_the_step_of_their_time(tmp_path: Path) -> None:
    node = NodeLog(tmp_path)
    with RunLog(tmp_path) as log:
        for step in range(6):
            log.write("step", {"train/loss": 1.0}, step=step)
            node.write("system", {"system/cpu_frac": step / 10})
    digest, run = read(tmp_path), open_run(tmp_path)
    bands, series = digest.bands("system/cpu_frac"), run.scalars("system/cpu_frac")
    assert bands.steps.tolist() == series.steps.tolist() == list(range(6))
    np.testing.assert_array_equal(bands.mean, series.values)


def test_a_sample_covers_the_run_and_says_that_it_is_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, segment_bytes=400_000) as log:
        for step in range(20_000):
            log.write("step", {"train/loss": 1.0 / (1 + step), "x": 0.0}, step=step)
    some, whole = preview(tmp_path), read(tmp_path)
    assert (some.is_preview, whole.is_preview) == (True, False)
    assert 0 < some.read_frac < 0.5
    assert (some.last_step, some.state()) == (19_999, "finished")
    assert some.last("train/loss") == whole.last("train/loss")
    steps = some.bands("train/loss", max_points=10**6).steps
    assert np.diff(steps, prepend=0, append=19_999).max() < 200
    assert len(some.bands("train/loss", within=(5000, 6000)).steps) > 20


def test_reading_stops_when_its_time_is_over_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_log(tmp_path, 5)
    monkeypatch.setattr(digests, "READ_BYTES", 1000)
    digest = Digest(tmp_path)
    shares = []
    while not digest.refresh(budget_s=0.0):
        shares.append(digest.read_frac)
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert_same_bands(digest, read(tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_shows_no_branch_that_a_rollback_left_wherever_the_rewind_lies(
    seed: int, tmp_path: Path
) -> None:
    """The rewinds stand in the middle of a segment, where a sample does not look."""
    draw = random.Random(seed)
    with RunLog(tmp_path) as log:
        step = 0
        for value in range(4):
            for _ in range(draw.randint(4000, 6000)):
                log.write("step", {"train/loss": float(value)}, step=step)
                step += 1
            if value < 3:
                step -= draw.randint(2000, 3500)
                log.rewind(step)
    truth = open_run(tmp_path)
    first = preview(tmp_path, num_places=100, tail_bytes=1000)
    assert first.is_preview
    assert first.last_step == truth.last_step
    shown, whole = first.bands("train/loss"), truth.scalars("train/loss")
    wrong = np.sum(shown.mean != whole.values[shown.steps])
    assert wrong <= 3 * 6  # between a rewind and the next place, two places at most

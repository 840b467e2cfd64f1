"""No record is a rewind: whatever is logged for an earlier step, in whatever kind, costs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.compat.proto.event_pb2 import Event

from harness.runlog.codec import encode
from harness.runlog.digest import Digest
from harness.runlog.paths import log_dir
from harness.runlog.reader import open_run
from harness.runlog.segments import Follower, SegmentWriter
from harness.runlog.writer import RunLog
from harness.tracking.mirror import MirroredRun
from harness.tracking.settings import MirrorSettings
from harness.tracking.tensorboard import TensorBoardMirror
from tests.support.events import shown_scalars

NUM_STEPS = 101
BELOW: dict[str, tuple[str, dict[str, Any]]] = {
    "an evaluation": ("eval", {"val/loss": 2.0}),
    "an epoch": ("epoch", {"epoch": 0}),
    "a custom metric": ("step", {"mine": 1.0}),
    "a text": ("text", {"notes": "why"}),
    "an event": ("event", {"name": "checkpoint"}),
    "a table of layers": ("layers", {"grad_norm": {"a": 1.0}}),
}


def write_steps(log: RunLog, steps: range, value: float = 0.0) -> None:
    for step in steps:
        log.write("step", {"train/loss": value + step}, step=step)


def mirrored(run_dir: Path) -> dict[int, float]:
    """`train/loss` as TensorBoard shows it."""
    mirror = TensorBoardMirror(MirroredRun(run_dir, MirrorSettings()), {})
    follower = Follower(log_dir(run_dir))
    while records := follower.read():
        for record in records:
            mirror.take(record)
    mirror.close(None)
    return dict(shown_scalars(run_dir / "tensorboard", "train/loss"))


def digested(run_dir: Path) -> dict[int, float]:
    digest = Digest(run_dir)
    digest.refresh()
    bands = digest.bands("train/loss", max_points=10**6)
    return dict(zip(bands.steps.tolist(), bands.mean.tolist(), strict=True))


def read(run_dir: Path) -> dict[int, float]:
    series = open_run(run_dir).scalars("train/loss")
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


@pytest.mark.parametrize("at", [0, 98])
@pytest.mark.parametrize("below", BELOW)
def test_a_record_below_the_resume_point_drops_nothing(below: str, at: int, tmp_path: Path) -> None:
    kind, values = BELOW[below]
    with RunLog(tmp_path) as log:
        write_steps(log, range(NUM_STEPS))
    with RunLog(tmp_path) as log:
        log.write(kind, values, step=at)
        write_steps(log, range(NUM_STEPS, NUM_STEPS + 3))
    truth = {step: float(step) for step in range(NUM_STEPS + 3)}
    assert read(tmp_path) == truth
    assert digested(tmp_path) == truth
    assert mirrored(tmp_path) == truth
    assert not any(event.abandoned for event in open_run(tmp_path).events())
    assert open_run(tmp_path).last_step == NUM_STEPS + 2


@pytest.mark.parametrize("seed", range(4))
def test_random_resumes_rewinds_and_records_out_of_order_show_what_a_dictionary_would(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    truth: dict[int, float] = {}
    log = RunLog(tmp_path, segment_bytes=4000)
    step = 0
    for number in range(400):
        chance = rng.random()
        if chance < 0.02:
            log.close()
            log = RunLog(tmp_path, segment_bytes=4000)
        elif chance < 0.05:
            step = int(rng.integers(0, step + 1))
            log.rewind(step)
            truth = {s: v for s, v in truth.items() if s < step}
        at = int(rng.integers(0, step + 1)) if rng.random() < 0.1 else step
        log.write("eval" if rng.random() < 0.1 else "step", {"train/loss": float(number)}, step=at)
        truth[at] = float(number)
        step = max(step, at + 1)
    log.close()
    assert read(tmp_path) == truth
    assert digested(tmp_path) == truth
    assert mirrored(tmp_path) == truth
    run, digest = open_run(tmp_path), Digest(tmp_path)
    digest.refresh()
    newest = truth[max(truth)]
    assert run.last("train/loss") == digest.last("train/loss") == newest
    assert run.last_step == digest.last_step == max(truth)


def test_a_branch_as_it_stood_is_still_shown_on_request(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(10))
    with RunLog(tmp_path) as log:
        log.rewind(5)
        log.write("eval", {"val/loss": 1.0}, step=2)
        write_steps(log, range(5, 7), value=100.0)
    run = open_run(tmp_path)
    assert run.scalars("train/loss", attempt=0).steps.tolist() == list(range(10))
    assert run.scalars("train/loss").values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 105.0, 106.0]


def test_tensorboard_without_its_data_server_drops_a_branch_too(tmp_path: Path) -> None:
    """It takes the first start of a session that it finds for the beginning, and drops nothing at it."""
    with RunLog(tmp_path) as log:
        write_steps(log, range(10))
    with RunLog(tmp_path) as log:
        log.rewind(5)
        write_steps(log, range(5, 7), value=100.0)
    mirrored(tmp_path)
    shown = PluginEventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Tensors("train/loss")] == list(range(7))


def test_what_tensorboards_data_server_drops_for_an_earlier_step_is_shown_again_at_the_end(
    tmp_path: Path,
) -> None:
    """That server keeps the steps of a tag ascending: a point drops all of its tag that are not before it."""
    with RunLog(tmp_path) as log:
        write_steps(log, range(NUM_STEPS))
        log.write("step", {"train/loss": -1.0}, step=50)
    mirrored(tmp_path)
    kept: dict[int, float] = {}
    [path] = (tmp_path / "tensorboard").iterdir()
    for raw in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(raw)
        for value in event.summary.value:
            if value.tag == "train/loss":
                kept = {step: x for step, x in kept.items() if step < event.step}
                kept[event.step] = value.simple_value
    assert kept == {**{step: float(step) for step in range(NUM_STEPS)}, 50: -1.0}


def test_in_an_old_log_a_training_that_began_again_at_step_0_replaces_the_one_before(tmp_path: Path) -> None:
    """Earlier releases wrote a rewind for a later first step only."""
    for value, steps in ((0.0, range(8)), (100.0, range(3))):
        with RunLog(tmp_path, info={"config": {"seed": 1}}) as log:
            write_steps(log, steps, value)
    assert read(tmp_path) == digested(tmp_path) == {0: 100.0, 1: 101.0, 2: 102.0}


def test_system_samples_keep_their_step_when_an_earlier_one_is_logged(tmp_path: Path) -> None:
    writer = SegmentWriter(log_dir(tmp_path))
    node = SegmentWriter(log_dir(tmp_path) / "nodes" / "a")
    for time, step in ((1.0, 0), (2.0, 90), (3.0, 5), (4.0, None)):
        writer.append(encode("step", {"mine": 1.0}, attempt=0, step=step, time=time))
    for time in (1.5, 2.5, 3.5, 4.5):
        node.append(encode("system", {"system/cpu_frac": 0.5}, attempt=-1, step=None, time=time))
    digest = Digest(tmp_path)
    digest.refresh()
    assert open_run(tmp_path).scalars("system/cpu_frac").steps.tolist() == [0, 90, 90, 90]
    assert digest.bands("system/cpu_frac").steps.tolist()[-1] == 90

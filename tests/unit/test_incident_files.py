"""What is kept of an incident: what was written is read back, and what is damaged is said."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from harness.errors import TrackingError
from harness.records import Culprit, ParameterRow, RankRow
from harness.runlog.incident_files import (
    INCIDENT,
    IncidentFile,
    RankFile,
    RememberedStep,
    hang_folders,
    incident_steps,
    ranks_in,
    read_incident,
    read_rank,
    read_rng,
    write_json,
    write_rank,
    write_rng,
)
from harness.runlog.paths import hang_dir, incident_dir, is_hang

ROW = RankRow(
    rank=0, loss=math.nan, num_tokens=8, grad_norm=1.0, max_abs=math.inf, num_nan=3, num_inf=0, num_zero=0
)
PARAMETER = ParameterRow(grad_norm=1.5, max_abs=2.0, num_nan=3, num_inf=0, num_zero=0, num_elements=9)


def incident() -> IncidentFile:
    return IncidentFile(
        step=7,
        kind="non-finite gradient",
        reason="3 NaN",
        summary="step 7 skipped: 3 NaN",
        time=1.7e9,
        verdict="skip",
        rank=1,
        culprits=(Culprit(rank=1, micro_batch=0, samples=(4, 5)),),
        loss=-math.inf,
        per_rank=(ROW,),
        per_parameter={"layers.0.weight": PARAMETER},
        samples=(((1, 2), (3, 4)), ((5, 6), (7, 8))),
        sources={"4": "a.txt:32"},
    )


def test_an_incident_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = incident_dir(tmp_path, 7)
    folder.mkdir(parents=True)
    write_json(folder / INCIDENT, incident())
    read = read_incident(folder)
    assert math.isnan(read.per_rank[0].loss)
    same = dataclasses.replace(read, per_rank=(dataclasses.replace(read.per_rank[0], loss=0.0),))
    assert same == dataclasses.replace(incident(), per_rank=(dataclasses.replace(ROW, loss=0.0),))
    for other in ("step-00000008.1", "step-000000009", "step-8", "hang-20260101-101010", "hang-2026"):
        (folder.parent / other).mkdir()
    assert incident_steps(tmp_path) == [7]
    assert [one.name for one in hang_folders(tmp_path)] == ["hang-20260101-101010"]
    assert is_hang(hang_dir(tmp_path).name)


def test_a_rank_and_its_random_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = {"torch": "d1", "python": "d2"}
    step = RememberedStep(step=3, position=24, samples=((1, 2),), rng=rng, loss=math.nan)
    write_rank(tmp_path, RankFile(rank=2, world_size=4, step=3, host="h", pid=1, steps=(step,)))
    write_rng(tmp_path, 2, {"torch": {"d1": b"\0\xff"}, "python": {"d2": [3, [1, 2], None]}})
    assert ranks_in(tmp_path) == [2]
    remembered = read_rank(tmp_path, 2).at(3)
    assert remembered is not None
    assert remembered.samples == ((1, 2),)
    assert read_rng(tmp_path, 2, 3) == {"torch": b"\0\xff", "python": [3, [1, 2], None]}
    assert read_rng(tmp_path, 2, 4) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "step": "seven"}',
        b'{"version": 1, "step": 7}',
        b'{"version": 1, "step": 7, "kind": "x", "reason": "", "summary": "", "time": 1, "samples": [[4]]}',
        b'{"version": 1, "nonfinite": [["nan", "a", "b"]]}',
    ],
)
def test_what_is_damaged_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INCIDENT).write_bytes(content)
    with pytest.raises(TrackingError, match=r"incident\.json"):
        read_incident(tmp_path)

"""What a replay found, told in words and as plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from harness.atomic import write_atomically
from harness.replay.cause_story import carriers_data, carriers_text, cause_data, cause_text, judgement_text
from harness.replay.remembered import Remembered
from harness.replay.replay import Replay
from harness.runlog.incident_files import REPLAY
from harness.runlog.paths import STORY, incident_dir

__all__ = ["as_data", "story", "write_story"]


def story(replay: Replay) -> str:
    """The replay in Markdown, a paragraph for each question that it answers."""
    parts = [_title(replay), _way(replay), _comparison(replay), _on_the_spot(replay.remembered)]
    parts += [cause_text(cause) for cause in replay.causes]
    if replay.judgement is not None:
        parts.append(judgement_text(replay.judgement, replay.arms))
    if replay.carriers is not None:
        parts.append(carriers_text(replay.carriers))
    if not replay.causes and replay.record.skipped and replay.carriers is None:
        parts.append("Every rank's own loss and gradient are finite: " + (replay.record.reason or ""))
    return "\n\n".join(part for part in parts if part) + "\n"


def as_data(replay: Replay) -> dict[str, Any]:
    """The same as plain JSON data; numbers that JSON does not know are strings."""
    history, record = replay.history, replay.record
    data = {
        "run": str(replay.directory),
        "step": history.step,
        "attempt": history.attempt,
        "world_size": history.world_size,
        "reproduced": replay.reproduced,
        "differences": [dataclasses.asdict(one) for one in replay.differences],
        "started_from": replay.started_from,
        "way": dataclasses.asdict(replay.parting),
        "remembered": {"num_steps": replay.remembered.num_steps, "differs": replay.remembered.differs},
        "rerun": [{"rank": rank, "lines": list(lines)} for rank, lines in replay.remembered.rerun],
        "notes": replay.notes,
        "incident": None if history.incident is None else history.incident.to_values(),
        "record": {
            "verdict": record.verdict,
            "reason": record.reason,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "num_nan": record.num_nan,
            "num_inf": record.num_inf,
            "culprits": [dataclasses.asdict(one) for one in record.culprits],
            "bad_elements": bad_elements(replay),
        },
        "causes": [cause_data(cause) for cause in replay.causes],
        "arms": [dataclasses.asdict(arm) for arm in replay.arms],
        "judgement": None if replay.judgement is None else dataclasses.asdict(replay.judgement),
        "carriers": None if replay.carriers is None else carriers_data(replay.carriers),
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def bad_elements(replay: Replay) -> dict[str, list[dict[str, int]]]:
    """NaN and Inf of each parameter's gradient on each rank, where there are any."""
    found: dict[str, list[dict[str, int]]] = {}
    for rank, rows in enumerate(replay.played.rows.tolist()):
        for name, row in zip(replay.record.per_parameter, rows, strict=True):
            if row[2] or row[3]:
                counts = {"rank": rank, "num_nan": int(row[2]), "num_inf": int(row[3])}
                found.setdefault(name, []).append(counts)
    return found


def write_story(replay: Replay) -> list[Path]:
    """Writes both beside what is known of the incident; their paths.

    Raises:
        OSError: the run's directory cannot be written.
    """
    folder = incident_dir(replay.directory, replay.history.step)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {STORY: story(replay), REPLAY: json.dumps(as_data(replay), indent=2) + "\n"}
    for name, text in texts.items():
        write_atomically(folder / name, text, sync=False)
    return [folder / name for name in texts]


def _title(replay: Replay) -> str:
    step, name = replay.history.step, replay.directory.name
    return f"# Step {step} of {name}, replayed"


def _way(replay: Replay) -> str:
    start, way = replay.started_from, replay.parting
    begin = f"the checkpoint of step {start}" if start else "the beginning of the run"
    ranks = replay.history.world_size
    before = f"{_count(len(replay.way), 'step')} and then " if replay.way else ""
    text = f"From {begin}, {before}step {replay.history.step}, "
    text += f"{_count(ranks, 'rank')} in turn in one process. "
    if way.step is not None:
        text += (
            f"**The way there parts from the log at step {way.step}**: {way.metric} is {way.in_replay:.9g}"
            f" and was {way.in_run:.9g}."
        )
    elif way.is_same:
        text += "Loss and gradient norm of the steps before are the log's, bit for bit."
    elif way.num_steps:
        text += (
            f"Loss and gradient norm of the steps before are the log's to within {way.largest:.1g}, the first"
            f" {way.num_same_bits} of {way.num_steps} bit for bit."
        )
    text += _remembered(replay.remembered)
    return text.rstrip() + "".join(f" Note: {note}." for note in replay.notes)


def _remembered(box: Remembered) -> str:
    if box.differs is not None:
        return f" **It is not what the ranks remember**: {box.differs}."
    same = "Data, random numbers and losses of each rank are what it remembers"
    return f" {same} ({_count(box.num_steps, 'step')} of all ranks)." if box.num_steps else ""


def _on_the_spot(box: Remembered) -> str:
    lines = [f"- rank {rank}: {says}" for rank, (says, *_) in box.rerun]
    return "\n".join(["## Run again on the spot", "", *lines]) if lines else ""


def _comparison(replay: Replay) -> str:
    logged, record = replay.history.incident, replay.record
    said = f"In the run: {logged.summary}." if logged is not None else "In the run the step was in order."
    if replay.reproduced:
        what = (
            f"loss {record.loss:.6g}, gradient norm {record.grad_norm:.6g}"
            if logged is None
            else f"verdict `{record.verdict}`, {record.num_nan} NaN and {record.num_inf} Inf in the"
            " gradients, on the same ranks and parameters"
        )
        return f"{said} **The replay reproduces it**: {what}."
    lines = [f"- {one.what}: {one.in_run} in the run, {one.in_replay} now" for one in replay.differences]
    return "\n".join([f"{said} **The replay does not reproduce it:**", "", *lines])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""Runs as strangers leave them: a sound one, and seeded damages of every file that a reader opens."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.config import TrainConfig, dump_yaml
from harness.records import Culprit, ParameterRow, RankRow
from harness.runlog.incident_files import (
    INCIDENT,
    REPLAY,
    IncidentFile,
    RankFile,
    RememberedStep,
    write_json,
    write_rank,
)
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import incident_dir, story_file
from harness.tracking import RunLog

__all__ = ["ALIAS_BOMB", "INCIDENT_STEP", "damaged_run", "sound_run"]

INCIDENT_STEP = 7
"""Of the incident of a sound run, of which a folder with a story is kept."""

ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join([f'*{chr(97 + level)}'] * 9)}]\n"
    for level in range(12)
)
HOSTILE = "\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>\u202e\n$\\frac{$"
NAMES = (
    "train/loss",
    "val/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "guard/num_nan",
    "time/step_s",
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    2**64 - 1,
    -(2**63),
    1e308,
    -1e308,
    5e-324,
    "",
    "NaN",
    HOSTILE,
    "x" * 20_000,
    [],
    [[]],
    [None],
    {},
    {"": None},
    {"a": {"b": [1, {"c": 2}]}},
    [1, "two", None, {"three": 3}],
)


def sound_run(run_dir: Path, *, num_steps: int = 24) -> Path:
    """A small run with a record of nearly every kind, names of checkpoints, what it printed."""
    config = TrainConfig(name=run_dir.name)
    info = {"config": {"loop": {"steps": num_steps}, "tracking": {"group": "g", "tags": ["t"]}}}
    with RunLog(run_dir, info=info) as log:
        log.write("hparams", {"lr": 0.1, "model": {"dim": 4}})
        for step in range(num_steps):
            loss = math.nan if step == INCIDENT_STEP else 1.0 / (step + 1)
            log.write("step", {name: loss + at for at, name in enumerate(NAMES)}, step=step)
            log.write("layers", {"grad_norm": {"w": loss, "b$_{x}": 1.0}, "max_abs": {"w": 1.0}}, step=step)
            log.write("ranks", {"loss": [1.0, loss], "compute_s": [0.1, 0.2]}, step=step)
            if step % 8 == 0:
                log.write("eval", {"val/loss": loss}, step=step)
                log.write("event", {"name": "checkpoint", "num_steps": step}, step=step)
        log.write("event", {"name": "incident", "summary": "NaN", "samples": [1, 2]}, step=INCIDENT_STEP)
        log.write("text", {"notes": "words"})
        log.rewind(12)
        for step in range(12, num_steps):
            log.write("step", {"train/loss": 0.5}, step=step)
    NodeLog(run_dir).write("system", {"system/cpu_frac": 0.5})
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    (run_dir / "summary.json").write_text(json.dumps({"state": "finished"}))
    for step in (8, 16):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "healthy").touch()
    _keep_incident(run_dir)
    records = run_dir.parent / ".dashboard" / run_dir.name
    records.mkdir(parents=True)
    (records / "output.log").write_text("step 1\nstep 2\n")
    (records / "program.json").write_text(
        json.dumps(
            {
                "command": ["python"],
                "processes": 1,
                "pid": 1,
                "process_start": 0.0,
                "machine": "m",
                "host": socket.gethostname(),
                "started": 1.0,
                "exit_code": 0,
            }
        )
    )
    return run_dir


def _keep_incident(run_dir: Path) -> None:
    """The folder of the incident: what happened, what a rank remembers, what a replay has found."""
    step, folder = INCIDENT_STEP, incident_dir(run_dir, INCIDENT_STEP)
    folder.mkdir(parents=True)
    row = RankRow(
        rank=0, loss=math.nan, num_tokens=8, grad_norm=1.0, max_abs=1.0, num_nan=1, num_inf=0, num_zero=0
    )
    parameter = ParameterRow(grad_norm=1.0, max_abs=2.0, num_nan=1, num_inf=0, num_zero=0, num_elements=9)
    what = IncidentFile(
        step=step,
        kind="non-finite loss",
        reason="the loss is NaN",
        summary="NaN",
        time=1.7e9,
        verdict="skip",
        rank=0,
        culprits=(Culprit(rank=0, micro_batch=0, samples=(1, 2)),),
        per_rank=(row,),
        per_parameter={"w": parameter},
        samples=(((1, 2),),),
        sources={"1": "a.txt:1"},
    )
    remembered = RememberedStep(step=step, position=14, samples=((1, 2),), loss=math.nan)
    write_json(folder / INCIDENT, what)
    write_rank(
        folder,
        RankFile(rank=0, world_size=1, step=step, host="h", pid=1, steps=(remembered,), rerun=("finite",)),
    )
    write_json(folder / REPLAY, {"run": run_dir.name, "step": step, "reproduced": True})
    story_file(run_dir, step).write_text("# Step 7\n\nThe loss is NaN on rank 0.\n")


def damaged_run(sound: Path, run_dir: Path, seed: int) -> str:
    """Copies a sound run to `run_dir`, does it one to three damages, and says which."""
    draw = random.Random(seed)
    shutil.copytree(sound, run_dir)
    shutil.copytree(sound.parent / ".dashboard" / sound.name, run_dir.parent / ".dashboard" / run_dir.name)
    done = []
    for damage in draw.choices(DAMAGES, k=draw.randint(1, 3)):
        try:
            damage(run_dir, draw)
        except (OSError, IndexError, ValueError):
            continue  # an earlier damage has taken what this one needs
        done.append(damage.__name__.strip("_"))
    return f"seed {seed}: {', '.join(done)}"


def _segment(run_dir: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in (run_dir / "log").rglob("*.jsonl") if path.is_file()))


def _any_file(run_dir: Path, draw: random.Random) -> Path:
    records = run_dir.parent / ".dashboard" / run_dir.name
    files = [path for folder in (run_dir, records) for path in folder.rglob("*") if path.is_file()]
    return draw.choice(sorted(files))


def _cut(run_dir: Path, draw: random.Random) -> None:
    path = _any_file(run_dir, draw)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randint(0, len(content))])


def _flip_bits(run_dir: Path, draw: random.Random) -> None:
    path = _any_file(run_dir, draw)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 3, 30, 300))):
        content[draw.randrange(len(content) or 1)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _binary(run_dir: Path, draw: random.Random) -> None:
    _any_file(run_dir, draw).write_bytes(draw.randbytes(draw.choice((1, 100, 100_000))))


def _empty(run_dir: Path, draw: random.Random) -> None:
    _any_file(run_dir, draw).write_bytes(b"")


def _giant_line(run_dir: Path, draw: random.Random) -> None:
    path = _segment(run_dir, draw)
    opening = draw.choice((b"", b'{"kind":"step","values":{"a":"', b"[" * 1000))
    with path.open("ab") as file:
        file.write(opening + draw.choice((b"x", b"[", b"0")) * (3 << 20) + draw.choice((b"", b"\n")))


def _foreign_lines(run_dir: Path, draw: random.Random) -> None:
    lines = [
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"{}",
        b"[" * 5000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b"\xff\xfe",
        b"",
    ]
    with _segment(run_dir, draw).open("ab") as file:
        file.writelines(draw.choice(lines) + b"\n" for _ in range(draw.randint(1, 2000)))


def _odd_fields(run_dir: Path, draw: random.Random) -> None:
    """JSON of the wrong type, range or depth, at any field of some records."""
    path = _segment(run_dir, draw)
    lines = path.read_bytes().splitlines()
    for _ in range(draw.randint(1, 20)):
        at = draw.randrange(len(lines))
        try:
            record = json.loads(lines[at])
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            _spoil(record, draw)
            lines[at] = json.dumps(record).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def _spoil(value: Any, draw: random.Random) -> None:
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        if draw.random() < 0.6 or not isinstance(value[key], (dict, list)):
            how = draw.random()
            if how < 0.15:
                del value[key]
            elif how < 0.3 and isinstance(value, dict):
                value[draw.choice((HOSTILE, "", "x" * 5000, "values", "__proto__"))] = value.pop(key)
            elif how < 0.4:
                value[key] = _nested(draw.choice((15, 40, 300)))
            else:
                value[key] = draw.choice(ODD_VALUES)
            return
        value = value[key]


def _odd_incident(run_dir: Path, draw: random.Random) -> None:
    """A file of the incident that says something of the wrong type, or far too long, or a story that does."""
    folder = incident_dir(run_dir, INCIDENT_STEP)
    path = draw.choice(sorted(folder.iterdir()))
    if path.suffix == ".md":
        path.write_text(draw.choice((HOSTILE, HOSTILE * 100_000)))
        return
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        for _ in range(draw.randint(1, 3)):
            _spoil(values, draw)
        path.write_text(json.dumps(values))


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _odd_records(run_dir: Path, draw: random.Random) -> None:
    """Records whose frame is right and whose values are anything, of every kind."""
    kinds = (
        "run",
        "step",
        "eval",
        "epoch",
        "event",
        "hparams",
        "rewind",
        "end",
        "text",
        "image",
        "histogram",
    )
    kinds += ("graph", "layers", "ranks", "system", "profile", HOSTILE)
    with _segment(run_dir, draw).open("ab") as file:
        for _ in range(draw.randint(1, 60)):
            names = draw.choices(
                (*NAMES, "name", "step", "config", "command", "host", "pid", "tags", HOSTILE), k=3
            )
            record = {
                "kind": draw.choice(kinds),
                "attempt": draw.choice((0, 0, 1, 2, -1, 2**31, 2**31 - 1)),
                "step": draw.choice((None, 0, 5, 2**62, 2**63 - 1, 2**63)),
                "time": draw.choice((1e9, 0, -1.0, 1e300, 253_402_300_799.0, 1.7e9)),
                "values": {name: draw.choice(ODD_VALUES) for name in names},
                "nonfinite": draw.choice(
                    ([], [["nan", draw.choice(names)]], [["inf", "a", 0]], 7, [[]], [["x", []]])
                ),
            }
            file.write(json.dumps(record).encode() + b"\n")


def _odd_config(run_dir: Path, draw: random.Random) -> None:
    contents: tuple[str | bytes, ...] = (
        "- a\n- b\n",
        "&a [*a]\n",
        "loop: &a {steps: *a}\n",
        ALIAS_BOMB,
        "!!python/object/apply:os.system [ls]\n",
        "loop: !!binary aGk=\n",
        "!!set {a, b}\n",
        "loop: 2024-99-99\n",
        "loop: {steps: " + "9" * 100_000 + "}\n",
        "loop: {steps: 0x" + "f" * 10_000 + "}\n",
        "a: " + "[" * 50_000,
        "a: 1\n---\nb: 2\n",
        "? [a]\n: b\n",
        "loop:\n\t- x\n",
        "*nope\n",
        "\n".join(f"k{number}: {number}" for number in range(15_000)),
        "x: " + "y" * 2_000_000,
        HOSTILE,
        f"{HOSTILE!r}: 1\n",
        "1: 2\nnull: 3\ntrue: 4\n2024-01-01: 5\n",
        "a: .nan\nb: .inf\nc: -.inf\n",
        b"\xff\xfe\x00",
        b"\x00\x01\x02",
        draw.randbytes(3000),
    )
    content = draw.choice(contents)
    (run_dir / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


def _odd_checkpoints(run_dir: Path, draw: random.Random) -> None:
    names = (
        "step-1",
        "step-" + "9" * 200,
        "step-00000100.1",
        "step-²²²²²²²²",
        "step-00000009",
        HOSTILE[:5],
        "x" * 200,
    )
    for name in draw.choices(names, k=3):
        path = run_dir / "checkpoints" / name
        if draw.random() < 0.3:
            path.write_text("a file")
        else:
            path.mkdir(parents=True)
            (path / "manifest.json").write_text(draw.choice(("", "{}", "[]", "null", HOSTILE)))


def _odd_segments(run_dir: Path, draw: random.Random) -> None:
    log = run_dir / "log"
    for name in draw.choices(
        ("1.jsonl", "9" * 60 + ".jsonl", "٣٣٣٣٣٣٣٣.jsonl", "00000007.jsonl", "a.jsonl"), k=2
    ):
        if draw.random() < 0.5:
            (log / name).mkdir()
        else:
            (log / name).write_bytes(draw.choice((b"", b"\n", b"{}\n", draw.randbytes(99))))


def _special_file(run_dir: Path, draw: random.Random) -> None:
    """A pipe, a socket or a folder where a file is expected, or a file where a folder is."""
    path = draw.choice([_any_file(run_dir, draw), run_dir / "config.yaml", run_dir / "checkpoints"])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = draw.choice(("pipe", "folder", "file", "nothing", "dangling", "loop"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind != "nothing":
        path.symlink_to(path if kind == "loop" else "nowhere")


def _shuffled(run_dir: Path, draw: random.Random) -> None:
    """Records twice, in another order, or of another run."""
    path = _segment(run_dir, draw)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(draw.choices(lines, k=2 * len(lines))))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _cut,
    _flip_bits,
    _binary,
    _empty,
    _giant_line,
    _foreign_lines,
    _odd_fields,
    _odd_fields,
    _odd_fields,
    _odd_records,
    _odd_records,
    _odd_config,
    _odd_config,
    _odd_checkpoints,
    _odd_incident,
    _odd_segments,
    _special_file,
    _shuffled,
)

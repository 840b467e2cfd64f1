"""The TensorBoard mirror: one event file that is a function of the log.

Written with TensorBoard's own messages and without torch or TensorFlow. The file only ever grows; a restart
cuts off what was written after the last commit and goes on from there.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from harness.tracking.codec import Record
from harness.tracking.log import media_file
from harness.tracking.mirror import StartAgain, scalars_of

__all__ = ["TensorBoardMirror", "trace_graph"]

_FILE = re.compile(r"events\.out\.tfevents\.[0-9]+\.harness")


class TensorBoardMirror:
    """Shows the log in `folder`: scalars, events and texts, images, histograms, the model's graph.

    Args:
        folder: What `tensorboard --logdir` is given, or a folder in it.
        run_dir: Where files that records refer to are found.
        state: What the last `commit` returned; empty starts anew.

    Raises:
        StartAgain: the event file is shorter than it was at the last commit, or gone.
    """

    def __init__(self, folder: Path, *, run_dir: Path, state: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._folder = folder
        self._waiting: list[bytes] = []
        if state and not _is_sound(state):
            raise StartAgain
        self._attempt: int | None = state.get("attempt")
        self._step: int = state.get("step", 0)
        self._path: Path | None = folder / state["file"] if "file" in state else None
        self._size: int = state.get("size", 0)
        if self._path is None:
            for old in folder.glob("events.out.tfevents.*.harness"):
                old.unlink()
        elif not self._path.exists() or self._path.stat().st_size < self._size:
            raise StartAgain

    def take(self, record: Record) -> None:
        if self._path is None:
            self._path = self._folder / f"events.out.tfevents.{int(record.time):010d}.harness"
            self._write(Event(wall_time=record.time, file_version="brain.Event:2"))
        if record.kind == "rewind":
            self._step = max(0, record.values["step"] - 1)
            self._begin_attempt(record.attempt, record.values["step"], record.time)
        elif record.step is not None and record.attempt >= 0:  # no word of a side process
            if self._attempt is not None and record.attempt > self._attempt:
                self._begin_attempt(record.attempt, record.step, record.time)
            self._attempt = record.attempt
            self._step = record.step
        event = Event(wall_time=record.time, step=self._step)
        _show(record, event.summary, self._run_dir)
        if event.summary.value:
            self._write(event)
        if record.kind == "graph" and (path := media_file(self._run_dir, record.values)) is not None:
            self._write(Event(wall_time=record.time, graph_def=path.read_bytes()))

    def commit(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        with self._path.open("r+b" if self._size else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.writelines(self._waiting)
            self._size = file.tell()
        self._waiting = []
        return {"file": self._path.name, "size": self._size, "attempt": self._attempt, "step": self._step}

    def idle(self) -> None:
        """Nothing is watched here."""

    def abandon(self) -> None:
        """Nothing is held open between commits."""

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.commit()

    def _begin_attempt(self, attempt: int, step: int, time: float) -> None:
        """TensorBoard forgets what earlier attempts showed from this step on."""
        self._attempt = attempt
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time, step=step, session_log=start))

    def _write(self, event: Event) -> None:
        self._waiting.append(_framed(event.SerializeToString()))


def _is_sound(state: Mapping[str, Any]) -> bool:
    """Whether it is what `commit` returned: the file that it names is going to be written."""
    numbers = [state.get(name, 0) for name in ("size", "step")]
    return (
        _FILE.fullmatch(str(state.get("file"))) is not None
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(state.get("attempt"), int | None)
    )


def trace_graph(model: Any, example_input: Any) -> bytes:
    """The model's graph in TensorBoard's format. Traces: the model runs once. Called in the trainer."""
    from torch.utils.tensorboard._pytorch_graph import graph

    traced: bytes = graph(model, example_input)[0].SerializeToString()
    return traced


def _framed(data: bytes) -> bytes:
    """A record of TensorFlow's TFRecord format: length, its checksum, data, its checksum; little-endian."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated right by 15 bits and moved by a constant. TensorBoard's own is pure Python: that alone
    would be half of what a step costs here."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _show(record: Record, summary: Summary, run_dir: Path) -> None:
    """Adds to `summary` what there is to see of the record."""
    if record.kind == "event":
        name = f"events/{record.values.get('name', 'event')}"
        summary.value.append(_text(name, _table(record.values)))
    elif record.kind in ("hparams", "run", "end"):
        summary.value.append(_text(record.kind, _table(record.values)))
    elif record.kind == "text":
        summary.value.extend(_text(name, str(text)) for name, text in record.values.items())
    elif record.kind == "histogram":
        summary.value.extend(_histogram(name, value) for name, value in record.values.items())
    elif record.kind == "image":
        files = {name: media_file(run_dir, value) for name, value in record.values.items()}
        summary.value.extend(_image(name, record.values[name], path) for name, path in files.items() if path)
    else:
        for name, number in scalars_of(record).items():
            summary.value.add(tag=name, simple_value=number)


def _text(tag: str, markdown: str) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _histogram(tag: str, value: Mapping[str, Any]) -> Summary.Value:
    """`edges` has one entry more than `counts`; TensorBoard wants each bucket's right edge."""
    names = ("min", "max", "num", "sum", "sum_squares")
    proto = HistogramProto(
        **{name: value[name] for name in names}, bucket_limit=value["edges"][1:], bucket=value["counts"]
    )
    return Summary.Value(tag=tag, histo=proto)


def _image(tag: str, value: Mapping[str, Any], path: Path) -> Summary.Value:
    image = Summary.Image(
        height=value["height"],
        width=value["width"],
        colorspace=value["channels"],
        encoded_image_string=path.read_bytes(),
    )
    return Summary.Value(tag=tag, image=image)

"""The TensorBoard mirror: one event file that is a function of the log.

Written with TensorBoard's own messages and without torch or TensorFlow. The file only ever grows; a restart
cuts off what was written after the last commit and goes on from there.
"""

from __future__ import annotations

import json
import math
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

from harness.runlog.codec import Record
from harness.runlog.paths import log_dir, media_bytes
from harness.runlog.scalars import scalars_of
from harness.runlog.segments import Follower
from harness.tracking.mirror import Mirror, MirroredRun, StartAgain, shown_name

__all__ = ["TensorBoardMirror", "trace_graph"]

_FILE = re.compile(r"events\.out\.tfevents\.[0-9]+\.harness")
_OWN_KINDS = frozenset({"run", "hparams", "end", "event"})
"""Records that are shown under names of the mirror's choice."""
_IS_RESERVED = re.compile(r"run|hparams|end|events/.*", re.DOTALL)
_KINDS = {**dict.fromkeys(_OWN_KINDS | {"text"}, "text"), "image": "image", "histogram": "histogram"}


class TensorBoardMirror(Mirror):
    """Shows the log in one event file: scalars, events and texts, images, histograms, the model's graph.

    Raises:
        StartAgain: the event file is shorter than it was at the last commit, or gone.
    """

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        self._run_dir = run.directory
        self._folder = folder = run.tensorboard_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: list[bytes] = []
        if state and not _is_sound(state):
            raise StartAgain
        self._step: int = state.get("step", 0)
        self._path: Path | None = folder / state["file"] if "file" in state else None
        self._size: int = state.get("size", 0)
        self._kinds: dict[str, str] = state.get("kinds", {})
        self._newest: dict[str, int] = state.get("newest", {})
        self._cut: dict[str, int] = state.get("cut", {})
        if self._path is None:
            for old in folder.glob("events.out.tfevents.*.harness"):
                old.unlink()
        elif not self._path.exists() or self._path.stat().st_size < self._size:
            raise StartAgain

    def take(self, record: Record) -> None:
        if self._path is None:
            self._path = self._folder / f"events.out.tfevents.{int(record.time):010d}.harness"
            self._write(Event(wall_time=record.time, file_version="brain.Event:2"))
            self._forget_from(
                0, record.time
            )  # TensorBoard without its data server ignores the first of these
        if record.kind == "rewind":
            self._step = max(0, record.values["step"] - 1)
            self._newest = {name: min(step, self._step) for name, step in self._newest.items()}
            self._forget_from(record.values["step"], record.time)
        is_dated = record.step is not None and record.attempt >= 0  # no word of a side process
        if is_dated:
            self._step = max(self._step, record.step or 0)
        event = Event(wall_time=record.time, step=record.step if is_dated else self._step)
        _show(record, event.summary, self._run_dir)
        for value in event.summary.value:
            if is_dated and record.kind not in _KINDS:
                self._note_order(value.tag, event.step)
            value.tag = self._free_tag(value.tag, record.kind)
        if event.summary.value:
            self._write(event)
        if record.kind == "graph" and (graph := media_bytes(self._run_dir, record.values)) is not None:
            self._write(Event(wall_time=record.time, graph_def=graph))

    def commit(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        with self._path.open("r+b" if self._size else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.writelines(self._waiting)
            self._size = file.tell()
        self._waiting = []
        state = {"file": self._path.name, "size": self._size, "step": self._step}
        return {**state, "kinds": self._kinds, "newest": self._newest, "cut": self._cut}

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        if self._cut:
            self._show_again()
        return self.commit()

    def _note_order(self, name: str, step: int) -> None:
        newest = self._newest.get(name, -1)
        if step < newest:
            self._cut[name] = min(step, self._cut.get(name, step))
        self._newest[name] = max(step, newest)

    def _show_again(self) -> None:
        """TensorBoard's data server drops a tag's later points when an earlier step of it follows them: here
        they are once more, in order. One pass over the log, for runs in which that happened."""
        for name, points in _points_since(self._run_dir, self._cut).items():
            tag = self._free_tag(name, "step")
            for step, (time, value) in sorted(points.items()):
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                self._write(Event(wall_time=time, step=step, summary=summary))
        self._cut = {}

    def _forget_from(self, step: int, time: float) -> None:
        """TensorBoard drops what it shows of this step and later ones."""
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time, step=step, session_log=start))

    def _free_tag(self, tag: str, record_kind: str) -> str:
        """TensorBoard shows one kind of data under a tag, that which came first, and drops any other."""
        kind = _KINDS.get(record_kind, "scalar")
        if record_kind not in _OWN_KINDS:
            tag = shown_name(tag, _IS_RESERVED)
        while self._kinds.setdefault(tag, kind) != kind:
            tag = f"{tag}/{kind}"
        return tag

    def _write(self, event: Event) -> None:
        self._waiting.append(_framed(event.SerializeToString()))


def _is_sound(state: Mapping[str, Any]) -> bool:
    """Whether it is what `commit` returned: the file that it names is going to be written."""
    numbers = [state.get(name, 0) for name in ("size", "step")]
    tables = [state.get(name, {}) for name in ("kinds", "newest", "cut")]
    return (
        _FILE.fullmatch(str(state.get("file"))) is not None
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(table, dict) for table in tables)
    )


def _points_since(run_dir: Path, since: Mapping[str, int]) -> dict[str, dict[int, tuple[float, float]]]:
    """Time and value of each step of some metrics, from a step of each on, as the log's timeline has them."""
    points: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in since}
    follower = Follower(log_dir(run_dir))
    while records := follower.read():
        for record in records:
            if record.kind == "rewind":
                first = record.values["step"]
                points = {name: {s: p for s, p in some.items() if s < first} for name, some in points.items()}
            elif record.step is not None:
                for name, value in scalars_of(record).items():
                    if record.step >= since.get(name, math.inf):
                        points[name][record.step] = (record.time, value)
    return points


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
        files = {name: media_bytes(run_dir, value) for name, value in record.values.items()}
        summary.value.extend(_image(name, record.values[name], data) for name, data in files.items() if data)
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


def _image(tag: str, value: Mapping[str, Any], data: bytes) -> Summary.Value:
    image = Summary.Image(
        height=value["height"],
        width=value["width"],
        colorspace=value["channels"],
        encoded_image_string=data,
    )
    return Summary.Value(tag=tag, image=image)

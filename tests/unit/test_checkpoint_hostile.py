"""Opening a checkpoint that somebody else has made runs none of their code."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from harness.checkpoint import Checkpointer, export, verify
from harness.errors import CheckpointError

_unpickled: list[str] = []
_watching = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "pickle.find_class":
        _unpickled.append(".".join(map(str, args)))


sys.addaudithook(_watch)  # cannot be taken away again, hence the switch


@pytest.fixture
def nothing_unpickled() -> Iterator[None]:
    global _watching
    _unpickled.clear()
    _watching = True
    yield
    _watching = False
    assert _unpickled == []


class Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": torch.nn.Linear(3, 3), "x": {"t": torch.ones(4), "n": [1, 2]}})
    return tmp_path / "run" / "step-00000001"


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as an attacker would: with all checksums in order."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())["manifest"]
    change(manifest)
    for name, file in manifest["files"].items():
        if (checkpoint / name).is_file():
            content = (checkpoint / name).read_bytes()
            file.update(size_bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
    body = json.dumps(manifest, separators=(",", ":")).encode()
    digest = xxhash.xxh3_128_hexdigest(body).encode()
    (checkpoint / "manifest.json").write_bytes(b'{"xxh3_128":"' + digest + b'","manifest":' + body + b"}\n")


def open_all(checkpoint: Path) -> list[CheckpointError]:
    """Every way there is of reading a checkpoint."""
    directory = checkpoint.parent
    refusals = []
    verify(directory)
    ways: list[Callable[[], object]] = [
        lambda: export(directory, directory.parent / "out.safetensors"),
        lambda: Checkpointer(directory).load({"model": torch.nn.Linear(3, 3), "x": None}),
    ]
    for way in ways:
        try:
            way()
        except CheckpointError as error:
            refusals.append(error)
    return refusals


def bombs(crater: Path) -> dict[str, bytes]:
    by_torch = io.BytesIO()
    torch.save({"x": Bomb(crater)}, by_torch)
    return {"pickle": pickle.dumps(Bomb(crater)), "torch": by_torch.getvalue()}


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("place", ["manifest.json", "rank-00000.safetensors", "healthy", ".metadata"])
def test_a_bomb_in_the_place_of_any_file_does_not_go_off(checkpoint: Path, kind: str, place: str) -> None:
    crater = checkpoint.parent / "crater"
    (checkpoint / place).write_bytes(bombs(crater)[kind])
    open_all(checkpoint)
    assert not crater.exists()


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_bomb_with_all_checksums_in_order_does_not_go_off(checkpoint: Path, kind: str) -> None:
    crater = checkpoint.parent / "crater"
    shard = checkpoint / "rank-00000.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(bombs(crater)[kind].ljust(size, b"\0"))
    reseal(checkpoint, lambda manifest: None)
    open_all(checkpoint)
    assert not crater.exists()


def chunk_of(manifest: dict[str, Any], name: str = "x/t") -> dict[str, Any]:
    chunk: dict[str, Any] = manifest["tensors"][name]["chunks"][0]
    return chunk


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file outside": lambda m: m["files"].update({"../../../etc/passwd": m["files"].popitem()[1]}),
    "an absolute file": lambda m: chunk_of(m).update(file="/etc/passwd"),
    "an unknown file": lambda m: chunk_of(m).update(file="rank-00009.safetensors"),
    "before the file": lambda m: chunk_of(m).update(start=-8),
    "behind the file": lambda m: chunk_of(m).update(start=1 << 40),
    "a huge chunk": lambda m: chunk_of(m).update(sizes=[1 << 50]),
    "a huge tensor": lambda m: m["tensors"]["x/t"].update(shape=[1 << 50]),
    "a huge tensor without chunks": lambda m: m["tensors"]["x/t"].update(shape=[1 << 50], chunks=[]),
    "negative sizes": lambda m: chunk_of(m).update(sizes=[-4]),
    "a function as dtype": lambda m: m["tensors"]["x/t"].update(dtype="save"),
    "a private name as dtype": lambda m: m["tensors"]["x/t"].update(dtype="__loader__"),
    "no tensors": lambda m: m.update(tensors=[]),
    "an unknown tensor": lambda m: m["state"]["x"].update(t={"$tensor": "model/none"}),
    "an unknown mark": lambda m: m["state"]["x"].update(n={"$eval": "1"}),
    "a mark of the wrong kind": lambda m: m["state"]["x"].update(n={"$dict": 3}),
    "unhashable keys": lambda m: m["state"]["x"].update(n={"$dict": [[[1], 2]]}),
    "another step": lambda m: m.update(step=2),
    "no ranks": lambda m: m.update(world_size=0),
    "an unknown field": lambda m: m.update(surprise=1),
    "a missing field": lambda m: m.pop("versions"),
}


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_forged_manifest_is_refused_with_a_message(checkpoint: Path, attack: str) -> None:
    reseal(checkpoint, HOSTILE[attack])
    state: dict[str, Any] = {"x": None}
    with pytest.raises(CheckpointError):
        Checkpointer(checkpoint.parent).load(state)
    assert state == {"x": None}


def test_a_manifest_that_nests_too_deeply_is_refused(checkpoint: Path) -> None:
    reseal(checkpoint, lambda manifest: manifest["state"].update(x=nested(900)))
    content = (checkpoint / "manifest.json").read_bytes()
    body = content[content.index(b'"manifest":') + 11 : -2].replace(b"[" * 900, b"[" * 100_000)
    digest = xxhash.xxh3_128_hexdigest(body).encode()
    (checkpoint / "manifest.json").write_bytes(b'{"xxh3_128":"' + digest + b'","manifest":' + body + b"}\n")
    with pytest.raises(CheckpointError):
        Checkpointer(checkpoint.parent).load({"x": None})

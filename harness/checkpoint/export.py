"""A model out of a checkpoint, in the formats of others: safetensors, in one file or several, and torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from harness.atomic import output_file, replacing
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.reading import OnDisk
from harness.checkpoint.shards import check_file
from harness.checkpoint.store import Saved, Store
from harness.checkpoint.tree import fill, tensor_names
from harness.errors import CheckpointError

__all__ = ["export"]

MODEL_KEYS = ("model", "training/model_state_dict")
"""Where the trainer and an `ExperimentTracker` save a model's state dict."""
Names = dict[str, str]
"""From the exported name to the name in the checkpoint."""


def export(
    directory: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    key: str | None = None,
    format: Literal["safetensors", "torch"] = "safetensors",
    rename: Callable[[str], str | None] | None = None,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes a model's state dict to `output`, whole and unsharded, whatever the world was.

    Files of the same names are replaced, each by rename. One process is enough, and the model is not built.

    Args:
        directory: Of the checkpoints.
        output: The file to write. With `max_shard_bytes`, `model.safetensors` becomes
            `model-00001-of-0000N.safetensors` and so on, and `model.safetensors.index.json`.
        step: The newest if not given.
        key: Under which it was saved, parts of a path joined by `/`; by default `model`, or where an
            `ExperimentTracker` saves it.
        rename: From a name in the state dict to the name in the file; None leaves the tensor out.
        max_shard_bytes: Limit of a safetensors file; a larger tensor has a file to itself.

    Returns:
        What was written.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        OSError: `output` cannot be written.
    """
    saved = _find(Store(Path(directory)), step)
    source = OnDisk(saved.path, _verified(saved))
    described = _described(source.manifest.state, MODEL_KEYS if key is None else (key,))
    if described is None:
        raise CheckpointError(
            f"{saved.path} has no state dict {key or MODEL_KEYS[0]!r}",
            rule=f"it has {list(source.manifest.state)}",
        )
    described = described.get("$OrderedDict", described)
    output = output_file(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if format == "torch":
        return [_export_torch(source, described, output, rename or str)]
    names = _tensor_places(described, rename or str)
    if max_shard_bytes is None:
        return [_export_file(source, names, output)]
    return _export_shards(source, names, output, max_shard_bytes)


def _described(state: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """The description of the first state dict that is there."""
    for key in keys:
        found: Any = state
        for part in key.split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict):
            return found
    return None


def _find(store: Store, step: int | None) -> Saved:
    saved = [saved for saved in store.saved() if step in (None, saved.step)]
    if not saved:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(
            f"there is {wanted} in {store.directory}",
            rule=f"there are {sorted({saved.step for saved in store.saved()})}",
        )
    return saved[-1]


def _verified(saved: Saved) -> Manifest:
    manifest = saved.manifest()
    for name, file in manifest.files.items():
        check_file(saved.path / name, file)
    return manifest


def _tensor_places(described: dict[str, Any], rename: Callable[[str], str | None]) -> Names:
    places: Names = {}
    for name, value in described.items():
        exported = rename(name)
        if exported is None:
            continue
        if not isinstance(value, dict) or "$tensor" not in value:
            raise CheckpointError(
                f"{name} is not a tensor",
                rule="safetensors holds tensors only",
                remedy="use the torch format",
            )
        if exported in places:
            raise CheckpointError(f"two tensors would be named {exported!r}, one of them {name!r}")
        places[exported] = value["$tensor"]
    return places


def _read(source: OnDisk, names: Names) -> dict[str, torch.Tensor]:
    """The tensors, each with memory of its own: safetensors refuses tied weights that share theirs."""
    tensors: dict[str, torch.Tensor] = {}
    for exported, name in names.items():
        shape, dtype = source.spec(name)
        target = torch.empty(shape, dtype=dtype)
        source.read({name: target})
        tensors[exported] = target
    return tensors


def _export_file(source: OnDisk, names: Names, output: Path) -> Path:
    from safetensors.torch import save_file  # here, for a checkpointer alone does without

    # transformers refuses files that do not say which framework's layout they have.
    metadata = {"format": "pt", "step": str(source.step)}
    return _commit(output, lambda path: save_file(_read(source, names), path, metadata=metadata))


def _export_shards(source: OnDisk, names: Names, output: Path, max_shard_bytes: int) -> list[Path]:
    shards = _pack(source, names, max_shard_bytes)
    written, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        path = output.with_name(f"{output.stem}-{number:05d}-of-{len(shards):05d}{output.suffix}")
        written.append(_export_file(source, shard, path))
        weight_map.update(dict.fromkeys(shard, path.name))
    total = sum(_size_bytes(source, name) for name in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2)
    path = output.with_name(f"{output.name}.index.json")
    return [*written, _commit(path, lambda attempt: attempt.write_text(text))]


def _pack(source: OnDisk, names: Names, max_shard_bytes: int) -> list[Names]:
    shards: list[Names] = [{}]
    filled = 0
    for exported, name in names.items():
        size_bytes = _size_bytes(source, name)
        if shards[-1] and filled + size_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][exported] = name
        filled += size_bytes
    return shards


def _size_bytes(source: OnDisk, name: str) -> int:
    shape, dtype = source.spec(name)
    return math.prod(shape) * dtype.itemsize


def _export_torch(
    source: OnDisk, described: dict[str, Any], output: Path, rename: Callable[[str], str | None]
) -> Path:
    """Tied weights stay tied here, and whatever else the state dict holds goes along."""
    tensors = _read(source, {name: name for name in tensor_names(described)})
    state = fill(described, tensors)
    renamed = {new: value for name, value in state.items() if (new := rename(name)) is not None}
    return _commit(output, lambda path: _save(renamed, path))


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # of a name without a suffix PyTorch makes an archive without one
        torch.save(state, file)


def _commit(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` make the file under another name, flushes it, and renames it to `path`."""
    with replacing(path, sync=True) as attempt:
        write(attempt)
    return path

"""Checkpoints can be audited, and models taken out of them, without the program that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint import Checkpointer, export, verify
from harness.errors import CheckpointError
from tests.support.checkpoints import TinyModel, TinyRun
from tests.support.distributed import run_ranks


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, TinyRun]:
    run = TinyRun("plain")
    run.train(1)
    with Checkpointer(tmp_path / "run", healthy_after=1) as checkpointer:
        checkpointer.save(1, run.state())
        checkpointer.wait()
        checkpointer.observe(2)
        run.train(1)
        checkpointer.save(2, run.state())
    return tmp_path / "run", run


def test_verify_reports_each_checkpoint(saved: tuple[Path, TinyRun]) -> None:
    directory, _ = saved
    (directory / "step-00000002" / "rank-00000.safetensors").write_bytes(b"x")
    first, second = verify(directory)
    assert (first.step, first.healthy, first.intact, first.world_size) == (1, True, True, 1)
    assert first.size_bytes == (directory / "step-00000001" / "rank-00000.safetensors").stat().st_size
    assert (second.step, second.healthy, second.intact) == (2, False, False)
    assert "rank-00000.safetensors has 1 bytes instead of" in second.problems[0]
    assert (directory / "step-00000002").exists()  # verify only looks


def test_one_safetensors_file_loads_into_the_model(saved: tuple[Path, TinyRun], tmp_path: Path) -> None:
    directory, run = saved
    (path,) = export(directory, tmp_path / "out" / "model.safetensors")
    model = TinyModel()
    model.load_state_dict(load_file(path))
    for name, tensor in run.model.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_an_earlier_step_and_other_names_can_be_asked_for(
    saved: tuple[Path, TinyRun], tmp_path: Path
) -> None:
    directory, _ = saved
    names = {"embed.weight": "model.embed_tokens.weight", "head.weight": None}
    (path,) = export(
        directory, tmp_path / "m.safetensors", step=1, rename=lambda name: names.get(name, f"other.{name}")
    )
    tensors = load_file(path)
    assert {"model.embed_tokens.weight", "other.blocks.0.weight", "other.seen"} <= tensors.keys()
    assert not any("head" in name for name in tensors)


def test_shards_have_an_index_and_hold_everything_once(saved: tuple[Path, TinyRun], tmp_path: Path) -> None:
    directory, run = saved
    *shards, index = export(directory, tmp_path / "model.safetensors", max_shard_bytes=400)
    assert index.name == "model.safetensors.index.json"
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 1
    content = json.loads(index.read_text())
    tensors = {}
    for shard in shards:
        tensors.update(load_file(shard))
        assert all(content["weight_map"][name] == shard.name for name in load_file(shard))
    expected = run.model.state_dict()
    assert tensors.keys() == expected.keys() == content["weight_map"].keys()
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_torch_format_loads_without_trust_and_keeps_weights_tied(
    saved: tuple[Path, TinyRun], tmp_path: Path
) -> None:
    directory, run = saved
    (path,) = export(directory, tmp_path / "model.pt", format="torch")
    state = torch.load(path, weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert all(state[name].equal(tensor) for name, tensor in run.model.state_dict().items())


def save_sharded(rank: int, world_size: int, directory: str) -> None:
    run = TinyRun("fsdp", rank, world_size)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(0, run.state())


def test_a_sharded_checkpoint_is_exported_whole(tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, str(tmp_path / "run"))
    (path,) = export(tmp_path / "run", tmp_path / "model.safetensors")
    tensors = load_file(path)
    expected = TinyRun("plain").model.state_dict()
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())


def test_a_damaged_checkpoint_is_not_exported(saved: tuple[Path, TinyRun], tmp_path: Path) -> None:
    directory, _ = saved
    shard = directory / "step-00000002" / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export(directory, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_what_is_not_there_is_said(saved: tuple[Path, TinyRun], tmp_path: Path) -> None:
    directory, _ = saved
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*\[1, 2\]"):
        export(directory, tmp_path / "m.safetensors", step=7)
    with pytest.raises(CheckpointError, match="no state dict 'ema'"):
        export(directory, tmp_path / "m.safetensors", key="ema")
    with pytest.raises(CheckpointError, match="named 'same'"):
        export(directory, tmp_path / "m.safetensors", rename=lambda name: "same")
    assert verify(tmp_path / "nothing") == []


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_state_dict_that_was_saved_as_plain_data_is_exported_too(format: Any, tmp_path: Path) -> None:
    model = TinyModel()
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"average": model.state_dict()})
    (file,) = export(tmp_path / "run", tmp_path / "out", key="average", format=format)
    loaded = load_file(file) if format == "safetensors" else torch.load(file, weights_only=True)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in loaded.items())
    assert loaded

"""No damage to any file of a checkpoint goes unnoticed, and nothing damaged is loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import Checkpointer, PerRank, verify
from harness.errors import CheckpointError
from tests.support.distributed import run_ranks

NUM_DAMAGES = 400  # 1,200 pass as well
STEPS = (1, 2, 3)


def values_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "wide": torch.rand(40, 6, generator=generator),
        "flags": torch.randint(2, (9,), generator=generator).bool(),
        "count": torch.tensor(step),
    }


def write_template(rank: int, world_size: int, directory: str) -> None:
    with Checkpointer(directory) as checkpointer:
        for step in STEPS:
            model = torch.nn.Linear(17, 5)
            torch.nn.init.constant_(model.weight, step)
            state = {
                "values": values_at(step),
                "model": model,
                "own": PerRank({"rank": rank}),
                "plain": [step, 0.5],
            }
            checkpointer.save(step, state)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template")
    run_ranks(write_template, 2, str(directory))
    return directory


# Each of these damages one file of a checkpoint; `other` is the same file of another step.
def flip_bits(file: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def zero_block(file: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + 512)
    if not any(content[start:end]):
        content[start] = 1
    else:
        content[start:end] = bytes(end - start)
    file.write_bytes(content)


def truncate(file: Path, other: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def empty(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def extend(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def remove(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def swap_steps(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(other.read_bytes())


def swap_ranks(file: Path, other: Path, rng: random.Random) -> None:
    shards = sorted(file.parent.glob("rank-*"))
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, reversed(contents), strict=True):
        shard.write_bytes(content)


def replace_by_folder(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[Callable[[Path, Path, random.Random], None]] = [
    flip_bits, flip_bits, flip_bits, flip_bits, flip_bits, zero_block, truncate, truncate, empty, extend,
    remove, swap_steps, swap_ranks, replace_by_folder,
]  # fmt: skip


def damage(directory: Path, step: int, rng: random.Random) -> str:
    folder, other = (directory / f"step-{number:08d}" for number in (step, step % len(STEPS) + 1))
    file = rng.choice(sorted(folder.iterdir()))
    how = rng.choice(DAMAGES)
    how(file, other / file.name, rng)
    return f"{how.__name__} of {folder.name}/{file.name}"


def load_and_check(directory: Path) -> int:
    model = torch.nn.Linear(17, 5)
    state: dict[str, Any] = {"values": None, "model": model, "own": PerRank(None), "plain": None}
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.load(state)
    assert step is not None
    assert state["plain"] == [step, 0.5]
    assert bool((model.weight == step).all())
    for name, tensor in values_at(step).items():
        assert state["values"][name].equal(tensor), name
    return step


@pytest.mark.parametrize("part", range(4))
def test_every_damage_is_found_and_the_next_older_intact_checkpoint_is_loaded(
    template: Path, tmp_path: Path, part: int
) -> None:
    for seed in range(part, NUM_DAMAGES, 4):
        rng = random.Random(seed)
        directory = tmp_path / str(seed)
        shutil.copytree(template, directory)
        struck = rng.choice([[3], [3], [3], [2, 3], [2]])
        what = [damage(directory, step, rng) for step in struck]
        assert [not report.intact for report in verify(directory)] == [s in struck for s in STEPS], what
        intact = [step for step in STEPS if step not in struck]
        assert load_and_check(directory) == max(intact), what
        tried = [step for step in struck if step > max(intact)]
        aside = sorted(int(path.name.removeprefix("damaged-step-")) for path in directory.glob("damaged-*"))
        assert aside == tried, what
        shutil.rmtree(directory)


def test_damage_is_reported_by_file_and_reason(
    template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(template, directory)
    shard = directory / "step-00000003" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert load_and_check(directory) == 2
    assert "step-00000003 is damaged: rank-00001.safetensors has" in caplog.text
    assert "damaged-step-00000003" in caplog.text
    kept = directory / "damaged-step-00000003" / "rank-00001.safetensors"
    assert kept.exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew_in_silence(
    template: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(template, directory)
    for shard in directory.glob("*/rank-00000.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"no intact checkpoint .*step-00000003.*step-00000001"):
        load_and_check(directory)


def test_a_damaged_checkpoint_that_was_asked_for_is_not_replaced_by_another(
    template: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(template, directory)
    (directory / "step-00000002" / "manifest.json").unlink()
    with (
        Checkpointer(directory) as checkpointer,
        pytest.raises(CheckpointError, match="no intact checkpoint"),
    ):
        checkpointer.load({"plain": None}, step=2)


def load_damaged(rank: int, world_size: int, directory: str) -> int:
    return load_and_check(Path(directory))


def test_all_ranks_fall_back_together(template: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(template, directory)
    (directory / "step-00000003" / "rank-00001.safetensors").write_bytes(b"")
    assert run_ranks(load_damaged, 3, str(directory)) == [2, 2, 2]

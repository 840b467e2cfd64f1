"""`parallel.replicate` x `parallel.shard`: what they mean, what is refused, how another world refits them."""

from __future__ import annotations

import pytest

from harness.config import ParallelConfig, TrainConfig, parse_arguments
from harness.errors import ConfigError


def mesh(world_size: int, *, may_refit: bool = False, **axes: int) -> tuple[int, int]:
    return ParallelConfig(strategy="fsdp", **axes).mesh_shape(world_size, may_refit=may_refit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axes", "world_size", "shape"),
    [
        ({}, 8, (1, 8)),
        ({}, 1, (1, 1)),
        ({"replicate": 2}, 8, (2, 4)),
        ({"replicate": 2, "shard": -1}, 4, (2, 2)),
        ({"replicate": 0, "shard": 2}, 8, (4, 2)),
        ({"replicate": 2, "shard": 4}, 8, (2, 4)),
    ],
)
def test_an_axis_that_is_0_takes_what_is_left(
    axes: dict[str, int], world_size: int, shape: tuple[int, int]
) -> None:
    assert mesh(world_size, **axes) == shape


@pytest.mark.parametrize(
    ("axes", "world_size", "said"),
    [
        ({"replicate": 2, "shard": 2}, 6, "is 2 x 2, in a world of 6"),
        ({"replicate": 4}, 6, "is 4 x 1, in a world of 6"),
        ({"replicate": 0, "shard": 4}, 2, "start 4 processes"),
        ({"replicate": 4}, 4, "strategy ddp"),
    ],
)
def test_a_mesh_that_does_not_make_up_the_world_is_refused(
    axes: dict[str, int], world_size: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        mesh(world_size, **axes)


@pytest.mark.parametrize(
    ("axes", "world_size", "shape"),
    [
        ({"replicate": 2, "shard": 4}, 8, (2, 4)),
        ({"replicate": 2, "shard": 4}, 6, (2, 3)),
        ({"replicate": 2, "shard": 2}, 3, (1, 3)),
        ({"replicate": 2, "shard": 2}, 2, (1, 2)),
        ({"replicate": 0, "shard": 4}, 3, (1, 3)),
        ({"replicate": 0, "shard": 4}, 12, (3, 4)),
    ],
)
def test_a_launcher_that_goes_on_with_other_ranks_refits_it(
    axes: dict[str, int], world_size: int, shape: tuple[int, int]
) -> None:
    assert mesh(world_size, may_refit=True, **axes) == shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parallel.replicate=2"], "parallel.replicate is 2"),
        (["--parallel.meta_init"], "--parallel.strategy fsdp"),
        (["--parallel.strategy=fsdp", "--parallel.replicate=0"], "only one of"),
        (["--parallel.strategy=fsdp", "--parallel.shard=-2"], "parallel.shard is -2"),
        (
            ["--parallel.strategy=fsdp", "--parallel.param_dtype=bf16", "--loop.precision=fp32"],
            "loop.precision bf16",
        ),
        (["--parallel.activation_checkpointing=some"], "activation_checkpointing"),
    ],
)
def test_what_cannot_be_is_said_when_the_arguments_are_read(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arguments(arguments)


def test_the_world_is_checked_before_it_is_joined() -> None:
    config = TrainConfig(parallel=ParallelConfig(strategy="fsdp", replicate=2, shard=2))
    with pytest.raises(ConfigError, match="is 2 x 2, in a world of 2"):
        config.check_world(2)
    config.check_world(2, may_be_uneven=True)

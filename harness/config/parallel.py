"""The section `parallel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["ParallelConfig"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the processes."""

    SECTION = "parallel"

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: plain in one process, ddp in several. fsdp (FSDP2) shards all of its state."""
    replicate: int = 1
    """Copies of the model under fsdp, each of which is sharded over `shard` ranks that stand next to one
    another: more than 1 is HSDP. 0 or -1: as many as `shard` leaves."""
    shard: int = 0
    """Ranks that one copy is sharded over under fsdp. 0 or -1: as many as `replicate` leaves.
    `replicate` x `shard` has to be the number of ranks; where a launcher starts the run again with fewer or
    more, both are refitted."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, layer by layer, instead of keeping it in memory. full: all but
    what goes into a layer. selective: all but the results of matrix products, convolutions and attention."""
    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which FSDP2 gathers parameters for forward and backward; shards and optimizer stay fp32.
    bf16 halves what is sent and held, has the residual stream in bf16 too, and needs loop.precision bf16."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which FSDP2 reduces gradients."""
    meta_init: bool = False
    """The model is built without memory for its parameters, sharded, and then initialised one by one: a rank
    needs its shards and the largest parameter. The same numbers as without it; takes fsdp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""
    threads: int = 0
    """Threads that each process computes with on the CPU. 0: its share of the cores that it may use (affinity
    and quota, over the processes on the machine), unless you, and not a launcher, set OMP_NUM_THREADS.
    Another number may change the last bits of results."""
    bucket_cap_mb: int = 25
    """Size of DDP's gradient buckets in MiB."""
    find_unused: bool = False
    """DDP looks in every step for parameters that the loss does not depend on, which costs a walk through the
    graph; without it such a parameter ends the run with an error that names it. FSDP needs no such search."""
    timeout_s: float = 300.0
    """How long one rank may wait for another before the run is ended. Not in a save that goes on in the
    background: that is bounded by checkpoint.give_up_after_s."""
    silent_s: float = 15.0
    """How long another machine may be out of reach before the connections to it are ended, and the run with
    them. Shorter breaks are waited out."""

    def __post_init__(self) -> None:
        require_positive(self, "bucket_cap_mb", "timeout_s")
        require(self, "silent_s", self.silent_s >= 1, "it has to be 1 second or more")
        require_not_negative(self, "threads")
        for field in ("replicate", "shard"):
            require(self, field, getattr(self, field) >= -1, "it has to be a number of ranks, or 0 or -1")
        require(
            self,
            "shard",
            self.replicate > 0 or self.shard > 0,
            "only one of parallel.replicate and parallel.shard can be what the other leaves",
            "set --parallel.replicate 1",
        )
        for field, off in (
            ("replicate", (1,)),
            ("shard", (0, -1)),
            ("param_dtype", ("fp32",)),
            ("reduce_dtype", ("fp32",)),
            ("meta_init", (False,)),
        ):
            require(
                self,
                field,
                self.strategy == "fsdp" or getattr(self, field) in off,
                f"only FSDP2 does that, and parallel.strategy is {self.strategy}",
                "set --parallel.strategy fsdp",
            )

    def check_precision(self, precision: str) -> None:
        """Checks what has to fit the arithmetic of forward and backward.

        Raises:
            ConfigError: parameters are to be gathered in bf16, and it is another.
        """
        require(
            self,
            "param_dtype",
            self.param_dtype == "fp32" or precision == "bf16",
            f"forward and backward compute in it, and the precision here is {precision}",
            "set --loop.precision bf16",
        )

    def mesh_shape(self, world_size: int, *, may_refit: bool = False) -> tuple[int, int]:
        """Copies of the model, and ranks that each is sharded over, under fsdp in a world of this size.

        Args:
            may_refit: The world is not that of the configuration: what does not go round there keeps its
                copies if each has two ranks or more, and else becomes one copy over all ranks.

        Raises:
            ConfigError: they do not make up the world, or a copy would be on one rank alone.
        """
        replicate = self.replicate if self.replicate > 0 else max(1, world_size // self.shard)
        shard = self.shard if self.shard > 0 else max(1, world_size // replicate)
        if replicate * shard == world_size and (shard > 1 or replicate == 1):
            return replicate, shard
        if may_refit:
            goes_round = self.replicate > 0 and world_size % self.replicate == 0
            copies = self.replicate if goes_round and world_size > self.replicate else 1
            return copies, world_size // copies
        require(
            self,
            "shard",
            replicate * shard == world_size,
            "parallel.replicate x parallel.shard has to be the number of ranks, and it is"
            f" {replicate} x {shard}, in a world of {world_size}",
            f"leave one of them 0, or start {replicate * shard} processes",
        )
        require(
            self,
            "replicate",
            shard > 1,
            "FSDP2 shards a copy over two ranks or more, and parallel.replicate x parallel.shard is"
            f" {replicate} x {shard}, in a world of {world_size}",
            "set --parallel.strategy ddp",
        )
        return replicate, shard

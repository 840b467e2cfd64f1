"""What guard, tracker, watchdog and checkpoint send, write and compute at 1 to 16,384 ranks.

    python scripts/scaling.py [--ranks 1 2 4 8 16]

Bytes and counts follow from the program's own constants, formats and shapes, and the host's work is that of
the program's own functions, called here with as many ranks' numbers as there would be. Trainings of up to 16
gloo processes count what is really sent, which has to be what the formulas say. The results go to
docs/benchmarks/scaling.*; docs/scaling.md says what they mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from harness.checkpoint import Checkpointer  # noqa: E402  (the repository has to be on the path first)
from harness.checkpoint.layout import plan_files  # noqa: E402
from harness.checkpoint.manifest import Manifest, ShardFile  # noqa: E402
from harness.config import GuardConfig  # noqa: E402
from harness.dist import collectives  # noqa: E402
from harness.records import StepRecord  # noqa: E402
from harness.runlog.codec import encode  # noqa: E402
from harness.stability import StepGuard  # noqa: E402
from harness.stability.checks.all import Checks  # noqa: E402
from harness.stability.layout import NUM_COLUMNS, Layout  # noqa: E402
from harness.stability.packing import can_be_gathered  # noqa: E402
from harness.stability.rank_statistics import MICRO_BATCH, NUM_FIELDS, TOKENS  # noqa: E402
from harness.stability.rank_table import rank_column  # noqa: E402
from harness.stability.record_builder import RecordBuilder  # noqa: E402
from harness.stability.verdict import Summary  # noqa: E402
from harness.training.journal import rank_values, ranks_are_due  # noqa: E402
from harness.training.late import RankState  # noqa: E402
from tests.support.distributed import run_ranks  # noqa: E402
from tests.support.guarded import batch, make_model  # noqa: E402

__all__ = ["MODELS", "Model", "chunks_of", "gathered_bytes", "measured_ranks"]

WORLDS = (1, 8, 64, 512, 2048, 16384)
BEAT_S = 5.0
STATE_BYTES = 12
"""Of a parameter in a checkpoint: float32, and Adam's two moments."""
STEPS = 12


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of a Llama: as many parameters, in as many tensors, as the name says."""

    layers: int
    dim: int
    kv_dim: int
    hidden: int
    vocabulary: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all parameters."""
        d, kv, h = self.dim, self.kv_dim, self.hidden
        layer = [(d, d), (kv, d), (kv, d), (d, d), (h, d), (h, d), (d, h), (d,), (d,)]
        return [(self.vocabulary, d), *(layer * self.layers), (d,), (self.vocabulary, d)]

    @property
    def num_parameters(self) -> int:
        """Elements of all."""
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in self.shapes)


MODELS = {
    "0.1 B": Model(12, 768, 768, 2048, 32000),
    "1 B": Model(16, 2048, 512, 8192, 32000),
    "8 B": Model(32, 4096, 1024, 14336, 128256),
    "70 B": Model(80, 8192, 1024, 28672, 128256),
    "405 B": Model(126, 16384, 1024, 53248, 128256),
}


def gathered_bytes(num_ranks: int) -> int:
    """What every rank receives in a step: the rank statistics of all, as float64."""
    return 8 * NUM_FIELDS * num_ranks


def rows_bytes(num_tensors: int, num_ranks: int) -> int:
    """The same of each parameter's statistics, in a step in which they are due; 0 where they are left out."""
    num_values = (NUM_COLUMNS + 1) * num_tensors
    return 8 * num_values * num_ranks if can_be_gathered(num_values, num_ranks=num_ranks) else 0


def chunks_of(model: Model, num_shards: int) -> int:
    """How many parts of tensors a checkpoint has: parameters and two moments, split along dimension 0."""
    return 3 * sum(-(-shape[0] // -(-shape[0] // num_shards)) for shape in model.shapes)


def seconds(action: Callable[[], object], *, times: int = 5) -> float:
    """Of this thread's processor, the least of a few: the machine is busy with other things too."""
    took = []
    for _ in range(times):
        began = time.thread_time()
        action()
        took.append(time.thread_time() - began)
    return min(took)


def record_of(num_ranks: int) -> tuple[Callable[[], StepRecord], StepRecord]:
    """How a step's record is made of what so many ranks have said, and one of them."""
    model = torch.nn.Linear(4, 4)
    layout = Layout.of(model.named_parameters(), of=list(model.parameters()))
    numbers = torch.rand(num_ranks, NUM_FIELDS, dtype=torch.float64) + 0.5
    numbers[:, [2, 3, 4, MICRO_BATCH]] = 0.0
    numbers[:, [1, 12]] = 0.0  # Inf, and faults
    numbers[:, TOKENS] = 4096.0
    summary = dict.fromkeys([field.name for field in dataclasses.fields(Summary)], 0.0)
    summary |= {"divisor": 1.0, "clip_coef": 1.0, "loss_scale": 1.0, "loss": 2.0, "grad_norm": 1.0}
    packet = {
        "summary": torch.tensor(list(summary.values()), dtype=torch.float64),
        "rank_statistics": numbers,
    }
    builder = RecordBuilder(layout, num_replicas=num_ranks, checks=Checks(GuardConfig()))

    def build() -> StepRecord:
        return builder.build(7, dict(packet), counts_tokens=True)

    return build, build()


def asked_in_every_step(record: StepRecord) -> None:
    """What loop and straggler detection read of a record."""
    for name in ("num_saves", "stop_requested", "compute_s", "data_wait_s"):
        rank_column(record.per_rank, name).max()


def host_work(num_ranks: int) -> dict[str, float]:
    """Milliseconds of a processor of this machine with the numbers of so many ranks, and rank 0's log."""
    build, record = record_of(num_ranks)
    line = encode("ranks", rank_values(record), attempt=0, step=7, time=0.0)
    doing, host = "backward of step 100000", "node-0001"
    state = RankState(
        rank=9999, order=700000, doing=doing, age_s=1.0, limit_s=60.0, host=host, pid=4194304, beat=10000
    )
    words = [json.dumps(dataclasses.asdict(state))] * num_ranks
    due = sum(ranks_are_due(num_ranks, step, every=10) for step in range(1000)) / 1000
    return {
        "record ms": 1e3 * seconds(build),
        "loop and stragglers ms": 1e3 * seconds(lambda: asked_in_every_step(record)),
        "rank 0: log ms": due
        * 1e3
        * seconds(lambda: encode("ranks", rank_values(record), attempt=0, step=7, time=0.0)),
        "rank 0: log bytes": round(due * len(line)),
        "listeners: heartbeats ms / 5 s": 1e3 * seconds(lambda: [RankState(**json.loads(w)) for w in words]),
        "listeners: heartbeat bytes / 5 s": sum(map(len, words)),
        "store: requests / s": round((2 * num_ranks + 3) / BEAT_S, 1),
    }


def plans(num_ranks: int, num_tensors: int) -> list[SavePlan]:
    """What the ranks would write of tensors that are split into as many parts."""
    size = torch.Size([num_ranks * 4, 8])
    properties = TensorProperties(dtype=torch.float32)
    found = []
    for rank in range(num_ranks):
        offsets = torch.Size([rank * 4, 0])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([4, 8]))
        items = [
            WriteItem(
                index=MetadataIndex(f"model/layers.{number}.feed_forward.weight", offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
            )
            for number in range(num_tensors)
        ]
        found.append(SavePlan(items))
    return found


def planning(num_ranks: int, num_tensors: int) -> dict[str, float]:
    """What rank 0 does for a checkpoint of so many chunks: the plan, once, and the manifest, every time."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({}, is_coordinator=True)
    began = time.thread_time()
    _, infos = plan_files(planner, plans(num_ranks, num_tensors))
    planned_s = time.thread_time() - began
    file = ShardFile(size_bytes=1 << 40, xxh3_128="0" * 32)
    manifest = Manifest(
        step=1, world_size=num_ranks, created=0.0, metric=None, meta={}, versions={}, tensors=infos,
        files={f"rank-{rank:05d}.safetensors": file for rank in range(num_ranks)}, state={},
    )  # fmt: skip
    began = time.thread_time()
    content = manifest.to_bytes()
    manifest_s = time.thread_time() - began
    num_chunks = num_ranks * num_tensors
    return {
        "chunks": num_chunks,
        "plan us/chunk": 1e6 * planned_s / num_chunks,
        "manifest us/chunk": 1e6 * manifest_s / num_chunks,
        "manifest bytes/chunk": len(content) / num_chunks,
    }


class Counted:
    """A collective, and how often it was called with how many bytes."""

    def __init__(self, inner: Any, size_of: Callable[..., int]) -> None:
        self._inner, self._size_of = inner, size_of
        self.calls, self.sizes = 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.sizes += self._size_of(*args, **kwargs)
        return self._inner(*args, **kwargs)


def measured_ranks(rank: int, world_size: int, folder: str) -> dict[str, float]:
    """Guarded steps of a tiny model and a checkpoint of it, in one of `world_size` gloo processes."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = GuardConfig(per_parameter_every=0, sample_every=0, replicas_every=0, silent_errors="off")
    guard = StepGuard.from_config(model, optimizer, config)
    gathers = Counted(collectives._all_gather_single, lambda out, _, **__: out.numel() * out.element_size())
    collectives._all_gather_single = gathers  # type: ignore[attr-defined]
    objects = Counted(torch.distributed.all_gather_object, lambda *_, **__: 0)
    torch.distributed.all_gather_object = objects
    took = []
    for step in range(STEPS):
        began = time.perf_counter()
        inputs, targets = batch(step, rank)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        guard.drain()
        took.append(time.perf_counter() - began)
    counted = gathers.calls, gathers.sizes
    in_steps = objects.calls
    with Checkpointer(Path(folder, "checkpoints")) as checkpoints:
        for step in (1, 2):
            objects.calls = 0
            began = time.perf_counter()
            checkpoints.save(step, {"model": model, "optimizer": optimizer})
            blocked_s = time.perf_counter() - began
            checkpoints.wait()
    guard.close()
    return {
        "collectives / step": counted[0] / STEPS,
        "bytes received / step": counted[1] / STEPS,
        "object gathers / step": in_steps / STEPS,
        "step ms": 1e3 * statistics.median(took),
        "object gathers / save": objects.calls,
        "save blocks ms": 1e3 * blocked_s,
    }


def measured(worlds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Real gloo processes: what they sent, beside what the formula says."""
    rows = {}
    for world_size in worlds:
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(measured_ranks, world_size, folder, timeout_s=600.0)
        row = {name: max(one[name] for one in found) for name in found[0]}
        said = gathered_bytes(world_size) if world_size > 1 else 0
        assert row["bytes received / step"] in (said, gathered_bytes(world_size)), (row, said)
        rows[f"{world_size} processes"] = {**row, "by the formula": gathered_bytes(world_size)}
    return rows


def checkpoint_table(per_chunk: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Shards, chunks and rank 0's work of a checkpoint of each model, sharded over all ranks or over 64."""
    rows = {}
    for name, model in MODELS.items():
        for num_ranks in (8, 512, 16384):
            for num_shards in sorted({min(64, num_ranks), num_ranks}):
                chunks = chunks_of(model, num_shards)
                rows[f"{name}, {num_ranks} ranks, {num_shards} shards"] = {
                    "GB": STATE_BYTES * model.num_parameters / 1e9,
                    "GB / writing rank": STATE_BYTES * model.num_parameters / 1e9 / num_shards,
                    "chunks": chunks,
                    "manifest MB": chunks * per_chunk["manifest bytes/chunk"] / 1e6,
                    "plan s, once": chunks * per_chunk["plan us/chunk"] / 1e6,
                    "manifest s, each": chunks * per_chunk["manifest us/chunk"] / 1e6,
                }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="of real processes")
    options = parser.parse_args()
    from results import write_results

    work = {f"{world} ranks": host_work(world) for world in WORLDS}
    sent = {
        f"{world} ranks": {
            "gather: bytes sent": 8 * NUM_FIELDS if world > 1 else 0,
            "gather: bytes received": gathered_bytes(world) if world > 1 else 0,
            **{
                f"rows of {name}: MB received": rows_bytes(len(model.shapes), world) / 1e6 or None
                for name, model in MODELS.items()
            },
        }
        for world in WORLDS
    }
    planned = {f"{ranks} x 32 tensors": planning(ranks, 32) for ranks in (64, 512)}
    per_chunk = planned["512 x 32 tensors"]
    sections: dict[str, dict[str, dict[str, Any]]] = {
        "a step's messages": sent,
        "planning": planned,
        "checkpoints": checkpoint_table(per_chunk),
    }
    about = {"load": round(os.getloadavg()[0], 1)}
    write_results("scaling", work, device=torch.device("cpu"), about=about, sections=sections)
    for world_size in options.ranks:  # each may take minutes, or fail, on a busy machine
        sections.setdefault("real processes", {}).update(measured([world_size]))
        write_results("scaling", work, device=torch.device("cpu"), about=about, sections=sections)


if __name__ == "__main__":
    main()

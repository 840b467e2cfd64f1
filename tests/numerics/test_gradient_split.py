"""The gradient is that of the mean over all tokens of the global batch, however it is split."""

import pytest
import torch
from torch import Tensor, nn

from harness.config import FaultConfig, GuardConfig, ParallelConfig
from harness.data import Batch, LossSum, Task, cross_entropy
from harness.dist import UnusedParameters, World, distribute, plain
from harness.stability import StepGuard
from harness.training.faults import FaultInjector
from harness.training.progress import Progress
from harness.training.step import StepRunner
from harness.training.timer import StepTimer
from tests.support.distributed import run_ranks

GLOBAL_BATCH, LENGTH, CLASSES = 8, 6, 5
NO_FAULTS: tuple[FaultConfig, ...] = ()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(CLASSES, 7), nn.Linear(7, CLASSES))


def global_batch() -> Batch:
    """Sequences of very different length: sample i has i + 1 padded targets, at most all but one."""
    draw = torch.Generator().manual_seed(1)
    targets = torch.randint(CLASSES, (GLOBAL_BATCH, LENGTH), generator=draw)
    for sample in range(GLOBAL_BATCH):
        targets[sample, : min(sample + 1, LENGTH - 1)] = -100
    return {"inputs": torch.randint(CLASSES, (GLOBAL_BATCH, LENGTH), generator=draw), "targets": targets}


def loss(network: nn.Module, batch: Batch) -> LossSum:
    return cross_entropy(network(batch["inputs"]), batch["targets"])


def one_step(
    rank: int, world_size: int, micro_batch: int, strategy: str
) -> tuple[list[Tensor], float, float]:
    """Parameters after one step of plain SGD, with the loss and the norm that the guard saw."""
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    task = Task(model=model(), loss=loss, train_data=[], val_data=[], tokens_per_sample=LENGTH)
    network = distribute(task.model, ParallelConfig(strategy=strategy), world)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, fused=strategy != "fsdp")
    guard = StepGuard.from_config(network, optimizer, GuardConfig(max_norm=None))
    runner = StepRunner(
        model=network,
        task=task,
        guard=guard,
        faults=FaultInjector(NO_FAULTS, model=plain(network), rank=rank),
        unused=UnusedParameters(network),
        device=world.device,
        precision="fp32",
        world_size=world_size,
        nominal_tokens=GLOBAL_BATCH * LENGTH,
        num_passes=GLOBAL_BATCH // world_size // micro_batch,
        progress=Progress(),
        timer=StepTimer(torch.device("cpu")),
    )
    share = GLOBAL_BATCH // world_size
    mine = {name: values[rank * share : (rank + 1) * share] for name, values in global_batch().items()}
    pieces = [
        {name: values[start : start + micro_batch] for name, values in mine.items()}
        for start in range(0, share, micro_batch)
    ]
    runner.run(0, pieces)
    guard.step(nominal_tokens=runner.nominal_tokens)
    (record,) = guard.drain(wait=True)
    guard.close()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in plain(network).parameters()]
    return [p.detach().clone() for p in whole], record.loss, record.grad_norm


def by_hand() -> tuple[list[Tensor], float, float]:
    """The same step as the definition has it: the mean over all tokens at once."""
    network, batch = model(), global_batch()
    logits = network(batch["inputs"]).flatten(0, 1)
    mean = nn.functional.cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100)
    mean.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    parameters = [p.detach() - 0.5 * g for p, g in zip(network.parameters(), gradients, strict=True)]
    return parameters, mean.item(), norm.item()


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "strategy"),
    [
        (1, 8, "auto"),
        (1, 2, "auto"),
        (2, 4, "ddp"),
        (2, 1, "ddp"),
        (4, 2, "ddp"),
        (4, 1, "ddp"),
        (2, 2, "fsdp"),
    ],
)
def test_a_padded_global_batch_gives_the_same_step_however_it_is_split(
    world_size: int, micro_batch: int, strategy: str
) -> None:
    parameters, mean, norm = by_hand()
    for result in run_ranks(one_step, world_size, micro_batch, strategy):
        torch.testing.assert_close(result[0], parameters, rtol=1e-5, atol=1e-6)
        assert result[1:] == pytest.approx((mean, norm), rel=1e-5)

"""Tasks that go bad at certain samples, each by an operation of its own: what a replay has to find."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task

__all__ = ["BAD", "EXPECTED", "Expected"]

BAD = (13, 29)
"""Samples at which the tasks go bad."""


class Expected(NamedTuple):
    """What a replay has to name."""

    module: str | None
    operation: str
    direction: str
    forward_operation: str | None = None
    makes: str = "Inf"


class Rows:
    """40 samples of 4 numbers from 0.1 to 1.1, and a mask; `bad` says what samples `BAD` are."""

    def __init__(self, bad: dict[str, Tensor], count: int = 40) -> None:
        self.bad, self.count = bad, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.arange(4.0) * 0.1 + 0.1 + index / self.count
        sample = {"x": x, "mask": torch.tensor([True, True, index % 2 == 0, False]), "y": x.sum().view(1)}
        return sample | (self.bad if index in BAD else {})


class Net(nn.Module):
    """Two linear layers, a dropout, and `middle` between them."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.middle = middle
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.drop(self.middle(self.first(x), x, mask)))


class Log(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return h + x.log()


class HiddenLog(nn.Module):
    """Leaves out the logarithm of 0 in the forward pass; its derivative is NaN all the same."""

    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        size = h.abs()
        return torch.where(size > 0, size.log(), size)


class Root(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return h.square().sqrt()


class MaskedMean(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        mean = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return h - mean


class Exp(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return h + x.exp()


class Softmax(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return h.masked_fill(~mask, -torch.inf).softmax(dim=1)


class Unwritten(nn.Module):
    """Copies the rows that have a mask and forgets the others, as kernels over ragged rows do."""

    before: float | None = None
    """What is in the memory that it is handed out; None: anything."""

    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(h)
        if self.before is not None:
            out.detach().numpy().fill(self.before)
        kept = mask.any(dim=1)
        out[kept] = h[kept]
        return out


class Nothing(nn.Module):
    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return h


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.project = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.1)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(h)).chunk(3, dim=-1)
        return h + self.drop(F.scaled_dot_product_attention(query, key, value))


class Attentive(nn.Module):
    """A model in which nothing goes wrong by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x[..., None])
        for block in self.blocks:
            h = block(h)
        return self.last(h).mean(1)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    error = model(batch["x"], batch["mask"]).float() - batch["y"]
    return LossSum(F.smooth_l1_loss(error, torch.zeros_like(error), reduction="sum"), len(error))


def _task(middle: nn.Module, **bad: Tensor) -> Task:
    rows, sound = Rows(bad), Rows({}, 8)
    return Task(model=Net(middle), loss=loss, train_data=rows, val_data=sound)


def log_of_zero(config: TrainConfig) -> Task:
    return _task(Log(), x=torch.tensor([0.3, 0.0, 0.2, 0.1]))


def hidden_log_of_zero(config: TrainConfig) -> Task:
    return _task(HiddenLog(), x=torch.zeros(4))


def root_of_zero(config: TrainConfig) -> Task:
    return _task(Root(), x=torch.zeros(4))


def empty_mean(config: TrainConfig) -> Task:
    return _task(MaskedMean(), mask=torch.zeros(4, dtype=torch.bool))


def overflowing_exp(config: TrainConfig) -> Task:
    return _task(Exp(), x=torch.tensor([0.1, 0.2, 200.0, 0.1]))


def softmax_of_nothing(config: TrainConfig) -> Task:
    return _task(Softmax(), mask=torch.zeros(4, dtype=torch.bool))


def unwritten(config: TrainConfig) -> Task:
    return _task(Unwritten(), mask=torch.zeros(4, dtype=torch.bool))


def poisoned(config: TrainConfig) -> Task:
    return _task(Nothing(), x=torch.tensor([0.1, torch.nan, 0.3, 0.4]))


def sound(config: TrainConfig) -> Task:
    return Task(model=Attentive(), loss=loss, train_data=Rows({}), val_data=Rows({}, 8))


EXPECTED = {
    "log_of_zero": Expected("middle", "aten.log.default", "forward"),
    "hidden_log_of_zero": Expected("middle", "aten.div.Tensor", "backward", "aten.log.default", "NaN"),
    "root_of_zero": Expected("middle", "aten.div.Tensor", "backward", "aten.sqrt.default", "NaN"),
    "empty_mean": Expected("middle", "aten.div.Tensor", "forward", makes="NaN"),
    "overflowing_exp": Expected("middle", "aten.exp.default", "forward"),
    "softmax_of_nothing": Expected("middle", "aten._softmax.default", "forward", makes="NaN"),
}
"""By the name of the task's function; of `poisoned` nothing is computed that is bad: the batch is."""

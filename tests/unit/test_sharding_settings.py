"""What FSDP2 reduces gradients in is what the section `parallel` says."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.config import ParallelConfig
from harness.dist import World, distribute


@pytest.fixture
def process_group() -> Iterator[None]:
    hook = sys.excepthook  # torch puts the rank before what this prints, and leaves that behind
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    sys.excepthook = hook


class Noting:
    """A reduce-scatter that notes in what precision it is asked for memory."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.dtypes.add(dtype)
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_gradients_are_reduced_in_reduce_dtype(reduce_dtype: Any, param_dtype: Any, own: torch.dtype) -> None:
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    parallel = ParallelConfig(strategy="fsdp", param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    model: Any = distribute(nn.Linear(2, 2, dtype=own), parallel, world)
    noting = Noting()
    model.set_custom_reduce_scatter(noting)
    computed = torch.bfloat16 if param_dtype == "bf16" else own
    model(torch.ones(1, 2, dtype=computed)).sum().backward()
    assert noting.dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16}[reduce_dtype]}
    assert model.weight.grad.dtype == own

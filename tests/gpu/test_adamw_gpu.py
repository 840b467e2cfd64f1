"""What of AdamW in Triton only a GPU can show; its values are judged in `tests/numerics`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.stability import StepGuard
from harness.stability.triton_adamw import TritonAdamW
from tests.support.cuda import no_synchronisation
from tests.support.guarded import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_torchs_fused_kernel_within_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    values = torch.randn(3_000_001, device="cuda", dtype=dtype)
    ours, theirs = (nn.Parameter(values.clone()) for _ in range(2))
    optimizers = TritonAdamW([ours], lr=1e-3), torch.optim.AdamW([theirs], lr=1e-3, fused=True)
    gradient = torch.randn_like(values) * 1e-2
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        parameter.grad = gradient.clone()
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.grad_scale = torch.full((), 3.0, device="cuda")
        optimizer.step()
    spacing = torch.finfo(dtype).eps * 2.0 ** values.double().abs().clamp(min=1e-3).log2().floor()
    assert float(((ours.double() - theirs.double()).abs() / spacing).max()) <= 1.0
    assert torch.equal(ours.grad, gradient)


def test_a_guarded_step_of_it_does_not_wait_for_the_device() -> None:
    model = make_model().cuda()
    optimizer = TritonAdamW(model.parameters(), lr=1e-3)
    guard = StepGuard(model, optimizer, lag_steps=9, sample_every=0)
    inputs = torch.randn(5, 4, device="cuda")
    for step in range(4):
        loss = model(inputs).square().mean()
        loss.backward()
        if step < 2:  # compiles, and makes its state
            guard.step(loss)
        else:
            with no_synchronisation():
                guard.step(loss)
        optimizer.zero_grad()


@pytest.mark.parametrize("undo", ["auto", "never"])
def test_optimizers_that_keep_nothing_on_the_host_do_not_wait_for_the_device_either(undo: str) -> None:
    model = make_model().cuda()
    matrices, vectors = (
        [p for p in model.parameters() if (p.dim() == 2) == wanted] for wanted in (True, False)
    )
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.SGD(vectors[:1], lr=1e-2, momentum=0.9),
        torch.optim.AdamW(vectors[1:2], lr=1e-3, capturable=True),
        torch.optim.RMSprop(vectors[2:], lr=1e-3, capturable=True),
    ]
    guard = StepGuard(model, optimizers, lag_steps=9, sample_every=0, undo=undo)
    inputs = torch.randn(5, 4, device="cuda")
    for step in range(4):
        loss = model(inputs).square().mean()
        loss.backward()
        if step < 2:
            guard.step(loss)
        else:
            with no_synchronisation():
                guard.step(loss)
        model.zero_grad()

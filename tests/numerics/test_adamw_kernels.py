"""AdamW in Triton against torch's fused one: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from harness.errors import ConfigError
from harness.stability import StepGuard, adamw_kernels
from harness.stability.triton_adamw import TritonAdamW
from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((0,), (1,), (17,), (64, 3), (5, 7, 11), (2100,))
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


def _parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(one.to(DEVICE, dtype)) for one in shapes]


def _give_gradients(step: int, *lists: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(step + 100)
    for alike in zip(*lists, strict=True):
        values = torch.randn(alike[0].shape, generator=generator) * 10.0 ** (step - 1)
        for parameter in alike:
            parameter.grad = values.to(parameter.device, parameter.dtype)


def _step(optimizer: Any, *, scale: float | None = None, skip: float = 0.0) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = torch.tensor(skip, device=device)
    optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=device)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


def _ulps(one: Tensor, exact: Tensor, *terms: Tensor) -> float:
    """Largest distance from a float64 result, in units in the last place of the largest of the terms that
    were added up to it."""
    if not one.numel():
        return 0.0
    size = torch.stack([exact.abs(), *(term.abs().double() for term in terms)]).amax(0)
    spacing = torch.finfo(one.dtype).eps * 2.0 ** size.clamp(min=torch.finfo(one.dtype).tiny).log2().floor()
    return float(((one.double() - exact).abs() / spacing).amax())


def _formula(step: int, scale: float, found: list[Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
    """torch's, operation by operation in `precision`, with the settings as fp32 has them: weights, moments,
    and the update."""
    names = ("lr", "eps", "weight_decay")
    settings = torch.tensor([*(SETTINGS[name] for name in names), *SETTINGS["betas"]], device=DEVICE)
    lr, eps, decay, beta1, beta2 = settings.to(precision)
    first, second = (1 - beta.float() ** step for beta in (beta1, beta2))
    p, g, m, v = (one.to(precision) for one in found)
    g = g / scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    update = lr / first.to(precision) * m / (v.sqrt() / second.sqrt().to(precision) + eps)
    return p - lr * decay * p - update, m, v, update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_is_torchs_formula_within_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    parameters = _parameters(dtype)
    optimizer = TritonAdamW(parameters, **SETTINGS)
    for step, scale in enumerate((1.0, 4.0, 0.75)):
        _give_gradients(step, parameters)
        kept = [[p.detach().clone(), p.grad.clone(), *_moments(optimizer, p)] for p in parameters]
        _step(optimizer, scale=scale)
        for one, found in zip(parameters, kept, strict=True):
            state = optimizer.state[one]
            # Beyond that, of the exact value the few roundings of each operation add up.
            for precision, limit in ((torch.float32, 1.0), (torch.float64, 3.0)):
                new, m, v, update = (x.double() for x in _formula(step + 1, scale, found, precision))
                if precision == torch.float32:
                    new, m, v = (x.to(dtype).double() for x in (new, m, v))
                assert _ulps(one.detach(), new, found[0], update) <= limit
                assert _ulps(state["exp_avg"], m, found[2], found[1] / scale) <= limit
                assert _ulps(state["exp_avg_sq"], v) <= limit
            assert torch.equal(one.grad, found[1]), "a gradient was written"
            assert float(state["step"]) == step + 1


def _moments(optimizer: TritonAdamW, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state[parameter]
    return [torch.zeros_like(parameter).detach() + state.get(name, 0.0) for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_where_torchs_own_goes(dtype: torch.dtype) -> None:
    ours, theirs = _parameters(dtype), _parameters(dtype)
    mine, reference = TritonAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    for step, scale in enumerate((None, 4.0, 0.75, 2.0)):
        _give_gradients(step % 3, ours, theirs)
        _step(mine, scale=scale)
        _step(reference, scale=scale)
    for one, other in zip(ours, theirs, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_left_out_is_no_step_and_one_that_is_made_says_its_norms(dtype: torch.dtype) -> None:
    parameters = _parameters(dtype)
    optimizer = TritonAdamW(parameters, **SETTINGS)
    for step in range(3):
        _give_gradients(step, parameters)
        if step == 1:
            for parameter in parameters:
                parameter.grad.fill_(math.nan)
        kept = [[p.detach().clone(), *map(Tensor.clone, optimizer.state[p].values())] for p in parameters]
        _step(optimizer, skip=float(step == 1), scale=2.0)
        norms = dict(optimizer.norms())
        for parameter, (before, *state) in zip(parameters, kept, strict=True):
            now = [parameter.detach(), *optimizer.state[parameter].values()]
            if step == 1:
                assert all(map(torch.equal, now, [before, *state]))
            expected = [(now[0].double() - before.double()).norm(), now[0].double().norm()]
            torch.testing.assert_close(norms[parameter], torch.stack(expected), rtol=1e-5, atol=1e-30)


def test_what_is_not_finite_after_a_step_is_counted() -> None:
    weights = torch.ones(3, 40, device=DEVICE)
    gradients = torch.ones_like(weights)
    gradients[1, :2] = 1e30  # its square is beyond fp32
    moments = [torch.zeros_like(weights) for _ in range(2)]
    measured = adamw_kernels.adamw(
        list(weights),
        list(gradients),
        list(moments[0]),
        list(moments[1]),
        torch.full((3, 2), 0.1, device=DEVICE),
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        grad_scale=torch.ones((), device=DEVICE),
        found_inf=torch.zeros((), device=DEVICE),
        block=16,
    )
    assert measured[:, adamw_kernels.NUM_BAD].tolist() == [0.0, 2.0, 0.0]


def test_checkpoints_are_torchs_both_ways() -> None:
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    mine, reference = TritonAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    for step in range(2):
        _give_gradients(step, ours, theirs)
        mine.step()
        reference.step()
    one, other = mine.state_dict(), reference.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert {k: set(v) for k, v in one["state"].items()} == {k: set(v) for k, v in other["state"].items()}
    other = copy.deepcopy(other)  # torch's load_state_dict shares what it needs not cast
    reference.load_state_dict(copy.deepcopy(one))
    mine.load_state_dict(other)
    _give_gradients(2, ours, theirs)
    mine.step()
    reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_what_comes_later_is_held_to_the_same_and_a_checkpoint_of_any_adamw_is_taken() -> None:
    ours, theirs = (nn.Parameter(torch.ones(4, device=DEVICE)) for _ in "ab")
    mine, plain = TritonAdamW([ours]), torch.optim.AdamW([theirs])
    theirs.grad = torch.ones_like(theirs)
    plain.step()
    mine.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert mine.param_groups[0]["fused"]
    assert (mine.state[ours]["step"].device, mine.state[ours]["step"].dtype) == (ours.device, torch.float32)
    for name in ("amsgrad", "maximize"):
        other = torch.optim.AdamW([theirs], **{name: True})
        with pytest.raises(ConfigError, match=name):
            mine.load_state_dict(other.state_dict())
        with pytest.raises(ConfigError, match=name):
            mine.add_param_group({"params": [theirs], name: True})
    with pytest.raises(ConfigError, match="strides"):
        mine.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4)[:, :2])], "fused": False})
    assert len(mine.param_groups) == 1


def test_a_parameter_in_another_order_of_memory_is_stepped_and_one_with_gaps_refused() -> None:
    turned, plain = (
        nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1))) for _ in "ab"
    )
    turned.data = plain.detach().T.contiguous().T.to(DEVICE)
    plain.data = plain.detach().to(DEVICE)
    for parameter in (turned, plain):
        parameter.grad = torch.arange(24.0, device=DEVICE).view(6, 4)
        TritonAdamW([parameter], **SETTINGS).step()
    assert turned.stride() != plain.stride()
    assert torch.equal(turned, plain)
    with pytest.raises(ConfigError, match="strides"):
        TritonAdamW([nn.Parameter(torch.zeros(4, 4)[:, :2])])
    with pytest.raises(ConfigError, match="amsgrad"):
        TritonAdamW([plain], amsgrad=True)


def test_the_guard_trusts_it_with_the_verdict(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = make_model().to(DEVICE), make_model().to(DEVICE)
    optimizer = TritonAdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
    guard = StepGuard(model, optimizer, max_norm=0.1, lag_steps=0)
    for step in range(5):
        inputs, targets = (one.to(DEVICE) for one in batch(step))
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.nan
        else:
            nn.functional.mse_loss(twin(inputs), targets).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            reference.step()
        found = snapshot(model, optimizer)
        guard.step(loss)
        assert (worst_difference(found, snapshot(model, optimizer)) == "") == (step == 2)
        model.zero_grad()
        twin.zero_grad()
    assert [record.verdict for record in guard.drain(wait=True)] == ["clip", "clip", "skip", "clip", "clip"]
    assert "on the host" not in caplog.text
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


COMPILE_FOR_CUDA = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from harness.stability import adamw_kernels as kernels

names = kernels._step_chunk.arg_names
pointers = dict(segments="*i64", offsets="*i64", lengths="*i64", starts="*i64", corrections="*fp32",
                grad_scale="*fp32", found_inf="*fp32", partial="*fp64", num_segments="i32", num_chunks="i32",
                BLOCK="constexpr", ALIGNED="constexpr")
for kind in ("*fp32", "*i16"):
    bases = {name: kind for name in names if name.endswith("_base")}
    scalars = {name: "fp32" for name in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    signature = {name: {**bases, **scalars, **pointers}[name] for name in names}
    source = ASTSource(kernels._step_chunk, signature=signature,
                       constexprs={"BLOCK": kernels.BLOCK, "ALIGNED": True},
                       attrs={(place,): [["tt.divisibility", 16]] for place in range(4)})
    options = {"num_warps": kernels.WARPS}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4" in ptx, "full chunks are not read in vectors"
    assert "st.global.v4" in ptx, "chunks are not written in vectors"
    assert ".ftz" not in ptx, "denormals are flushed"
    assert "div.full" not in ptx and "sqrt.approx" not in ptx, "a division is only approximate"
source = ASTSource(kernels._add_chunks,
                   signature={"partial": "*fp64", "first_chunk": "*i64", "result": "*fp64",
                              "num_chunks": "i32", "ROWS": "constexpr"}, constexprs={"ROWS": 256})
assert "atom" not in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


def test_the_kernel_compiles_for_an_h100_with_vectors_and_exact_divisions() -> None:
    environment = {"TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_CUDA],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _sharded(rank: int, world_size: int) -> list[str]:
    """What differs between Triton's and torch's after three steps over shards, of which one is empty."""
    models = [make_model(width=7) for _ in range(2)]
    for model in models:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world_size,)))
    ours, theirs = models
    optimizers = [
        TritonAdamW(ours.parameters(), lr=1e-2),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True),
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            inputs, targets = batch(step, rank)
            nn.functional.mse_loss(model(inputs), targets).backward()
            _step(optimizer, scale=2.0, skip=float(step == 1))
            optimizer.zero_grad()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    return [
        name
        for (name, one), other in pairs
        if not torch.allclose(one.to_local(), other.to_local(), rtol=1e-5, atol=1e-6)
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="two ranks on one GPU are tests/gpu's")
def test_shards_are_stepped_as_torch_steps_them() -> None:
    assert run_ranks(_sharded, 2) == [[], []]

"""AdamW in Triton: torch's own in all that a user sees, and norms of weights and updates for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.dist import local_part
from harness.errors import ConfigError

__all__ = ["TritonAdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq")

REFUSED = ("amsgrad", "maximize", "differentiable")


class TritonAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` as one Triton kernel for each dtype and parameter group.

    It reads `found_inf` and `grad_scale` on the device, as torch's fused one does, but leaves the gradients
    as they are: 28 bytes per fp32 parameter instead of 32. State and state dict are torch's, so either takes
    the other's checkpoints. Parameters are fp32, bf16 or fp16, plain or sharded. Does not synchronise.

    Raises:
        ConfigError: `amsgrad`, `maximize`, `differentiable`, a learning rate in a tensor, or a parameter
            whose elements do not lie side by side.
    """

    leaves_gradients = True
    """It divides gradients by `grad_scale` as it reads them, and does not write them back."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "fused": True})
        self._measured: list[tuple[list[nn.Parameter], Tensor]] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ConfigError: `TritonAdamW`; the group is not added.
        """
        _refuse_settings({**self.defaults, **param_group})
        super().add_param_group({**param_group, "fused": True})
        try:
            for parameter in self.param_groups[-1]["params"]:
                _refuse_gaps(parameter)
        except ConfigError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, of any AdamW's state: step counts go to the device, whatever wrote it.

        Raises:
            ConfigError: `TritonAdamW`; nothing is loaded.
        """
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        for group in groups:
            _refuse_settings(group)
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none if `found_inf` says so.

        Raises:
            ValueError: a closure.
        """
        if closure is not None:
            raise ValueError("TritonAdamW takes no closure: it steps on the gradient that is there")
        self._measured = []
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            for dtype in dict.fromkeys(p.dtype for p in having):
                self._step_alike([p for p in having if p.dtype == dtype], group)

    def norms(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Of each parameter that the last step had a gradient for: `[2]` float64 on the device, the norms of
        its update and of its weights after it; of this rank's share. Does not synchronise."""
        for parameters, measured in self._measured:
            yield from zip(parameters, measured[:, :2].sqrt().unbind(), strict=True)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        from harness.stability import adamw_kernels  # needs Triton, which machines without a GPU do not have

        states = [self._state_of(p) for p in parameters]
        device = local_part(parameters[0]).device
        skip = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        skip = torch.zeros((), device=device) if skip is None else skip.float()
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [1 - skip] * len(steps))
        beta1, beta2 = group["betas"]
        counts = torch.stack([local_part(step) for step in steps])
        corrections = torch.stack([1 - beta1**counts, (1 - beta2**counts).sqrt()], dim=1)
        measured = adamw_kernels.adamw(
            [local_part(p).detach() for p in parameters],
            [_alike(local_part(p.grad), local_part(p)) for p in parameters if p.grad is not None],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            corrections,
            lr=float(group["lr"]),
            betas=(beta1, beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=torch.ones((), device=device) if scale is None else scale.float(),
            found_inf=skip,
        )
        self._measured.append((parameters, measured))

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for moment in MOMENTS:  # loaded, they may lie in another order
            state[moment] = _alike(state[moment], parameter)
        return state


def _alike(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The values of `tensor`, of the parameter's dtype and in its order in memory: the tensor itself, or a
    copy."""
    local, like = local_part(tensor), local_part(parameter)
    if local.dtype == like.dtype and local.stride() == like.stride():
        return tensor
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def _refuse_settings(group: dict[str, Any]) -> None:
    """Refuses settings of a group that the kernel does not know."""
    refused = [name for name in REFUSED if group.get(name)]
    if refused or isinstance(group["lr"], Tensor):
        raise ConfigError(
            f"AdamW in Triton with {refused[0] if refused else 'a learning rate in a tensor'}",
            rule="its kernel knows neither amsgrad, maximize and differentiable nor a rate on the device",
            remedy="use torch.optim.AdamW(fused=True)",
        )


def _refuse_gaps(parameter: nn.Parameter) -> None:
    """Refuses what does not lie densely in memory."""
    local = local_part(parameter)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    if local.numel() and extent != local.numel():
        raise ConfigError(
            f"AdamW in Triton over a parameter of shape {tuple(local.shape)} and strides {local.stride()}",
            rule="a parameter's elements lie side by side, in whatever order",
            remedy="use torch.optim.AdamW, or make the parameter contiguous",
        )

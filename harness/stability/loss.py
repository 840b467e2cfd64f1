"""What the caller says about a micro-batch, looked at before it is added up. Nothing here synchronises."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.errors import ConfigError

__all__ = ["checked_count", "checked_loss"]

RULE = "a loss is one real floating-point number in a tensor, the one that backward() was called on"


def checked_loss(loss: object, device: torch.device) -> Tensor:
    """The loss, detached, 0-d, of one element in whatever shape it came.

    Args:
        loss: What the caller gave.
        device: The model's; a number on the CPU does as well.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(loss, Tensor):
        raise ConfigError(f"the loss is {_described(loss)}", rule=RULE, remedy=_remedy(loss))
    if isinstance(loss, DTensor):
        raise ConfigError("the loss is a DTensor", rule=RULE, remedy="pass loss.full_tensor()")
    if loss.numel() != 1:
        raise ConfigError(
            f"the loss has the shape {list(loss.shape)}",
            rule=RULE,
            remedy="pass its mean() or, to accumulate(), its sum() with the number of tokens",
        )
    if not loss.is_floating_point() or loss.layout != torch.strided:
        kind = str(loss.dtype if loss.layout == torch.strided else loss.layout)
        raise ConfigError(
            f"the loss is of {kind}", rule=RULE, remedy="pass the real number that is minimised"
        )
    if loss.device not in (device, torch.device("cpu")):
        raise ConfigError(
            f"the loss lies on {loss.device} and the model on {device}",
            rule="both are on one device",
            remedy=f"pass loss.to({str(device)!r})",
        )
    return loss.detach().reshape(())


def checked_count(count: object, what: str, device: torch.device) -> Tensor | float:
    """A number of tokens: a number, or a tensor of one element, which comes back detached and 0-d.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(count, Tensor):
        on_device = count.device in (device, torch.device("cpu"))
        if count.numel() == 1 and not count.is_complex() and on_device and not isinstance(count, DTensor):
            return count.detach().reshape(())
    elif isinstance(count, Real):  # NumPy's numbers too
        return float(count)
    raise ConfigError(
        f"{what} is {_described(count)}",
        rule="it is one number, or a tensor of one element on the model's device",
        remedy="count over the whole micro-batch: mask.sum()",
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype} on {value.device}"
    plain = value is None or isinstance(value, Real | str)
    return repr(value) if plain else f"a {type(value).__name__}"


def _remedy(loss: object) -> str:
    if isinstance(loss, Real):
        return "pass the loss itself, not its item(); the guard does not wait for its value"
    if hasattr(loss, "loss"):
        return "pass outputs.loss"
    return "pass the tensor, as in guard.step(loss)"

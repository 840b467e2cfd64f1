"""The largest attention logit of each layer, seen on its way into `scaled_dot_product_attention`.

Growing logits (beyond about 100) saturate the softmax and announce a divergence (Dehghani et al., "Scaling
Vision Transformers to 22 Billion Parameters", 2023). Fused attention never shows them, so those of a few
queries are computed a second time. A compiled model shows nothing, and should not be run within the probe:
it would be compiled a second time for it.

Legend: B batch, H query heads, K key heads, T queries, U keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.config import GuardConfig
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.wrappers import uncompiled

__all__ = ["AttentionCheck", "AttentionProbe", "is_compiled"]

NUM_QUERIES = 32
"""Queries per call whose logits are computed, evenly spaced."""


class AttentionCheck(Check):
    """Fills `StepRecord.attention_logit_max`, one number for each call of attention, over micro-batches and
    ranks."""

    name = "attention"

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.sample_every
        self._largest: Tensor | None = None

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        with AttentionProbe() as probe:
            yield
        if probe.maxima:
            largest = torch.stack(probe.maxima)
            self._largest = largest if self._largest is None else self._largest.maximum(largest)

    def measure(self, view: StepView) -> Tensor | None:
        """`[L]`, or None where the loop does not let the guard watch."""
        largest, self._largest = self._largest, None
        return largest

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, L]`."""
        return Reading(fields={"attention_logit_max": tuple(numbers.amax(0).tolist())})

    def forget(self) -> None:
        self._largest = None


class AttentionProbe(TorchFunctionMode):
    """Within it each call of `scaled_dot_product_attention` leaves its largest logit in `maxima`, in order:
    0-d tensors on the device. Does not synchronise and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.maxima: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            with torch.no_grad():
                self.maxima.append(_largest_logit(*args, **kwargs))
        return function(*args, **kwargs)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of it runs as `torch.compile` left it."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or uncompiled(module) is not module
        for module in model.modules()
    )


def _largest_logit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Over queries `[B, H, T, D]` and keys `[B, K, U, D]`, of those that the mask lets through: float64."""
    num_queries = query.shape[-2]
    chosen = torch.arange(0, num_queries, max(1, num_queries // NUM_QUERIES), device=query.device)
    few = query.index_select(-2, chosen).float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = few @ key.float().mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.arange(key.shape[-2], device=query.device) <= chosen[:, None]
        logits = logits.where(allowed, -torch.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(*attn_mask.shape[:-2], num_queries, -1).index_select(-2, chosen)
        logits = logits.where(mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.amax().double()

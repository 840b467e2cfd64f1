"""What a rank's forward passes are like, seen by a hook on the model: on the host, and without a wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.stability.checks.fingerprint import fingerprint, sample_fingerprints
from harness.stability.inert import ForwardHook

__all__ = ["ForwardWatch", "SeenBatch", "is_active_in_training", "is_dropout", "tensors_in"]


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

MAX_CALLS = 8
"""Of a step, whose inputs are looked at."""


class SeenBatch(NamedTuple):
    """What went into one forward pass, on the device."""

    samples: Tensor
    """`[n]` int64, fingerprints of some samples; of nothing but scalars there are none."""
    whole: Tensor
    """0-d int64, of everything."""


class ForwardWatch:
    """Notes the forward passes since the last step, for all checks of a guard. Of a model that is compiled as
    a whole, or that the loop does not call itself (a part of it, say), it sees nothing.

    The inputs of up to `MAX_CALLS` passes of a step are looked at, by a few small kernels each.
    """

    def __init__(self) -> None:
        self._has_modes = self._has_agreed = False
        self._handle: RemovableHandle | None = None
        self.clear()

    def attach(self, model: nn.Module) -> None:
        """Sees the passes of `model` from now on."""
        self._has_modes = any(is_active_in_training(module) for module in model.modules())
        self._handle = model.register_forward_pre_hook(ForwardHook(self._see), with_kwargs=True)

    def clear(self) -> None:
        """Begins the next step."""
        self.num_training = 0
        """With a graph, so for a backward pass."""
        self.num_reading = 0
        """Without a graph, in training mode, of a model for which that makes a difference."""
        self.batches: list[SeenBatch] = []
        """Of the first of those with a graph."""
        self.tokens: Tensor | None = None
        """`[B, T]` int64, the token ids that went into the pass under way."""
        self.lengths: tuple[int, int] | None = None
        """First dimensions of inputs and labels that did not agree, where those of an earlier pass did."""

    def close(self) -> None:
        """Sees nothing any more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.clear()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Whatever it cannot look at, the forward pass is the user's and goes on.
        with suppress(Exception):
            self._note(module, args, kwargs)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            self.num_reading += int(self._has_modes and module.training)
            return
        self.num_training += 1
        self.tokens = None
        # Within vmap and grad inputs are wrappers that end with the call.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        self.tokens = _tokens(args, kwargs)
        if self.num_training <= MAX_CALLS:
            tensors = list(filter(_is_plain, tensors_in((args, kwargs))))
            with torch.no_grad():
                self.batches += [_seen(tensors)] if tensors else []
        lengths = _lengths({**kwargs, **_named(args)})
        if lengths is not None and lengths[0] == lengths[1]:
            self._has_agreed = True
        elif self._has_agreed:
            self.lengths = self.lengths or lengths


def _seen(tensors: Sequence[Tensor]) -> SeenBatch:
    """Samples are by the first dimension; what has another one belongs to none of them."""
    size = next((len(one) for one in tensors if one.dim()), 0)
    of_samples = [sample_fingerprints(one) for one in tensors if one.dim() and len(one) == size]
    others = [fingerprint(one) for one in tensors if not one.dim() or len(one) != size]
    if not of_samples:
        return SeenBatch(others[0].new_zeros(0), sum(others[1:], others[0]))
    # Mixed with their place, so that equal inputs and labels do not cancel.
    samples = sum(((2 * place + 3) * one for place, one in enumerate(of_samples[1:])), of_samples[0])
    return SeenBatch(samples, sum(others, samples.sum()))


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)


def _is_plain(tensor: Tensor) -> bool:
    """Whether there are bits to look at: not on the meta device, nor in another layout."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return (
        tensor.layout == torch.strided and tensor.numel() > 0 and not (tensor.is_meta or tensor.is_quantized)
    )


def is_active_in_training(module: nn.Module) -> bool:
    """Whether it does in training what it does not in evaluation: dropout, or normalisation by batches."""
    normalises = isinstance(module, BATCH_NORMS) and bool(module.track_running_stats)
    return is_dropout(module) or normalises


def is_dropout(module: nn.Module) -> bool:
    """Whether it drops anything."""
    return isinstance(module, DROPOUTS) and module.p > 0


def _named(args: tuple[Any, ...]) -> Mapping[str, Any]:
    """The entries of a batch that is handed over as one mapping."""
    return args[0] if len(args) == 1 and isinstance(args[0], Mapping) else {}


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first argument, or that of the usual name, if it is `[B, T]` of token ids. Not labels, which models
    may shift by themselves, nor what goes into a decoder."""
    named = {**kwargs, **_named(args)}
    candidates = [*args[:1], *(named[name] for name in ("input_ids", "inputs") if name in named)]
    tensors = [one for one in candidates if isinstance(one, Tensor)]
    is_usable = bool(tensors) and _is_plain(tensors[0])
    return tensors[0] if is_usable and tensors[0].dim() == 2 and tensors[0].dtype == torch.int64 else None


def _lengths(batch: Mapping[Any, Any]) -> tuple[int, int] | None:
    """Of a batch with the names of Hugging Face: the numbers of samples of what goes in and of its labels."""
    inputs = next((batch[name] for name in ("input_ids", "pixel_values") if name in batch), None)
    labels = batch.get("labels")
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor) and inputs.dim() and labels.dim()):
        return None
    return len(inputs), len(labels)

"""Many small kernels as one launch: what a step's verdict takes, recorded once into a CUDA graph.

A verdict is some 200 kernels on a few hundred numbers. They take the device 2 microseconds each, and the
host, launching them one by one, ten times that: a device that waits for its host, in every step. Replayed as
a graph they are one launch. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Graphed"]

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]


class Graphed:
    """Calls a function of tensors, on CUDA from the second call on as one launch.

    The results are overwritten by the next call; whoever keeps them longer copies them. Nothing here
    synchronises. On the CPU, within a graph that somebody else records, and where the function turns out not
    to be one that can be recorded, it is called as it is.

    Args:
        function: Takes and gives tensors whose shapes do not change, and neither reads a value on the host
            nor depends on one that changes.
        state: The tensors that the function replaces by new ones, live, by name. Tensors that it changes in
            place need not be named.
    """

    def __init__(self, function: Function, *, state: Callable[[], dict[str, Tensor]] = dict) -> None:
        self._function = function
        self._state = state
        self._was_called = False
        self._recording: _Recording | None = None
        self._refused = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        state = self._state()
        if self._recording is not None and not self._recording.fits(inputs, state):
            self._recording, self._was_called = None, False
        if self._recording is None and self._can_record(inputs):
            self._recording = self._record(inputs, state)
        if self._recording is not None:
            return self._recording.replay(inputs)
        self._was_called = True
        return self._function(*inputs)

    def _can_record(self, inputs: Sequence[Tensor]) -> bool:
        """Not at the first call, nor at the first after a checkpoint was loaded: that one makes what is made
        once, kernels and allocations, and brings the state to the device."""
        on_cuda = self._was_called and not self._refused and inputs[0].is_cuda
        return on_cuda and not torch.cuda.is_current_stream_capturing()

    def _record(self, inputs: Sequence[Tensor], state: dict[str, Tensor]) -> _Recording | None:
        # A recording that fails has replaced entries of `state` by then.
        before = dict(state)
        try:
            return _Recording(self._function, inputs, state)
        except RuntimeError as error:
            state.update(before)
            self._refused = True
            logger.warning(
                "a step's verdict cannot be recorded as a CUDA graph and is launched kernel by kernel: %s",
                str(error).splitlines()[0],
            )
            return None


class _Recording:
    """A function as a CUDA graph, on inputs and state at fixed addresses."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], state: dict[str, Tensor]) -> None:
        # A replay reads and writes the addresses of the recording: inputs are copied to them, and the state
        # stays at them from now on.
        self._static_inputs = [tensor.clone() for tensor in inputs]
        self._static_state = {name: tensor.clone() for name, tensor in state.items()}
        state.update(self._static_state)
        self._graph = torch.cuda.CUDAGraph()
        # The default stream cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads go on calling CUDA: NCCL's watchdog, the loader's, which pins memory.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._results = function(*self._static_inputs)
                # Recorded too: the new state goes back to where the next replay reads it.
                for name, tensor in self._static_state.items():
                    tensor.copy_(state[name])
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        # While it was recorded the function put tensors of the graph's own memory into `state`.
        state.update(self._static_state)

    def fits(self, inputs: Sequence[Tensor], state: dict[str, Tensor]) -> bool:
        """Whether it is of this function on such inputs, and of this state, which a checkpoint replaces."""
        shapes = [tensor.shape for tensor in inputs]
        return shapes == [tensor.shape for tensor in self._static_inputs] and all(
            state.get(name) is tensor for name, tensor in self._static_state.items()
        )

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self._static_inputs, list(inputs))
        self._graph.replay()
        return self._results

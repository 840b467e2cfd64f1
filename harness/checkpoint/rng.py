"""State that every rank has for itself, and the random number generators, which are the first of it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["PerRank", "Rng"]


class PerRank:
    """Marks a value whose state differs between ranks: every rank's own is kept.

    What is saved without this mark is taken from rank 0 (parameters, sharded tensors and optimizer state
    apart, which all ranks hold alike or in parts).

    At another world size rank r loads the state of the saved rank r, or r modulo the saved world size where
    there was no rank r; then `diverge(r)` is called on the value, if it has such a method.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Rng:
    """The random number generators of this process: Python, numpy, torch on the CPU and the current GPU.

    Kept per rank without being marked. A rank that did not exist when the state was saved seeds its
    generators from its donor's state and its own number, so that no two ranks draw the same numbers.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of all generators. Synchronises with the GPU if it is in use."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
            "numpy": np.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets all generators. A GPU's is set only where there is a GPU and was one."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def diverge(self, rank: int) -> None:
        """Leaves the stream that another rank is on: seeds anew from its next number and `rank`."""
        seed = int(torch.randint(2**62, ())) ^ (rank * 0x9E3779B97F4A7C15 & (2**62 - 1))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

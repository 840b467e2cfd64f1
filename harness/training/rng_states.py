"""States of the random number generators: taken in every step, and made into what a file holds only for an
incident."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
import xxhash

from harness.runlog.incident_files import RngStates

__all__ = ["HeldRng", "digest", "rng_from_plain"]


class HeldRng(NamedTuple):
    """The states of all generators, as these give them."""

    of_python: tuple[Any, ...]
    of_numpy: Any
    of_torch: torch.Tensor
    of_cuda: torch.Tensor | None

    @classmethod
    def take(cls, device: torch.device) -> HeldRng:
        """As they are now; some 50 us. No synchronisation: a GPU's seed and offset are on the host."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)

    def state_dict(self) -> dict[str, Any]:
        """What `harness.checkpoint.Rng` loads."""
        version, words, gauss = self.of_python
        states: dict[str, Any] = {
            "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
            "numpy": self.of_numpy,
            "torch": self.of_torch,
        }
        return states if self.of_cuda is None else {**states, "cuda": self.of_cuda}

    def plain(self) -> RngStates:
        """As JSON holds them, those of torch as bytes."""
        version, words, gauss = self.of_python
        name, key, *rest = self.of_numpy
        states: RngStates = {
            "python": [version, list(words), gauss],
            "numpy": [str(name), list(map(int, key)), *rest],
            "torch": self.of_torch.numpy().tobytes(),
        }
        return states if self.of_cuda is None else {**states, "cuda": self.of_cuda.numpy().tobytes()}


def digest(state: Any) -> str:
    """Tells a generator's state, as `plain` gives it, from any other."""
    return xxhash.xxh3_64_hexdigest(state if isinstance(state, bytes) else orjson.dumps(state))


def rng_from_plain(states: RngStates) -> dict[str, Any]:
    """What `harness.checkpoint.Rng.load_state_dict` takes, of what `read_rng` gives."""
    version, words, gauss = states["python"]
    name, key, *rest = states["numpy"]
    taken: dict[str, Any] = {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (name, np.array(key, dtype=np.uint32), *rest),
        "torch": _tensor(states["torch"]),
    }
    return taken if "cuda" not in states else {**taken, "cuda": _tensor(states["cuda"])}


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)

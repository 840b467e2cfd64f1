"""What the ranks remembered of the steps on the way: their random number generators, their own losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.records import StepRecord
from harness.replay.compare import ROUNDING, relative
from harness.runlog.incident_files import RankFile, ranks_in, read_rank
from harness.runlog.paths import incident_dir
from harness.training.rng_states import HeldRng, digest

__all__ = ["Remembered"]


@dataclass(kw_only=True)
class Remembered:
    """The black boxes that an incident has left, compared with the replay step by step."""

    ranks: Mapping[int, RankFile] = field(default_factory=dict)
    num_steps: int = 0
    """Steps times ranks that were compared."""
    differs: str | None = None
    """The first thing that is not as it is remembered."""

    @classmethod
    def of_incident(cls, directory: Path, step: int, *, world_size: int) -> Remembered:
        """Those of the incident of a step; none where nothing is kept, or nothing that can be read."""
        folder = incident_dir(directory, step)
        found = {}
        try:
            for rank in ranks_in(folder):
                found[rank] = read_rank(folder, rank)
        except (TrackingError, OSError):
            return cls()
        return cls(ranks={rank: one for rank, one in found.items() if one.world_size == world_size})

    @property
    def rerun(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """What `incidents.rerun` has found, by rank."""
        return tuple((rank, one.rerun) for rank, one in self.ranks.items() if one.rerun)

    def compare_begin(self, step: int, position: int, states: Mapping[int, Mapping[str, Any]]) -> None:
        """A step begins at a position in the data, with these states of the ranks' generators."""
        for rank, box in self.ranks.items():
            held = box.at(step)
            if held is None or self.differs is not None:
                continue
            self.num_steps += 1
            if held.position != position:
                self.differs = (
                    f"step {step} begins at sample {position} of the order, and began at {held.position}"
                )
                return
            now = {name: digest(state) for name, state in _plain(states[rank]).items()}
            other = [name for name, known in held.rng.items() if now.get(name, known) != known]
            if other:
                self.differs = f"step {step} begins with other random numbers on rank {rank} ({other[0]}'s)"

    def compare_end(self, record: StepRecord) -> None:
        """A step's own losses."""
        for rank, box in self.ranks.items():
            held = box.at(record.step)
            if held is None or held.loss is None or self.differs is not None:
                continue
            now = record.per_rank[rank].loss
            if relative(held.loss, now) > ROUNDING:
                self.differs = (
                    f"the loss of rank {rank} in step {record.step} is {now:.9g}, and was {held.loss:.9g}"
                )


def _plain(state: Mapping[str, Any]) -> Mapping[str, Any]:
    version, words, gauss = state["python"]
    held = HeldRng((version, tuple(words.tolist()), gauss), state["numpy"], state["torch"], state.get("cuda"))
    return held.plain()

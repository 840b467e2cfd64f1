"""Checkpoints that are written beside training, committed whole, verified on loading, and never unpickled."""

from harness.checkpoint.checkpointer import Checkpointer
from harness.checkpoint.export import export
from harness.checkpoint.rng import PerRank, Rng
from harness.checkpoint.verify import CheckpointReport, verify
from harness.checkpoint.writer import SaveOutcome

__all__ = ["CheckpointReport", "Checkpointer", "PerRank", "Rng", "SaveOutcome", "export", "verify"]

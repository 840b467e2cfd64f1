"""Runs a step of a run again, in one process, and explains what went wrong in it: `harness replay`."""

from harness.replay.replay import Replay, replay

__all__ = ["Replay", "replay"]

"""Gradient health: measured on the device every step, judged there, and acted on by all ranks alike."""

from harness.stability.checks.base import Check, Reading
from harness.stability.guard import StepGuard
from harness.stability.incidents import Incident
from harness.stability.policy import Action, Ladder

__all__ = ["Action", "Check", "Incident", "Ladder", "Reading", "StepGuard"]

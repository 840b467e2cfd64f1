"""Harness: distributed training that watches the numbers."""

__version__ = "0.1.0"

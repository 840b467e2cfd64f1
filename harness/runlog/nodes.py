"""What a side process itself has to say: samples of its node, alerts. A log of its own beside the run's."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.runlog.codec import encode
from harness.runlog.paths import nodes_dir
from harness.runlog.segments import SegmentWriter

__all__ = ["NodeLog"]


NO_ATTEMPT = -1
"""Side processes do not know attempts; nothing of theirs is ever abandoned."""


class NodeLog:
    """Appends to `log/nodes/HOST-ID`. Every side process has a folder of its own, since two may overlap."""

    def __init__(self, run_dir: Path) -> None:
        name = f"{socket.gethostname()[:60]}-{uuid.uuid4().hex[:8]}"
        self._segments = SegmentWriter(nodes_dir(run_dir) / name)
        self._mutex = threading.Lock()

    def write(self, kind: str, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Appends one record; several threads may."""
        with self._mutex:
            self._segments.append(encode(kind, values, attempt=NO_ATTEMPT, step=step, time=time.time()))

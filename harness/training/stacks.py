"""What the threads of this process are doing: all of it for a file, the training thread's in a line."""

from __future__ import annotations

import faulthandler
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

__all__ = ["innermost", "is_debugged", "waits_for_others", "write_stacks"]

_TORCH = Path(torch.__file__).parent
_WAITING = (_TORCH / "distributed", _TORCH / "nn/parallel", _TORCH / "autograd/graph.py")
"""Where Python code stands that waits for other ranks; in the last for DDP's and FSDP's backward pass."""
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_DEBUGGERS = ("bdb", "pdb", "_pydevd_bundle", "pydevd", "debugpy")


def write_stacks(path: Path, heading: str) -> None:
    """The stacks of all threads, innermost frame first. Needs no lock that a thread may hold."""
    with path.open("w") as file:
        file.write(f"{heading}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def innermost(thread: int) -> str:
    """The place in the code at which a thread is, as `file:line function`; not within Python's own library,
    where it waits for something."""
    frames = list(_frames(thread))
    frame = next((frame for frame in frames if not _is_pythons(frame)), frames[0] if frames else None)
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"


def waits_for_others(thread: int) -> bool:
    """Whether a thread is within torch's communication, or the end of a backward pass that waits for it."""
    frame = next(_frames(thread), None)
    return frame is not None and any(map(Path(frame.f_code.co_filename).is_relative_to, _WAITING))


def is_debugged(thread: int) -> bool:
    """Whether a debugger has stopped a thread: somebody looks at it."""
    return any(str(f.f_globals.get("__name__", "")).split(".")[0] in _DEBUGGERS for f in _frames(thread))


def _is_pythons(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_STANDARD_LIBRARY) and "site-packages" not in path.parts


def _frames(thread: int) -> Iterator[FrameType]:
    """From the innermost one outwards."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back

"""What the threads of this process are doing: all of it for a file, the training thread's in a line."""

from __future__ import annotations

import faulthandler
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

__all__ = ["innermost", "is_debugged", "waits_for_others", "write_stacks"]

_TORCH = Path(torch.__file__).parent
_WAITING = tuple(
    _TORCH / name
    for name in (
        *("distributed", "nn/parallel"),
        "autograd/graph.py",  # the backward pass of DDP and FSDP
        "cuda/streams.py",  # the device, which waits for those of others
    )
)
"""Where Python code stands that waits for other ranks."""
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
    where it waits for something. Of a thread that waits for the end of another one, the place of that one."""
    frames = list(_frames(_worker(thread)))
    frame = next((frame for frame in frames if not _is_pythons(frame)), frames[0] if frames else None)
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"


def waits_for_others(thread: int) -> bool:
    """Whether a thread is within torch's communication, or the end of a backward pass that waits for it; or
    waits for the end of a thread that is, such as the one that writes a checkpoint."""
    frame = next(_frames(_worker(thread)), None)
    return frame is not None and _is_waiting(frame)


def arose_waiting(error: BaseException) -> bool:
    """Whether an error, or that which caused it, came out of torch's communication."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _is_waiting(frames[-1])


def is_debugged(thread: int) -> bool:
    """Whether a debugger has stopped a thread: somebody looks at it."""
    return any(str(f.f_globals.get("__name__", "")).split(".")[0] in _DEBUGGERS for f in _frames(thread))


def _worker(thread: int) -> int:
    """The thread for whose end a thread waits, or itself."""
    for frame in list(_frames(thread))[:2]:
        joined = frame.f_locals.get("self") if frame.f_code is threading.Thread.join.__code__ else None
        if isinstance(joined, threading.Thread) and joined.ident is not None:
            return joined.ident
    return thread


def _is_waiting(frame: FrameType) -> bool:
    return any(map(Path(frame.f_code.co_filename).is_relative_to, _WAITING))


def _is_pythons(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_STANDARD_LIBRARY) and "site-packages" not in path.parts


def _frames(thread: int) -> Iterator[FrameType]:
    """From the innermost one outwards."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back

"""What the code of a task raises, told to its author: the error, what was running, and his own lines."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from harness.errors import HarnessError, TaskError

__all__ = ["task_code"]

_MOST_FRAMES = 8
_LONGEST_MESSAGE = 1000
_HARNESS = Path(__file__).parents[1]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_TORCH = Path(torch.__file__).parent
_COMMUNICATING = (_TORCH / "distributed", _TORCH / "nn/parallel")
_DTENSOR = _TORCH / "distributed/tensor"  # whose errors are about how it is used
_INSTALLED = {"site-packages", "dist-packages"}


@contextmanager
def task_code(what: str, *, rule: str) -> Iterator[None]:
    """Within it the code of a task runs: `what` names it, `rule` says what is expected of it.

    Raises:
        TaskError: for whatever was raised, but errors of Harness's own and those in which another rank was
            lost: of torch.distributed, or of a collective of the model's wrapper.
    """
    try:
        yield
    except (HarnessError, dist.DistError):
        raise
    except Exception as error:
        if _is_lost_connection(error):
            raise
        raised = TaskError(
            f"{what} raised {_said(error)}",
            rule=rule,
            remedy="look at the lines below; HARNESS_TRACEBACK=1 shows the whole traceback",
        )
        raised.frames = _own_frames(error)
        raise raised from error


def _is_lost_connection(error: Exception) -> bool:
    """gloo raises a plain RuntimeError, in the middle of a forward pass under DDP or FSDP."""
    if not isinstance(error, RuntimeError):
        return False
    *_, innermost = traceback.walk_tb(error.__traceback__)
    path = Path(innermost[0].f_code.co_filename)
    return any(map(path.is_relative_to, _COMMUNICATING)) and not path.is_relative_to(_DTENSOR)


def _said(error: Exception) -> str:
    message = str(error).strip()
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _own_frames(error: Exception) -> str:
    """The last frames of `error` in files of the task's author; where there are none, the last ones."""
    if isinstance(error, SyntaxError):  # its place is no frame
        return "".join(traceback.format_exception_only(error)[:-1]).rstrip()
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if _is_own(frame.filename)] or frames[-1:]
    return "".join(traceback.StackSummary.from_list(own).format()[-_MOST_FRAMES:]).rstrip()


def _is_own(filename: str) -> bool:
    path = Path(filename)
    return not (
        filename.startswith("<")
        or path.is_relative_to(_HARNESS)
        or path.is_relative_to(_STANDARD_LIBRARY)
        or _INSTALLED.intersection(path.parts)
    )

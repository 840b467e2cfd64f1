"""Code of a user's own: found by its name, and what it raises told to its author: the error, what was
running, and the lines of his own files."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.errors import ConfigError, HarnessError, TaskError

__all__ = ["check_modules", "load_function", "made_by_user", "user_code"]

Made = TypeVar("Made")
_MOST_FRAMES = 8
_LONGEST_MESSAGE = 1000
_HARNESS = Path(__file__).parent
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_TORCH = Path(torch.__file__).parent
_COMMUNICATING = (_TORCH / "distributed", _TORCH / "nn/parallel")
_DTENSOR = _TORCH / "distributed/tensor"  # whose errors are about how it is used
_INSTALLED = {"site-packages", "dist-packages"}


@contextmanager
def user_code(what: str, *, rule: str) -> Iterator[None]:
    """Within it code of a user's own runs: `what` names it, `rule` says what is expected of it.

    Raises:
        TaskError: for whatever was raised, `SystemExit` too, but errors of Harness's own and those in which
            another rank was lost: of torch.distributed, or of a collective of the model's wrapper.
    """
    try:
        yield
    except (HarnessError, dist.DistError):
        raise
    except (Exception, SystemExit) as error:  # whose exit code would be taken for the run's
        if _is_lost_connection(error):
            raise
        raised = TaskError(
            f"{what} raised {_said(error)}",
            rule=rule,
            remedy="look at the lines below; HARNESS_TRACEBACK=1 shows the whole traceback",
        )
        raised.frames = _own_frames(error)
        raise raised from error


def made_by_user(
    what: str, make: Callable[..., Any], argument: object, *, kind: type[Made], rule: str
) -> Made:
    """What a user's own function makes of `argument`.

    Args:
        what: Names the function in errors.
        rule: What is expected of it.

    Raises:
        ConfigError: it is of another type than `kind`.
        TaskError: the function raised something.
    """
    with user_code(what, rule=rule):
        made = make(argument)
    if not isinstance(made, kind):
        raise ConfigError(f"{what} returned {type(made).__name__}", rule=rule)
    return made


def _is_lost_connection(error: BaseException) -> bool:
    """gloo raises a plain RuntimeError, in the middle of a forward pass under DDP or FSDP."""
    if not isinstance(error, RuntimeError):
        return False
    *_, innermost = traceback.walk_tb(error.__traceback__)
    path = Path(innermost[0].f_code.co_filename)
    return any(map(path.is_relative_to, _COMMUNICATING)) and not path.is_relative_to(_DTENSOR)


def _said(error: BaseException) -> str:
    message = str(error).strip()
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _own_frames(error: BaseException) -> str:
    """The last frames of `error` in files of the user; where there are none, the last ones."""
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


def load_function(spec: str, *, key: str) -> Callable[..., Any]:
    """Finds the function or class `package.module:name`, with the current directory importable under every
    launcher.

    Args:
        key: The setting that names it.

    Raises:
        ConfigError: there is no such module, or nothing in it that can be called by that name.
        TaskError: the module raised something while it was imported.
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"{key} is {spec!r}", rule="it has to be package.module:function")
    module = _import(spec, module_name, key)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"{key} {spec!r}: {module.__name__} has no function {name!r}", remedy=_nearest(module, name)
        )
    loaded: Callable[..., Any] = function
    return loaded


def check_modules(specs: Iterable[str], *, key: str) -> None:
    """Looks for the module of each `package.module:name` and does not run it: another process will.

    Raises:
        ConfigError: there is no such module.
        TaskError: a package that holds it raised something while it was imported.
    """
    for spec in specs:
        module_name = spec.partition(":")[0]
        with _importing(spec, key):
            if module_name not in sys.modules and importlib.util.find_spec(module_name) is None:
                raise ModuleNotFoundError(name=module_name)


def _import(spec: str, module_name: str, key: str) -> ModuleType:
    with _importing(spec, key):
        return importlib.import_module(module_name)


@contextmanager
def _importing(spec: str, key: str) -> Iterator[None]:
    # Launchers put the program's own folder on the path; people expect the one they stand in.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with user_code(f"importing {key} {spec!r}", rule="its module has to be importable on every rank"):
        try:
            yield
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{key} {spec!r}: there is no module {error.name!r}",
                rule="it is package.module:function, importable from the current directory or installed",
                remedy=f"start from the folder that holds it (this is {here}), or install it",
            ) from error


def _nearest(module: ModuleType, name: str) -> str:
    functions = [other for other, value in vars(module).items() if callable(value) and other[0] != "_"]
    close = difflib.get_close_matches(name, functions, n=1)
    return f"did you mean {module.__name__}:{close[0]}?" if close else ""

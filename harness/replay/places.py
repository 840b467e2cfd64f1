"""Where in the model and in which line of code an operation is called, read off Python's frames."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

__all__ = ["Place", "here", "module_names"]

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_ENGINE = str(Path(_TORCH) / "autograd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A line of code, and the module in whose forward pass it ran."""

    module: str | None
    """Its name in the model, empty for the model itself; None: outside of it, as the loss is."""
    module_type: str | None
    file: str | None
    """None: no line of anybody's code but torch's."""
    line: int | None

    @property
    def code(self) -> str:
        """The line's text."""
        if self.file is None or self.line is None:
            return ""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        if self.file is None:
            return ""
        path, folder = Path(self.file), Path.cwd()
        return f"{path.relative_to(folder) if path.is_relative_to(folder) else path}:{self.line}"


def module_names(model: nn.Module) -> dict[int, str]:
    """Names of all modules by `id`."""
    return {id(module): name for name, module in model.named_modules()}


def here(names: dict[int, str]) -> Place:
    """The innermost line that is neither torch's nor the replay's, and the innermost of the model's modules,
    of what is running on this thread. In a backward pass only what it has called itself counts."""
    frame: FrameType | None = sys._getframe(1)
    file: str | None = None
    line: int | None = None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_ENGINE) and frame.f_code.co_name == "_engine_run_backward":
            break
        is_own = path.startswith((_TORCH, _OWN, "<")) or frame.f_code.co_name == "__torch_function__"
        if file is None and not is_own:
            file, line = path, frame.f_lineno
        if frame.f_code.co_name == "_call_impl":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in names:
                kind = type(module).__name__
                return Place(module=names[id(module)], module_type=kind, file=file, line=line)
        frame = frame.f_back
    return Place(module=None, module_type=None, file=file, line=line)

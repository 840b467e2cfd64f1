"""The table of gradient statistics: a row per parameter, a column per quantity.

Legend: P number of parameters, N elements of a flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.errors import ConfigError

__all__ = ["MAX_ABS", "NUM_COLUMNS", "NUM_INF", "NUM_NAN", "NUM_ZERO", "SUM_SQUARES", "Layout"]

SUM_SQUARES, MAX_ABS, NUM_NAN, NUM_INF, NUM_ZERO = range(5)
NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """Which parameter is which row. Rows follow the order of `named_parameters`, the forward pass's order."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Elements per parameter, as this rank sees them."""
    parameters: tuple[Tensor, ...]
    """The parameters themselves, held so that no `id` is ever given to another one."""
    row_of: Mapping[int, int]
    """Row by `id(parameter)`: parameters are compared by identity, shared ones have one row."""

    @classmethod
    def of(cls, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Layout:
        """The layout of all parameters that take a gradient; frozen ones have no row."""
        unique: dict[Tensor, str] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                unique.setdefault(parameter, name)
        return cls(
            names=tuple(unique.values()),
            sizes=tuple(parameter.numel() for parameter in unique),
            parameters=tuple(unique),
            row_of={id(parameter): row for row, parameter in enumerate(unique)},
        )

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, parameters: Sequence[Tensor]) -> list[int]:
        """The row of each of `parameters` (those of a bucket, say), in their order.

        Raises:
            ConfigError: one of them was not there, or was frozen, when the layout was taken.
        """
        try:
            return [self.row_of[id(parameter)] for parameter in parameters]
        except KeyError:
            strangers = [tuple(p.shape) for p in parameters if id(p) not in self.row_of]
            raise ConfigError(
                f"no row for parameters of shapes {strangers}",
                rule="all parameters that take a gradient have to exist when the guard is made",
                remedy="make the guard after unfreezing or replacing parameters",
            ) from None

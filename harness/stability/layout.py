"""The table of gradient statistics: a row per parameter, a column per quantity.

Legend: P number of parameters, N elements of a flat buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

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
    parameters: tuple[nn.Parameter, ...]
    """The parameters themselves, kept so that no `id` is ever given to another one."""
    row_of: Mapping[int, int]
    """Row by `id(parameter)`: parameters are compared by identity, shared ones have one row."""

    @classmethod
    def of(
        cls, named_parameters: Iterable[tuple[str, nn.Parameter]], *, of: Collection[nn.Parameter]
    ) -> Layout:
        """The layout of the parameters in `of`, by the names and in the order of the model's.

        Raises:
            ConfigError: one of them is not among `named_parameters`.
        """
        ids = {id(parameter) for parameter in of}
        unique: dict[nn.Parameter, str] = {}
        for name, parameter in named_parameters:
            if id(parameter) in ids:
                unique.setdefault(parameter, name)
        unknown = [tuple(p.shape) for p in of if p not in unique]
        if unknown:
            raise ConfigError(
                f"the optimizer holds {len(unknown)} parameters that are not the model's, of shapes "
                f"{_first(unknown)}",
                rule="what a guarded optimizer changes has to be in the guarded model, to be measured there",
                remedy="make the optimizer from the parameters of the model as it is now, after it was "
                "moved, sharded or rebuilt; one that keeps copies of its own (fp32 masters) has to have the "
                "model's parameters in its param_groups",
            )
        return cls(
            names=tuple(unique.values()),
            sizes=tuple(parameter.numel() for parameter in unique),
            parameters=tuple(unique),
            row_of={id(parameter): row for row, parameter in enumerate(unique)},
        )

    def __len__(self) -> int:
        return len(self.names)


def _first(shapes: list[tuple[int, ...]], num: int = 3) -> str:
    more = f" and {len(shapes) - num} more" if len(shapes) > num else ""
    return ", ".join(map(str, shapes[:num])) + more

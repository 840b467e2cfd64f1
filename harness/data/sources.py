"""Samples by name: where a sample comes from, and which samples are never to be trained on."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from harness.errors import DataError, HarnessError
from harness.user_code import user_code

__all__ = ["find_quarantined", "source_of"]

logger = logging.getLogger(__name__)

_RULE = "it takes a sample's index and returns a string"
_SHOWN = 5


def source_of(dataset: Any, index: int) -> str | None:
    """Where a sample comes from: what the data set's `source_of` says, looked up through torch's `Subset` and
    `ConcatDataset`; None if it has none, or if that fails."""
    dataset, index = _innermost(dataset, index)
    if not callable(getattr(dataset, "source_of", None)):
        return None
    try:
        with user_code(f"{type(dataset).__name__}.source_of({index})", rule=_RULE):
            return str(dataset.source_of(index))
    except HarnessError as error:
        logger.warning("%s", error)
        return None


def find_quarantined(dataset: Any, entries: Sequence[int | str]) -> tuple[int, ...]:
    """The indices of the samples that are meant by `data.quarantine`, sorted, each once.

    An entry is an index, a name as `source_of` gives it, or a file with one of these a line, in which `#`
    begins a comment. Where names are numbers themselves, a number is a name if a sample has it. A name means
    all samples that have it, looked up by the data set's `indices_of` or `index_of`, else among all names.

    Raises:
        DataError: there is no such sample, a file cannot be read, or no sample would be left.
    """
    given = set(_entries(map(str, entries)))
    numbers = {entry for entry in given if entry.isdecimal()}
    if numbers and (source_of(dataset, 0) or "").isdecimal():
        logger.info("numbers in data.quarantine are names where a sample has them, as in this data set")
        numbers = set()
    found = _found(dataset, given - numbers)
    unknown = sorted(given - numbers - found.keys())
    numbers.update(name for name in unknown if name.isdecimal())
    if not numbers.issuperset(unknown):
        wrong = [name for name in unknown if name not in numbers]
        raise _unknown(wrong, "it holds indices, names as incidents show them, or files of these")
    indices = {int(number) for number in numbers}
    wrong = [str(index) for index in sorted(indices) if index >= len(dataset)]
    if wrong:
        raise _unknown(wrong, f"the training data has {len(dataset)} samples, counted from 0")
    indices.update(int(index) for of_name in found.values() for index in of_name)
    if len(indices) == len(dataset):
        raise DataError("data.quarantine names every sample", rule="there has to be one to train on")
    return tuple(sorted(indices))


def _entries(given: Iterable[str]) -> Iterable[str]:
    for entry in (text.strip() for text in given):
        if not _is_file(entry):
            yield entry
            continue
        try:
            lines = Path(entry).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"data.quarantine: cannot read {entry}: {error}", rule="it is a text file"
            ) from error
        yield from (line for line in (line.partition("#")[0].strip() for line in lines) if line)


def _is_file(entry: str) -> bool:
    try:
        return not entry.isdecimal() and Path(entry).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a 0 byte, no home
        return False


def _found(dataset: Any, names: Collection[str]) -> dict[str, Collection[int]]:
    """The indices of the samples with these names, by name, of those that there are."""
    if not names:
        return {}
    kind = type(dataset).__name__
    if callable(getattr(dataset, "indices_of", None)):
        with user_code(f"{kind}.indices_of", rule="it takes names and returns lists of indices by name"):
            return {name: list(indices) for name, indices in dataset.indices_of(names).items() if indices}
    if callable(getattr(dataset, "index_of", None)):
        with user_code(f"{kind}.index_of", rule="it takes a name and returns an index or None"):
            by_name = {name: dataset.index_of(name) for name in names}
            return {name: [int(index)] for name, index in by_name.items() if index is not None}
    logger.info("looking for %d quarantined names among %d samples", len(names), len(dataset))
    found: dict[str, Collection[int]] = {}
    for index in range(len(dataset)):
        source = source_of(dataset, index)
        if source is None:
            break  # it names none
        if source in names:
            found[source] = [*found.get(source, ()), index]
    return found


def _unknown(entries: Sequence[str], rule: str) -> DataError:
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return DataError(
        f"data.quarantine names no sample or file: {', '.join(map(repr, entries[:_SHOWN]))}{more}",
        rule=rule,
        remedy="copy them from `harness show RUN --incident STEP`",
    )


def _innermost(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set within torch's own wrappers, and the sample's index there."""
    while True:
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif isinstance(dataset, ConcatDataset):
            number = bisect.bisect_right(dataset.cumulative_sizes, index)
            before = dataset.cumulative_sizes[number - 1] if number else 0
            dataset, index = dataset.datasets[number], index - before
        else:
            return dataset, index

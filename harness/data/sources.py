"""Samples by name: where a sample comes from, and which samples are never to be trained on."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Sequence
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
    begins a comment. A name is looked up by the data set's `index_of`, else among the names of all samples.

    Raises:
        DataError: there is no such sample, a file cannot be read, or no sample would be left.
    """
    numbers: set[int] = set()
    names: set[str] = set()
    for entry in _entries(map(str, entries)):
        numbers.add(int(entry)) if entry.isdecimal() else names.add(entry)
    wrong = [str(number) for number in sorted(numbers) if number >= len(dataset)]
    if wrong:
        raise _unknown(wrong, f"the training data has {len(dataset)} samples, counted from 0")
    numbers |= _found(dataset, names)
    if len(numbers) == len(dataset):
        raise DataError("data.quarantine names every sample", rule="there has to be one to train on")
    return tuple(sorted(numbers))


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


def _found(dataset: Any, names: set[str]) -> set[int]:
    """The indices of the samples with these names."""
    if not names:
        return set()
    if callable(getattr(dataset, "index_of", None)):
        with user_code(
            f"{type(dataset).__name__}.index_of", rule="it takes a name and returns an index or None"
        ):
            by_name = {name: dataset.index_of(name) for name in names}
    else:
        logger.info("looking for %d quarantined names among %d samples", len(names), len(dataset))
        by_name = dict.fromkeys(names)
        for index in range(len(dataset)):
            source = source_of(dataset, index)
            if source is None:
                break  # it names none
            if source in by_name:
                by_name[source] = index
    unknown = sorted(name for name, index in by_name.items() if index is None)
    if unknown:
        raise _unknown(unknown, "it holds indices, names as incidents show them, or files of these")
    return {int(index) for index in by_name.values()}


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

"""What every test starts from, and what none may leave behind."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The program takes the `harness` logger over; a test that ran it gives the logger back."""
    logger = logging.getLogger("harness")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.level, logger.propagate = level, propagate
    logger.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Distributed tests share two cores between up to four ranks, and bits may depend on the split."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))

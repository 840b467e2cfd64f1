"""Errors that make no noise: each loop is named when it is broken, and not when it is mended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.silent_errors import ALONE


@pytest.mark.parametrize(("loop", "check"), ALONE.items(), ids=lambda one: getattr(one, "__name__", ""))
def test_a_broken_loop_is_named_and_a_mended_one_is_not(
    loop: Callable[[bool], list[str]], check: str
) -> None:
    assert check in loop(True)
    assert loop(False) == []

"""Who prints an error, and how often."""

from __future__ import annotations

import pytest

from harness.cli.errors import reporting
from harness.errors import ConfigError


def printed(
    error: ConfigError,
    rank: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    early: bool = False,
) -> str:
    """By one rank of four on two machines."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with reporting() as outcome:
        if early:
            outcome.report(error)
        raise error
    assert outcome.exit_code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "speakers", "where"),
    [(None, [0, 2], ""), ((), [0], ""), ((1, 3), [1], " on ranks 1, 3"), ((2,), [2], " on rank 2")],
)
@pytest.mark.parametrize("early", [False, True])
def test_each_machine_is_told_what_went_wrong_before_the_ranks_met_and_else_one_rank_speaks(
    ranks: tuple[int, ...] | None,
    speakers: list[int],
    where: str,
    early: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank in range(4):
        error = ConfigError("odd")
        error.ranks = ranks
        said = f"ConfigError{where}: odd.\n" if rank in speakers else ""
        assert printed(error, rank, capsys, monkeypatch, early=early) == said

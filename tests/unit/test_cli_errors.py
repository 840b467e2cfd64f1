"""Who prints an error, and how often."""

from __future__ import annotations

import pytest

from harness.cli.errors import Outcome, reporting
from harness.cli.train import train_and_exit
from harness.errors import ConfigError, LostRankError
from harness.stop import StopRequest


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


@pytest.mark.parametrize(
    ("ranks", "speakers"), [(None, [0, 2]), ((), [0, 2]), ((1,), [1, 2]), ((1, 3), [1, 3]), ((2,), [0, 2])]
)
def test_of_each_machine_one_rank_speaks_to_the_launcher_and_it_is_one_on_which_the_error_arose(
    ranks: tuple[int, ...] | None, speakers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConfigError("odd")
    error.ranks = ranks
    speaking = []
    for rank in range(4):
        launched = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        for name, value in launched.items():
            monkeypatch.setenv(name, str(value))
        outcome = Outcome(error=error)
        assert outcome.is_final
        speaking += [rank] if outcome.speaks else []
    assert speaking == speakers
    assert not Outcome(error=LostRankError("gone")).is_final


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_damaged_variable_of_a_launcher_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sound in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(sound, "1")
    monkeypatch.setenv(name, "x")
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    train_and_exit(["--config=debug"], prog="train", stop=StopRequest())
    said = capsys.readouterr().err
    assert codes == [2]
    assert said.startswith(f"LaunchError: {name} is 'x'")
    assert "Traceback" not in said

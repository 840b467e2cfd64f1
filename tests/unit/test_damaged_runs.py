"""A damaged or foreign run costs its own row and nothing else, wherever runs are shown.

`scripts/fuzz_runs.py` does the same with thousands of damages, and asks everything of each.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")

from harness.tracking.text import printable
from tests.support.damage import damaged_run, sound_run
from tests.support.readers import Answer, Question, Readers

BATCH = 50
LONGEST_S = 10.0
"""Of processor time: a usual answer takes hundredths of it, what grows with a damaged number never ends."""
ASKED = 4
"""Of each run; which ones, the seed says."""


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first command pays for the loading of torch and of the page's libraries."""
    root = tmp_path_factory.mktemp("warm")
    sound_run(root / "sound")
    for question in Readers(root).questions("sound", "sound", root):
        question.ask()


def checked(question: Question, answer: Answer) -> Answer:
    assert answer.seconds < LONGEST_S, question.name
    if question.name.startswith("/api"):
        assert answer.status in (200, 404), (question.name, answer.text)
        json.loads(answer.text, parse_constant=pytest.fail)
    else:
        assert answer.status in (0, 1, 2), (question.name, answer.text)
        assert [line for line in answer.text.split("\n") if printable(line, longest=len(line)) != line] == []
    return answer


def told(readers: Readers, run: str, out: Path) -> list[str]:
    """All answers, but for how long ago the last record was."""
    answers = [question.ask().text for question in readers.questions(run, run, out)]
    return [re.sub(r"\(last record .* ago\)", "", text) for text in answers]


@pytest.mark.parametrize("first_seed", range(0, 2 * BATCH, BATCH))
def test_no_damage_is_a_traceback_or_takes_long_or_hides_another_run(first_seed: int, tmp_path: Path) -> None:
    root, out = tmp_path / "runs", tmp_path
    sound = sound_run(root / "sound")
    readers = Readers(root)
    before = told(readers, "sound", out)
    done = {}
    for seed in range(first_seed, first_seed + BATCH):
        run = f"damaged{seed}"
        done[run] = damaged_run(sound, root / run, seed)
        for question in random.Random(seed).sample(readers.questions(run, "sound", out), ASKED):
            try:
                checked(question, question.ask())
            except Exception as error:
                error.add_note(f"{done[run]}: {question.name}")
                raise
    rows = readers.table()
    assert {run: done[run] for run, row in rows.items() if row["state"] == "unreadable"} == {}
    assert set(rows) == set(readers.run_index.names()) >= {"sound"}
    assert rows["sound"]["last_step"] == 23
    listed, *shown = (checked(question, question.ask()) for question in readers.folder_questions())
    assert listed.status == 0
    assert {row["id"] for row in json.loads(shown[0].text)["runs"]} == set(rows)
    assert {line.split()[0] for line in listed.text.splitlines()} >= set(rows)
    assert told(readers, "sound", out) == before

"""Damages runs and asks everything of each: every command and every address of the dashboard.

    python scripts/fuzz_runs.py --damages 2000 --seed 0

A row per question of docs/benchmarks/fuzz.md: how many runs it was asked of, how many answers were an error
in words, how many were a traceback, and the longest answer. Times are this process's; `harness runs` reads a
hundred runs for one answer. What has been asked is written after every hundred runs, so that a process that
is ended early leaves what it has.
"""

from __future__ import annotations

import argparse
import faulthandler
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import write_results  # noqa: E402  (the repository has to be on the path first)

from tests.support.damage import damaged_run, sound_run  # noqa: E402
from tests.support.readers import Question, Readers  # noqa: E402

HANG_S = 120.0
FOLDER = 100
"""Runs in a folder, for the tables."""


class Tally:
    """What was asked, and what came of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.tracebacks: Counter[str] = Counter()

    def ask(self, name: str, question: Question, damage: str) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            answer = question.ask()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (that is what is looked for)
            self.tracebacks[name] += 1
            self.seconds[name].append(0.0)
            print(f"{damage}: {question.name}: {error!r}", flush=True)
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.seconds[name].append(answer.seconds)
        self.errors[name] += answer.status in (1, 2, 404)
        if answer.seconds > 1.0:
            print(f"{damage}: {question.name}: {answer.seconds:.1f} s", flush=True)

    def rows(self) -> dict[str, dict[str, object]]:
        return {
            name: {
                "asked": len(seconds),
                "errors in words": self.errors[name],
                "tracebacks": self.tracebacks[name],
                "longest answer (s)": round(max(seconds), 2),
            }
            for name, seconds in sorted(self.seconds.items())
        }


def fuzz_folder(tally: Tally, seeds: range) -> Counter[str]:
    """Damages as many runs in one folder; the states that the dashboard's table gives them."""
    with tempfile.TemporaryDirectory() as name:
        root, out = Path(name, "runs"), Path(name)
        sound = sound_run(root / "sound")
        readers = Readers(root)
        for question in readers.questions("sound", "sound", out):
            question.ask()  # what is loaded at first costs no damaged run
        for seed in seeds:
            run = f"run{seed}"
            damage = damaged_run(sound, root / run, seed)
            for question in readers.questions(run, "sound", out):
                tally.ask(_kind(question.name, run), question, damage)
        rows = readers.table()
        if set(rows) != set(readers.run_index.names()) or rows["sound"]["last_step"] != 23:
            raise AssertionError(f"the table of seeds {seeds} lacks a run")
        for question in readers.folder_questions():
            tally.ask(question.name, question, f"seeds {seeds}")
        return Counter(row["state"] for row in rows.values())


def _kind(name: str, run: str) -> str:
    """The question without the run: an address's path, or a command and its format."""
    if name.startswith("/api"):
        return name.split()[0]
    words = re.sub(r" -o \S+| --runs \S+", "", name).replace(run, "RUN").replace("sound", "OTHER")
    return words.replace("RUN OTHER", "RUN")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damages", type=int, default=2000, help="damaged runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--no-results", action="store_true", help="write no docs/benchmarks/fuzz.md")
    options = parser.parse_args()
    tally, states, began = Tally(), Counter[str](), time.monotonic()
    end = options.seed + options.damages
    for first in range(options.seed, end, FOLDER):
        last = min(first + FOLDER, end)
        states += fuzz_folder(tally, range(first, last))
        num_runs = last - options.seed
        print(f"{num_runs} runs, {sum(tally.tracebacks.values())} tracebacks", flush=True)
        if not options.no_results:
            about = {
                "damaged runs": num_runs,
                "seed": options.seed,
                "unreadable rows": states["unreadable"],
                "minutes": round((time.monotonic() - began) / 60, 1),
            }
            write_results("fuzz", tally.rows(), device=torch.device("cpu"), about=about)
    sys.exit(bool(tally.tracebacks))


if __name__ == "__main__":
    main()

"""`harness replay RUN --step N`: runs a step again and tells what went wrong in it."""

from __future__ import annotations

import argparse
import code
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.cli.arguments import parser, run_argument, run_directory
from harness.cli.errors import reporting
from harness.cli.output import say, say_paths

if TYPE_CHECKING:
    from harness.replay.ranks import RanksInTurn
    from harness.replay.replay import Replay

__all__ = ["EXIT_NOT_REPRODUCED", "run"]

EXIT_NOT_REPRODUCED = 1


def run(argv: Sequence[str]) -> int:
    """Prints the story; exit code 1 if the step is not what it was in the run, 2 if it cannot be replayed."""
    options = _arguments().parse_args(argv)
    with reporting() as outcome:
        directory = run_directory(options.run, options.runs)
        from harness.replay import replay
        from harness.replay.story import as_data, story, write_story

        def tell(found: Replay, ranks: RanksInTurn) -> None:
            say(json.dumps(as_data(found), indent=2) if options.json else story(found))
            try:
                paths = write_story(found)
            except OSError as error:  # another user's run, say; what was found has been printed
                say(
                    f"the story is not kept: {error.filename} cannot be written: {error.strerror}", error=True
                )
            else:
                if not options.json:
                    say_paths(paths)
            if options.shell:
                _shell(found, ranks)

        found = replay(
            directory,
            options.step,
            steps_before=options.steps_before,
            device=options.device,
            from_start=options.from_start,
            say=functools.partial(say, error=True),
            inspect=tell,
        )
        outcome.exit_code = 0 if found.reproduced else EXIT_NOT_REPRODUCED
    return outcome.exit_code


def _shell(found: Replay, ranks: RanksInTurn) -> None:
    """Python, with what the step was made of."""
    import torch

    passes = found.played.micro_batches
    bad = found.causes[0] if found.causes else None
    chosen = [one for one in passes if bad and (one.rank, one.number) == (bad.rank, bad.micro_batch)]
    things = {
        "replay": found,
        "ranks": ranks,
        "model": ranks.model,
        "optimizers": ranks.optimizers,
        "guard": ranks.judge,
        "micro_batches": passes,
        "batch": (chosen or passes)[0].batch,
        "loss": ranks.task.loss,
        "torch": torch,
    }
    banner = f"the state before step {found.history.step}: {', '.join(things)}; loss(model, batch) runs it"
    code.interact(banner=banner, local=things, exitmsg="")


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "replay",
        "Runs a step of a run again from the checkpoint before it, all ranks in turn in one process, and "
        "tells where its NaN or Inf began and which samples are to blame. The run may be finished, crashed "
        "or running; nothing of it is changed, but for incidents/step-N/ where the story is left.",
    )
    run_argument(arguments)
    arguments.add_argument("--step", type=int, help="default: that of the run's last incident")
    arguments.add_argument(
        "--steps-before", type=int, default=0, help="run at least so many steps before it again too"
    )
    arguments.add_argument(
        "--from-start",
        action="store_true",
        help="where no checkpoint from before the step is left, run all steps from the first one again",
    )
    arguments.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the run's"
    )
    arguments.add_argument("--json", action="store_true", help="print replay.json instead of the story")
    arguments.add_argument(
        "--shell", action="store_true", help="stay in Python with model, batch and guard as before the step"
    )
    return arguments

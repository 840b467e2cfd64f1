"""torchrun, and a little more: `python -m harness.agent` in place of `torchrun`, with the same arguments.

An agent that is cut off from the others would wait a quarter of an hour for them. Here it ends, and its
machine is there for what starts it again.

torchrun exits with 1 whatever its program's exit code was: nobody could tell a run that was
stopped, or a setting that is wrong, from a process that died. Here the program leaves its exit code in a
file where it has a meaning: it was stopped and has saved (75), or another start would not help (2, 3).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from torch.distributed import run

from harness import env
from harness.config import ParallelConfig
from harness.dist import Connections

__all__: list[str] = []


def _main() -> int:
    """The program's exit code where it has left one; else raises what torchrun does."""
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        note = Path(folder, "exit-code")
        env.set_exit_note(note)
        try:
            run.main()
        except BaseException:
            if not note.exists():
                raise
            return int(note.read_text())
    return 0


if __name__ == "__main__":
    with Connections(ParallelConfig.silent_s):  # the default: the agent does not know its program's
        exit_code = _main()
    sys.exit(exit_code)

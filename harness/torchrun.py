"""torchrun, with the exit code that the program had: `python -m harness.torchrun` in the place of `torchrun`.

torchrun itself exits with 1 whatever its program's exit code was: Kubernetes could not tell a run that was
stopped, or a setting that is wrong, from a process that died. The program leaves its exit code in a file
where it has a meaning: it was stopped and has saved (75), or another start would not help (2, 3).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run

from harness import env

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun with its own arguments; the program's exit code, or what torchrun ends with.

    Raises:
        BaseException: what torchrun does, where the program has left nothing.
    """
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        note = Path(folder, "exit-code")
        env.set_exit_note(note)
        try:
            run.main(None if argv is None else list(argv))
        except BaseException:
            if not note.exists():
                raise
            return int(note.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

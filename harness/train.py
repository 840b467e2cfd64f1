"""The program: `accelerate launch harness/train.py`, `torchrun harness/train.py`, `python harness/train.py`.

Started as a file, Python puts this folder at the head of `sys.path`, where its modules would shadow others
and be imported twice. So the repository takes its place there, and the package does the work.
"""

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from harness.parent import stop_with_launcher

    stop_with_launcher()

    from harness.cli.train import run

    exit_code = run(sys.argv[1:], prog="harness/train.py")
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed by now. Shutting the interpreter down beside gloo's threads aborts now and
    # then, and a launcher would take that for a failure.
    os._exit(exit_code)

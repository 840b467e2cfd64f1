"""The program: `accelerate launch harness/train.py`, `torchrun harness/train.py`, `python harness/train.py`.

Started as a file, Python puts this folder at the head of `sys.path`, where its modules would shadow others
and be imported twice. So the repository takes its place there, and the package does the work.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from harness.stop import StopRequest

    with StopRequest() as stop:  # before anything that takes time
        from harness.parent import stop_with_launcher

        stop_with_launcher()

        from harness.cli.train import train_and_exit

        train_and_exit(sys.argv[1:], prog="harness/train.py", stop=stop)

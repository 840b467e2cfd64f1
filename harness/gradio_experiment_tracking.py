"""The dashboard under the name of the tracker's description: `python -m harness.gradio_experiment_tracking`.

Options are those of `harness dashboard`.
"""

from __future__ import annotations

import sys

from harness.cli.dashboard import run as main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

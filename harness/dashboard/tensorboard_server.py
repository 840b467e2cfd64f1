"""The TensorBoard process that `tensorboard` starts: TensorBoard itself, on a Unix socket alone."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Serves until standard input ends, which it does when the dashboard dies, however that comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--socket", required=True, help="path at which to listen")
    options = parser.parse_args(arguments)
    from tensorboard import default, program
    from werkzeug.serving import make_server

    class Server:
        """What `program.TensorBoard` takes for a `server_class`."""

        def __init__(self, app: Any, flags: Any) -> None:
            self.serve_forever = make_server(f"unix://{options.socket}", 0, app, threaded=True).serve_forever

        def get_url(self) -> str:
            return f"unix://{options.socket}"

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for every request
    # Static plugins only: the others open files that a run names (the projector does), or are anybody's.
    server = program.TensorBoard(plugins=default.get_static_plugins(), server_class=Server)
    # Fast loading is a data server, which listens on a TCP port and answers whoever asks.
    server.configure(logdir=options.logdir, load_fast="false")
    server.launch()
    sys.stdin.buffer.read()
    os._exit(0)

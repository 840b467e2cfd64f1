"""The TensorBoard process that `tensorboard` starts: TensorBoard itself, on a Unix socket."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

__all__ = ["main"]


def main(logdir: str, socket: str) -> None:
    """Serves until standard input ends, which it does when the dashboard dies, however that comes."""
    from tensorboard import program
    from werkzeug.serving import make_server

    class Server:
        """What `program.TensorBoard` takes for a `server_class`."""

        def __init__(self, app: Any, flags: Any) -> None:
            self.serve_forever = make_server(f"unix://{socket}", 0, app, threaded=True).serve_forever

        def get_url(self) -> str:
            return f"unix://{socket}"

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for every request
    server = program.TensorBoard(server_class=Server)
    server.configure(logdir=logdir)
    server.launch()
    sys.stdin.buffer.read()
    os._exit(0)

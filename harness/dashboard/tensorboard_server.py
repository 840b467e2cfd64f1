"""The TensorBoard process that `tensorboard` starts: TensorBoard itself, on a Unix socket alone."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["logdir_and_socket", "main"]


def logdir_and_socket(folder: Path) -> tuple[Path, Path]:
    """Where, in the folder of a process, the links to runs lie, and where it listens."""
    return folder / "runs", folder / "socket"


def main(arguments: Sequence[str]) -> None:
    """Serves until standard input ends, which it does when the dashboard dies, however that comes. Then
    removes its folder, the only argument."""
    (folder,) = map(Path, arguments)
    logdir, socket = logdir_and_socket(folder)
    from tensorboard import default, program
    from werkzeug.serving import make_server

    class Server:
        """What `program.TensorBoard` takes for a `server_class`."""

        def __init__(self, app: Any, flags: Any) -> None:
            self.serve_forever = make_server(f"unix://{socket}", 0, app, threaded=True).serve_forever

        def get_url(self) -> str:
            return f"unix://{socket}"

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for every request
    # Static plugins only: the others open files that a run names (the projector does), or are anybody's.
    server = program.TensorBoard(plugins=default.get_static_plugins(), server_class=Server)
    # Fast loading is a data server, which listens on a TCP port and answers whoever asks.
    server.configure(logdir=str(logdir), load_fast="false")
    server.launch()
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)  # links, not what they lead to
    os._exit(0)

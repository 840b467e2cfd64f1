"""What NCCL's own RAS subsystem says of a job: which processes answer, and which ranks lag behind in a communicator.

NCCL 2.24 and later listen on each machine, at localhost:28028 or where NCCL_RAS_ADDR says, and answer for the
whole job. Asked as NVIDIA's `ncclras` asks, so that the program need not be installed:
https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting/ras.html
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import torch

from harness import env

__all__ = ["ask_ras", "write_ras_report"]

_CLIENT_PROTOCOL = 2
_PIECE_BYTES = 1 << 16
_MOST_BYTES = 32 << 20
_SPARE_S = 0.5
"""How much earlier than we stop listening NCCL stops waiting for ranks that do not answer it."""
_FILE = "nccl-ras.txt"


def write_ras_report(folder: Path, timeout_s: float) -> None:
    """Writes the job's state to `folder`; nothing where no NCCL was used, or it does not answer.

    Takes no device, and no collective.
    """
    if torch.cuda.is_initialized() and torch.distributed.is_nccl_available():
        report = ask_ras(env.nccl_ras_address(), timeout_s=timeout_s)
        if report:
            (folder / _FILE).write_text(report)


def ask_ras(address: tuple[str, int], *, timeout_s: float) -> str:
    """NCCL's report on all ranks, or as much of it as has come in time; empty if nobody answers as NCCL does."""
    ends = time.monotonic() + timeout_s
    wait_s = max(1, round(timeout_s - _SPARE_S))
    request = f"CLIENT PROTOCOL {_CLIENT_PROTOCOL}\nTIMEOUT {wait_s}\nVERBOSE STATUS\n"
    said = bytearray()
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            connection.sendall(request.encode())
            while len(said) < _MOST_BYTES and (left_s := ends - time.monotonic()) > 0:
                connection.settimeout(left_s)
                piece = connection.recv(_PIECE_BYTES)
                if not piece:
                    break
                said += piece
    except OSError:  # nobody listens, or it has stopped to answer: what has come is kept
        pass
    lines = said.decode(errors="replace").splitlines(keepends=True)
    if not lines or not lines[0].startswith("SERVER PROTOCOL"):
        return ""
    return "".join(line for line in lines[1:] if line.strip() != "OK")

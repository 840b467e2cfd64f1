"""What NCCL was asked to do last: torch's flight recorder, which remembers the last 2,000 collectives.

torch (2.11 and later) records by itself and, when a collective times out, writes a file per rank before it
ends the process; here it is told where. Of a hang that is found before, the records are asked for.
`torchfrtrace --prefix nccl-rank- FOLDER` compares those of all ranks and says who did not join what.
"""

from __future__ import annotations

from pathlib import Path

import torch

from harness import env

__all__ = ["keep_flight_records", "write_flight_records"]

_PREFIX = "nccl-rank-"


def keep_flight_records(folder: Path) -> None:
    """Has torch write its records to `folder`, unless the user has said where. It looks that up when it does."""
    folder.mkdir(parents=True, exist_ok=True)
    env.set_default("TORCH_FR_DUMP_TEMP_FILE", str(folder / _PREFIX))


def write_flight_records(folder: Path, rank: int) -> None:
    """Writes them now; nothing where torch was built without NCCL. Takes no device, and no collective."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        (folder / f"{_PREFIX}{rank}").write_bytes(dump())

"""torchrun for several machines: `python -m harness.agent` in place of `torchrun`, with the same arguments.

An agent that is cut off from the others would wait a quarter of an hour for them. Here it ends, and its
machine is there for what starts it again.
"""

from __future__ import annotations

from torch.distributed.run import main

from harness.config import ParallelConfig
from harness.dist import Connections

__all__: list[str] = []

if __name__ == "__main__":
    with Connections(ParallelConfig.silent_s):
        main()

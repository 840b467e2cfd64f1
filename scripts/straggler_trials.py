"""Runs of two ranks of which one is slow, or gets its data late: is it named, the right one, and no other?

python scripts/straggler_trials.py --trials 24 --seed 0
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from tests.support.straggling import late_run  # noqa: E402  (the repository has to be on the path first)

KINDS = ("straggler", "data-bound rank")
STRATEGIES = ("ddp", "fsdp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    num_right = 0
    for number in range(options.trials):
        kind, strategy = KINDS[number % 2], STRATEGIES[number // 2 % 2]
        rank, late_s = draw.randrange(2), draw.uniform(0.03, 0.12)
        with tempfile.TemporaryDirectory() as folder:
            found = late_run(Path(folder), kind, rank=rank, strategy=strategy, late_s=late_s)
        is_right = found == [(kind, rank)]
        num_right += is_right
        print(
            f"{strategy} rank {rank} {kind} by {late_s:.3f} s: {found} {'right' if is_right else 'WRONG'}",
            flush=True,
        )
    print(f"{num_right} of {options.trials} right")
    sys.exit(num_right != options.trials)


if __name__ == "__main__":
    main()

"""`harness doctor [CONFIG]`: are these machines fit for a training, and is the training what it is meant to
be? Alone, or on all ranks under a launcher."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import parser
from harness.cli.errors import reporting
from harness.cli.output import say
from harness.config import ParallelConfig

if TYPE_CHECKING:
    from harness.dist import World
    from harness.doctor import Finding

__all__ = ["EXIT_UNFIT", "run"]

EXIT_UNFIT = 1
_MEET_S = 60.0
"""How long ranks wait for one another: one that does not come in a minute is a finding."""


def run(argv: Sequence[str]) -> int:
    """Prints what was found, a line each, on rank 0; exit code 1 if one of them is a fail."""
    arguments = parser(
        "doctor",
        "Examine the machines that a training would use: versions, GPUs, network, disk, clocks, ports, "
        "login. On all ranks: torchrun --nproc-per-node=8 --no-python harness doctor. Exits with 1 if "
        "something fails. With a configuration a few of its steps are trained too, under all checks for "
        "silent errors (docs/checks.md), and nothing of them is kept.",
    )
    arguments.add_argument("config", nargs="?", help="a preset or a YAML file: train a few steps of it too")
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    arguments.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="as parallel.device"
    )
    arguments.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.dist import open_world  # after the arguments, so that --help does not wait for torch
        from harness.doctor import Site, examine, worst

        with open_world(ParallelConfig(device=options.device, timeout_s=_MEET_S)) as world:
            findings = examine(Site(world, options.runs))
            if options.config is not None:
                findings += _of_training(options.config, world)
        if world.is_main and options.json:
            content = {"verdict": worst(findings), "ranks": world.world_size}
            json.dump({**content, "findings": [dataclasses.asdict(each) for each in findings]}, sys.stdout)
            sys.stdout.write("\n")
        elif world.is_main:
            _print(findings)
        outcome.exit_code = EXIT_UNFIT if worst(findings) == "fail" else 0
    return outcome.exit_code


def _of_training(path: str, world: World) -> list[Finding]:
    """What a few steps of the run show."""
    from harness.config import TrainConfig
    from harness.doctor import Finding
    from harness.training.trial import training_checks

    found = training_checks(TrainConfig.from_file(path), world)
    if not found:
        return [Finding("training", "a few steps, no silent error found")]
    return [Finding(f"training: {one.check}", one.problem, "warn", one.remedy) for one in found]


def _print(findings: Sequence[Finding]) -> None:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        say(f"{finding.verdict:<5} {finding.what:<{width}}  {finding.value}")
        if finding.remedy:
            say(f"{'':<{6 + width}}  -> {finding.remedy}")

"""Under a real Slurm: a job that is pre-empted saves, is queued again, and ends as the undisturbed run.

`scripts/bench_slurm.py` tries time limits, requeues and failing nodes too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import pytest

from scripts.bench_slurm import EVENTS, run_undisturbed, trial
from tests.support.slurm import Slurm, why_not


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_preempted_job_saves_every_step_and_goes_on_as_the_same_run() -> None:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # short, as the path of a socket has to be
        run_undisturbed(folder)
        with Slurm.started(folder) as slurm:
            trial(slurm, "struck", EVENTS["pre-emption"], Random(0), may_start=False)

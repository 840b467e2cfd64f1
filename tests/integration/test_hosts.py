"""Two machines: what is killed starts again, one that is lost is done without and taken in when it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.network import address_towards, interface_towards, is_here
from tests.support.elastic import Job
from tests.support.hosts import Hosts, why_no_hosts

STEPS = 100
MORE = (f"--loop.steps={STEPS}", "--checkpoint.every=10", "--loop.eval_every=0", "--parallel.silent_s=4")


@pytest.fixture
def hosts() -> None:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes start, and a busy machine takes a minute for each
@pytest.mark.usefixtures("hosts")
def test_a_killed_worker_starts_again_and_a_lost_machine_is_done_without_and_taken_in_again(
    tmp_path: Path,
) -> None:
    with Hosts(2) as hosts:
        job = Job(hosts, tmp_path, name="struck", nnodes="1:2", more=MORE)
        job.start()
        job.wait_for_steps(12, world_size=2, attempt=0)
        job.kill_rank(hosts[1])
        job.wait_for_steps(2, world_size=2, attempt=1)
        hosts[1].lose()
        job.wait_for_steps(2, world_size=1, attempt=2)
        job.pace(0.5)
        hosts[1].mend()
        job.start_agent(hosts[1])
        job.wait_for_steps(2, world_size=2, attempt=3)
        job.pace(0.0)
        job.wait_for_end()
        assert [attempt.world_size for attempt in job.attempts()] == [2, 2, 1, 2]
        assert "10.77.0.2 has not answered for 4 s" in job.said()
        # All samples once: each step is there once, at the position that its number says.
        assert job.tokens() == [8 * 32 * (step + 1) for step in range(STEPS)]


def test_a_machine_finds_the_address_that_others_reach_it_by() -> None:
    assert (address_towards("127.0.0.1"), interface_towards("127.0.0.1")) == ("127.0.0.1", None)
    assert is_here("127.0.0.1")
    assert address_towards("no-such-host.invalid") is None
    assert not is_here("no-such-host.invalid")

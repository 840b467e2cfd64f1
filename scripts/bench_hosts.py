"""Loses workers, hosts and links of a run on several machines: does it go on, how soon, is it the same?

    python scripts/bench_hosts.py [--trials 3] [--events "node lost"]

The machines are network namespaces (root is needed, and iproute2), each with an agent that
`harness/launch/torchrun.sh` starts, one gloo process and a tiny model. Every event strikes in the middle of
a run. It has to end as docs/operations.md promises, and to be the undisturbed run: bit for bit where the
world's size never changed, with the same samples in every step where it did. The results go to
docs/benchmarks/hosts.*.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import summarise, write_results  # noqa: E402  (the repository has to be on the path first)

from tests.support.elastic import STEP_S, Job  # noqa: E402
from tests.support.hosts import Host, Hosts, why_no_hosts  # noqa: E402

__all__ = ["EVENTS"]

STEPS = 120
MORE = (f"--loop.steps={STEPS}", "--checkpoint.every=10", "--loop.eval_every=0", "--loop.global_batch=12")
FIRST = 25
"""Steps before an event."""
FLAP_S = 6.0
JOURNAL = "trials.jsonl"


def worker_killed(job: Job, hosts: list[Host]) -> float:
    """The agents start all ranks again."""
    return _goes_on(job, hosts, lambda: job.kill_rank(hosts[-1]), world_size=len(hosts))


def agent_killed(job: Job, hosts: list[Host]) -> float:
    """Its rank ends with it; the others go on without."""
    return _goes_on(job, hosts, lambda: job.kill_agent(hosts[-1]), world_size=len(hosts) - 1)


def node_stopped(job: Job, hosts: list[Host]) -> float:
    """SIGTERM to an agent, as for a pre-emption: all save, the others go on without it."""
    seconds = _goes_on(job, hosts, lambda: job.agents[hosts[-1].name].terminate(), world_size=len(hosts) - 1)
    assert not _lost_steps(job)[-1], "a step was lost"
    return seconds


def node_lost(job: Job, hosts: list[Host]) -> float:
    """The others find out by themselves, and go on without it."""
    return _goes_on(job, hosts, hosts[-1].lose, world_size=len(hosts) - 1)


def first_rank_lost(job: Job, hosts: list[Host]) -> float:
    """The same of the host with rank 0, which is not the one that holds the agents' store."""
    return _goes_on(job, hosts, hosts[0].lose, world_size=len(hosts) - 1)


def node_back(job: Job, hosts: list[Host]) -> float:
    """A host that was lost comes back, and is taken in."""
    _lose_for_good(job, hosts, hosts[-1].lose)
    hosts[-1].mend()
    seconds = _goes_on(job, hosts, lambda: job.start_agent(hosts[-1]), world_size=len(hosts), began=True)
    assert not _lost_steps(job)[-1], "a step was lost as the host came back"
    return seconds


def link_cut(job: Job, hosts: list[Host]) -> float:
    """A host is cut off and lives: its rank and its agent end, the others go on without it."""

    def cut_off() -> None:
        hosts[-1].cut()
        began = time.time()
        job.wait(lambda: not hosts[-1].pids(), "the end of all that is cut off", timeout_s=120.0)
        print(f"   the cut-off host's processes ended after {time.time() - began:.1f} s", flush=True)

    return _goes_on(job, hosts, cut_off, world_size=len(hosts) - 1)


def link_flaps(job: Job, hosts: list[Host]) -> float:
    """Nothing comes through for some seconds: the run waits, and goes on without a restart."""
    job.start()
    job.wait_for_steps(FIRST, world_size=len(hosts), attempt=0)
    began = time.time()
    hosts[-1].cut()
    time.sleep(FLAP_S)
    hosts[-1].mend()
    attempts = job.attempts()
    job.wait_for_steps(len(attempts[-1].steps) + 5, world_size=len(hosts), attempt=len(attempts) - 1)
    seconds = time.time() - began
    job.wait_for_end()
    assert len(job.attempts()) == len(attempts), "it was started again"
    return seconds


def rendezvous_lost(job: Job, hosts: list[Host]) -> float:
    """All others end; what has started the job starts it again, and it goes on from the last checkpoint."""
    job.start()
    job.wait_for_steps(FIRST, world_size=len(hosts), attempt=0)
    hosts[0].lose()
    began, others = time.time(), hosts[1:]
    job.wait(lambda: not any(host.pids() for host in others), "the end of the others")
    seconds = time.time() - began
    assert all(job.agents[host.name].returncode for host in others)
    hosts[0].mend()
    job.start()
    job.wait_for_end()
    return seconds


def _goes_on(
    job: Job, hosts: list[Host], event: Callable[[], object], *, world_size: int, began: bool = False
) -> float:
    """An event after which the run goes on at this size of the world; the seconds until it does."""
    if not began:
        job.start()
        job.wait_for_steps(FIRST, world_size=len(hosts), attempt=0)
    attempts = len(job.attempts())
    time_s = time.time()
    event()
    again = job.wait_for_steps(5, world_size=world_size, attempt=attempts)
    job.pace(STEP_S)
    job.wait_for_end(*(host for host in hosts if job.agents[host.name].poll() in (None, 0) and host.pids()))
    return again - time_s


def _lose_for_good(job: Job, hosts: list[Host], event: Callable[[], object]) -> None:
    """Until the others have gone on without one of them."""
    job.start()
    job.wait_for_steps(FIRST, world_size=len(hosts), attempt=0)
    attempts = len(job.attempts())
    event()
    job.wait_for_steps(10, world_size=len(hosts) - 1, attempt=attempts)
    job.pace(1.0)  # else the run might end before the host is back


def _lost_steps(job: Job) -> list[int]:
    """How many steps were done again in each attempt but the first."""
    attempts = [attempt.steps for attempt in job.attempts()]
    return [max(one) + 1 - min(other) for one, other in itertools.pairwise(attempts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happens to a run: `strikes` returns the seconds until it goes on, or all have ended."""

    strikes: Callable[[Job, list[Host]], float]
    num_hosts: int
    at_least: int
    """Hosts that it goes on with: MIN of --nnodes."""
    rendezvous: int = 0
    """The host that holds the agents' store."""

    def run(self, folder: Path, name: str) -> tuple[Job, float]:
        with Hosts(self.num_hosts) as hosts:
            job = Job(
                hosts,
                folder,
                name=name,
                nnodes=f"{self.at_least}:{self.num_hosts}",
                more=MORE,
                rendezvous=hosts[self.rendezvous],
            )
            return job, self.strikes(job, hosts)


EVENTS = {
    "worker killed, 2 hosts": Event(strikes=worker_killed, num_hosts=2, at_least=2),
    "worker killed, 3 hosts": Event(strikes=worker_killed, num_hosts=3, at_least=2),
    "agent killed, 2 hosts": Event(strikes=agent_killed, num_hosts=2, at_least=1),
    "agent killed, 3 hosts": Event(strikes=agent_killed, num_hosts=3, at_least=2),
    "node stopped, 2 hosts": Event(strikes=node_stopped, num_hosts=2, at_least=1),
    "node lost, 2 hosts": Event(strikes=node_lost, num_hosts=2, at_least=1),
    "node lost, 3 hosts": Event(strikes=node_lost, num_hosts=3, at_least=2),
    "first rank's node lost, 3 hosts": Event(strikes=first_rank_lost, num_hosts=3, at_least=2, rendezvous=2),
    "node back, 2 hosts": Event(strikes=node_back, num_hosts=2, at_least=1),
    "node back, 3 hosts": Event(strikes=node_back, num_hosts=3, at_least=2),
    "link cut, 2 hosts": Event(strikes=link_cut, num_hosts=2, at_least=1),
    "link cut, 3 hosts": Event(strikes=link_cut, num_hosts=3, at_least=2),
    "link flaps for 6 s, 2 hosts": Event(strikes=link_flaps, num_hosts=2, at_least=1),
    "rendezvous host lost, 2 hosts": Event(strikes=rendezvous_lost, num_hosts=2, at_least=1),
    "rendezvous host lost, 3 hosts": Event(strikes=rendezvous_lost, num_hosts=3, at_least=2),
}


def whole_run(folder: Path, num_hosts: int) -> Job:
    """The run on so many hosts that nothing happens to."""
    with Hosts(num_hosts) as hosts:
        job = Job(hosts, folder, name=f"whole-{num_hosts}", nnodes=str(num_hosts), more=MORE)
        if not (job.run_dir / "summary.json").exists():
            job.start()
            job.wait_for_end()
        return job


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--events", nargs="*", default=list(EVENTS), help="those whose name begins so")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs there, and go on with its trials next time"
    )
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts have to go too
    reason = why_no_hosts()
    if reason is not None:
        sys.exit(reason)
    chosen = {name: event for name, event in EVENTS.items() if name.startswith(tuple(options.events))}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = options.folder or Path(temporary)
        whole = {count: whole_run(folder, count) for count in {event.num_hosts for event in chosen.values()}}
        for number in range(options.trials):
            for name, event in chosen.items():
                _try(name, event, folder, whole[event.num_hosts], number)
        if not options.dry:
            write_results("hosts", _rows(folder), device=torch.device("cpu"), about={"steps": STEPS})


def _try(name: str, event: Event, folder: Path, whole: Job, number: int) -> None:
    """One trial, and a line of the folder's journal that says how it went."""
    outcome: dict[str, object] = {"event": name}
    try:
        job, seconds = event.run(folder, f"{name.replace(' ', '-').replace(',', '')}-{time.time():.0f}")
        bitwise = all(attempt.world_size == event.num_hosts for attempt in job.attempts())
        job.assert_same_run(whole, bitwise=bitwise)
        outcome |= {"seconds": seconds, "equal": "bitwise" if bitwise else "same samples"}
    except AssertionError:
        print(traceback.format_exc(), flush=True)
    print(f"{name} {number}: {outcome}", flush=True)
    with (folder / JOURNAL).open("a") as journal:
        journal.write(json.dumps(outcome) + "\n")


def _rows(folder: Path) -> dict[str, dict[str, object]]:
    outcomes = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    rows: dict[str, dict[str, object]] = {}
    for name in EVENTS:
        tried = [outcome for outcome in outcomes if outcome["event"] == name]
        seconds = [outcome["seconds"] for outcome in tried if "seconds" in outcome]
        if tried:
            rows[name] = {
                "trials": len(tried),
                "as promised": len(seconds),
                "equal": next((outcome["equal"] for outcome in tried if "equal" in outcome), None),
                "p50 s": summarise(seconds)["p50"] if seconds else None,
                "max s": max(seconds, default=None),
            }
    return rows


if __name__ == "__main__":
    main()

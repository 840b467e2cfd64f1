"""Runs a step of a run again and finds out what went wrong in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harness.checkpoint.read_only import committed
from harness.checkpoint.store import Saved
from harness.data.seeding import own_generators
from harness.errors import CheckpointError, HarnessError, ReplayError
from harness.records import StepRecord
from harness.replay.arms import Arm, run_arms
from harness.replay.cause import Cause, find_causes, find_unwritten
from harness.replay.compare import Difference, Parting, Passed, differences, parting
from harness.replay.history import History, read_history
from harness.replay.judgement import (
    Judgement,
    has_diverged,
    judge_cause,
    judge_sound,
    judge_spike,
    judge_sum,
    judge_update,
)
from harness.replay.probe import Probe
from harness.replay.ranks import MicroBatch, Played, RanksInTurn
from harness.replay.remembered import Remembered
from harness.replay.spike import Carriers, find_carriers
from harness.runlog.paths import checkpoints_dir
from harness.training.build import set_determinism
from harness.training.precision import resolved_precision

__all__ = ["Replay", "replay"]

logger = logging.getLogger(__name__)
_faults_logger = logging.getLogger("harness.training.faults")

MOST_UNASKED = 200
"""Steps times ranks that are run again from the beginning of a run without being asked for."""


@dataclass(kw_only=True)
class Replay:
    """What came of a replay."""

    directory: Path
    history: History
    started_from: int
    """Completed steps of the checkpoint that it began with; 0: the beginning of the run."""
    way: list[Passed]
    """The steps before."""
    played: Played
    """The step itself."""
    parting: Parting
    differences: list[Difference]
    """Where the step is not what it was in the run."""
    causes: list[Cause] = field(default_factory=list)
    """Of a step that is not finite: each bad micro-batch."""
    arms: list[Arm] = field(default_factory=list)
    """Variations of the first of them."""
    judgement: Judgement | None = None
    carriers: Carriers | None = None
    """Of a spike."""
    remembered: Remembered = field(default_factory=Remembered)
    """What the ranks remembered, compared with the steps on the way."""
    notes: list[str] = field(default_factory=list)
    """What is not as it was in the run: device, versions."""

    @property
    def record(self) -> StepRecord:
        """The step as it was replayed."""
        return self.played.record

    @property
    def diverged(self) -> str:
        """How losses or norms had grown up to the step, in words; empty: they had not."""
        series = []
        for name, by_step in self.history.values.items():
            before = [v for at, v in sorted(by_step.items()) if at < self.history.step and math.isfinite(v)]
            now = by_step.get(self.history.step, math.nan)
            series.append((name, [*before, now if math.isfinite(now) else math.inf]))
        return has_diverged(series)

    @property
    def reproduced(self) -> bool:
        """Whether the step is what it was in the run."""
        return not self.differences


def replay(
    directory: str | Path,
    step: int | None = None,
    *,
    steps_before: int = 0,
    device: str = "auto",
    from_start: bool = False,
    say: Callable[[str], None] = logger.info,
    inspect: Callable[[Replay, RanksInTurn], None] | None = None,
) -> Replay:
    """Runs a step of a run again, all its ranks in turn in this process. Changes nothing in the run.

    Args:
        directory: The run's.
        step: None: that of the run's last incident.
        steps_before: At least so many steps before it are run again too, where a checkpoint allows.
        device: auto, cpu or cuda; auto: as the run.
        from_start: Where no checkpoint from before the step is left, begin at the beginning of the run,
            however many steps that are; otherwise that is an error if they are many.
        say: Called with how far it is, before the first step.
        inspect: Called at the end, while everything is there, with the weights from before the step.

    Raises:
        TrackingError, ReplayError: there is no such run or no such step, or it is too far from anything to
            begin with.
        CheckpointError: the checkpoint is damaged, or does not fit the model as its code is now.
        HarnessError: the task, its data or its code cannot be had here.
    """
    directory = Path(directory)
    history = read_history(directory, step)
    with _as_in_run(history), own_generators():
        ranks = _ranks(history, device)
        saved = _restored(ranks, directory, history, steps_before)
        say(_distance(history, saved, from_start=from_start))
        remembered = Remembered.of_incident(directory, history.step, world_size=history.world_size)
        way, before = _play_up_to(ranks, history, saved, remembered)
        earlier = ranks.passes
        remembered.compare_begin(history.step, ranks.position, ranks.rng)
        played = ranks.play(apply=False)
        result = Replay(
            directory=directory,
            history=history,
            started_from=0 if saved is None else saved.step,
            way=way,
            played=played,
            parting=parting(history, way),
            differences=differences(history, played.record, ranks.samples_of),
            notes=_notes(history, ranks),
            remembered=remembered,
        )
        _explain(result, Probe(ranks), earlier, before)
        if inspect is not None:
            inspect(result, ranks)
    return result


def _explain(result: Replay, probe: Probe, earlier: Sequence[MicroBatch], before: StepRecord | None) -> None:
    """Finds out what is wrong with the step, if anything is."""
    record, passes = result.record, result.played.micro_batches
    bad_ranks = [
        row.rank for row in record.per_rank if row.num_nan or row.num_inf or not math.isfinite(row.loss)
    ]
    is_large = record.is_spike or record.is_outlier or record.skipped
    incident = result.history.incident
    if bad_ranks:
        result.causes = find_causes(probe, passes, bad_ranks=bad_ranks, earlier=earlier)
        first = next((one for one in result.causes if not one.only_together), None)
        if first is not None:
            culprit = next(p for p in passes if (p.rank, p.number) == (first.rank, first.micro_batch))
            result.arms = run_arms(probe, culprit, has_attention=bool(first.attention_logits))
            result.judgement = judge_cause(first, result.arms, diverged=result.diverged)
        else:
            unwritten = _again(result, probe, bad_ranks[0])
            result.judgement = judge_sum(unwritten, result.arms, reproduced=result.reproduced)
    elif record.undone:
        result.judgement = judge_update()
    elif incident is not None and not (is_large and result.reproduced):
        unwritten = _again(result, probe, incident.rank)
        result.judgement = judge_sound(unwritten, way=result.parting, notes=result.notes, arms=result.arms)
    elif is_large:
        try:
            result.carriers = find_carriers(probe, passes, record, before)
        except (HarnessError, RuntimeError) as error:  # batch normalisation takes no single sample, say
            problem = str(error).splitlines()[0]
            result.notes.append(f"the samples cannot be run by themselves: {problem}")
            return
        largest = result.carriers.samples[0]
        culprit = next(p for p in passes if (p.rank, p.number) == (largest.rank, largest.micro_batch))
        result.arms = run_arms(probe, culprit, has_attention=False)
        result.judgement = judge_spike(result.carriers, result.arms, diverged=result.diverged)


def _again(result: Replay, probe: Probe, rank: int | None) -> list[Cause]:
    """Runs micro-batches (of `rank`; None: of all) that are in order in the replay several times; those that
    are bad where memory that nobody has written holds NaN."""
    incident, passes = result.history.incident, result.played.micro_batches
    number = None if incident is None else incident.micro_batch
    of_rank = [one for one in passes if rank in (None, one.rank)] or passes
    unwritten = find_unwritten(probe, of_rank)
    result.causes += unwritten
    culprit = next((one for one in of_rank if one.number == number), of_rank[0])
    result.arms = run_arms(probe, culprit, has_attention=False)
    return unwritten


def _ranks(history: History, device: str) -> RanksInTurn:
    config = history.config
    config.check_world(history.world_size, may_be_uneven=True)
    chosen = _device(history, device)
    faults = [fault for fault in config.faults if not history.was_visited_before(fault.step)]
    precision = history.about.get("precision")
    world = RanksInTurn.world_of(0, history.world_size, chosen)
    return RanksInTurn(
        config,
        world_size=history.world_size,
        device=chosen,
        precision=str(precision) if precision else resolved_precision(config, world.device),
        schedule_steps=int(history.about.get("schedule_steps") or 0),
        faults=faults,
    )


def _device(history: History, wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = str(history.about.get("device", "cpu")).partition(":")[0]
        wanted = wanted if wanted != "cuda" or torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ReplayError("--device is 'cuda' and torch sees no CUDA device", remedy="leave --device out")
    return torch.device(wanted)


def _notes(history: History, ranks: RanksInTurn) -> list[str]:
    notes = [
        f"the log's incident ({kind}) is of the machines, and not replayed" for kind in history.unplayable
    ]
    device = str(history.about.get("device", "")).partition(":")[0]
    if device and device != ranks.device.type:
        notes.append(f"the run computed on {device}, the replay on {ranks.device.type}")
    versions = history.about.get("versions", {})
    if isinstance(versions, dict) and versions.get("torch", torch.__version__) != torch.__version__:
        notes.append(f"the run used torch {versions['torch']}, the replay {torch.__version__}")
    data = history.about.get("data", {})
    for part, known in data.items() if isinstance(data, dict) else ():
        now = ranks.fingerprints.get(part)
        if now != known:
            notes.append(f"the {part} data was {known} in the run, and is {now or 'missing'} in the replay")
    parallel = history.config.parallel
    if "bf16" in (parallel.param_dtype, parallel.reduce_dtype):
        notes.append(
            "FSDP2 gathered parameters (and with them the residual stream) or reduced gradients in bf16,"
            " the replay holds them in fp32"
        )
    if history.config.callbacks:
        notes.append(f"callbacks are not called: {', '.join(history.config.callbacks)}")
    return notes


def _restored(ranks: RanksInTurn, directory: Path, history: History, steps_before: int) -> Saved | None:
    """The checkpoint that was loaded; None: the run begins anew, which needs none."""
    saved = committed(checkpoints_dir(directory))
    wanted = max(0, history.step - steps_before)
    reachable = [one for one in reversed(saved) if one.step <= history.step]
    candidates = [one for one in reachable if one.step <= wanted] or reachable[-1:]
    problems = []
    for one in candidates:
        try:
            if one.manifest().created < history.until:
                ranks.load(one)
                return one
        except CheckpointError as error:
            problems.append(error)
            logger.warning("%s: %s", one.path.name, error)
    if problems and len(problems) == len(candidates):
        raise problems[0]
    return None


def _distance(history: History, saved: Saved | None, *, from_start: bool) -> str:
    """What has to be run again, in words."""
    num_steps, num_ranks = history.step + 1 - (0 if saved is None else saved.step), history.world_size
    if saved is None and num_steps * num_ranks > MOST_UNASKED and not from_start:
        raise ReplayError(
            f"no checkpoint from before step {history.step} is left",
            rule=f"the {num_steps} steps x {num_ranks} ranks from the beginning of the run on are run again"
            " only if that is asked for",
            remedy="--from-start does it; checkpoint.keep_every and keep_last keep more checkpoints",
        )
    begin = "the beginning of the run" if saved is None else f"checkpoint {saved.path.name}"
    return f"from {begin}, {num_steps} steps x {num_ranks} ranks"


def _play_up_to(
    ranks: RanksInTurn, history: History, saved: Saved | None, remembered: Remembered
) -> tuple[list[Passed], StepRecord | None]:
    """The steps before the one that is asked for, and the record of the last of them."""
    saved_at = 0.0 if saved is None else saved.manifest().created
    skips = history.skipped_samples(first=ranks.step, saved_at=saved_at)
    way: list[Passed] = []
    record: StepRecord | None = None
    while True:
        ranks.skip(skips.get(ranks.step, 0))
        if ranks.step >= history.step:
            return way, record
        remembered.compare_begin(ranks.step, ranks.position, ranks.rng)
        record = ranks.play().record
        remembered.compare_end(record)
        way.append(Passed(record.step, record.loss, record.grad_norm))


@contextmanager
def _as_in_run(history: History) -> Iterator[None]:
    """Threads and algorithms as the run had them, and afterwards as they were."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    of_run = history.about.get("threads") or history.config.parallel.threads
    if of_run:
        torch.set_num_threads(int(of_run))
    set_determinism(history.config)
    level = _faults_logger.level
    _faults_logger.setLevel(logging.CRITICAL)  # they strike once more in each of many passes
    try:
        yield
    finally:
        _faults_logger.setLevel(level)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark

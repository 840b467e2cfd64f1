"""Puts a run together. The only place that knows all the parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from harness import env, logs
from harness.checkpoint import Checkpointer, Rng
from harness.config import TrainConfig
from harness.data import Loader, Shares, Task, num_signs, seed_everything
from harness.dist import (
    UnusedParameters,
    World,
    distribute,
    from_main,
    keep_flight_records,
    open_world,
    plain,
    report_once,
    time_collectives,
    use_threads,
)
from harness.errors import HarnessError
from harness.parent import missing_settings
from harness.runlog.paths import checkpoints_dir, faults_dir, incidents_dir
from harness.stability import Ladder, StepGuard
from harness.stop import StopRequest
from harness.training.black_box import BlackBox, open_black_box
from harness.training.callbacks import Callback, Callbacks
from harness.training.counters import Counters
from harness.training.debug import Debugger, debugging, with_every_check
from harness.training.directory import prepare_directory
from harness.training.end import Start, end_run, judge_restart, note_hang
from harness.training.faults import FaultInjector
from harness.training.inputs import Inputs, agreed_inputs
from harness.training.journal import Journal
from harness.training.loop import Run, train_loop
from harness.training.micro_batch import keep_micro_batch
from harness.training.opening import Attempt, open_journal
from harness.training.optim import build_optimizers
from harness.training.parts import PartLosses
from harness.training.precision import resolved_precision
from harness.training.progress import Progress
from harness.training.recompute import RecomputeCheck
from harness.training.rerun import Rerunner
from harness.training.rollback import roll_back
from harness.training.schedule import describe_schedule
from harness.training.silent import RunChecks
from harness.training.step import MicroBatchGuard, StepRunner
from harness.training.straggler import Stragglers
from harness.training.summary import Ending, TrainResult
from harness.training.timer import StepTimer
from harness.training.watchdog import Watchdog

__all__ = ["build_loader", "build_run", "build_runner", "set_determinism", "train"]

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[HarnessError], None] | None = None,
    stop: StopRequest | None = None,
    begun: float | None = None,
) -> TrainResult:
    """Runs the training that `config` describes, in the processes that the launcher started.

    Args:
        callbacks: Called at set points of the loop, after those that `config.callbacks` names; the same on
            all ranks.
        tell: Where there are several, called on the rank that prints an error before any of them leaves.
        stop: Where the caller handles signals; default: they are handled here, in the main thread.
        begun: When the program that trains was started, by `time.monotonic()`; default: now.

    Raises:
        HarnessError: whatever is wrong with configuration, launch or data, before anything is written; or
            `InstabilityError` when the guard's last rung is reached.
    """
    begun = time.monotonic() if begun is None else begun
    # Where machines may go and come, a number of ranks that fits badly is better than none.
    config.check_world(env.launched().world_size, may_be_uneven=env.is_restartable())
    if config.debug:
        config = with_every_check(config)
    with (
        StopRequest() if stop is None else nullcontext(stop) as stopping,
        open_world(config.parallel, stopping=lambda: stopping.requested) as world,
        debugging(config.debug),
    ):
        logs.setup(rank=world.rank, world_size=world.world_size)
        local_world_size = env.launched().local_world_size
        logger.info("%s", use_threads(config.parallel.threads, local_world_size=local_world_size))
        missing = missing_settings() if world.is_main else []
        if missing:
            logger.warning(
                "torchrun was started without %s, which the files of `harness launch` set: a machine that"
                " comes back is not taken in, or one that is lost is waited for longer",
                " and ".join(missing),
            )
        set_determinism(config)
        with Watchdog(config, begun=begun) as watchdog:
            return _train(config, world, stopping, callbacks, tell, watchdog)


def _train(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    callbacks: Sequence[Callback],
    tell: Callable[[HarnessError], None] | None,
    watchdog: Watchdog,
) -> TrainResult:
    """The run, and an end that is written down however it comes."""
    with report_once(tell), watchdog.naming_who_hangs():
        run = build_run(config, world, stop, callbacks, watchdog.progress)
    start, ending, error = Start.of(run), Ending(status="finished"), None
    watchdog.note_end = (run.black_box.end_hung, lambda hang: note_hang(run, hang, start))
    watchdog.progress.signs_of_life = lambda: num_signs() + run.checkpointer.written_bytes
    if world.device.type == "cuda":
        keep_flight_records(incidents_dir(run.directory))
    try:
        if run.counters.step >= run.config.loop.steps:
            run.journal.say(f"nothing to do: {run.counters.step} steps are done; raise --loop.steps to go on")
        # Before anything is closed, which may take one rank longer than another.
        with report_once(tell):
            try:
                with watchdog.naming_who_hangs():
                    ending = train_loop(run)
            except HarnessError as failure:
                judge_restart(failure, run.counters.step > start.step)
                raise
            finally:
                run.journal.leave_terminal()
    except BaseException as failure:  # noqa: BLE001  (raised again, once the run has been ended)
        error = failure
    return end_run(run, ending, error, start)


def build_run(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> Run:
    """Makes all parts of a run and restores its newest checkpoint; whatever fails, fails on every rank."""
    progress = progress or Progress()
    precision = resolved_precision(config, world.device)
    inputs = agreed_inputs(config, world)
    directory, steps_before = from_main(lambda: prepare_directory(config, inputs.task))
    config, micro_batch_before = keep_micro_batch(config, world, directory)
    model = _distributed(config, world, inputs)
    stepped = _optimizers(config, model)
    timer, recompute = _timer(model, world), RecomputeCheck(config.incidents.recompute_every)
    held, parts = [*stepped.values()], PartLosses(inputs.task.parts)
    guard = StepGuard.from_config(model, held, config.guard, precision=precision, checks=[recompute, parts])
    guard.when_local_done(timer.local_done)
    loader = build_loader(config, world, inputs.task, inputs.fingerprints, inputs.quarantined)
    counters = Counters()
    ladder = Ladder(config.guard, rollback=lambda record: roll_back(run, record))
    called = Callbacks([*inputs.callbacks, *callbacks])
    checkpointer = _checkpointer(config, directory)
    saved = {
        "model": plain(model),
        **stepped,
        "loader": loader,
        "guard": guard,
        "ladder": ladder,
        "counters": counters,
        "callbacks": called,
        "rng": Rng(),
    }
    # Each rank draws its own dropout; initialisation, above, was the same on all.
    seed_everything(config.seed + 1 + world.rank)
    resumed_from = checkpointer.load(saved)
    _begin_at(counters.step, directory, inputs.faults, progress)
    schedule = _settle_schedule(config, counters, steps_before=steps_before)
    attempt = Attempt(counters, resumed_from, schedule, loader, precision, micro_batch_before)
    runner = build_runner(config, world, inputs.task, model, guard, inputs.faults, precision, progress, timer)
    runner = replace(runner, recompute=recompute, note_loss=parts.add)
    black_box = open_black_box(config, world, progress, directory, loader, inputs.task.train_data)
    # Last of what can fail: from here on somebody has to close it.
    journal = open_journal(config, world, directory, inputs, attempt, progress)
    called.own = _own_callbacks(config, world, journal, runner, black_box)
    run = Run(
        config=config,
        world=world,
        directory=directory,
        task=inputs.task,
        model=model,
        optimizers=held,
        loader=loader,
        runner=runner,
        guard=guard,
        ladder=ladder,
        checkpointer=checkpointer,
        saved=saved,
        counters=counters,
        saved_step=-1 if resumed_from is None else counters.step,
        journal=journal,
        stop=stop,
        precision=precision,
        schedule_steps=counters.schedule_steps,
        callbacks=called,
        progress=progress,
        black_box=black_box,
    )
    return run


def _begin_at(step: int, directory: Path, faults: FaultInjector, progress: Progress) -> None:
    progress.resume(step)
    faults.begin_at(step, faults_dir(directory))


def _distributed(config: TrainConfig, world: World, inputs: Inputs) -> nn.Module:
    """What was put off of the model's initialisation is made up for once it is sharded."""
    model = inputs.task.model
    return distribute(model, config.parallel, world, loop=config.loop, deferred=inputs.deferred)


def _timer(model: nn.Module, world: World) -> StepTimer:
    timer = StepTimer(world.device)
    time_collectives(model, timer.waited)
    return timer


def _optimizers(config: TrainConfig, model: nn.Module) -> dict[str, Optimizer]:
    is_sharded = config.parallel.strategy == "fsdp"
    return build_optimizers(model, config.optim, config.muon, is_sharded=is_sharded)


def _own_callbacks(
    config: TrainConfig, world: World, journal: Journal, runner: StepRunner, black_box: BlackBox
) -> list[Callback]:
    return [
        *([Rerunner(config, runner, black_box)] if config.incidents.rerun == "on" else []),
        journal,
        black_box,
        Stragglers(config.straggler, world, journal),
        *([RunChecks(config, journal)] if config.guard.silent_errors == "on" else []),
        *([Debugger()] if config.debug else []),
    ]


def _checkpointer(config: TrainConfig, directory: Path) -> Checkpointer:
    folder = checkpoints_dir(directory)
    return Checkpointer.from_config(folder, config.checkpoint, timeout_s=config.parallel.timeout_s)


def _settle_schedule(config: TrainConfig, counters: Counters, *, steps_before: int) -> str:
    """Notes the length of the learning-rate schedule for good, and tells what it means for this attempt."""
    length_before = counters.schedule_steps or steps_before
    if counters.step == 0:
        length_before = config.schedule.steps or config.loop.steps
    counters.schedule_steps = config.schedule.steps or length_before
    return describe_schedule(
        config, step=counters.step, length=counters.schedule_steps, length_before=length_before
    )


def build_runner(
    config: TrainConfig,
    world: World,
    task: Task,
    model: nn.Module,
    guard: MicroBatchGuard,
    faults: FaultInjector,
    precision: str,
    progress: Progress,
    timer: StepTimer | None = None,
) -> StepRunner:
    """What runs forward and backward passes of this rank."""
    return StepRunner(
        model=model,
        task=task,
        guard=guard,
        faults=faults,
        unused=UnusedParameters(model),
        device=world.device,
        precision=precision,
        world_size=world.world_size,
        progress=progress,
        timer=timer or StepTimer(world.device),
        nominal_tokens=config.loop.global_batch * task.tokens_per_sample,
        num_passes=_shares(config, world).num_passes,
    )


def _shares(config: TrainConfig, world: World) -> Shares:
    return Shares.of(config.loop.global_batch, world.world_size, at_most=config.loop.micro_batch)


def build_loader(
    config: TrainConfig,
    world: World,
    task: Task,
    fingerprints: Mapping[str, str],
    quarantined: Sequence[int],
) -> Loader:
    """The loader of this rank's share of the training data, without the samples of `find_quarantined`."""
    return Loader(
        task.train_data,
        global_batch=config.loop.global_batch,
        micro_batch=config.loop.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        pin_memory=world.device.type == "cuda",
        fingerprints=fingerprints,
        allow_change=config.data.allow_change,
        pinned=tuple(task.pinned),
        quarantined=quarantined,
    )


def set_determinism(config: TrainConfig) -> None:
    """Lets torch choose among all algorithms, or among deterministic ones only."""
    if config.deterministic:
        env.set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic

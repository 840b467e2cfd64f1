"""The run's own account of itself: every record goes to the log, and what people need to see to the terminal.

Ranks other than 0 hold a silent one, so that the loop reads the same on every rank.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harness.checkpoint import SaveOutcome
from harness.config import TrainConfig, to_dict
from harness.data import source_of
from harness.records import Finding, StepRecord
from harness.runlog import events
from harness.runlog.ledger import Ledger, newest_ledger
from harness.runlog.names import Metric, Prefix
from harness.stability import Incident
from harness.stability.rank_table import rank_column, rank_columns
from harness.tracking import MirrorSettings, start_sampler
from harness.tracking.boundary import Complaints, harmless
from harness.tracking.histograms import histograms
from harness.tracking.recorder import Recorder, tensors_of
from harness.tracking.saved_event import saved_event
from harness.training.callbacks import Callback, Rollback, Training
from harness.training.console import Console
from harness.training.counters import Counters, incident_kind
from harness.training.ledger import LedgerKeeper
from harness.training.progress import Progress
from harness.training.summary import Ending
from harness.training.utilisation import Utilisation

__all__ = ["Journal", "MainJournal", "NodeJournal", "rank_values", "ranks_are_due"]

logger = logging.getLogger(__name__)

MOST_RANKS_EACH_STEP = 512
"""Whose numbers, some 70 bytes of each, the log takes in every step; those of more ranks in incidents and in
every `tracking.log_every`-th step."""


def _nothing(journal: object) -> None:
    return None


def _no_samples(journal: object) -> Sequence[int]:
    return ()


class Journal(Callback):
    """Says nothing; what every rank but 0 has."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Further numbers of a step, by the names that log and mirrors show."""

    def histograms(self, step: int, model: nn.Module) -> None:
        """How gradients and parameters are distributed; synchronises rank 0 with its device."""

    def event(self, what: events.LoggedEvent, step: int) -> None:
        """Something that happened."""

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""

    def leave_terminal(self) -> None:
        """Ends the line of progress: what comes next is somebody else's."""

    def close(self, ending: Ending, *, hangs: bool = False) -> None:
        """The end of this attempt. The side process is told, and not waited for.

        Args:
            hangs: The training thread is where it will be for ever; this is another one.
        """


class NodeJournal(Journal):
    """Samples a node on which rank 0 is not: processor, memory, GPUs; one rank of it."""

    def __init__(self, directory: Path, config: TrainConfig) -> None:
        self._sampler = start_sampler(directory, MirrorSettings.from_config(config))

    def close(self, ending: Ending, *, hangs: bool = False) -> None:
        self._sampler.leave()


class MainJournal(Journal):
    """Writes the log, follows it with mirrors, speaks to the terminal; rank 0.

    Once it is open nothing in it raises: rank 0 would leave the others waiting, for the sake of a record.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        *,
        first_step: int,
        about: Mapping[str, Any],
        utilisation: Utilisation | None,
        step_indices: Callable[[int, int | None, int | None], Sequence[int]],
        progress: Progress,
        wait_s: float = 0.0,
    ) -> None:
        """Opens the log and starts its mirrors.

        Args:
            step_indices: The loader's: which samples a step holds, by its first position.
            first_step: The step that comes next; what the log holds of it and later ones is abandoned.
            about: What to note about this attempt.
            wait_s: How long the process of an attempt before may still write.
            utilisation: At one token per second, where it is known.
            progress: What this rank is doing, of which the ledger is kept.
        """
        tracking = config.tracking
        self._complaints = Complaints()
        self._log = Recorder(directory, info={"config": to_dict(config), **about}, wait_s=wait_s)
        if first_step or self._log.attempt:  # a restart before the first checkpoint begins at 0 again
            self._log.rewind(first_step)
        # Read now, as another process may have written up to the moment at which the log was opened.
        self._ledger = LedgerKeeper(progress, _ledger_before(directory), self._write_ledger)
        self._log.start_mirrors(MirrorSettings.from_config(config))
        self._console = Console(tracking.progress, first_step=first_step, num_steps=config.loop.steps)
        self._every = tracking.log_every
        self._num_steps = config.loop.steps
        self._utilisation = utilisation
        self._step_indices = step_indices
        self._window_s = 0.0
        self._window_tokens = 0
        self._window_steps = 0

    @harmless(_nothing)
    def on_step(self, run: Training, record: StepRecord) -> None:
        self._ledger.count(record.step, is_skipped=record.skipped)
        in_flight = run.in_flight[record.step]
        lr = run.learning_rate(record.step)
        values = step_values(record, run.counters, lr=lr, step_s=in_flight.step_s) | dict(record.measured)
        if self._utilisation is not None:
            values[Metric.MFU_FRAC] = values[Metric.TOKENS_PER_S] * self._utilisation.mfu
            if self._utilisation.hfu != self._utilisation.mfu:
                values[Metric.HFU_FRAC] = values[Metric.TOKENS_PER_S] * self._utilisation.hfu
        self._log.write("step", values, step=record.step)
        num_ranks, is_notable = len(record.per_rank), record.reason is not None
        if ranks_are_due(num_ranks, record.step, every=self._every, is_notable=is_notable):
            self._log.write("ranks", rank_values(record), step=record.step)
        if record.per_parameter or record.sampled:
            self._log.write("layers", layer_values(record), step=record.step)
        samples_of = functools.partial(self._samples_of, in_flight.samples[0])
        named = functools.partial(source_of, run.task.train_data)
        incident = Incident.of(record, samples_of=samples_of, source_of=named, outliers=True)
        for finding in record.findings:
            self._log.write("event", finding_event(finding).to_values(), step=record.step)
        if incident is not None:
            if incident.is_outlier:
                self.say(incident.summary())  # of incidents the ladder speaks
            self._log.write("event", incident_event(incident, record).to_values(), step=record.step)
        self._show(record, values, in_flight.step_s)

    @harmless(_nothing)
    def _write_ledger(self, ledger: Ledger) -> None:
        self._log.write("ledger", ledger.to_values())

    @harmless(_no_samples)
    def _samples_of(self, first: int, rank: int | None, micro_batch: int | None) -> Sequence[int]:
        """An incident without its samples is one all the same."""
        return self._step_indices(first, rank, micro_batch)

    def _show(self, record: StepRecord, values: Mapping[str, float], step_s: float) -> None:
        self._window_s += step_s
        self._window_tokens += record.num_tokens
        self._window_steps += 1
        if (record.step + 1) % self._every and record.step + 1 != self._num_steps:
            return
        left_s = self._window_s / self._window_steps * (self._num_steps - record.step - 1)
        speed = self._window_tokens / max(self._window_s, 1e-9)
        self._console.step(record.step, values, tokens_per_s=speed, left_s=left_s)
        self._window_s, self._window_tokens, self._window_steps = 0.0, 0, 0

    @harmless(_nothing)
    def on_eval(self, run: Training, step: int, metrics: Mapping[str, float]) -> None:
        self._log.write("eval", metrics, step=step)
        shown = "  ".join(f"{name.removeprefix(Prefix.VAL)} {value:.4f}" for name, value in metrics.items())
        self._console.say(f"after {step + 1} steps: held-out {shown}")

    @harmless(_nothing)
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log.write("step", values, step=step)

    @harmless(_nothing)
    def histograms(self, step: int, model: nn.Module) -> None:
        self._log.write("histogram", histograms(tensors_of(model)), step=step)

    @harmless(_nothing)
    def on_saved(self, run: Training, outcome: SaveOutcome) -> None:
        last_step = max(0, outcome.step - 1)
        self._log.write("step", {Metric.CHECKPOINT_BLOCKED_S: outcome.blocked_s}, step=last_step)
        self.event(saved_event(outcome), last_step)

    @harmless(_nothing)
    def event(self, what: events.LoggedEvent, step: int) -> None:
        self._log.write("event", what.to_values(), step=step)

    @harmless(_nothing)
    def say(self, text: str) -> None:
        self._console.say(text)

    @harmless(_nothing)
    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        self._ledger.roll_back()
        self._log.rewind(rollback.step)
        record = rollback.record
        what = events.Rollback(
            failed_step=record.step, reason=record.reason, skipped_samples=rollback.skipped_samples
        )
        self.event(what, rollback.step)

    @harmless(_nothing)
    def leave_terminal(self) -> None:
        self._console.close()

    def close(self, ending: Ending, *, hangs: bool = False) -> None:
        self.leave_terminal()
        self._close_ledger(ending, hangs)
        self._close_log(ending)

    @harmless(_nothing)
    def _close_ledger(self, ending: Ending, hangs: bool) -> None:
        self._ledger.close(is_finished=ending.status == "finished", hangs=hangs)

    @harmless(_nothing)
    def _close_log(self, ending: Ending) -> None:
        about = {"reason": ending.reason, "rank": ending.rank}
        self._log.close(ending.status, {name: value for name, value in about.items() if value is not None})


def _ledger_before(directory: Path) -> Ledger | None:
    """The account of the attempts before; the log is open, so nothing is raised."""
    try:
        return newest_ledger(directory)
    except OSError as error:
        logger.warning("the account of the run's time begins anew: the one before cannot be read: %s", error)
        return None


def step_values(record: StepRecord, counters: Counters, *, lr: float, step_s: float) -> dict[str, float]:
    """A step's scalars under the names that log and mirrors show."""
    return {
        Metric.TRAIN_LOSS: record.loss,
        Metric.TRAIN_PERPLEXITY: math.exp(min(record.loss, 700.0)),
        Metric.TRAIN_ACCURACY: record.num_correct / record.num_tokens if record.num_tokens else 0.0,
        Metric.GRAD_NORM: record.grad_norm,
        Metric.GRAD_NORM_CLIPPED: record.grad_norm * record.clip_coef,
        Metric.CLIP_COEF: record.clip_coef,
        Metric.LR: lr,
        Metric.TOKENS: counters.tokens,
        Metric.NUM_NAN: record.num_nan,
        Metric.NUM_INF: record.num_inf,
        Metric.NUM_ZERO: record.num_zero,
        Metric.MAX_ABS: record.max_abs,
        Metric.SKIPS: counters.num_skips,
        Metric.CLIP_FRAC: counters.num_clips / (record.step + 1),
        Metric.LOSS_SCALE: record.loss_scale,
        Metric.SPIKE_SCORE: record.spike_score,
        Metric.STEP_S: step_s,
        Metric.DATA_WAIT_S: float(rank_column(record.per_rank, "data_wait_s").max(initial=0.0)),
        Metric.COMPUTE_S: float(rank_column(record.per_rank, "compute_s").max(initial=0.0)),
        Metric.TOKENS_PER_S: record.num_tokens / step_s if step_s else 0.0,
    }


def layer_values(record: StepRecord) -> dict[str, dict[str, float]]:
    """Statistics of each parameter and its gradient, by statistic and name."""
    rows = record.per_parameter.items()
    values = {
        "grad_norm": {name: row.grad_norm for name, row in rows},
        "max_abs": {name: row.max_abs for name, row in rows},
        "num_nonfinite": {name: float(row.num_nan + row.num_inf) for name, row in rows},
    }
    if record.sampled:
        samples = record.sampled.items()
        values["weight_norm"] = {name: sample.weight_norm for name, sample in samples}
        values["update_norm"] = {name: sample.update_norm for name, sample in samples}
        values["update_ratio"] = {name: s.update_ratio for name, s in samples if s.update_ratio is not None}
        values["underflow_frac"] = {name: sample.underflow_frac for name, sample in samples}
    if record.attention_logit_max:
        layers = enumerate(record.attention_logit_max)
        values["attention_logit_max"] = {f"layer {number}": largest for number, largest in layers}
    return values


def ranks_are_due(num_ranks: int, step: int, *, every: int, is_notable: bool = False) -> bool:
    """Whether the log takes what the ranks said of themselves in a step: of thousands, in some steps and in
    notable ones only; of a single one, of which the step's own numbers are, never.

    Args:
        every: `tracking.log_every`.
    """
    is_due = is_notable or num_ranks <= MOST_RANKS_EACH_STEP or (step + 1) % every == 0
    return num_ranks > 1 and is_due


def rank_values(record: StepRecord) -> dict[str, list[float]]:
    """What the ranks said of themselves, by quantity, in the order of the ranks."""
    return rank_columns(record.per_rank, "loss", "grad_norm", "compute_s", "data_wait_s")


def finding_event(finding: Finding) -> events.Finding:
    """What a check for silent errors has found, as the log keeps it."""
    return events.Finding(summary=finding.summary(), **dataclasses.asdict(finding))


def incident_event(incident: Incident, record: StepRecord) -> events.Incident:
    """An incident, or an outlier batch, as the log keeps it."""
    about = {field.name: getattr(incident, field.name) for field in dataclasses.fields(incident)}
    del about["step"]  # its record has that
    about["culprits"] = tuple(dataclasses.asdict(culprit) for culprit in incident.culprits)
    about |= {"summary": incident.summary(), "module": incident.module}
    about |= {"loss": record.loss, "grad_norm": record.grad_norm}
    if incident.is_outlier:
        return events.Outlier(kind="outlier batch", **about)
    return events.Incident(kind=incident_kind(record), **about)

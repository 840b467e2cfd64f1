"""What is kept of a run's incidents, in words; without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import TrackingError
from harness.records import ParameterRow, RankRow
from harness.runlog.incident_files import (
    REPLAY,
    STORY,
    IncidentFile,
    incident_steps,
    ranks_in,
    read_incident,
    read_rank,
)
from harness.runlog.paths import incident_dir, incident_step
from harness.tracking.text import number, printable, table

__all__ = ["incidents_table", "show_incident"]

_MOST_LISTED = 20
_MOST_PARAMETERS = 12
_MOST_RANKS = 16
_MOST_SAMPLES = 16
_LONGEST = 1000


def incidents_table(run_dir: Path) -> str:
    """The incidents of which a folder is kept, the newest last; empty if there is none."""
    steps = incident_steps(run_dir)
    rows = [_row(run_dir, step) for step in steps[-_MOST_LISTED:]]
    more = f"\n({len(steps) - _MOST_LISTED} earlier ones are left out)" if len(steps) > _MOST_LISTED else ""
    return (
        table(["kept of step", "kind", "rank", "parameter", "replayed", "folder"], rows) + more
        if rows
        else ""
    )


def show_incident(run_dir: Path, step: int) -> str:
    """What is kept of the incident of a step, in words. For `harness show RUN --incident STEP`.

    Raises:
        TrackingError: nothing is, or it is damaged.
    """
    folder = incident_dir(run_dir, step)
    steps = incident_steps(run_dir)
    if step not in steps:
        kept = ", ".join(map(str, steps[-_MOST_LISTED:])) or "none"
        raise TrackingError(
            f"nothing is kept of step {step} of {run_dir}",
            rule=f"incidents leave a folder; kept are those of the steps {kept}",
            remedy="look at `harness show` for what the log says of it",
        )
    what = read_incident(folder)
    parts = [
        _heading(what, folder),
        _samples(what),
        _parameters(what),
        _ranks(what.per_rank),
        _rerun(folder),
        _files(folder),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(run_dir: Path, step: int) -> list[str]:
    folder = incident_dir(run_dir, step)
    replayed = "yes" if (folder / REPLAY).exists() else ""
    try:
        what = read_incident(folder)
    except TrackingError:
        return [str(step), "not read", "", "", replayed, f"incidents/{folder.name}"]
    rank = "" if what.rank is None else str(what.rank)
    return [str(step), what.kind, rank, what.parameter or "", replayed, f"incidents/{folder.name}"]


def _heading(what: IncidentFile, folder: Path) -> str:
    facts = {
        "folder": str(folder),
        "kind": what.kind,
        "verdict": what.verdict or "none: the step did not come to one",
        "culprit": _culprit(what),
        "loss": number(what.loss) if what.loss is not None else None,
        "gradient norm": number(what.grad_norm) if what.grad_norm is not None else None,
        "NaN, Inf": f"{what.num_nan}, {what.num_inf}" if what.num_nan is not None else None,
        "stacks": f"incidents/{what.stacks}" if what.stacks else None,
        "start from": f"checkpoints/{what.checkpoint}" if what.checkpoint else "the beginning of the run",
        "world": f"{what.world_size} ranks x {what.num_micro_batches} micro-batches x"
        f" {what.micro_batch_samples} samples",
        "versions": ", ".join(f"{name} {version}" for name, version in what.versions.items()),
        "git revision": what.git_revision,
        "on other hosts": ", ".join(f"rank {rank} on {host}" for rank, host in what.other_hosts.items()),
    }
    width = max(map(len, facts))
    lines = [f"{name.ljust(width)}  {printable(value, _LONGEST)}" for name, value in facts.items() if value]
    return "\n".join([printable(what.summary, _LONGEST), "", *lines])


def _culprit(what: IncidentFile) -> str:
    if what.rank is None:
        return "no single rank"
    within = "" if what.micro_batch is None else f", micro-batch {what.micro_batch}"
    return f"rank {what.rank}{within}{'' if what.parameter is None else f', {what.parameter}'}"


def _rerun(folder: Path) -> str:
    """What running micro-batches again on the spot has shown."""
    lines = []
    for rank in ranks_in(folder):
        try:
            found = read_rank(folder, rank).rerun
        except TrackingError:
            continue
        lines += (
            [f"again, on rank {rank}: {found[0]}", *(f"    {line}" for line in found[1:])] if found else []
        )
    return "\n".join(printable(line, _LONGEST) for line in lines)


def _samples(what: IncidentFile) -> str:
    blamed = [(one.rank, one.micro_batch, index) for one in what.culprits for index in one.samples]
    if not blamed:
        blamed = [
            (rank, number, index)
            for rank, of_rank in enumerate(what.samples)
            for number, indices in enumerate(of_rank)
            for index in indices
        ]
    rows = [
        [str(index), str(rank), "" if number is None else str(number), what.sources.get(str(index), "")]
        for rank, number, index in blamed[:_MOST_SAMPLES]
    ]
    return _with_rest(["sample", "rank", "micro-batch", "where it comes from"], rows, len(blamed))


def _parameters(what: IncidentFile) -> str:
    """The culprit's, those with something bad first, then by norm."""
    found = what.culprit_parameters or what.per_parameter
    ordered = sorted(found.items(), key=lambda item: (-item[1].num_nan - item[1].num_inf, -item[1].grad_norm))
    rows = [_parameter(name, row) for name, row in ordered[:_MOST_PARAMETERS]]
    whose = "gradient of the culprit" if what.culprit_parameters else "gradient"
    heads = [whose, "norm", "max-abs", "NaN", "Inf", "zero", "elements"]
    return _with_rest(heads, rows, len(ordered))


def _parameter(name: str, row: ParameterRow) -> list[str]:
    counts = (row.num_nan, row.num_inf, row.num_zero, row.num_elements)
    return [name, number(row.grad_norm), number(row.max_abs), *(str(c) if c >= 0 else "-" for c in counts)]


def _ranks(rows: Sequence[RankRow]) -> str:
    cells = [
        [
            str(r.rank),
            number(r.loss),
            number(r.grad_norm),
            str(r.num_nan),
            str(r.num_inf),
            number(r.compute_s),
        ]
        for r in rows[:_MOST_RANKS]
    ]
    return _with_rest(["rank", "loss", "gradient norm", "NaN", "Inf", "compute s"], cells, len(rows))


def _files(folder: Path) -> str:
    lines = [f"rank {rank}: {_rank_text(folder, rank)}" for rank in ranks_in(folder)[:_MOST_RANKS]]
    if (folder / STORY).exists():
        lines.append(f"what a replay has found: {folder / STORY}")
    else:
        lines.append(
            f"find out more: harness replay {folder.parent.parent} --step {incident_step(folder.name)}"
        )
    return "\n".join(lines)


def _rank_text(folder: Path, rank: int) -> str:
    try:
        mine = read_rank(folder, rank)
    except TrackingError as error:
        return printable(str(error), _LONGEST)
    steps = [step.step for step in mine.steps]
    about = [f"{len(steps)} steps remembered" + (f", {min(steps)} to {max(steps)}" if steps else "")]
    about += [f"{mine.phase}"] if mine.phase else []
    about += [mine.error] if mine.error else []
    about += [f"{name} is left out: {why}" for name, why in mine.left_out.items()]
    return printable("; ".join(about), _LONGEST)


def _with_rest(heads: Sequence[str], rows: Iterable[list[str]], count: int) -> str:
    shown = list(rows)
    more = f"\n(and {count - len(shown)} more)" if count > len(shown) else ""
    return table(heads, shown) + more if shown else ""

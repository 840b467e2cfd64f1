"""What happened, as `incident.json` holds it: made on a thread, of what the host knows."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from harness import __version__
from harness.config import TrainConfig, dump_yaml
from harness.data import Dataset, Loader, source_of
from harness.dist import World, from_main, gather
from harness.records import Culprit
from harness.runlog.incident_files import IncidentFile
from harness.runlog.paths import MANIFEST, checkpoint_of, checkpoints_dir, config_file
from harness.stability import Incident
from harness.training.incident_writer import Found, IncidentWriter

__all__ = ["open_writer"]

_MOST_SOURCES = 64
_GIT_S = 5.0


def open_writer(
    config: TrainConfig, world: World, directory: Path, loader: Loader, data: Dataset
) -> IncidentWriter | None:
    """Writes this rank's incidents; None: they are not kept. On all ranks; two collectives on the host."""
    if not config.incidents.enabled:
        return None
    # Asked for now: at the end of a run there may be no time for it.
    revision = from_main(_git_revision)
    hosts = gather(lambda: None if config_file(directory).is_file() else platform.node())
    apart = {str(rank): host for rank, host in enumerate(hosts) if host is not None}
    reporter = _Reporter(config, world.world_size, directory, loader, data, apart, revision)
    is_apart = hosts[world.rank] is not None
    return IncidentWriter(
        config.incidents,
        world,
        directory,
        describe=reporter.describe,
        samples=lambda position: reporter.samples(position, world.rank),
        sweeps=world.is_main or (is_apart and world.local_rank == 0),
    )


class _Reporter:
    """Knows what an incident's file says besides what was found."""

    def __init__(
        self,
        config: TrainConfig,
        world_size: int,
        directory: Path,
        loader: Loader,
        data: Dataset,
        other_hosts: Mapping[str, str],
        git_revision: str | None,
    ) -> None:
        self._config, self._world_size, self._directory = config, world_size, directory
        self._loader, self._data, self._other_hosts = loader, data, other_hosts
        self._git_revision = git_revision

    def samples(self, position: int, rank: int) -> tuple[tuple[int, ...], ...]:
        """A rank's samples of the step that began at `position`, by micro-batch."""
        numbers = range(len(self._loader.shares.offsets(rank)))
        return tuple(tuple(self._loader.step_indices(position, rank, number)) for number in numbers)

    def describe(self, found: Found, position: int | None) -> IncidentFile:
        """What happened, to a step whose first sample stands at the global `position`, or to none."""
        ranks = range(self._world_size if position is not None else 0)
        samples = tuple(self.samples(position or 0, rank) for rank in ranks)
        about = self._from_record(found, samples) if found.record else self._from_error(found, samples)
        culprits: tuple[Culprit, ...] = about["culprits"]
        named = [index for one in culprits for index in one.samples]
        named = named or [index for rank in samples for micro_batch in rank for index in micro_batch]
        return IncidentFile(
            step=found.step,
            kind=found.kind,
            reason=found.reason,
            time=time.time(),
            world_size=self._world_size,
            num_micro_batches=self._loader.shares.num_passes,
            micro_batch_samples=self._loader.shares.micro_batch,
            position=position or 0,
            num_samples=len(self._data),
            seed=self._config.seed,
            quarantined=self._loader.quarantined,
            samples=samples,
            sources=self._sources(named),
            checkpoint=self._checkpoint(found.step),
            config_fingerprint=xxhash.xxh3_64_hexdigest(dump_yaml(self._config).encode()),
            versions=_versions(),
            git_revision=self._git_revision,
            stacks=Path(found.hang_folder).name if found.hang_folder else None,
            other_hosts=self._other_hosts,
            **about,
        )

    def _from_record(self, found: Found, samples: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Any]:
        record = found.record
        assert record is not None
        named = functools.partial(source_of, self._data)
        incident = Incident.of(record, samples_of=_samples_of(samples), source_of=named)
        about = {
            "summary": incident.summary() if incident else f"step {found.step}: {found.reason}",
            "culprits": incident.culprits if incident else (),
            "per_rank": tuple(record.per_rank),
            **{
                name: getattr(record, name)
                for name in (
                    "verdict", "rank", "parameter", "micro_batch", "loss", "grad_norm", "num_nan", "num_inf",
                    "per_parameter", "culprit_parameters",
                )
            },
        }  # fmt: skip
        if incident is None and record.findings:
            about |= {"rank": record.findings[0].rank, "parameter": record.findings[0].parameter}
        return about

    def _from_error(self, found: Found, samples: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Any]:
        of_all = _samples_of(samples)
        culprits = (
            Culprit(rank=rank, micro_batch=None, samples=tuple(of_all(rank, None))) for rank in found.ranks
        )
        where = f" {found.phase}" if found.phase else ""
        return {
            "summary": f"step {found.step}: {found.kind}{where}: {found.reason}",
            "culprits": tuple(culprits),
            "rank": found.ranks[0] if found.ranks else None,
        }

    def _sources(self, indices: Sequence[int]) -> dict[str, str]:
        named = {str(index): source_of(self._data, index) for index in indices[:_MOST_SOURCES]}
        return {index: source for index, source in named.items() if source is not None}

    def _checkpoint(self, step: int) -> str | None:
        """The newest one that is committed, at or before the step."""
        folder = checkpoints_dir(self._directory)
        names = [checkpoint_of(path.name) for path in folder.iterdir() if (path / MANIFEST).is_file()]
        before = [name for name in names if name is not None and name.step <= step]
        return str(max(before)) if before else None


def _git_revision() -> str | None:
    """Of the folder that the program was started in."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _samples_of(
    samples: Sequence[Sequence[tuple[int, ...]]],
) -> Callable[[int | None, int | None], Sequence[int]]:
    def of(rank: int | None, micro_batch: int | None) -> Sequence[int]:
        ranks = range(len(samples)) if rank is None else [rank]
        return [
            index
            for one in ranks
            if one < len(samples)
            for number, indices in enumerate(samples[one])
            if micro_batch in (None, number)
            for index in indices
        ]

    return of


def _versions() -> dict[str, str]:
    versions = {"harness": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions if torch.version.cuda is None else {**versions, "cuda": torch.version.cuda}

"""What has to be the same on all ranks, compared before anything depends on it."""

from __future__ import annotations

from collections.abc import Sequence

from harness.config import TrainConfig, flatten, to_dict
from harness.data import SourceFile, Task, fingerprint, text_files
from harness.dist import HostGroup, gather
from harness.errors import ConfigError, DataError

__all__ = ["LONGEST_S", "agree_on_data", "agree_on_files", "agree_on_settings"]

LONGEST_S = 86400.0
"""How long ranks wait for each other where one lists, prepares or searches data. Machines may differ by hours
in what they have to prepare; the watchdog tells one that works from one that hangs."""

# What a machine may have for itself.
_LOCAL = ("data.cache_dir", "data.num_workers", "parallel.threads", "runs_dir", "tracking.")


def agree_on_settings(config: TrainConfig) -> None:
    """Compares the ranks' configurations; one collective on the host.

    Raises:
        ConfigError: they differ; the first setting that does is named, on every rank.
    """
    mine = {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(_LOCAL)}
    by_rank = gather(lambda: mine)
    for rank, theirs in enumerate(by_rank):
        for key, value in by_rank[0].items():
            if theirs.get(key) != value:
                raise ConfigError(
                    f"{key} is {value!r} on rank 0 and {theirs.get(key)!r} on rank {rank}",
                    rule="all ranks run the same configuration",
                    remedy="give every machine the same file and the same arguments",
                )


def agree_on_files(config: TrainConfig) -> list[SourceFile] | None:
    """The files of the text as rank 0 lists them; None for tasks other than text.

    Called by all ranks together; waits for a day at most, for a million files on a network take longer than
    `parallel.timeout_s`.

    Raises:
        DataError: a path does not exist or cannot be read; on every rank.
    """
    if config.task != "text":
        return None
    group = HostGroup(error=DataError, timeout_s=LONGEST_S)
    return group.from_main(lambda: text_files(config.data))


def agree_on_data(task: Task, config: TrainConfig) -> dict[str, str]:
    """The fingerprints of the training and the validation data, by part, and what the task has pinned, once
    all ranks have the same ones.

    Called by all ranks together; one collective on the host.

    Raises:
        DataError: they are not the same; on every rank.
        TaskError: no sample could be had; on every rank.
    """
    parts = {"training": task.train_data, "validation": task.val_data}
    in_worker = config.data.num_workers > 0
    by_rank = gather(
        lambda: (
            {part: fingerprint(data, in_worker=in_worker) for part, data in parts.items()} | dict(task.pinned)
        )
    )
    for name in by_rank[0]:
        what = f"{name} data" if name in parts else name
        _require_same(what, [fingerprints.get(name, "missing") for fingerprints in by_rank])
    return by_rank[0]


def _require_same(what: str, by_rank: Sequence[str]) -> None:
    for rank, theirs in enumerate(by_rank):
        if theirs != by_rank[0]:
            raise DataError(
                f"the {what} of rank 0 is {by_rank[0]}, and that of rank {rank} is {theirs}",
                rule="every rank holds the same data, of which it is handed its share",
                remedy="split by config.seed or by torch's, numpy's or Python's global generator, which are"
                " seeded alike on all ranks; sort what is listed; compare the files of the machines, or give"
                " the data set a fingerprint()",
            )

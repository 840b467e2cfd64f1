"""The training loader. Its order is a function of (seed, epoch, position), its state is one number.

A global batch is the next `global_batch` positions of the endless sequence epoch 0, epoch 1, ...; rank r
takes the r-th contiguous slice of its micro-batches (`Shares`). So every world size and every micro-batch
size trains on the same samples in the same steps, and a run resumes anywhere.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from harness.data.fetch import fetch, map_tensors, worker_failure
from harness.data.order import mix, sample_order, substituted
from harness.data.shares import Shares
from harness.data.task import Batch, Dataset
from harness.errors import DataError, HarnessError

__all__ = ["Loader", "evaluation_batches"]

logger = logging.getLogger(__name__)


class Loader:
    """Hands each rank its micro-batches, step after step, without end.

    Args:
        dataset: Map-style data; see `harness.data.task.Dataset`.
        global_batch: Samples per step over all ranks.
        micro_batch: Samples per micro-batch at most; None: a rank's whole share.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the order, and of `__getitem__`'s randomness.
        num_workers: Processes that fetch ahead; 0 fetches when asked.
        pin_memory: Put batches into page-locked memory, for asynchronous copies to a GPU.
        fingerprints: What tells the run's data from any other, by name; kept in the state and compared when
            one is loaded.
        allow_change: Go on with other data than a loaded state's, with a warning.
        pinned: Names among the fingerprints that have to stay all the same.
        quarantined: Samples that are never handed out, by index; in their places stand others, the same
            ones at every world size.

    Raises:
        ConfigError: the global batch cannot be split.
        DataError: the dataset is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        allow_change: bool = False,
        pinned: Collection[str] = (),
        quarantined: Sequence[int] = (),
    ) -> None:
        self.shares = Shares.of(global_batch, world_size, at_most=micro_batch)
        """How the ranks share a global batch."""
        self._source = _Source(
            dataset, seed=seed, micro_batch=self.shares.micro_batch, quarantined=quarantined
        )
        self._global_batch = global_batch
        self._offsets = self.shares.offsets(rank)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._fingerprints = dict(fingerprints or {})
        self._allow_change = allow_change
        self._pinned = frozenset(pinned)
        self._stream: Any = None
        """Iterator of `Batch | HarnessError`, torch's own where there are workers; None: it is not open."""
        self._position = 0

    @property
    def position(self) -> int:
        """Samples consumed so far, over all ranks and epochs."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self._position // self._source.num_samples

    @property
    def quarantined(self) -> tuple[int, ...]:
        """Samples that are never handed out, by index, sorted."""
        return tuple(self._source.quarantined.tolist())

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step.

        Raises:
            TaskError, DataError: what the dataset raised, also in a worker; or a worker died.
        """
        self.start()
        assert self._stream is not None
        batches = [self._receive(self._stream) for _ in self._offsets]
        self._position += self._global_batch
        return batches

    def start(self) -> None:
        """Starts the workers now rather than with the first `next`: before this process opens a file of the
        data set that they would share."""
        if self._stream is None:
            self._stream = self._open()

    def sample_indices(self, position: int, count: int) -> list[int]:
        """Which samples stand at global positions `position` to `position + count`."""
        return self._source.indices(np.arange(position, position + count))

    def step_indices(
        self, position: int, rank: int | None = None, micro_batch: int | None = None
    ) -> list[int]:
        """Which samples the step that began at `position` holds: all, or those of one rank's micro-batch."""
        if rank is None or micro_batch is None:
            return self.sample_indices(position, self._global_batch)
        return self.sample_indices(position + self.shares.offsets(rank)[micro_batch], self.shares.micro_batch)

    def skip(self, num_samples: int) -> None:
        """Steps over the next `num_samples` global samples without fetching them."""
        self._seek(self._position + num_samples)

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed; what workers have fetched ahead does not count. Equal on all ranks."""
        return {
            "position": self._position,
            "num_samples": self._source.num_samples,
            "seed": self._source.seed,
            "fingerprints": dict(self._fingerprints),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, at any world size and micro-batch size.

        Changed data is a question of the first state that is loaded: later ones, as of a rollback past that
        change, are of the same run.

        Raises:
            DataError: the state belongs to other data or another seed, whose order cannot be continued.
        """
        own = self.state_dict()
        self._require_same("seed", state["seed"], own["seed"], remedy="bring back the seed")
        for name, known in state.get("fingerprints", {}).items():  # older states have none
            if name in self._fingerprints and self._fingerprints[name] != known:
                self._data_changed(name, known, self._fingerprints[name])
        if not self._allow_change:
            accept = "bring back the data, or accept the change with --data.allow_change true"
            self._require_same("num_samples", state["num_samples"], own["num_samples"], remedy=accept)
        self._allow_change = True
        self._seek(int(state["position"]))

    def _require_same(self, key: str, before: Any, now: Any, *, remedy: str) -> None:
        if before != now:
            raise DataError(
                f"the order of samples was made with {key} = {before}, and now {key} = {now}",
                rule="a run can only be continued on the same data in the same order",
                remedy=f"{remedy}, or start a run under another --name",
            )

    def _data_changed(self, name: str, before: str, now: str) -> None:
        if name in self._pinned:
            raise DataError(
                f"the {name} was {before} when the checkpoint was written, and now it is {now}",
                rule="it stays what it was, whatever data.allow_change says",
                remedy="bring that back, or start a run under another --name",
            )
        if self._allow_change:
            logger.warning("going on with other %s data: it was %s and is %s", name, before, now)
            return
        raise DataError(
            f"the {name} data was {before} when the checkpoint was written, and now it is {now}",
            rule="a run goes on with the data that it began with",
            remedy="bring that back, start a run under another --name, or accept the change with"
            " --data.allow_change true; where the data is the same and its samples' last bits are not, give"
            " the data set a fingerprint()",
        )

    def close(self) -> None:
        """Ends the workers. The loader can be used again; it then starts new ones."""
        if self._stream is not None and self._num_workers > 0:
            # Dropping it is not enough: the traceback of an error may keep it alive.
            self._stream._shutdown_workers()
        self._stream = None

    def _receive(self, stream: Iterator[Batch | HarnessError]) -> Batch:
        try:
            batch = next(stream)
        except RuntimeError as error:
            if self._num_workers == 0:
                raise
            raise worker_failure(error) from error
        if isinstance(batch, HarnessError):
            raise batch
        return batch

    def _seek(self, position: int) -> None:
        self.close()
        self._position = position

    def _open(self) -> Iterator[Batch | HarnessError]:
        """An endless stream of this rank's micro-batches from the present position on."""
        starts = self._starts(self._position)
        if self._num_workers == 0:
            batches = map(self._source.batch, starts)
            return map(_pinned, batches) if self._pin_memory else batches
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                sampler=starts,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_begin_worker,
                # Without its own, making the iterator draws from the generator that dropout uses.
                generator=torch.Generator(),
            )
        )

    def _starts(self, first: int) -> Iterator[int]:
        """Global positions at which this rank's micro-batches begin, from the step at `first` on."""
        for step_start in itertools.count(first, self._global_batch):
            for offset in self._offsets:
                yield step_start + offset


class _Source(torch.utils.data.Dataset[Batch | HarnessError]):
    """The endless sequence of all epochs; item `p` is the micro-batch that begins at global position `p`.

    What workers run: everything that a batch depends on is in the position.
    """

    def __init__(self, dataset: Dataset, *, seed: int, micro_batch: int, quarantined: Sequence[int]) -> None:
        self.num_samples = len(dataset)
        self.seed = seed
        self.quarantined = np.unique(np.array(quarantined, dtype=np.int64))
        self._dataset = dataset
        self._micro_batch = micro_batch
        if self.num_samples == 0:
            raise DataError("the training data has no samples", rule="there has to be at least one")

    def __getitem__(self, start: int) -> Batch | HarnessError:
        """For workers: an error as a value, for raised it would come as a text of two tracebacks."""
        try:
            return self.batch(start)
        except HarnessError as error:
            return error

    def batch(self, start: int) -> Batch:
        positions = np.arange(start, start + self._micro_batch)
        seeds = mix(self.seed, positions).tolist()
        return fetch(self._dataset, self.indices(positions), seeds)

    def indices(self, positions: NDArray[np.int64]) -> list[int]:
        epochs, within = np.divmod(positions, self.num_samples)
        order = sample_order(self.num_samples, self.seed, epochs, within)
        indices: list[int] = substituted(
            order, self.quarantined, num_samples=self.num_samples, seed=self.seed, positions=positions
        ).tolist()
        return indices


def evaluation_batches(
    dataset: Dataset, *, num_samples: int, micro_batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Batch, bool]]:
    """A fixed set of samples, spread evenly over `dataset`, and whether a batch counts.

    Each sample is once in a batch that counts, over all ranks. All ranks get the same number of batches, as
    sharded models need: where the samples do not go round, a rank's last batch is one sample that does not
    count. The caller reduces sums, so that the split does not matter.

    Args:
        num_samples: How many to take over all ranks; at most all of them.
        micro_batch: Longest batch.

    Raises:
        DataError: the dataset is empty.
    """
    if len(dataset) == 0:
        raise DataError("the validation data has no samples", rule="there has to be at least one")
    count = min(num_samples, len(dataset))
    chosen = np.arange(count) * len(dataset) // count
    own = chosen[rank::world_size].tolist()
    longest_share = -(-count // world_size)
    for start in range(0, longest_share, micro_batch):
        share = own[start : start + micro_batch]
        yield fetch(dataset, share or [0]), bool(share)


def _pinned(batch: Batch) -> Batch:
    pinned: Batch = map_tensors(batch, torch.Tensor.pin_memory)
    return pinned


def _begin_worker(_worker: int) -> None:
    gc.enable()  # the trainer collects its own garbage, after set steps, and a worker inherits that
    _outlive_signals()


def _outlive_signals() -> None:
    """Ctrl-C and pre-emption reach every process of a job, and the trainer still needs its next batch then.

    So a worker ends on SIGTERM from the trainer only, which is how the trainer's exit ends it. If the
    trainer is killed, torch's worker loop notices within seconds.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_trainer, daemon=True).start()


def _exit_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

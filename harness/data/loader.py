"""The training loader. Its order is a function of (seed, epoch, position), its state is one number.

A global batch is the next `global_batch` positions of the endless sequence epoch 0, epoch 1, ...; rank r
takes the r-th contiguous slice of it and cuts the slice into micro-batches. So every world size and every
micro-batch size trains on the same samples in the same steps, and a run resumes anywhere.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from harness.data.fetch import fetch
from harness.data.order import mix, sample_order
from harness.data.task import Batch, Dataset
from harness.errors import ConfigError, DataError

__all__ = ["Loader", "evaluation_batches"]


class Loader:
    """Hands each rank its micro-batches, step after step, without end.

    Args:
        dataset: Map-style data; see `harness.data.task.Dataset`.
        global_batch: Samples per step over all ranks.
        micro_batch: Samples per micro-batch; None: a rank's whole share.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the order, and of `__getitem__`'s randomness.
        num_workers: Processes that fetch ahead; 0 fetches when asked.
        pin_memory: Put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ConfigError: the global batch cannot be split evenly.
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
    ) -> None:
        share = global_batch // world_size
        micro_batch = micro_batch or share
        if micro_batch == 0 or global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"a global batch of {global_batch} samples",
                rule=f"it has to be a multiple of world size x micro-batch = {world_size} x {micro_batch}",
            )
        self._source = _Source(dataset, seed=seed, micro_batch=micro_batch)
        self._global_batch, self._share, self._micro_batch = global_batch, share, micro_batch
        self._offsets = range(rank * share, (rank + 1) * share, micro_batch)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._stream: Iterator[Batch] | None = None
        self._position = 0

    @property
    def position(self) -> int:
        """Samples consumed so far, over all ranks and epochs."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self._position // self._source.num_samples

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step.

        Raises:
            Whatever the dataset raises, also from a worker, with the worker's traceback.
        """
        if self._stream is None:
            self._stream = self._open()
        batches = [next(self._stream) for _ in self._offsets]
        self._position += self._global_batch
        return batches

    def sample_indices(self, position: int, count: int) -> list[int]:
        """Which samples stand at global positions `position` to `position + count`."""
        return self._source.indices(np.arange(position, position + count))

    def step_indices(
        self, position: int, rank: int | None = None, micro_batch: int | None = None
    ) -> list[int]:
        """Which samples the step that began at `position` holds: all, or those of one rank's micro-batch."""
        if rank is None or micro_batch is None:
            return self.sample_indices(position, self._global_batch)
        offset = rank * self._share + micro_batch * self._micro_batch
        return self.sample_indices(position + offset, self._micro_batch)

    def skip(self, num_samples: int) -> None:
        """Steps over the next `num_samples` global samples without fetching them."""
        self._seek(self._position + num_samples)

    def state_dict(self) -> dict[str, int]:
        """What has been consumed; what workers have fetched ahead does not count. Equal on all ranks."""
        return {
            "position": self._position,
            "num_samples": self._source.num_samples,
            "seed": self._source.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, at any world size and micro-batch size.

        Raises:
            DataError: the state belongs to other data or another seed, whose order cannot be continued.
        """
        for key, own in (("num_samples", self._source.num_samples), ("seed", self._source.seed)):
            if state[key] != own:
                raise DataError(
                    f"the order of samples was made with {key} = {state[key]}, and now {key} = {own}",
                    rule="a run can only be continued on the same data in the same order",
                    remedy="bring back the data and the seed, or start a run under another --name",
                )
        self._seek(int(state["position"]))

    def close(self) -> None:
        """Ends the workers. The loader can be used again; it then starts new ones."""
        if isinstance(self._stream, _MultiProcessingDataLoaderIter):
            # Dropping it is not enough: the traceback of an error may keep it alive.
            self._stream._shutdown_workers()
        self._stream = None

    def _seek(self, position: int) -> None:
        self.close()
        self._position = position

    def _open(self) -> Iterator[Batch]:
        """An endless stream of this rank's micro-batches from the present position on."""
        starts = self._starts(self._position)
        if self._num_workers == 0:
            batches = map(self._source.__getitem__, starts)
            return (_pinned(batch) for batch in batches) if self._pin_memory else batches
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                sampler=starts,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_outlive_signals,
                # Without its own, making the iterator draws from the generator that dropout uses.
                generator=torch.Generator(),
            )
        )

    def _starts(self, first: int) -> Iterator[int]:
        """Global positions at which this rank's micro-batches begin, from the step at `first` on."""
        for step_start in itertools.count(first, self._global_batch):
            for offset in self._offsets:
                yield step_start + offset


class _Source(torch.utils.data.Dataset[Batch]):
    """The endless sequence of all epochs; item `p` is the micro-batch that begins at global position `p`.

    What workers run: everything that a batch depends on is in the position.
    """

    def __init__(self, dataset: Dataset, *, seed: int, micro_batch: int) -> None:
        self.num_samples = len(dataset)
        self.seed = seed
        self._dataset = dataset
        self._micro_batch = micro_batch
        if self.num_samples == 0:
            raise DataError("the training data has no samples", rule="there has to be at least one")

    def __getitem__(self, start: int) -> Batch:
        positions = np.arange(start, start + self._micro_batch)
        seeds = mix(self.seed, positions).tolist()
        return fetch(self._dataset, self.indices(positions), seeds)

    def indices(self, positions: NDArray[np.int64]) -> list[int]:
        epochs, within = np.divmod(positions, self.num_samples)
        indices: list[int] = sample_order(self.num_samples, self.seed, epochs, within).tolist()
        return indices


def evaluation_batches(
    dataset: Dataset, *, num_samples: int, micro_batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """A fixed set of samples, spread evenly over `dataset`, each exactly once over all ranks.

    All ranks get the same number of batches, as sharded models need; where the samples do not go round, a
    last batch is short or has length 0. The caller reduces sums, so that the split does not matter.

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
        yield fetch(dataset, own[start : start + micro_batch])


def _pinned(batch: Batch) -> Batch:
    return {name: values.pin_memory() for name, values in batch.items()}


def _outlive_signals(_worker: int) -> None:
    """Ctrl-C and pre-emption reach every process of a job, and the trainer still needs its next batch then.

    So a worker ends on SIGTERM from the trainer only, which is how the trainer's exit ends it. If the
    trainer is killed, torch's worker loop notices within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_trainer, daemon=True).start()


def _exit_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

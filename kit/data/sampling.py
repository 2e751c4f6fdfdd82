"""The order of rows in an epoch, and each process's part of it."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

# Rows of one bucket differ in length by at most this factor.
_BUCKET = 1.1


class EpochBatches:
    """Batches of row indices for one process; a new shuffle every epoch, the same on every process.

    Micro-batch m of all processes together covers `batch_size × num_processes` consecutive rows of the shuffle, of
    which process r takes the r-th slice. So one process with batch 8, two with 4 and accumulation over 8 see the same
    rows in the same optimizer step. A process without a row left in the last micro-batch gets row -1, which carries
    no label: nothing is repeated to fill up, as accelerate's `even_batches` would.

    Where lengths are given, the rows of each optimizer step are dealt out from the longest to the shortest: the step
    holds the same rows as without, in micro-batches with less padding.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        lengths: np.ndarray | None = None,
        accumulation: int = 1,
    ) -> None:
        """Plan batches of `batch_size` rows for process `process_index` of `num_processes`.

        Args:
            num_rows: rows of an epoch.
            batch_size: rows of a micro-batch on one process.
            seed: of the shuffle.
            num_processes: processes that share the rows.
            process_index: which of them this is.
            lengths: int64 (rows,), by which the rows of an optimizer step are sorted.
            accumulation: micro-batches of an optimizer step; makes a difference with `lengths` alone.
        """
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.lengths = lengths
        self.rows_per_step = batch_size * num_processes * accumulation
        self.epoch = 0

    # Trainer looks for `set_epoch` on the `batch_sampler` of the loader's batch sampler (where accelerate's wrapper
    # and `skip_first_batches` put the original), so this one points to itself.
    @property
    def batch_sampler(self) -> "EpochBatches":
        """The sampler that `set_epoch` is to be called on."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch."""
        self.epoch = epoch

    def of_step(self, step: int, accumulation: int) -> list[list[int]]:
        """Return the row indices of each of this process's micro-batches in an optimizer step.

        Args:
            step: counted from 0 over all epochs.
            accumulation: micro-batches of a step.
        """
        steps_per_epoch = -(-len(self) // accumulation)
        self.set_epoch(step // steps_per_epoch)
        first = step % steps_per_epoch * accumulation
        return list(islice(self, first, first + accumulation))

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch, the same on every process."""
        return -(-self.num_rows // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each micro-batch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        if self.lengths is not None:
            order = order[np.lexsort((-self.lengths[order], np.arange(self.num_rows) // self.rows_per_step))]
        for step in range(len(self)):
            start = (step * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size].tolist() or [-1]


class LengthBatches(EpochBatches):
    """Batches of rows of similar length; other rows together every epoch, in batches of the same sizes.

    Rows are put into buckets of similar length, from the longest to the shortest, shuffled within each, and cut into
    batches. Where they are cut depends on the buckets alone, so that every epoch has as many batches. Those are
    shuffled and dealt to the processes in rounds; a process without one in the last round gets row -1.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        """Plan the batches of process `process_index` of `num_processes`.

        Args:
            lengths: int64 (rows,).
            batch_size: rows of a micro-batch, at most.
            seed: of the shuffles.
            num_processes: processes that share the batches.
            process_index: which of them this is.
            max_tokens: positions of a micro-batch, padding included, at most; a longer row is a batch of its own.
        """
        super().__init__(len(lengths), batch_size, seed, num_processes, process_index)
        self._buckets = np.floor(np.log(np.maximum(lengths, 1)) / np.log(_BUCKET)).astype(np.int64)
        longest = np.zeros(self._buckets.max(initial=0) + 1, dtype=np.int64)
        np.maximum.at(longest, self._buckets, lengths)
        # The length that the row at each place of the order has at most, in every epoch.
        bounds = longest[-np.sort(-self._buckets)]
        self._starts = [0]
        while self._starts[-1] < len(lengths):
            start = self._starts[-1]
            rows = batch_size if max_tokens is None else min(batch_size, max(1, max_tokens // int(bounds[start])))
            self._starts.append(min(start + rows, len(lengths)))

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch, the same on every process and in every epoch."""
        return -(-(len(self._starts) - 1) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each micro-batch."""
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(self.num_rows)
        order = order[np.argsort(-self._buckets[order], kind="stable")]
        batches = generator.permutation(len(self._starts) - 1)
        for step in range(len(self)):
            number = step * self.num_processes + self.process_index
            if number >= len(batches):
                yield [-1]
            else:
                batch = int(batches[number])
                yield order[self._starts[batch] : self._starts[batch + 1]].tolist()

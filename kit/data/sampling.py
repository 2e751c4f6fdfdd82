"""The order of rows in an epoch, and each process's part of it."""

from collections.abc import Iterator

import numpy as np


class EpochBatches:
    """Batches of row indices for one process; a new shuffle every epoch, the same on every process.

    Micro-batch m of all processes together covers `batch_size × num_processes` consecutive rows of the shuffle, of
    which process r takes the r-th slice. So one process with batch 8, two with 4 and accumulation over 8 see the same
    rows in the same optimizer step. A process without a row left in the last micro-batch gets row -1, which carries
    no label: nothing is repeated to fill up, as accelerate's `even_batches` would.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int, num_processes: int = 1, process_index: int = 0
    ) -> None:
        """Plan batches of `batch_size` rows for process `process_index` of `num_processes`."""
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
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

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch, the same on every process."""
        return -(-self.num_rows // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each micro-batch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        for step in range(len(self)):
            start = (step * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size].tolist() or [-1]

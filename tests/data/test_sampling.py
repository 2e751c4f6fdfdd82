"""The order of rows: each once an epoch, and the same rows in an optimizer step whatever the topology."""

from itertools import chain

import pytest
from accelerate import skip_first_batches
from torch.utils.data import DataLoader, Dataset

from kit.data.sampling import EpochBatches

NUMBERS = [1, 2, 7, 8, 9, 31, 32, 33, 64, 100]
# (processes, batch size) of one global micro-batch of 8 rows or less
TOPOLOGIES = [(1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (3, 2), (4, 2), (8, 1)]


def batches(rows, size, processes=1, seed=0, epoch=0):
    """The batches of every process: [process][micro-batch] -> rows."""
    samplers = [EpochBatches(rows, size, seed, processes, rank) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    result = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(lists) for lists in result]
    return result


def steps(rows, size, processes, global_batch):
    """The rows of each optimizer step, in the order of the shuffle."""
    of_each = batches(rows, size, processes)
    micro = [[row for rank in of_each for row in rank[m] if row >= 0] for m in range(len(of_each[0]))]
    accumulation = global_batch // (size * processes)
    return [list(chain(*micro[m : m + accumulation])) for m in range(0, len(micro), accumulation)]


@pytest.mark.parametrize("rows", NUMBERS)
@pytest.mark.parametrize(("processes", "size"), TOPOLOGIES)
def test_all_processes_together_see_each_row_once(rows, processes, size):
    of_each = batches(rows, size, processes)
    assert sorted(row for rank in of_each for batch in rank for row in batch if row >= 0) == list(range(rows))
    assert len({len(rank) for rank in of_each}) == 1


@pytest.mark.parametrize("rows", NUMBERS)
@pytest.mark.parametrize(("processes", "size"), [(1, 4), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (8, 1)])
def test_an_optimizer_step_has_the_same_rows_whatever_the_topology(rows, processes, size):
    assert steps(rows, size, processes, 8) == steps(rows, 8, 1, 8)


def test_a_process_without_rows_gets_the_row_without_labels():
    assert [rank[-1] for rank in batches(9, 2, processes=4)][1:] == [[-1]] * 3
    of_each = batches(11, 2, processes=4)
    assert [len(rank[-1]) for rank in of_each] == [2, 1, 1, 1]
    assert [rank[-1] == [-1] for rank in of_each] == [False, False, True, True]
    assert not any(-1 in batch for rank in of_each for batch in rank[:-1])


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_epochs_and_seeds_shuffle_differently_and_repeatably(seed):
    def order(**settings):
        return list(chain(*batches(50, 8, **settings)[0]))

    assert order(seed=seed) == order(seed=seed) != list(range(50))
    assert order(seed=seed, epoch=1) not in (order(seed=seed), order(seed=seed, epoch=2))
    assert order(seed=seed) != order(seed=seed + 1)
    # Seeds and epochs are not added up: the next seed's first epoch is no second epoch of this one.
    assert order(seed=seed + 1) != order(seed=seed, epoch=1)


def test_going_back_to_an_epoch_gives_its_order_again():
    sampler = EpochBatches(50, 8, 0)
    first = list(sampler)
    sampler.set_epoch(4)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


class Identity(Dataset):
    """Row i of 20 is i."""

    def __len__(self):
        """Return the number of rows."""
        return 20

    def __getitem__(self, index):
        """Return a row."""
        return index


@pytest.mark.parametrize("skipped", [1, 3, 9])
@pytest.mark.parametrize("rank", [0, 1])
def test_seeking_with_accelerate_gives_the_tail_of_the_epoch(skipped, rank):
    """Resume seeks by `skip_first_batches`, then Trainer sets the epoch on the loader's inner batch sampler."""
    loader = DataLoader(Identity(), batch_sampler=EpochBatches(20, 1, 3, 2, rank), collate_fn=list)
    loader.batch_sampler.set_epoch(2)
    straight = list(loader)
    loader.batch_sampler.set_epoch(0)
    sought = skip_first_batches(loader, skipped)
    sought.batch_sampler.batch_sampler.set_epoch(2)
    assert list(sought) == straight[skipped:]
    assert len(sought) == 10 - skipped

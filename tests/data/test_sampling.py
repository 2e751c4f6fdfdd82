"""The order of rows: each once an epoch, and the same rows in an optimizer step whatever the topology."""

from itertools import chain

import numpy as np
import pytest
from accelerate import skip_first_batches
from torch.utils.data import DataLoader, Dataset

from kit.data.sampling import EpochBatches, LengthBatches

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


# ---- Rows sorted by length within an optimizer step ----

LENGTHS = np.random.default_rng(5).integers(1, 300, 103)


def sorted_steps(rows, size, processes, global_batch, lengths):
    """The rows of each optimizer step by micro-batch, [step][micro-batch][process]."""
    accumulation = global_batch // (size * processes)
    samplers = [EpochBatches(rows, size, 0, processes, rank, lengths, accumulation) for rank in range(processes)]
    of_each = list(zip(*map(list, samplers), strict=True))
    return [of_each[m : m + accumulation] for m in range(0, len(of_each), accumulation)]


@pytest.mark.parametrize(("processes", "size"), [(1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_sorting_by_length_leaves_each_optimizer_step_its_rows(processes, size):
    unsorted = steps(103, 8, 1, 8)
    sorted_ones = sorted_steps(103, size, processes, 8, LENGTHS)
    flat = [[row for micro in step for batch in micro for row in batch if row >= 0] for step in sorted_ones]
    assert [sorted(step) for step in flat] == [sorted(step) for step in unsorted]
    for step in flat:
        assert LENGTHS[step].tolist() == sorted(LENGTHS[step], reverse=True)


def test_sorting_by_length_pads_less():
    def positions(micro_batches):
        return sum(len(rows) * LENGTHS[rows].max() for rows in micro_batches)

    plain = positions(EpochBatches(103, 4, 0))
    by_length = positions(EpochBatches(103, 4, 0, lengths=LENGTHS, accumulation=8))
    assert LENGTHS.sum() < by_length < 0.8 * plain


# ---- Batches of rows of similar length ----


def length_batches(lengths=LENGTHS, size=8, processes=1, seed=0, epoch=0, max_tokens=None):
    """The batches of every process: [process][micro-batch] -> rows."""
    samplers = [LengthBatches(lengths, size, seed, processes, rank, max_tokens) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    result = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(lists) for lists in result]
    return result


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [None, 1, 250, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_each_row_comes_once_an_epoch_within_the_budget(processes, max_tokens, epoch):
    of_each = length_batches(processes=processes, max_tokens=max_tokens, epoch=epoch)
    found = [batch for rank in of_each for batch in rank if batch != [-1]]
    assert sorted(chain(*found)) == list(range(103))
    for batch in found:
        assert len(batch) <= 8
        assert max_tokens is None or len(batch) * LENGTHS[batch].max() <= max_tokens or len(batch) == 1
    assert len({len(rank) for rank in of_each}) == 1
    assert not any([-1] in rank[:-1] for rank in of_each)


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_all_epochs_have_as_many_batches_of_other_rows(max_tokens):
    epochs = [length_batches(epoch=epoch, max_tokens=max_tokens)[0] for epoch in range(20)]
    assert len({tuple(sorted(map(len, epoch))) for epoch in epochs}) == 1
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 20
    assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 20
    assert length_batches(epoch=3, max_tokens=max_tokens)[0] == epochs[3]
    assert length_batches(seed=1, max_tokens=max_tokens)[0] != epochs[0]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_take_the_batches_of_one_in_rounds(processes):
    alone = length_batches(max_tokens=700)[0]
    of_each = length_batches(max_tokens=700, processes=processes)
    dealt = [batch for round_ in zip(*of_each, strict=True) for batch in round_]
    assert dealt[: len(alone)] == alone
    assert all(batch == [-1] for batch in dealt[len(alone) :])
    assert len(dealt) - len(alone) < processes


def test_batches_of_many_rows_have_little_padding():
    lengths = np.random.default_rng(1).integers(5, 500, 5000)
    batches = length_batches(lengths, size=16)[0]
    padding = 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padding < 0.06
    assert len(batches) == -(-5000 // 16)


def test_batches_are_not_in_the_order_of_their_length():
    longest = [int(LENGTHS[batch].max()) for batch in length_batches()[0]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.mark.parametrize("lengths", [[1], [7] * 9, [1, 1000]])
def test_few_or_equal_rows_make_batches_too(lengths):
    [batches] = length_batches(np.array(lengths), size=4, max_tokens=100)
    assert sorted(chain(*batches)) == list(range(len(lengths)))


@pytest.mark.parametrize("skipped", [1, 3])
def test_seeking_with_accelerate_gives_the_tail_of_an_epoch_by_length(skipped):
    lengths = np.arange(1, 21)
    loader = DataLoader(Identity(), batch_sampler=LengthBatches(lengths, 4, 3, 2, 1), collate_fn=list)
    loader.batch_sampler.set_epoch(2)
    straight = list(loader)
    loader.batch_sampler.set_epoch(0)
    sought = skip_first_batches(loader, skipped)
    sought.batch_sampler.batch_sampler.set_epoch(2)
    assert list(sought) == straight[skipped:]

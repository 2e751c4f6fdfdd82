"""The store of the frozen-prefix cache: what is damaged counts as missing; and rows known by their content."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kit.data.blocks import TokenRows, TrainPart
from kit.data.labeled_examples import CollateLabeled
from kit.data.packing import Layout
from kit.recipe.freezing import FreezingSection
from kit.training.prefix_data import prefix_data
from kit.training.prefix_rows import CollateNamed, rows_of_call, take_rows
from kit.training.prefix_store import PrefixStore, make_room
from kit.training.throughput import flops_per_token
from tests.material import make_model

LIMIT = 1 << 20


def digest(number):
    return number.to_bytes(16, "little")


def payload(number, size=100):
    return np.random.default_rng(number).integers(0, 256, size + number, dtype=np.uint8)


def filled(folder, numbers=range(5), limit=LIMIT):
    store = PrefixStore(folder, limit)
    for number in numbers:
        store.write(digest(number), payload(number))
    return store


def readable(store, numbers=range(5)):
    """Return the numbers whose payload is there; one that is there has to be right."""
    found = set()
    store.holds([digest(n) for n in numbers])
    for number in numbers:
        into = np.zeros_like(payload(number))
        if store.read(digest(number), into):
            assert np.array_equal(into, payload(number))
            found.add(number)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "stores" / "one"


def the_log(folder):
    [log] = folder.iterdir()
    return log


def test_what_one_process_writes_another_reads_at_once_and_later_ones_too(folder):
    reader = PrefixStore(folder, LIMIT)
    assert not reader.holds([digest(0)])
    writer = filled(folder, [0, 1])
    assert reader.holds([digest(0), digest(1)])
    writer.write(digest(2), payload(2))
    assert readable(reader) == {0, 1, 2} == readable(writer) == readable(PrefixStore(folder, LIMIT))
    assert not reader.read(digest(1), np.zeros(7, dtype=np.uint8)), "of another length"


def test_a_record_is_written_once(folder):
    store = filled(folder)
    size = store.num_bytes
    store.write(digest(3), payload(3))
    assert store.num_bytes == size == the_log(folder).stat().st_size


@pytest.mark.parametrize("place", [60, -1])
def test_a_damaged_record_counts_as_missing_and_can_be_written_again(folder, place):
    filled(folder)
    content = bytearray(the_log(folder).read_bytes())
    content[place] ^= 1
    the_log(folder).write_bytes(content)
    store, damaged = PrefixStore(folder, LIMIT), {0} if place > 0 else {4}
    assert readable(store) == set(range(5)) - damaged
    assert store.damaged == 1
    [number] = damaged
    store.write(digest(number), payload(number))
    assert readable(store) == set(range(5))


def test_of_a_header_that_is_none_on_a_log_is_left(folder):
    filled(folder)
    content = bytearray(the_log(folder).read_bytes())
    content[136] ^= 255  # where the second record begins
    the_log(folder).write_bytes(content)
    store = PrefixStore(folder, LIMIT)
    assert readable(store) == {0}
    assert store.damaged == 1


@pytest.mark.parametrize("cut", [1, 30, 137, 250])
def test_a_truncated_log_holds_what_is_whole(folder, cut):
    filled(folder)
    os.truncate(the_log(folder), cut)
    store = PrefixStore(folder, LIMIT)
    assert readable(store) == ({0} if cut > 136 else set())
    filled(folder)
    assert readable(store) == set(range(5))


def test_a_log_that_is_truncated_under_a_reader_ends_nobody(folder):
    filled(folder)
    store = PrefixStore(folder, LIMIT)
    assert readable(store) == set(range(5))
    os.truncate(the_log(folder), 137)
    assert readable(store) == {0}
    assert store.damaged == 4


def test_a_log_with_bytes_behind_its_end_holds_what_it_held(folder):
    filled(folder)
    with the_log(folder).open("ab") as log:
        log.write(bytes(1000))
    assert readable(PrefixStore(folder, LIMIT)) == set(range(5))


def test_more_than_the_limit_is_refused(folder):
    store = PrefixStore(folder, 400)
    store.write(digest(0), payload(0))
    store.write(digest(1), payload(1))
    with pytest.raises(OSError, match="400"):
        store.write(digest(2), payload(2))
    assert readable(store) == {0, 1}


def test_a_full_disk_leaves_no_half_record(folder, monkeypatch):
    store = filled(folder, [0])
    size = the_log(folder).stat().st_size
    write = os.pwritev

    def half(file, parts, offset):
        return write(file, [b"".join(bytes(part) for part in parts)[:70]], offset)

    def none_left(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", half)
    monkeypatch.setattr(os, "pwrite", none_left)
    with pytest.raises(OSError, match="No space"):
        store.write(digest(1), payload(1))
    assert the_log(folder).stat().st_size == size
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwritev", half)  # a short write alone is gone on with
    store.write(digest(1), payload(1))
    assert readable(PrefixStore(folder, LIMIT)) == {0, 1}


def _fill(folder, start):
    store = PrefixStore(folder, LIMIT)
    for number in [*range(start, 40), *range(start)]:
        if not store.holds([digest(number)]):
            store.write(digest(number), payload(number))
        assert store.read(digest(number), np.zeros_like(payload(number)))


def test_several_processes_fill_one_store(folder):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fill, args=(folder, start)) for start in (0, 10, 20)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert readable(PrefixStore(folder, LIMIT), range(40)) == set(range(40))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for number, name in enumerate(("old", "older", "new", "own")):
        filled(tmp_path / name)
        os.utime(tmp_path / name, (number, {"older": 1, "old": 2, "new": 3, "own": 0}[name]))
    size = sum(log.stat().st_size for log in (tmp_path / "new").iterdir())
    assert make_room(tmp_path, tmp_path / "own", size, 4 * size) == []
    assert make_room(tmp_path, tmp_path / "own", size, 3 * size) == [tmp_path / "older"]
    assert make_room(tmp_path, tmp_path / "own", size, size) == [tmp_path / "old", tmp_path / "new"]
    assert (tmp_path / "own").exists()
    assert make_room(tmp_path / "missing", tmp_path / "own", 1, 1) == []


def test_a_store_that_goes_while_its_size_is_looked_up_counts_as_gone(tmp_path, monkeypatch):
    for name in ("gone", "whole"):
        filled(tmp_path / name)
    stat = Path.stat

    def vanishing(path, **kwargs):
        if path.suffix == ".log" and path.parent.name == "gone":
            shutil.rmtree(path.parent, ignore_errors=True)
        return stat(path, **kwargs)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert make_room(tmp_path, tmp_path / "own", 1, LIMIT) == []
    assert not (tmp_path / "gone").exists()
    assert (tmp_path / "whole").exists()


def test_room_that_is_reserved_is_left(folder):
    store = PrefixStore(folder, 400)
    with pytest.raises(OSError, match="stored"):
        store.write(digest(0), payload(0), reserved=300)
    store.write(digest(0), payload(0), reserved=200)
    assert readable(store) == {0}


# ---- How much there is


def pieces(sizes, blocks, chosen, block_size=4):
    """Return a part of an epoch whose layout has pieces of these sizes, in these blocks."""
    ends = np.cumsum(sizes)
    layout = Layout(np.stack([ends - sizes, ends], axis=1), np.array(blocks))
    return TrainPart(SimpleNamespace(), np.arange(1), layout, np.array(chosen), block_size)


@pytest.mark.parametrize(("packing", "positions", "length"), [(True, 8, 4), (False, 7, 2)])
def test_a_row_that_an_epoch_holds_twice_takes_room_once(packing, positions, length):
    part = pieces([1, 2, 4, 3], [0, 2, 3, 4], [0, 1, 1, 0, 1])  # of three blocks two, with pieces 1 + 2 and 4
    rows = TokenRows([part], packing, 0, 0)
    corpus = SimpleNamespace(
        rows=rows, collate=None, sets={"domain": SimpleNamespace(lengths=np.array([5, 6]))}, key=""
    )
    found = prefix_data(corpus, None, "store")
    assert (found.positions, found.length, found.evaluated) == (positions, length, 11)


# ---- Rows


def row(tokens, label=0):
    return {"input_ids": np.array(tokens), "labels": np.array(label), "weights": np.array(1.0)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_has_one_name_in_any_batch_whatever_its_label(side):
    collate = CollateNamed(CollateLabeled(0, side))
    batch = collate([row([5, 6, 7]), row([5, 6], label=1)])
    other = collate([row([5, 6]), row([9, 9, 9, 9, 0])])
    [(_, start, length), short] = take_rows(batch)
    assert (start, length) == (0, 3)
    assert short[1:] == ((1 if side == "left" else 0), 2)
    [again, long] = take_rows(other)
    assert again[0] == short[0]
    assert again[1:] == ((3 if side == "left" else 0), 2)
    assert len({again[0], long[0]}) == 2
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "weights"}
    assert take_rows(batch) is None


def test_positions_and_types_of_tokens_are_a_part_of_the_name():
    def name(**more):
        return take_rows(CollateNamed(CollateLabeled(0))([row([5, 6]) | more]))[0][0]

    names = {name(), name(token_type_ids=np.array([0, 1])), name(position_ids=np.array([0, 0]))}
    assert len(names) == 3


def test_a_call_that_generates_or_gives_no_ids_is_not_served():
    ids = torch.arange(6).view(2, 3)
    assert len(rows_of_call((), {"input_ids": ids, "use_cache": False})) == 2
    first = rows_of_call((), {"input_ids": ids})
    assert first == rows_of_call((), {"input_ids": ids, "labels": ids})
    assert first != rows_of_call((), {"input_ids": ids, "attention_mask": ids.ge(1)})
    assert rows_of_call((), {"input_ids": ids, "use_cache": True}) is None
    assert rows_of_call((ids,), {}) is None
    assert rows_of_call((), {"inputs_embeds": ids}) is None


# ---- What is left out of a step


def test_operations_without_the_first_blocks():
    model, width, length, weights = make_model("gpt2", num_hidden_layers=2), 32, 16, 12 * 32**2
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    saved = flops_per_token(model, length) - flops_per_token(model, length, 1)
    assert saved == 2 * weights + 4 * length * width
    for parameter in model.transformer.h[1].parameters():
        parameter.requires_grad_(True)
    assert flops_per_token(model, length) - flops_per_token(model, length, 1) == pytest.approx(saved)


# ---- The recipe


def test_words_that_yaml_reads_as_booleans():
    section = {"trainable": {"last_blocks": 1}}
    found = [FreezingSection(**section, cache=value).cache for value in (True, False, "on", "off", "auto")]
    assert found == ["on", "off", "on", "off", "auto"]
    assert FreezingSection(**section).cache == "auto"
    with pytest.raises(ValueError, match="cache"):
        FreezingSection(**section, cache="maybe")
    with pytest.raises(ValueError, match="says nothing"):
        FreezingSection(cache="on")

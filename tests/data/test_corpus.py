"""From a recipe's data section to rows, evaluation sets and ledger, with the tiny tokenizer."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from kit.data.blocks import IGNORE_INDEX
from kit.data.corpus import build_corpus, recode, training_documents, training_documents_key
from kit.errors import UserError
from kit.recipe.data import DataSection
from kit.recipe.models import EvaluationSet
from tests.data.encoders import encode_characters
from tests.material import documents

SEPARATOR = "\n\n\n"


@pytest.fixture
def write(tmp_path):
    def write(name, texts):
        path = tmp_path / name
        path.write_text(SEPARATOR.join(texts), encoding="utf-8")
        return {"path": str(path), "separator": SEPARATOR}

    return write


@pytest.fixture
def build(tmp_path, coding):
    """A function that builds a corpus from a data section's values and evaluation sets'."""

    def build(train, sets=None, seed=0, **data):
        section = DataSection.model_validate(
            {"train": train, "block_size": 16, "store_dir": str(tmp_path / "store"), **data}
        )
        wanted = {name: EvaluationSet.model_validate(values) for name, values in (sets or {}).items()}
        return build_corpus(section, wanted, coding, seed)

    return build


@pytest.fixture
def count(tokenizer):
    """A function that counts tokens one document at a time, EOS included."""
    return lambda texts: sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)


def trained_texts(corpus, tokenizer):
    """The documents that an unpacked epoch of whole documents trains on."""
    labels = [corpus.rows[i]["shift_labels"] for i in range(len(corpus.rows))]
    return [tokenizer.decode(row[row != IGNORE_INDEX][:-1].tolist()) for row in labels]


def measured_texts(documents, tokenizer):
    every = range(len(documents.lengths))
    return [tokenizer.decode(documents.tokens(i, 0, int(documents.lengths[i]) - 1).tolist()) for i in every]


def whole(build, *args, **data):
    """Build so that the first block holds everything, and single rows are whole documents."""
    return build(*args, block_size=10**6, packing=False, **data)


def test_each_document_trains_or_is_measured(build, write, tokenizer, count):
    texts = documents(120, seed=3)
    corpus = whole(build, [write("a.txt", texts)], validation={"fraction": 0.2})
    train, held = trained_texts(corpus, tokenizer), measured_texts(corpus.sets["domain"], tokenizer)
    assert sorted(train + held) == texts
    assert len(held) > 5
    (row,) = corpus.ledger
    assert (row.documents, row.held_out, row.left_out) == (len(train), len(held), {})
    assert row.read == row.trained == count(train)
    assert corpus.sets["domain"].lengths.sum() == count(held)
    assert corpus.sets["domain"].num_bytes == sum(len(text.encode()) for text in held)


@pytest.mark.parametrize("packing", [True, False])
def test_the_ledger_agrees_with_tokens_counted_alone(build, write, tokenizer, count, packing):
    shared = documents(10, seed=9)
    a, b = documents(50, seed=1), documents(40, seed=2)
    train = [write("a.txt", a + shared[:4] + ["", "  "]), {**write("b.txt", b + shared[4:]), "weight": 0.7}]
    corpus = build(train, {"general": write("general.txt", shared)}, packing=packing)
    first, second = corpus.ledger
    assert first.read == count(a + shared[:4])
    assert second.read == count(b + shared[4:])
    assert first.dropped == {"also in evaluation": count(shared[:4])}
    assert second.dropped["also in evaluation"] == count(shared[4:])
    assert first.trained == count(a)
    assert first.left_out["empty"]["documents"] == 2
    for row in corpus.ledger:
        assert row.read + row.repeated == row.trained + row.context + row.total_dropped
    labels = [row for i in range(len(corpus.rows)) for row in corpus.rows[i]["shift_labels"]]
    assert sum(label != IGNORE_INDEX for label in labels) == first.trained + second.trained
    assert abs(second.trained - 0.7 * (first.trained + second.trained)) <= 16


def test_a_document_that_is_measured_on_does_not_train(build, write, tokenizer):
    texts, shared = documents(30, seed=1), documents(3, seed=2)
    sets = {"general": write("general.txt", documents(5, seed=4) + shared)}
    corpus = whole(build, [write("a.txt", texts + shared + shared)], sets)
    assert sorted(trained_texts(corpus, tokenizer)) == sorted(set(texts) - set(shared))
    assert set(shared) <= set(measured_texts(corpus.sets["general"], tokenizer))


def test_a_validation_document_does_not_train_from_another_source(build, write, tokenizer):
    texts = documents(60, seed=1)
    train = [write("a.txt", texts), write("b.txt", texts[::2] + ["a text of its own"])]
    corpus = whole(build, train, validation={"fraction": 0.3}, exact_duplicates="keep")
    held = measured_texts(corpus.sets["domain"], tokenizer)
    assert len(held) > len(set(held)), "no duplicate is held out: nothing is tested"
    assert not set(trained_texts(corpus, tokenizer)) & set(held)


def test_measuring_on_the_training_split_takes_nothing_from_it(build, write, tokenizer):
    texts = documents(60, seed=1)
    sets = {"seen": {"split": "train"}, "domain": {"split": "validation"}}
    corpus = whole(build, [write("a.txt", texts)], sets, validation={"fraction": 0.2})
    assert sorted(trained_texts(corpus, tokenizer)) == sorted(measured_texts(corpus.sets["seen"], tokenizer))
    assert sorted(trained_texts(corpus, tokenizer) + measured_texts(corpus.sets["domain"], tokenizer)) == texts
    assert corpus.ledger[0].dropped == {}


def test_held_out_documents_do_not_train_even_where_they_are_not_measured(build, write, tokenizer):
    texts = documents(60, seed=1)
    sets = {"general": write("general.txt", documents(5, seed=77))}
    with_set = whole(build, [write("a.txt", texts)], sets, validation={"fraction": 0.2})
    without = whole(build, [write("a.txt", texts)], validation={"fraction": 0.2})
    assert list(with_set.sets) == ["general"]
    assert trained_texts(with_set, tokenizer) == trained_texts(without, tokenizer)


def test_validation_by_sources_of_its_own(build, write, tokenizer):
    texts, first, second = documents(30, seed=1), documents(8, seed=2), documents(6, seed=3)
    validation = [write("v.txt", first), write("w.txt", second + texts[:1])]
    corpus = whole(build, [write("a.txt", texts)], validation=validation)
    assert measured_texts(corpus.sets["domain"], tokenizer) == first + second + texts[:1]
    assert trained_texts(corpus, tokenizer) == texts[1:]
    assert corpus.ledger[0].held_out == 0


def test_without_validation_everything_trains(build, write, tokenizer):
    texts = documents(30, seed=1)
    corpus = whole(build, [write("a.txt", texts)])
    assert trained_texts(corpus, tokenizer) == texts
    assert corpus.sets == {}


def test_documents_to_measure_on_are_limited_over_all_sources_and_barely_change(build, write, tokenizer):
    a, b, added = documents(40, seed=1), documents(40, seed=2), documents(20, seed=3)

    def measured(extra):
        sets = {"some": {"split": "validation", "max_documents": 9}}
        corpus = build([write("a.txt", a), write("b.txt", extra + b)], sets, validation={"fraction": 0.5})
        texts = measured_texts(corpus.sets["some"], tokenizer)
        assert len(texts) == len(corpus.sets["some"].hashes) == 9
        return set(texts)

    before, after = measured([]), measured(added)
    assert before & set(a)
    assert before & set(b)
    assert after - before <= set(added)
    assert before & after


@pytest.mark.parametrize("seed", [0, 4])
def test_a_fraction_of_a_source_is_what_validation_would_hold_out_of_it(build, write, tokenizer, seed):
    """So a base model is measured on what its own pretraining left out, whatever the new domain is."""
    general, split = write("general.txt", documents(60, seed=1)), {"fraction": 0.2, "seed": seed}
    pretraining = build([general], validation=split)
    corpus = build([write("a.txt", documents(20, seed=5))], {"general": {**general, **split}})
    measured = measured_texts(corpus.sets["general"], tokenizer)
    assert measured == measured_texts(pretraining.sets["domain"], tokenizer)
    assert 0 < len(measured) < 60
    assert corpus.sets["general"].key == pretraining.sets["domain"].key


def test_a_fraction_that_holds_no_document_is_refused(build, write):
    sets = {"general": {**write("general.txt", documents(7, seed=1)), "fraction": 1e-9}}
    with pytest.raises(UserError, match=r"evaluation set `general` is empty: the fraction 1e-09 of 7 documents"):
        build([write("a.txt", documents(20, seed=5))], sets)


def test_tokens_of_measured_documents_are_read_in_part(build, write, tokenizer):
    texts = documents(12, seed=1)
    sets = {"all": {**write("v.txt", texts)}, "more": {"split": "validation"}}
    validation = [write("x.txt", texts[:5]), write("y.txt", texts[5:])]
    corpus = build([write("a.txt", documents(5, seed=8))], sets, validation=validation)
    for measured in corpus.sets.values():
        for i, text in enumerate(texts):
            expected = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            length = int(measured.lengths[i])
            assert length == len(expected)
            assert measured.tokens(i, 0, length).tolist() == expected
            assert measured.tokens(i, length - 1, length).tolist() == expected[-1:]
        with pytest.raises(IndexError):
            measured.tokens(len(texts), 0, 1)


def test_an_empty_validation_split_is_refused(build, write):
    with pytest.raises(UserError, match=r"evaluation set `domain` is empty.*`sample_by`"):
        build([write("a.txt", documents(20, seed=1))], validation={"fraction": 1e-9})


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_single_document_cannot_be_split(build, write, fraction):
    """Whichever side it falls on, the other is empty."""
    train = [write("b.txt", documents(20, seed=1)), write("a.txt", ["one document"])]
    with pytest.raises(UserError, match=r"a\.txt`: is one document.*`sample_by` or `separator`.*`data\.validation`"):
        build(train, validation={"fraction": fraction})


def test_a_source_that_is_measured_on_as_a_whole_is_refused(build, write):
    source = write("a.txt", documents(20, seed=1))
    message = r"a\.txt`: all of its 20 training documents are also in the evaluation set `general`; measure on other"
    with pytest.raises(UserError, match=message):
        build([source], {"general": source})


def test_where_nothing_is_left_the_causes_are_told(build, write):
    a, b = documents(20, seed=1), documents(4, seed=2)
    message = r"b\.txt`: none of its 24 documents is left.*\(also in evaluation: 4; exact duplicate: 20\)"
    with pytest.raises(UserError, match=message):
        build([write("a.txt", a), write("b.txt", a + b)], {"general": write("v.txt", b)})
    message = r"b\.txt`: none of its 24 documents is left.*\(held out: 24\)"
    with pytest.raises(UserError, match=message):
        # Of the longer source something is left, of the shorter nothing.
        build([write("a.txt", documents(4000, seed=3)), write("b.txt", a + b)], validation={"fraction": 0.999})


def test_a_source_without_text_is_refused(build, write):
    with pytest.raises(UserError, match=r"empty\.txt`: no document is left in it \(empty: 3\)"):
        build([write("a.txt", documents(5, seed=1)), write("empty.txt", ["", " ", "\t"])])


def test_building_again_encodes_nothing_and_gives_the_same(build, write, coding, monkeypatch):
    train = [write("a.txt", documents(40, seed=1))]
    first = build(train, validation={"fraction": 0.3})
    monkeypatch.setitem(coding.__dict__, "encode", None)
    second = build(train, validation={"fraction": 0.3})
    assert first.key == second.key
    assert len(first.rows) == len(second.rows)
    assert first.ledger == second.ledger


def test_the_key_follows_all_that_trains_or_is_measured(build, write):
    train, other = [write("a.txt", documents(40, seed=1))], write("v.txt", documents(5, seed=2))
    weighted = [train[0], {**other, "weight": 0.05}]
    corpora = [
        build(train),
        build(train, block_size=17),
        build(train, packing=False),
        build(train, validation={"fraction": 0.3}),
        build(train, validation={"fraction": 0.3, "seed": 1}),
        build(train, {"general": other}),
        build(train, {"general": write("v2.txt", documents(5, seed=4))}),
        build([train[0], {**write("c.txt", documents(200, seed=5)), "weight": 0.3}], seed=0),
        build([train[0], {**write("c.txt", documents(200, seed=5)), "weight": 0.3}], seed=1),
        build(weighted),
    ]
    assert len({corpus.key for corpus in corpora}) == len(corpora)
    # Two block sizes that give equally many blocks are two corpora all the same.
    tokens = corpora[0].ledger[0].read
    assert build(train, block_size=tokens).key != build(train, block_size=tokens + 1).key


def test_the_tokenizer_learns_from_the_training_split_alone(build, write, tokenizer, tmp_path):
    texts = documents(80, seed=1)
    values = {"train": [write("a.txt", texts)], "validation": {"fraction": 0.3}}
    learned = list(training_documents(DataSection.model_validate(values)))
    assert learned == trained_texts(whole(build, values["train"], validation=values["validation"]), tokenizer)
    assert 0 < len(learned) < len(texts)
    key = training_documents_key(DataSection.model_validate(values))
    values["validation"]["seed"] = 1
    assert training_documents_key(DataSection.model_validate(values)) != key
    values["validation"] = [write("v.txt", texts[:3])]
    assert list(training_documents(DataSection.model_validate(values))) == texts


def test_formats_mix(build, write, tmp_path, tokenizer):
    texts = documents(9, seed=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"body": text}) for text in texts[:4]))
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\r\n".join(texts[4:]).encode())
    train = [{"path": str(rows), "text_column": "body"}, {"path": str(lines), "sample_by": "line"}]
    assert Counter(trained_texts(whole(build, train), tokenizer)) == Counter(texts)


def test_a_tokenizer_is_not_trained_on_more_than_max_tokens_may_take(write):
    texts = documents(200, seed=5)
    source = write("corpus.txt", texts)
    limited = DataSection.model_validate({"train": [{**source, "max_tokens": 100}]})
    learned = list(training_documents(limited))
    assert learned == texts[: len(learned)]
    assert sum(map(len, learned)) <= 600
    assert training_documents_key(limited) != training_documents_key(DataSection.model_validate({"train": [source]}))


def test_a_source_that_changes_while_it_is_stored_is_refused_and_not_kept(build, write, monkeypatch, tmp_path):
    """Also where `max_tokens` ends the reading before the source does."""
    import kit.data.corpus

    source = write("corpus.txt", documents(200, seed=5))
    original = kit.data.corpus.read_documents

    def changes(source):
        for number, text in enumerate(original(source)):
            if number == 3:
                write("corpus.txt", documents(200, seed=6))
            yield text

    monkeypatch.setattr(kit.data.corpus, "read_documents", changes)
    with pytest.raises(UserError, match="changed while it was read"):
        build([{**source, "max_tokens": 500}])
    assert [path for path in (tmp_path / "store" / "tokens").iterdir() if path.is_dir()] == []


def test_repeated_documents_of_an_evaluation_set_are_told(build, write, capsys):
    texts = documents(30, seed=5)
    build([write("a.txt", texts)], {"general": write("b.txt", ["one more", "one more", "another"])})
    assert "evaluation set `general`: 3 documents, of which 2 are different" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 1500}])
def test_another_tokenizer_gets_the_same_documents(build, write, tmp_path, coding, tokenizer, limit):
    """Whatever it makes of the tokens that `max_tokens` counts."""
    texts = documents(120, seed=3)
    source = {**write("a.txt", texts), **limit}
    sets = {"domain": {"split": "validation"}, "own": {**write("b.txt", documents(20, seed=8)), "max_documents": 7}}
    values = {"train": [source], "validation": {"fraction": 0.2}, "store_dir": str(tmp_path / "store")}
    section = DataSection.model_validate(values)
    corpus = build([source], sets, validation={"fraction": 0.2})
    characters = dataclasses.replace(coding, key="characters", encode=encode_characters, vocab_size=1 << 17)

    for chosen in (corpus.training, *(each.stores for each in corpus.sets.values())):
        recoded = recode(chosen, section, characters)
        for (store, selected), (other, same) in zip(chosen, recoded, strict=True):
            assert np.array_equal(selected, same)
            decoded = [tokenizer.decode(store.document(i).tolist()) for i in selected]
            assert ["".join(map(chr, other.document(i))) for i in same] == decoded
            assert np.array_equal(other.num_bytes, store.num_bytes)
    assert corpus.ledger[0].stopped == bool(limit)


def test_a_source_that_changed_is_not_taken_for_the_same(build, write, tmp_path, coding):
    source = write("a.txt", documents(30, seed=3))
    section = DataSection.model_validate({"train": [source], "store_dir": str(tmp_path / "store")})
    corpus = build([source])
    write("a.txt", documents(30, seed=4))
    other = dataclasses.replace(coding, key="characters", encode=encode_characters, vocab_size=1 << 17)
    with pytest.raises(UserError, match="changed"):
        recode(corpus.training, section, other)

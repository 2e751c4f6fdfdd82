"""From labelled files to rows of an epoch and evaluation sets. A token is a byte, so that all counts are exact."""

import json
import pickle
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kit.data.labeled_corpus import (
    CollateLabeled,
    SequenceCoding,
    build_labeled_corpus,
    labeled_sources_key,
)
from kit.errors import UserError
from kit.recipe.classification import LabeledDataSection, LabeledEvaluationSection

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")
BEGIN, END = 256, 257


def coding(max_length=1000, types=False, **settings):
    """Bytes between a begin and an end, as BERT's tokenizers do it, cut at the end."""

    def encode(texts, pairs):
        assert len(texts) <= 1000
        result = []
        for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
            ids = [BEGIN, *text.encode(), END]
            second = [] if pair is None else [*pair.encode(), END]
            of_ids = ([0] * len(ids) + [1] * len(second))[:max_length] if types else None
            result.append(((ids + second)[:max_length], of_ids, len(ids) + len(second)))
        return result

    return SequenceCoding(key=f"bytes {max_length} {types}", encode=encode, pad_token_id=0, **settings)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Write rows into files, and build the corpus of them: `train` and other parts are lists of dictionaries."""
    monkeypatch.chdir(tmp_path)

    def source(name, rows):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {"pair": "text_pair_column", "group": "group_column"}
        return {"path": f"{name}.jsonl"} | {key: c for c, key in columns.items() if c in rows[0]} | SETTINGS

    SETTINGS = {}

    def corpus(train, validation=None, test=None, sets=None, evaluation=None, with_coding=None, keys=None, **data):
        SETTINGS.clear()
        SETTINGS.update(keys or {})
        given = {"validation": validation, "test": test}
        parts = {name: [source(name, rows)] for name, rows in {"train": train, **given}.items() if rows}
        measured = {"sets": {name: source(name, rows) for name, rows in (sets or {}).items()}, **(evaluation or {})}
        return build_labeled_corpus(
            LabeledDataSection.model_validate({**parts, **data}),
            LabeledEvaluationSection.model_validate(measured),
            with_coding or coding(),
        )

    return corpus


def rows(n, prefix="text", labels=("ham", "spam")):
    return [{"text": f"{prefix} number {i}", "label": labels[i % len(labels)]} for i in range(n)]


NO_SPLIT = {"split": {"validation": 0.0, "test": 0.0}}


def decoded(row):
    return bytes(t for t in row["input_ids"].tolist() if t < 256).decode()


def epoch(corpus):
    return [decoded(corpus.rows[i]) for i in range(len(corpus.rows))]


def account(corpus, part="train"):
    return next(ledger for ledger in corpus.ledger if ledger.part == part)


# ---- Parts ----


def test_one_file_becomes_training_rows_and_sets_in_their_order(build):
    corpus = build(rows(100), sets={"other": rows(7, "other")}, evaluation={"train_sample": 20})
    assert {name: len(s) for name, s in corpus.sets.items()} == {
        "validation": 10, "train_sample": 20, "test": 20, "other": 7,
    }  # fmt: skip
    assert list(corpus.sets) == ["validation", "train_sample", "test", "other"]
    assert corpus.final_sets == ("test", "other")
    assert len(corpus.rows) == len(corpus.train) == 70
    assert [ledger.part for ledger in corpus.ledger] == ["train", *corpus.sets]
    assert corpus.labels.names == ("ham", "spam")
    assert account(corpus).split_off == {"validation": 10, "test": 20}
    together = [*corpus.train.texts, *corpus.sets["validation"].texts, *corpus.sets["test"].texts]
    assert sorted(together) == sorted(row["text"] for row in rows(100))
    assert set(corpus.sets["train_sample"].texts) <= set(corpus.train.texts)


def test_rows_and_sets_hold_the_same_texts_labels_and_places(build):
    corpus = build(rows(40))
    of_text = {row["text"]: (row["label"], f"train.jsonl:{i}") for i, row in enumerate(rows(40), start=1)}
    for name, measured in {"train": corpus.train, **corpus.sets}.items():
        assert measured.name == name
        for index, text in enumerate(measured.texts):
            row = measured.rows[index]
            label, where = of_text[text]
            assert decoded(row) == text
            assert corpus.labels.names[row["labels"]] == label == corpus.labels.names[measured.labels[index]]
            assert measured.where[index].endswith(where)
            assert row["labels"].dtype == np.int64
            assert row["weights"] == 1
            assert measured.rows.lengths[index] == len(text) + 2


def test_sources_of_parts_are_taken_whole_and_leave_the_training_rows(build):
    train = [*rows(20), *rows(4, "shared"), *rows(2, "measured")]
    corpus = build(
        train, validation=[*rows(4, "shared"), *rows(4, "v")], test=rows(6, "t"), sets={"extra": rows(2, "measured")}
    )
    assert len(corpus.sets["validation"]) == 8
    assert len(corpus.sets["test"]) == 6
    assert corpus.train.texts == [row["text"] for row in rows(20)]
    dropped = account(corpus).dropped
    assert {cause: entry["rows"] for cause, entry in dropped.items()} == {"also in validation": 4, "also in extra": 2}
    assert dropped["also in validation"]["examples"][0]["text"] == "shared number 0"
    assert dropped["also in validation"]["examples"][0]["where"].endswith("train.jsonl:21")


def test_a_part_with_sources_leaves_the_other_to_the_split(build):
    corpus = build(rows(100), test=rows(6, "t"))
    assert {name: len(s) for name, s in corpus.sets.items()} == {"validation": 10, "train_sample": 90, "test": 6}


def test_what_is_split_off_holds_nothing_of_a_test_of_its_own(build):
    """Validation chooses the model: it is not to have seen the test."""
    for seed in range(5):
        corpus = build(rows(40), test=rows(20), split={"seed": seed, "validation": 0.5})
        assert not set(corpus.sets["validation"].texts) & set(corpus.sets["test"].texts)
        assert len(corpus.sets["validation"]) == 10
        assert account(corpus).dropped["also in test"]["rows"] == 20


def test_a_part_of_rare_classes_alone_is_an_error(build):
    rare = [{"text": "once", "label": "rare"}]
    with pytest.raises(UserError, match=r"test: no row is left \(class of fewer than 2 rows: 1\); lower"):
        build([*rows(20), {"text": "twice", "label": "rare"}], test=rare, min_rows_per_label=2)


def test_validation_in_the_test_is_told(build, capsys):
    build(rows(20), validation=rows(4, "v"), test=[*rows(3, "v"), *rows(2, "t")])
    assert "test: 3 of 5 rows are also in validation, which chooses the model, such as `v number 0`" in (
        capsys.readouterr().out
    )


def test_without_validation_nothing_chooses_the_model(build, capsys):
    corpus = build(rows(20), split={"validation": 0.0, "test": 0.2})
    assert list(corpus.sets) == ["train_sample", "test"]
    assert "nothing chooses the model" in capsys.readouterr().out
    build(rows(20))
    assert "nothing chooses the model" not in capsys.readouterr().out


def test_no_sample_where_none_is_asked_for(build):
    assert "train_sample" not in build(rows(20), evaluation={"train_sample": 0}).sets


def test_the_sample_is_the_same_whatever_trains_beside_it(build):
    plain = build(rows(100), evaluation={"train_sample": 10})
    noisy = build(rows(100), evaluation={"train_sample": 10}, augment={"characters": 0.5}, balance="oversample")
    assert plain.sets["train_sample"].texts == noisy.sets["train_sample"].texts
    assert plain.sets["train_sample"].key == noisy.sets["train_sample"].key


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_file_moves_no_row(build, seed):
    train = [*rows(90), *rows(10, "twice"), *rows(10, "twice")]
    shuffled = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    one, other = build(train, balance="undersample"), build(shuffled, balance="undersample")
    for name in one.sets:
        assert sorted(one.sets[name].texts) == sorted(other.sets[name].texts)
    assert sorted(one.train.texts) == sorted(other.train.texts)


def test_groups_stay_on_one_side(build):
    train = [row | {"group": str(i // 5)} for i, row in enumerate(rows(100))]
    corpus = build(train)
    group_of = {row["text"]: row["group"] for row in train}
    sides = [{group_of[text] for text in part.texts} for part in (corpus.train, *corpus.sets.values())]
    train, validation, _, test = sides
    assert (len(train), len(validation), len(test)) == (14, 2, 4)
    assert len(train | validation | test) == 20


def test_groups_of_sources_of_their_own_are_told(build, capsys):
    with_group = [row | {"group": f"g{i}"} for i, row in enumerate(rows(20))]
    build(with_group, validation=[row | {"group": f"g{i}"} for i, row in enumerate(rows(4, "v"))], **NO_SPLIT)
    assert "validation: 4 of its groups also train, such as `g0`" in capsys.readouterr().out


# ---- What is left out ----


def test_equal_texts_with_other_labels_are_told_with_two_examples(build, capsys):
    odd = [{"text": f"odd {i}", "label": label} for i in range(3) for label in ("ham", "spam")]
    corpus = build([*rows(20), *odd], **NO_SPLIT)
    out = capsys.readouterr().out
    assert "3 texts occur with different labels: `odd 0` is `ham` (" in out
    assert "train.jsonl:21) and `spam` (" in out
    assert "`odd 1`" in out
    assert "`odd 2`" not in out
    assert len(corpus.rows) == 26


def test_later_copies_are_left_out_where_the_recipe_says_so(build):
    train = [*rows(10), *rows(4), {"text": "text number 0", "label": "spam"}]
    kept, dropped = (build(train, exact_duplicates=how, **NO_SPLIT) for how in ("keep", "drop"))
    assert (len(kept.rows), len(dropped.rows)) == (15, 11)
    entry = account(dropped).dropped["exact duplicate"]
    assert entry["rows"] == 4
    assert entry["examples"][0]["where"].endswith("train.jsonl:11")


def test_later_copies_leave_the_sources_of_parts_too_but_no_further_set(build):
    twice = [*rows(3, "t"), *rows(3, "t")]
    corpus = build(rows(10), validation=twice, sets={"extra": twice}, exact_duplicates="drop", split={"test": 0.0})
    assert (len(corpus.sets["validation"]), len(corpus.sets["extra"])) == (3, 6)


def test_a_text_with_another_second_text_is_another_example(build, capsys):
    train = [{"text": "same", "pair": f"p{i}", "label": ("ham", "spam")[i % 2]} for i in range(40)]
    corpus = build(train, test=[{"text": "same", "pair": "other", "label": "ham"}], exact_duplicates="drop")
    assert (len(corpus.train), len(corpus.sets["validation"])) == (36, 4)
    assert not account(corpus).dropped
    assert "different labels" not in capsys.readouterr().out
    assert len(set(corpus.train.pairs)) == 36


def test_classes_are_spread_alike_unless_the_recipe_says_otherwise(build):
    def validated(**split):
        return account(build(imbalanced(180, 20), split=split), "validation").classes["spam"]

    assert {validated(seed=seed) for seed in range(8)} == {2}
    assert len({validated(seed=seed, stratify=False) for seed in range(8)}) > 1


def test_rows_that_are_not_read_are_counted_by_cause(build, capsys):
    bad = [{"text": "", "label": "ham"}, {"text": "x", "label": None}, {"text": "y", "label": ""}]
    corpus = build([*rows(10), *bad], keys={"on_bad_label": "skip"}, **NO_SPLIT)
    left_out = account(corpus).sources[0].left_out
    assert sum(entry["rows"] for entry in left_out.values()) == 3
    assert left_out["empty"]["rows"] == 1
    corpus.report()
    assert "not read of train.jsonl: 1 empty: " in capsys.readouterr().out


def test_nothing_but_empty_texts_is_an_error_with_counts(build):
    with pytest.raises(UserError, match=r"train: no usable row in `train.jsonl` \(empty: 3\)"):
        build([{"text": " ", "label": "ham"}] * 3)
    with pytest.raises(UserError, match=r"extra: no usable row in `extra.jsonl` \(empty: 1\)"):
        build(rows(20), sets={"extra": [{"text": "", "label": "ham"}]})


def test_training_rows_that_are_all_measured_on_are_an_error(build):
    with pytest.raises(UserError, match=r"train: none of 4 rows is left \(also in test: 4\)"):
        build(rows(4), test=rows(6), split={"validation": 0.0})


def test_a_class_without_training_rows_is_an_error(build):
    train = [*rows(10), {"text": "rare", "label": "rare"}]
    with pytest.raises(
        UserError, match=r"class `rare` has no training row: what `data.train` has of it \(1\) .*\(also in test: 1\)"
    ):
        build(train, test=[{"text": "rare", "label": "ham"}], **{"split": {"validation": 0.0}})


def test_a_class_that_is_not_measured_is_told(build, capsys):
    corpus = build([*rows(60), {"text": "rare", "label": "rare"}])
    out = capsys.readouterr().out
    assert "validation: has no row of 1 of 3 classes, not measured there: `rare`" in out
    assert "test: has no row of 1 of 3 classes, not measured there: `rare`" in out
    assert "rare" in corpus.train.texts


def test_a_share_too_small_for_a_row_is_an_error(build):
    with pytest.raises(UserError, match=r"data\.split\.validation: 0\.1 of 4 rows.*without a row"):
        build([row | {"group": "all"} for row in rows(4)])


def test_a_label_that_never_trained_is_an_error(build):
    with pytest.raises(UserError, match="`egg`"):
        build(rows(10), test=[{"text": "t", "label": "egg"}])


def test_second_texts_in_some_rows_alone_are_an_error(build, tmp_path):
    with_pair = [row | {"pair": "second"} for row in rows(10)]
    with pytest.raises(UserError, match=r"train: has second texts .*test has none; expected both or neither"):
        build(with_pair, test=rows(4, "t"))
    Path("one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in with_pair))
    Path("two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3, "b")))
    data = {"train": [{"path": "one.jsonl", "text_pair_column": "pair"}, {"path": "two.jsonl"}]}
    with pytest.raises(UserError, match=r"one.jsonl:1 has a second text .*two.jsonl:1 has none"):
        build_labeled_corpus(LabeledDataSection.model_validate(data), LabeledEvaluationSection(), coding())


def test_a_text_without_tokens_is_an_error(build):
    nothing = SequenceCoding("none", lambda texts, pairs: [([], None, 0)] * len(texts), 0)
    with pytest.raises(UserError, match=r"train.jsonl:\d+: the tokenizer makes no token of this text"):
        build(rows(10), with_coding=nothing)


# ---- Balance and noise ----


def imbalanced(ham, spam):
    return [*rows(ham, "a", ("ham",)), *rows(spam, "b", ("spam",))]


def test_undersampling_all_rows_balances_every_part(build):
    corpus = build(imbalanced(150, 50), balance={"method": "undersample", "rows": "all", "seed": 1})
    for part in ("train", "validation", "test"):
        assert set(account(corpus, part).classes.values()) == {{"train": 35, "validation": 5, "test": 10}[part]}
    assert account(corpus).dropped["undersampled"]["rows"] == 100


def test_undersampling_training_rows_leaves_the_sets_as_they_occur(build):
    corpus = build(imbalanced(150, 50), balance="undersample")
    assert account(corpus).classes == {"ham": 35, "spam": 35}
    assert account(corpus, "test").classes == {"ham": 30, "spam": 10}
    assert len(corpus.train) == 70
    assert account(corpus).dropped["undersampled"]["rows"] == 70


def test_oversampling_repeats_training_rows_alone(build):
    plain, corpus = (build(imbalanced(150, 40), balance=balance) for balance in (None, "oversample"))
    assert account(corpus).classes == {"ham": 105, "spam": 105}
    assert account(corpus).repeated == 105 - 28
    assert corpus.train.texts == plain.train.texts
    assert set(Counter(text for text in epoch(corpus) if text[0] == "b").values()) == {3, 4}
    assert {name: s.key for name, s in corpus.sets.items()} == {name: s.key for name, s in plain.sets.items()}


def test_class_weights_are_of_the_training_rows(build):
    corpus = build(imbalanced(150, 50), balance="class-weights")
    assert corpus.class_weights.tolist() == [140 / 210, 140 / 70]
    weights = np.array([corpus.rows[i]["weights"] for i in range(len(corpus.rows))])
    assert weights.sum() == pytest.approx(140)
    assert weights.dtype == np.float32
    assert set(corpus.train.rows.weights) == set(corpus.sets["test"].rows.weights) == {1.0}


def test_weights_and_seeds_change_the_key_and_nothing_else_does(build):
    plain = build(imbalanced(30, 10))
    assert build(imbalanced(30, 10)).key == plain.key
    for change in ({"balance": "class-weights"}, {"split": {"seed": 1}}, {"augment": {"words": 0.5}},
                   {"label_names": {"ham": "good"}}, {"with_coding": coding(5)}):  # fmt: skip
        assert build(imbalanced(30, 10), **change).key != plain.key


def test_the_key_knows_what_the_model_does_not_read(build):
    """The baselines read whole texts: figures of theirs are not to be taken for those of other data."""
    first, second = ([{"text": f"{n} the same {end}", "label": "ab"[n % 2]} for n in range(40)] for end in "xy")
    keys = {build(given, with_coding=coding(6), test=[{"text": "t", "label": "a"}]).key for given in (first, second)}
    assert len(keys) == 2


def test_noise_adds_copies_of_training_rows_and_touches_no_set(build):
    plain = build(rows(50))
    corpus = build(rows(50), augment={"characters": 0.5, "words": 0.2, "copies": 3})
    texts = epoch(corpus)
    assert texts[:35] == plain.train.texts == corpus.train.texts
    assert len(texts) == 4 * 35
    labels = [int(corpus.rows[i]["labels"]) for i in range(140)]
    assert labels[35:] == np.repeat(labels[:35], 3).tolist()
    same = sum(copy == original for copy, original in zip(texts[35:], np.repeat(texts[:35], 3), strict=True))
    assert (account(corpus).copies, account(corpus).unchanged_copies) == (105, same)
    assert 0 <= same < 30
    assert {name: s.key for name, s in corpus.sets.items()} == {name: s.key for name, s in plain.sets.items()}


def test_the_noise_of_a_row_does_not_depend_on_other_rows(build):
    noise = {"augment": {"characters": 1.0}, **NO_SPLIT}
    few, many = epoch(build(rows(10), **noise)), epoch(build(rows(30), **noise))
    assert few[10:] == many[30:40]
    assert epoch(build(rows(10), augment={"characters": 1.0, "seed": 1}, **NO_SPLIT))[10:] != few[10:]


def test_repeated_rows_get_other_noise_each_time(build):
    corpus = build(imbalanced(20, 2), balance="oversample", augment={"characters": 1.0}, **NO_SPLIT)
    copies = [text for text, label in zip(epoch(corpus)[40:], corpus.rows.labels[40:], strict=True) if label == 1]
    assert len(copies) == 20
    assert len(set(copies)) > 15


def test_both_texts_of_a_pair_get_noise(build):
    train = [row | {"pair": f"another {i}"} for i, row in enumerate(rows(20))]
    corpus = build(train, augment={"characters": 1.0}, with_coding=coding(types=True), **NO_SPLIT)
    before, after = corpus.rows[0], corpus.rows[20]
    for kind in (0, 1):
        one, other = (decoded({"input_ids": r["input_ids"][r["token_type_ids"] == kind]}) for r in (before, after))
        assert one != other


# ---- Rows and batches ----


def test_several_labels_are_float_rows_with_weights_of_their_shape(build):
    train = [{"text": f"t{i}", "label": ["a"] if i % 4 else ["a", "b"] if i % 8 else []} for i in range(80)]
    corpus = build(train, balance="class-weights")
    assert corpus.labels.multi
    batch = corpus.collate([corpus.rows[i] for i in range(5)])
    assert batch["labels"].shape == batch["weights"].shape == (5, 2)
    assert batch["labels"].dtype == batch["weights"].dtype == torch.float32
    counts = corpus.train.labels.sum(axis=0)
    assert corpus.class_weights.tolist() == ((56 - counts) / counts).tolist()
    expected = np.where(corpus.train.labels, corpus.class_weights, 1.0)
    np.testing.assert_allclose([corpus.rows[i]["weights"] for i in range(56)], expected, rtol=1e-6)
    assert account(corpus, "test").unlabeled == 2


def test_truncation_is_counted_by_part(build, capsys):
    corpus = build(rows(20), with_coding=coding(10), max_length=10, evaluation={"train_sample": 3})
    for part, measured in {"train": corpus.train, **corpus.sets}.items():
        uncut = np.array([len(text) + 2 for text in measured.texts])
        ledger = account(corpus, part)
        assert (ledger.truncated, ledger.tokens, ledger.tokens_cut) == (len(uncut), uncut.sum(), (uncut - 10).sum())
        assert ledger.longest == (uncut.max(), 10)
        assert (measured.rows.lengths == 10).all()
    corpus.report()
    # The rows of the sample are told of with the training part, of which they are.
    assert capsys.readouterr().out.count("rows are cut (`data.max_length: 10`)") == 3


def test_the_row_for_a_process_without_one_weighs_nothing(build):
    for corpus in (build(rows(20)), build([{"text": f"t{i}", "label": ["a", "b"][: i % 3]} for i in range(20)])):
        nothing = corpus.rows[-1]
        assert len(nothing["input_ids"]) == 1
        assert not nothing["weights"].any()
        batch = corpus.collate([nothing])
        assert batch["labels"].shape[1:] == corpus.rows[0]["labels"].shape
        assert corpus.rows[0]["weights"].all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_length_and_moves_no_position(side):
    examples = [
        {"input_ids": np.array(ids), "token_type_ids": np.ones(len(ids), dtype=np.int64)} for ids in ([5, 0, 7], [0])
    ]
    batch = CollateLabeled(0, side, positions=True)(examples)
    right = side == "right"
    assert batch["input_ids"].tolist() == ([[5, 0, 7], [0, 0, 0]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0] if right else [0, 0, 1]]
    assert batch["token_type_ids"].tolist() == batch["attention_mask"].tolist()
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        assert batch["position_ids"][row][real].tolist() == list(range(int(real.sum())))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "position_ids" not in CollateLabeled(0, side)(examples)


def test_texts_without_labels_make_batches_too(build):
    corpus = build(rows(20), with_coding=coding(padding_side="left", types=True))
    batch = corpus.collate_encoded(coding(types=True).encode(["ab", "c"], None))
    assert batch["input_ids"].tolist() == [[BEGIN, 97, 98, END], [0, BEGIN, 99, END]]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}


def test_rows_travel_to_the_processes_of_a_loader(build):
    corpus = build(rows(20))
    again = pickle.loads(pickle.dumps(corpus.rows))
    assert again.key == corpus.rows.key
    assert again[3]["input_ids"].tolist() == corpus.rows[3]["input_ids"].tolist()


ARGUMENTS = {
    "train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 3, "data_seed": None, "world_size": 1,
    "process_index": 0,
}  # fmt: skip


def test_batches_follow_the_arguments_of_training(build, capsys):
    corpus = build(rows(50))
    plain = list(corpus.batches(SimpleNamespace(**ARGUMENTS)))
    assert sorted(chain(*plain)) == list(range(35))
    lengths = corpus.rows.lengths
    first_step = lengths[plain[0] + plain[1]].tolist()
    assert first_step == sorted(first_step, reverse=True)
    assert list(corpus.batches(SimpleNamespace(**ARGUMENTS | {"data_seed": 9}))) != plain
    budget = build(rows(50), group_by_length=True, max_tokens_per_batch=40)
    by_length = list(budget.batches(SimpleNamespace(**ARGUMENTS)))
    assert sorted(chain(*by_length)) == list(range(35))
    assert {len(batch) for batch in by_length} <= {1, 2}
    assert all(len(batch) * lengths[batch].max() <= 40 for batch in by_length)
    build(rows(50), group_by_length=True, max_tokens_per_batch=15).report()
    assert "have more than `data.max_tokens_per_batch` 15: each is a batch alone" in capsys.readouterr().out


def test_the_key_of_sources_is_of_their_content(build):
    build(rows(20))
    section = LabeledDataSection.model_validate({"train": [{"path": "train.jsonl"}]})
    before = labeled_sources_key(section, LabeledEvaluationSection())
    Path("elsewhere.jsonl").write_bytes(Path("train.jsonl").read_bytes())
    elsewhere = LabeledDataSection.model_validate({"train": [{"path": "elsewhere.jsonl"}]})
    assert labeled_sources_key(elsewhere, LabeledEvaluationSection()) == before
    measured = LabeledEvaluationSection.model_validate({"sets": {"more": {"path": "train.jsonl"}}})
    assert labeled_sources_key(section, measured) != before
    with Path("train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "new", "label": "ham"}) + "\n")
    assert labeled_sources_key(section, LabeledEvaluationSection()) != before


# ---- Real data ----

SMS = {"path": str(DATA / "sms_spam" / "SMSSpamCollection"), "format": "tsv", "column_names": ["label", "text"]}


def of_files(source, **data):
    section = LabeledDataSection.model_validate({"train": [source], **data})
    return build_labeled_corpus(section, LabeledEvaluationSection(), coding())


def plain_sms():
    lines = (DATA / "sms_spam" / "SMSSpamCollection").read_text().rstrip("\n").split("\n")
    return [line.split("\t", 1) for line in lines]


@real
def test_sms_balanced_as_in_the_guide():
    corpus = of_files(SMS, balance={"method": "undersample", "rows": "all", "seed": 123})
    ledger = account(corpus)
    assert ledger.sources[0].read == 5574
    assert ledger.dropped["undersampled"]["rows"] == 5574 - 2 * 747
    parts = [account(corpus, part) for part in ("train", "validation", "test")]
    totals = {name: sum(part.classes[name] for part in parts) for name in ("ham", "spam")}
    assert totals == {"ham": 747, "spam": 747}
    assert np.allclose([part.rows for part in parts], 1494 * np.array([0.7, 0.1, 0.2]), atol=2)
    kept = [text for part in ("validation", "test") for text in corpus.sets[part].texts] + corpus.train.texts
    assert Counter(kept) - Counter(text for _, text in plain_sms()) == Counter()
    spam = Counter(text for label, text in plain_sms() if label == "spam")
    assert not spam - Counter(kept)


@real
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_sms_split_with_no_text_on_two_sides(seed):
    corpus = of_files(SMS, split={"validation": 0.1, "test": 0.2, "seed": seed})
    sides = [corpus.train.texts, corpus.sets["validation"].texts, corpus.sets["test"].texts]
    assert np.allclose([len(side) for side in sides], 5574 * np.array([0.7, 0.1, 0.2]), atol=5)
    assert sum(map(len, sides)) == 5574
    assert sum(len(set(side)) for side in sides) == len({text for _, text in plain_sms()})
    for part in ("train", "validation", "test"):
        ledger = account(corpus, part)
        assert ledger.classes["spam"] / ledger.rows == pytest.approx(747 / 5574, abs=0.005)


@real
def test_pubmedqa_abstracts_are_on_one_side():
    path = DATA / "pubmedqa" / "sections.jsonl"
    rows_of_file = [json.loads(line) for line in path.read_text().split("\n") if line]
    abstracts = {}
    for row in rows_of_file:
        abstracts.setdefault(row["text"], set()).add(row["pmid"])
    corpus = of_files({"path": str(path), "group_column": "pmid"})
    sides = [
        set().union(*(abstracts[text] for text in part.texts if len(abstracts[text]) == 1))
        for part in (corpus.train, corpus.sets["validation"], corpus.sets["test"])
    ]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 1000
    assert np.allclose([account(corpus, part).rows for part in ("train", "validation", "test")],
                       len(rows_of_file) * np.array([0.7, 0.1, 0.2]), rtol=0.05)  # fmt: skip


def test_rows_are_named_by_the_place_where_their_text_was_read(build):
    corpus = build(imbalanced(20, 2), balance="oversample", augment={"characters": 1.0, "copies": 2}, **NO_SPLIT)
    lines, number = corpus.name_rows(range(len(corpus.rows)), 10_000)
    assert number == len(lines) == len(corpus.rows) == 3 * 40
    texts = dict(zip(corpus.train.where, corpus.train.texts, strict=True))
    for row, line in enumerate(lines):
        where, _, copy = line.removeprefix(f"row {row}: ").partition(" (a noisy copy)")
        assert (f" (a noisy copy){copy}" in line) == (row >= 40)
        if row < 40:
            assert texts[where] == decoded(corpus.rows[row])
        else:  # one letter is another
            assert corpus.rows.labels[row] == corpus.train.labels[corpus.train.where.index(where)]
    assert corpus.name_rows([7, 3], 1) == ([lines[7]], 2)

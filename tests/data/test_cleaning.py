"""What is left out of training for what else is in the corpus, and the account of it.

Tokens are bytes, so that counts are exact. The expected documents are worked out from the texts alone, in plain Python.
"""

import json
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import xxhash

from kit.data import cleaning
from kit.data.blocks import IGNORE_INDEX
from kit.data.corpus import TokenCoding, build_corpus
from kit.data.ledger import check_dropped, ledger_as_json
from kit.data.splits import held_out
from kit.errors import UserError
from kit.recipe.data import DataSection
from kit.recipe.models import EvaluationSet
from tests.material import documents

EOS = 256
BYTES = TokenCoding(
    key="bytes",
    encode=lambda texts: [list(text.encode()) for text in texts],
    decode=lambda ids: bytes(ids).decode(errors="replace"),
    vocab_size=257,
    eos_token_id=EOS,
    context_token_id=EOS,
    pad_token_id=EOS,
)


@pytest.fixture
def write(tmp_path):
    """A function that writes texts as JSON lines and returns the source."""

    def write(name, texts, **keys):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return {"path": str(path), **keys}

    return write


@pytest.fixture
def build(tmp_path):
    """A function that builds a corpus from a data section's values and evaluation sets'."""

    def build(train, sets=None, coding=BYTES, **data):
        values = {"train": train, "block_size": 64, "store_dir": str(tmp_path / "store"), **data}
        wanted = {name: EvaluationSet.model_validate(set_) for name, set_ in (sets or {}).items()}
        return build_corpus(DataSection.model_validate(values), wanted, coding, 0)

    return build


def count(texts):
    return sum(len(text.encode()) + 1 for text in texts)


def left(corpus):
    """The texts that train, by source."""
    return [[text_of(p.store, i) for i in p.documents.tolist()] for p in corpus.rows.parts]


def text_of(store, document):
    return bytes(store.document(document).tolist()).decode()


def measured(corpus, name):
    return [text_of(store, i) for store, chosen in corpus.sets[name].stores for i in chosen.tolist()]


# ---- Exact duplicates ----


def test_of_equal_texts_the_first_one_trains_whatever_its_source(build, write):
    a, b, shared = documents(20, seed=1), documents(20, seed=2), documents(4, seed=3)
    first, second = a[:5] + shared[:2] + a + shared[:2], shared + b + [b[0], b[0]] + a[:1]
    corpus = build([write("a", first), write("b", second)])
    assert left(corpus) == [a[:5] + shared[:2] + a[5:], shared[2:] + b]
    one, two = corpus.ledger
    assert (one.read, two.read) == (count(first), count(second))
    assert one.dropped == {"exact duplicate": count(a[:5] + shared[:2])}
    assert two.dropped == {"exact duplicate": count([*shared[:2], b[0], b[0], a[0]])}
    assert one.dropped_documents["exact duplicate"]["documents"] == 7
    (entry,) = two.dropped_documents.values()
    assert entry["documents"] == 5
    times = [(example["text"].rstrip("…"), example["times"]) for example in entry["examples"]]
    assert [n for _, n in times] == [3, 3, 3]
    for (beginning, _), text in zip(times, [*shared[:2], b[0]], strict=True):
        assert beginning
        assert text.startswith(beginning)
    check_dropped(corpus.ledger, 0)


def test_an_excerpt_ends_with_a_whole_character(build, write):
    text = "é" * 30  # 40 tokens of it are 20 characters; one byte before, the 20th is cut
    corpus = build([write("a", ["x" + text, "x" + text])])
    (example,) = corpus.ledger[0].dropped_documents["exact duplicate"]["examples"]
    assert example["text"] == "x" + "é" * 19


def test_equal_texts_are_kept_where_the_recipe_says_so(build, write):
    texts = documents(20, seed=1)
    corpus = build([write("a", texts + texts), write("b", texts)], exact_duplicates="keep")
    assert left(corpus) == [texts + texts, texts]
    assert [row.dropped for row in corpus.ledger] == [{}, {}]


def test_a_source_of_duplicates_alone_is_refused(build, write):
    texts = documents(5, seed=1)
    with pytest.raises(UserError, match=r"b\.jsonl`: none of its 3 documents is left.*\(exact duplicate: 3\)"):
        build([write("a", texts), write("b", texts[:3])])


# ---- Near-duplicates ----


def test_near_duplicates_go_over_all_sources_in_their_order(build, write):
    rng = random.Random(0)
    texts = [" ".join(f"d{i}w{rng.randrange(10**6)}" for _ in range(100)) for i in range(30)]
    near = [text.upper() + "!" for text in texts[:4]]
    train = [write("a", texts[:20] + near[:1]), write("b", near[1:3] + texts[20:])]
    corpus = build(train, near_duplicates={}, replay={"share": 0.2, "sources": [write("r", near[3:] + ["Else."])]})
    assert left(corpus) == [texts[:20], texts[20:], ["Else."]]
    assert [row.dropped["near-duplicate"] for row in corpus.ledger] == [
        count(near[:1]),
        count(near[1:3]),
        count(near[3:]),
    ]
    (example,) = corpus.ledger[0].dropped_documents["near-duplicate"]["examples"]
    assert near[0].startswith(example["text"][:-1].rstrip())
    assert texts[0].startswith(example["like"][:-1].rstrip())
    assert example["similarity"] == 1
    check_dropped(corpus.ledger, 0)
    assert left(build(train)) == [texts[:20] + near[:1], near[1:3] + texts[20:]]


# ---- Text of evaluation sets ----


def passages(rng, n, words=100):
    return [[f"w{rng.randrange(10**6)}" for _ in range(words)] for _ in range(n)]


def test_documents_with_a_passage_of_an_evaluation_set_go_and_none_else(build, write):
    """Planted at the start, in the middle, at the end; in other case, punctuation and line breaks; over two lines."""
    rng = random.Random(5)
    evaluated, texts, planted = passages(rng, 10), [], set()
    for i, words in enumerate(passages(rng, 120)):
        source, at = rng.choice(evaluated), rng.choice([0, 50, 100])
        length = rng.choice([0, 1, 5, 11, 12, 13, 14, 30])
        begin = rng.randint(0, 100 - length)
        passage = [rng.choice([w, w.upper(), f"{w},", f"({w})\n"]) for w in source[begin : begin + length]]
        texts.append(" ".join(words[:at] + passage + words[at:]))
        if length >= 13:
            planted.add(i)
    sets = {"general": write("e", [" ".join(words) for words in evaluated])}
    corpus = build([write("a", texts)], sets, evaluation_overlap={})
    assert left(corpus) == [[text for i, text in enumerate(texts) if i not in planted]]
    (row,) = corpus.ledger
    assert row.dropped == {"overlaps evaluation": count(texts[i] for i in planted)}
    entry = row.dropped_documents["overlaps evaluation"]
    assert entry["documents"] == len(planted) > 20
    for example in entry["examples"]:
        assert example["set"] == "general"
        assert any(example["ngram"] in " ".join(words) for words in evaluated)
        assert len(example["ngram"].split()) == 13
    check_dropped(corpus.ledger, 0)


@pytest.mark.parametrize("least", [1, 2, 5])
def test_as_many_distinct_n_grams_as_the_recipe_says(build, write, least):
    rng = random.Random(6)
    (evaluated,) = passages(rng, 1)
    # A passage of k + 2 words has k n-grams of 3 words; said twice, still k.
    texts = [" ".join(own + (evaluated[: k + 2] + ["cut"]) * 2) for k, own in enumerate(passages(rng, 8))]
    sets = {"general": write("e", [" ".join(evaluated)])}
    corpus = build([write("a", texts)], sets, evaluation_overlap={"ngram": 3, "min_shared": least})
    assert left(corpus) == [texts[:least]]
    examples = corpus.ledger[0].dropped_documents["overlaps evaluation"]["examples"]
    assert [example["shared"] for example in examples] == list(range(least, 8))[:3]


def test_the_set_is_named_and_a_split_of_training_is_none(build, write):
    rng = random.Random(7)
    one, two, own = (" ".join(words) for words in passages(rng, 3))
    sets = {"one": write("e1", [one]), "two": write("e2", [two]), "seen": {"split": "train"}}
    corpus = build([write("a", [own, two + " more"]), write("b", [own + " else"])], sets, evaluation_overlap={})
    assert left(corpus) == [[own], [own + " else"]]
    (example,) = corpus.ledger[0].dropped_documents["overlaps evaluation"]["examples"]
    assert example["set"] == "two"


def test_without_evaluation_nothing_overlaps(build, write):
    texts = documents(10, seed=1)
    assert left(build([write("a", texts)], evaluation_overlap={})) == [texts]


def test_training_on_what_is_measured_says_what_to_do(build, write):
    source = write("a", documents(10, seed=1))
    with pytest.raises(
        UserError, match=r"all of its 10 .*evaluation set `general`; measure on other documents, or hold"
    ):
        build([source], {"general": source}, evaluation_overlap={}, near_duplicates={})


# ---- What was found is kept ----


@pytest.fixture
def searches(monkeypatch):
    """Counts the searches that are done rather than read from the store."""
    done = Counter()
    for name in ("find_near_duplicates", "_ngrams_of"):
        original = getattr(cleaning, name)

        def counted(*args, name=name, original=original):
            done[name] += 1
            return original(*args)

        monkeypatch.setattr(cleaning, name, counted)
    return done


def test_near_duplicates_are_looked_for_once(build, write, searches):
    a, b, e = documents(30, seed=1), documents(30, seed=2), documents(5, seed=3)
    a += [text + " more" for text in a[:9]]
    source, other, general = write("a", a), write("b", b), {"general": write("e", e)}
    same = [build([source], near_duplicates=values) for values in ({}, {}, {"threshold": 0.8}, {"ngram": 5})]
    assert searches["find_near_duplicates"] == 1
    assert all(corpus.ledger == same[0].ledger and corpus.key == same[0].key for corpus in same)
    build([source], near_duplicates={}, block_size=32, packing=False)
    assert searches["find_near_duplicates"] == 1
    for number, (train, values, data) in enumerate(
        [
            ([source], {"threshold": 0.7}, {}),
            ([source], {"ngram": 4}, {}),
            ([source, other], {}, {}),
            ([other, source], {}, {}),
            ([source], {}, {"validation": {"fraction": 0.3}}),
            ([source], {}, {"sets": general}),
        ],
        start=2,
    ):
        build(train, near_duplicates=values, **data)
        assert searches["find_near_duplicates"] == number


def test_what_is_almost_equal_to_a_measured_document_does_not_train(build, write):
    """Held out by a hash, one of two near-duplicates may be measured on: the other one must not be trained on."""
    originals = [" ".join(f"w{n}x{i}" for i in range(60)) for n in range(120)]
    copies = [text.replace("x30 ", "y30 ", 1) for text in originals]
    corpus = build([write("a", originals + copies)], validation={"fraction": 0.2}, near_duplicates={})
    [row] = corpus.ledger
    measured = {text_of(store, i) for store, chosen in corpus.sets["domain"].stores for i in chosen.tolist()}
    pairs = {**dict(zip(originals, copies, strict=True)), **dict(zip(copies, originals, strict=True))}
    [trained] = left(corpus)
    assert measured
    assert not measured & {pairs[text] for text in trained}
    gone = row.dropped_documents["near-duplicate of evaluation"]
    assert gone["documents"] == len([text for text in measured if pairs[text] not in measured])
    assert gone["examples"][0]["set"] == "domain"
    assert row.read + row.repeated == row.trained + row.context + row.total_dropped


def test_overlap_is_looked_for_once_for_the_same_sets(build, write, searches):
    a, e = write("a", documents(30, seed=1)), documents(9, seed=3)
    calls = [
        ({"one": write("e", e)}, {}, 1),
        ({"one": write("e", e)}, {"ngram": 13, "min_shared": 1}, 1),
        ({"one": write("e2", e[:8])}, {}, 2),
        ({"one": write("e", e, max_documents=4)}, {}, 3),
        ({"two": write("e", e)}, {}, 3),  # by another name: the same documents
        ({"one": write("e", e)}, {"ngram": 12}, 4),
        ({"one": write("e", e)}, {"min_shared": 2}, 5),
        ({"one": write("e", e)}, {}, 5),
    ]
    for sets, values, expected in calls:
        build([a], sets, evaluation_overlap=values)
        assert searches["_ngrams_of"] == expected, (sets, values)


def test_texts_come_back_from_the_tokens_of_a_byte_level_tokenizer(build, write, coding):
    """Whatever is written there: no clean-up of spaces, no special token left out."""
    texts = [
        "don 't , he said .  Two  spaces", " leading and trailing ", "tabs\tand\nline\n\nbreaks", "naïve Größe — 日本",
        "<eos> is written here", "e\u0301 and \u00e9", "\u200b zero width", "a 🎉",
    ]  # fmt: skip
    corpus = build([write("a", texts)], coding=coding, exact_duplicates="keep")
    (part,) = corpus.rows.parts
    assert [coding.decode(part.store.document(i).tolist()) for i in range(len(texts))] == texts


# ---- The account ----


@pytest.mark.parametrize("seed", range(30))
def test_the_account_adds_up_and_says_what_went(build, write, seed):
    """Sources, weights, replay, duplicates, fractions and sets at random; what went is worked out from the texts."""
    rng = random.Random(seed)
    pool = documents(400, seed=seed % 3, longest=60)
    weights = rng.choice([[None], [None, None], [None, 0.3], [0.5, 0.2], [None, 0.1, 0.05]])
    share = rng.choice([None, 0.1, 0.3]) if any(w is None for w in weights) else 0.3
    number = len(weights) + (rng.randint(1, 3) if share else 0)
    texts = [rng.choices(pool, k=rng.randint(30, 120)) for _ in range(number)]
    sources = [write(f"s{i}", t) for i, t in enumerate(texts)]
    train = [{**s, **({"weight": w} if w else {})} for s, w in zip(sources, weights, strict=False)]
    data = {"exact_duplicates": rng.choice(["drop", "keep"]), "packing": rng.random() < 0.5}
    if share:
        data["replay"] = {"share": share, "sources": sources[len(weights) :]}
    fraction = rng.choice([None, 0.1, 0.3])
    sets = {}
    if fraction:
        data["validation"] = {"fraction": fraction, "seed": seed}
        sets = {name: {"split": name} for name in ["validation", "train"] if rng.random() < 0.6}
        sets |= {"replay": {"split": "replay"}} if share and rng.random() < 0.5 else {}
    if rng.random() < 0.5:
        sets["own"] = write("own", rng.sample(pool, 20))
    data |= {key: {} for key in ("near_duplicates", "evaluation_overlap") if rng.random() < 0.4}
    corpus = build(train, sets, **data)

    of_sets = {name: set(measured(corpus, name)) for name in corpus.sets if name != "train"}
    evaluated = set().union(*of_sets.values())
    seen, dropped = set(), Counter()
    for index, (row, own, trains) in enumerate(zip(corpus.ledger, texts, left(corpus), strict=True)):
        splits = fraction and (index < len(weights) or "replay" in sets)
        hashes = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in own], dtype=np.uint64)
        held = held_out(hashes, fraction, seed) if splits else np.zeros(len(own), dtype=bool)
        training = [text for text, out in zip(own, held.tolist(), strict=True) if not out]
        assert (row.documents, row.held_out, row.read) == (len(training), held.sum(), count(training))
        expected = {"also in evaluation": [text for text in training if text in evaluated]}
        rest, times = [text for text in training if text not in evaluated], []
        for text in rest:
            if text in seen and data["exact_duplicates"] == "drop":
                times.append(text)
            seen.add(text)
        expected["exact duplicate"] = times
        for cause, gone in expected.items():
            assert row.dropped.get(cause, 0) == count(gone)
            assert row.dropped_documents.get(cause, {"documents": 0})["documents"] == len(gone)
            dropped[cause] += len(gone)
        gone = Counter(training) - Counter(trains)
        assert count(gone.elements()) == sum(row.dropped.values()) - row.dropped.get("beyond its share", 0)
        assert not evaluated & set(trains)
        assert row.read + row.repeated == row.trained + row.context + sum(row.dropped.values())
        assert row.is_replay == (index >= len(weights))
        assert ("near_duplicates" in data) >= ("near-duplicate" in row.dropped)
        assert row.wanted_share == (share if row.is_replay else weights[index])

    rows = [corpus.rows[i]["shift_labels"] for i in range(len(corpus.rows))]
    labels, positions = sum(int((r != IGNORE_INDEX).sum()) for r in rows), sum(map(len, rows))
    assert labels == sum(row.trained for row in corpus.ledger)
    assert positions - labels == sum(row.padding for row in corpus.ledger)
    assert abs(sum(row.share for row in corpus.ledger) - 1) < 1e-9
    for row in corpus.ledger:
        assert row.share == row.trained / labels
    if share:
        replayed = sum(row.trained for row in corpus.ledger if row.is_replay)
        # Half a block for each part that was rounded.
        assert abs(replayed - share * labels) <= 64
    saved = json.loads(json.dumps(ledger_as_json(corpus.ledger)))
    assert [(entry["share"], entry["wanted_share"]) for entry in saved] == [
        (row.share, row.wanted_share) for row in corpus.ledger
    ]


# ---- Replay ----


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("weights", "sizes"), product([(None,), (None, 0.2), (0.3, 0.4)], [(8,), (900,), (10, 700), (3, 4, 5)])
)
def test_replay_has_its_share_to_the_nearest_block(build, write, packing, weights, sizes):
    """Whether its sources hold less than their share or more; they divide it by their size."""
    train = [write(f"a{i}", documents(150, seed=i), **({"weight": w} if w else {})) for i, w in enumerate(weights)]
    replay = [write(f"r{i}", documents(size, seed=50 + i)) for i, size in enumerate(sizes)]
    corpus = build(train, replay={"share": 0.3, "sources": replay}, packing=packing)
    rows, total = corpus.ledger[len(weights) :], sum(row.trained for row in corpus.ledger)
    replayed = sum(row.trained for row in rows)
    assert abs(replayed - 0.3 * total) <= 64
    assert {(row.is_replay, row.wanted_share) for row in rows} == {(True, 0.3)}
    for row in rows:
        assert abs(row.trained - replayed * row.read / sum(r.read for r in rows)) <= 2 * 64
    if sizes in [(8,), (3, 4, 5)]:
        assert all(row.repeated > 2 * row.read for row in rows)
    elif sizes == (900,) and weights == (None,):
        assert rows[0].dropped["beyond its share"] > 0
        assert rows[0].repeated == 0
    for row, weight in zip(corpus.ledger, weights, strict=False):
        assert weight is None or abs(row.trained - weight * total) <= 64
    check_dropped(corpus.ledger, 0)


def test_replay_is_no_part_of_validation(build, write):
    texts, general = documents(80, seed=1), documents(80, seed=2)
    data = {"validation": {"fraction": 0.3}, "replay": {"share": 0.4, "sources": [write("r", general)]}}
    corpus = build([write("a", texts)], **data)
    assert set(measured(corpus, "domain")) <= set(texts)
    assert left(corpus)[1] == general
    assert corpus.ledger[1].held_out == 0


def test_replay_is_held_out_where_it_is_measured_and_then_trains_nowhere(build, write):
    texts, general = documents(80, seed=1), documents(80, seed=2)
    train = [write("a", texts + general)]  # all of it stands in the domain too
    data = {"validation": {"fraction": 0.3}, "replay": {"share": 0.4, "sources": [write("r", [*general, "its own"])]}}
    sets = {"domain": {"split": "validation"}, "kept": {"split": "replay"}}
    without = build(train, {"domain": {"split": "validation"}}, exact_duplicates="keep", **data)
    corpus = build(train, sets, exact_duplicates="keep", **data)
    held = set(measured(corpus, "kept"))
    assert 10 < len(held) < 60
    assert held <= {*general, "its own"}
    assert held <= set(measured(corpus, "domain")) | {"its own"}, "one seed holds out the same texts everywhere"
    assert not held & {text for texts in left(corpus) for text in texts}
    assert corpus.ledger[1].held_out == len(held)
    assert without.ledger[1].held_out == 0
    assert measured(without, "domain") == measured(corpus, "domain")
    # What validation measures on does not come back through replay.
    assert without.ledger[1].dropped["also in evaluation"] == count(held - {"its own"})

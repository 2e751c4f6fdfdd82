"""Added tokens are counted as they stand in the texts, and their rows' movement is measured, not guessed."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kit.model.embeddings import resize_and_initialise
from kit.model.readable import readable_tokens
from kit.model.tokenizer import special_tokens
from kit.model.vocabulary import AddedRow, Extension, extend_tokenizer
from kit.model.vocabulary_audit import (
    TextFigures,
    audit_after,
    audit_as_json,
    audit_before,
    count_occurrences,
    initial_rows,
    print_audit,
    print_movement,
)
from kit.recipe.vocabulary import VocabularySection
from tests.material import documents, make_model, make_tokenizer
from tests.model.models import MODELS

DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = ["kinase", "IL-6", "never"]


def encoded(tokenizer, texts):
    return [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint16) for text in texts]


def audited_text(before, after, texts):
    arrays = encoded(after, texts)
    old, new = sum(map(len, encoded(before, texts))), sum(map(len, arrays))
    figures = TextFigures(len(texts), sum(len(t.encode()) for t in texts), old + len(texts), new + len(texts))
    return figures, iter(arrays)


def extended(**values):
    before = make_tokenizer()
    after = copy.deepcopy(before)
    return before, after, extend_tokenizer(after, VocabularySection(**values))


def grow(model, extension, initialize="subword-mean"):
    rows = len(model.get_input_embeddings().weight)
    size = max([extension.old_size, *(row.id + 1 for row in extension.rows)])
    resize_and_initialise(model, extension, size, initialize, 64, seed=0)
    return rows, len(model.get_input_embeddings().weight), initial_rows(model, extension)


def audit_of(training, sets=None, model=None, special=None, **values):
    """Return an audit, and what it was made of: tokenizers, extension, the rows at the start, the model."""
    before, after, extension = extended(**values)
    model = model or make_model("gpt2")
    rows_before, rows_after, initial = grow(model, extension, values.get("initialize", "subword-mean"))
    sets = {name: audited_text(before, after, texts) for name, texts in (sets or {}).items()}
    text = audited_text(before, after, training)
    special = special_tokens(after) if special else None
    audit = audit_before(extension, text, sets, before, after, rows_before, rows_after, initial, special)
    return audit, before, after, extension, initial, model


TRAINING_TEXT = ["the kinase, kinase and IL-6", "kinase kinase\nkinase", "IL-6 (IL-6) IL-66", *documents(20, seed=1)]
SETS = {"domain": ["a kinase"], "general": ["nothing of it", "IL-6 <|user|>"]}


# ---- before training


def test_occurrences(tmp_path):
    rows = [AddedRow("a", 9, False, (), "mean", "a"), AddedRow("b", 12, False, (), "mean", "b")]
    first = np.random.default_rng(0).integers(0, 12, 5_000_000).astype(np.uint16)
    second = np.array([8, 9, 13, 11], dtype=np.int32)
    first.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    assert count_occurrences(rows, [mapped, second, second[:0]]) == {9: int((first == 9).sum()) + 1, 12: 0}
    assert count_occurrences(iter(rows), iter([])) == {9: 0, 12: 0}
    assert count_occurrences([], [second]) == {}


def test_an_id_beyond_the_arrays_type():
    """A token store whose ids fit 16 bits may be asked for one that does not."""
    rows = [AddedRow(str(i), i, False, (), "mean", str(i)) for i in (7, 70_000)]
    assert count_occurrences(rows, [np.array([7, 7, 70_000 % 65536], dtype=np.uint16)]) == {7: 2, 70_000: 0}


def test_occurrences_equal_a_count_by_hand_and_rows_of_a_word_belong_together():
    audit, _, after, extension, *_ = audit_of(TRAINING_TEXT, SETS, tokens=WORDS, special_tokens=["<|user|>"])
    assert [token.token for token in audit.tokens] == ["<|user|>", *WORDS]
    kinase = audit.tokens[1]
    assert [row.text for row in kinase.rows] == ["␣kinase", "kinase"]
    every = {"training": TRAINING_TEXT} | {f"evaluation/{name}": texts for name, texts in SETS.items()}
    for name, texts in every.items():
        ids = [int(number) for array in encoded(after, texts) for number in array]
        for token in audit.tokens:
            assert [row.occurrences[name] for row in token.rows] == [ids.count(row.id) for row in token.rows]
            expected = sum(ids.count(row.id) for row in extension.rows if row.token == token.token)
            assert token.occurrences[name] == expected
    assert kinase.occurrences == {"training": 5, "evaluation/domain": 1, "evaluation/general": 0}
    assert audit.tokens[0].occurrences["evaluation/general"] == 1


def test_figures():
    audit, before, after, *_ = audit_of(TRAINING_TEXT, SETS, tokens=WORDS)
    old, new = (sum(map(len, encoded(t, TRAINING_TEXT))) + len(TRAINING_TEXT) for t in (before, after))
    figures = audit.texts["training"]
    assert (figures.documents, figures.tokens_before, figures.tokens_after) == (len(TRAINING_TEXT), old, new)
    assert figures.saved == old - new > 0
    assert figures.share == (old - new) / old
    num_bytes = len("".join(TRAINING_TEXT).encode())
    assert (figures.bytes_per_token_before, figures.bytes_per_token_after) == (num_bytes / old, num_bytes / new)
    nothing = TextFigures(0, 0, 0, 0)
    assert (nothing.share, nothing.bytes_per_token_before, nothing.bytes_per_token_after) == (0, 0, 0)


def test_what_is_saved_is_measured_where_the_word_stands():
    """A space before `IL-6` becomes a token of its own, so its four pieces save two tokens."""
    texts = ["the kinase and IL-6 or IL-6", "a corpus\n<|user|>\n<|user|> learns"]
    described = [{"content": "<|user|>", "description": "a token that the model learns to say in each document"}]
    audit, before, after, *_ = audit_of(texts, tokens=WORDS, special_tokens=described)
    of = {token.token: token.saved["training"] for token in audit.tokens}
    assert sum(of.values()) == audit.texts["training"].saved
    assert of["IL-6"] == 2 * (len(encoded(before, [" IL-6"])[0]) - len(encoded(after, [" IL-6"])[0]))
    assert of["<|user|>"] == 2 * (len(encoded(before, ["<|user|>"])[0]) - 1)


def test_matrices_and_what_there_was():
    audit, *_ = audit_of(["the"], tokens=["kinase", "the"], model=make_model("gpt2", vocab_size=350))
    assert (audit.rows_before, audit.rows_after) == (350, 350)
    assert audit.spare == 350 - 320 - 2
    assert audit.existing == ("the",)
    assert audit_as_json(audit)["existing"] == ["the"]


def test_holes_and_spare_rows_are_no_old_rows():
    rows = (AddedRow("x", 12, False, (), "mean", "x"),)
    before, after, _ = extended(tokens=["kinase"])
    none = (TextFigures(0, 0, 0, 0), [])
    initial = {"input": torch.ones(1, 2)}
    audit = audit_before(Extension(rows, (), 12, (3, 7)), none, {}, before, after, 10, 16, initial)
    assert audit.old_ids.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert audit.spare == 16 - 10 - 1


def test_a_token_that_never_occurs_is_warned_of_once(capsys):
    audit, *_ = audit_of(["(kinase) kinase"], {"domain": ["never"]}, tokens=WORDS)
    print_audit(audit)
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1
    assert "2 of 3 added tokens never occur in the training text" in printed
    assert "never trained as inputs: IL-6, never\n" in printed
    assert audit_as_json(audit)["never_in_training"] == ["IL-6", "never"]


def test_one_row_that_occurs_is_enough(capsys):
    audit, *_ = audit_of(["kinase"], tokens=["kinase"])
    assert [row.occurrences["training"] for row in audit.tokens[0].rows] == [0, 1]
    print_audit(audit)
    assert "warning" not in capsys.readouterr().out


def test_tokens_that_the_kit_writes_itself_are_not_missed(capsys):
    before, after, extension = extended(special_tokens=["<s>", "</s>", "<pad>", "<|user|>"])
    after.bos_token, after.eos_token, after.pad_token = "<s>", "</s>", "<pad>"
    rows_before, rows_after, initial = grow(make_model("gpt2"), extension)
    text = audited_text(before, after, ["the kit"])
    special = special_tokens(after)
    audit = audit_before(extension, text, {}, before, after, rows_before, rows_after, initial, special)
    assert [token.written_as for token in audit.tokens] == [("context",), ("eos",), ("pad",), ()]
    assert audit.never_in_training == ["<|user|>"]
    print_audit(audit)
    printed = capsys.readouterr().out
    assert "1 of 4 added tokens never occur" in printed
    assert all(cell in printed for cell in ("│ <s> (context) ", "│ </s> (eos) ", "│ <pad> (pad) ", "│ <|user|>  "))
    written = "(context) stands before each document, (eos) ends each document, (pad) fills up rows: written by the kit"
    assert written in printed.replace("\n", " ")
    assert [token["written_as"] for token in audit_as_json(audit)["tokens"]] == [("context",), ("eos",), ("pad",), ()]


def test_a_token_of_two_roles_and_none_of_the_others(capsys):
    before, after, extension = extended(special_tokens=["</s>", "<|user|>"])
    after.eos_token = after.pad_token = "</s>"
    rows_before, rows_after, initial = grow(make_model("gpt2"), extension)
    text = audited_text(before, after, ["the <|user|> kit"])
    special = special_tokens(after)
    print_audit(audit_before(extension, text, {}, before, after, rows_before, rows_after, initial, special))
    assert "</s> (context, eos, pad)" in capsys.readouterr().out
    audit, *_ = audit_of(["a <|user|>"], special=True, special_tokens=["<|user|>"])
    print_audit(audit)
    assert "written by the kit" not in capsys.readouterr().out


@pytest.mark.parametrize(("architecture", "text"), [("gpt2", "the input emb"), ("llama", "the output emb")])
def test_rows_that_the_kit_trains_and_that_did_not_move(architecture, text, capsys):
    """The context is an input everywhere, the EOS a target only: an untied model trains its output row alone."""
    before, after, extension = extended(special_tokens=["<s>", "</s>"])
    after.bos_token, after.eos_token = "<s>", "</s>"
    model = make_model(architecture)
    rows_before, rows_after, initial = grow(model, extension)
    none = audited_text(before, after, ["the kit"])
    special = special_tokens(after)
    audit = audit_before(extension, none, {}, before, after, rows_before, rows_after, initial, special)
    print_movement(audit, audit_after(audit, model, initial, after))
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    tied = "output" not in initial
    assert len(warned) == (1 if tied else 2)
    assert text in warned[-1]
    assert warned[0].endswith(": <s>")
    assert tied or warned[1].endswith(": </s>")


def test_what_is_printed_before_training(capsys):
    audit, *_ = audit_of(TRAINING_TEXT, SETS, tokens=["kinase", "IL-6"])
    print_audit(audit)
    printed = capsys.readouterr().out
    f = audit.texts["training"]
    assert f"training: {f.tokens_before:,} tokens become {f.tokens_after:,} (-{f.share:.1%}); " in printed
    assert f"{f.bytes_per_token_before:.2f} bytes per token become {f.bytes_per_token_after:.2f}" in printed
    assert "evaluation/domain: " in printed
    assert "320 rows become 384, 61 of them without a token" in printed
    [line] = [line for line in printed.splitlines() if "│ kinase" in line]
    assert "│".join(audit.tokens[0].rows[0].pieces) in line
    assert "320, 321" in line
    assert "in training text" in printed
    assert "in evaluation text" in printed


def test_tokens_are_sorted_by_what_they_save_then_by_how_often_they_occur(capsys):
    texts = ["a <|often|> " * 9, "an asyncio_kinase " * 3, "a tensor_kinase " * 2, "IL-66 kit"]
    words = ["tensor_kinase", "never", "asyncio_kinase", "the", "IL-66"]
    described = [{"content": "<|often|>", "description": "a corpus"}]
    audit, *_ = audit_of(texts, tokens=words, special_tokens=described)
    ranks = [(-token.saved["training"], -token.occurrences["training"], token.token) for token in audit.tokens]
    assert len({saved for saved, *_ in ranks}) > 3
    print_audit(audit)
    printed = capsys.readouterr().out
    places = [printed.index(f"│ {token} ") for _, _, token in sorted(ranks)]
    assert places == sorted(places)


def test_many_tokens(capsys):
    words = [f"{a}{b}qz" for a in "bcdfg" for b in "aeiou"]
    audit, *_ = audit_of(["the"], tokens=words)
    print_audit(audit)
    printed = capsys.readouterr().out
    assert "and 5 more; the `vocabulary.json`" in printed
    assert f"{', '.join(words[:10])} and 15 more" in printed


def test_nothing_but_tokens_that_exist(capsys):
    audit, _, after, _, initial, model = audit_of(["the"], tokens=["the"])
    movements = audit_after(audit, model, initial, after)
    capsys.readouterr()
    print_audit(audit)
    print_movement(audit, movements)
    assert "training: 4 tokens become 4 (+0.0%)" in capsys.readouterr().out
    assert audit_as_json(audit, movements)["tokens"] == []


# ---- after training


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied", "llama", "llama-tied", "bert", "bert-untied"])
def test_movement_equals_a_computation_by_hand(kind, capsys):
    model = MODELS[kind]()
    audit, _, after, extension, initial, _ = audit_of(["kinase kinase"], model=model, tokens=["kinase", "never"])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = {"input": model.get_input_embeddings().weight}
    if not tied:
        weights["output"] = model.get_output_embeddings().weight
    assert initial.keys() == weights.keys()
    old = {name: weight.detach().clone().double() for name, weight in weights.items()}
    elsewhere = audit.tokens[0].rows[1].id
    with torch.no_grad():
        for number, weight in enumerate(weights.values()):
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        for name, weight in weights.items():
            weight[elsewhere] = old[name][elsewhere].to(weight.dtype)
    movements = audit_after(audit, model, initial, after)
    assert list(movements) == sorted(row.id for row in extension.rows)
    starts = {row.id: row.initial_norm for token in audit.tokens for row in token.rows}
    for id_, movement in movements.items():
        for name, weight in weights.items():
            length = np.sqrt((old[name][id_].numpy() ** 2).sum())
            distance = np.sqrt(((weight[id_].detach().double() - old[name][id_]).numpy() ** 2).sum())
            assert starts[id_][name] == pytest.approx(length)
            assert movement.moved[name] == pytest.approx(distance)
            assert movement.moved_relative[name] == pytest.approx(distance / length)
        assert movement.unmoved == (tuple(weights) if id_ == elsewhere else ())
    print_movement(audit, movements)
    printed = capsys.readouterr().out
    assert printed.count("1 did not move at all") == len(weights)
    # It occurs, at the beginning of the text; the second word's rows do not, and moved.
    assert printed.count("1 new rows of the input embeddings are what they were before training") == 1
    assert ("of the output embeddings are what they were" in printed) == (not tied)
    assert ("all rows of these embeddings, which are the output's too" in printed) == tied
    assert ("all rows of the output embeddings" in printed) == (not tied)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_that_no_row_stayed_is_told_only_where_rows_can_stay(kind, capsys):
    model = MODELS[kind]()
    audit, _, after, _, initial, _ = audit_of(["kinase kinase"], model=model, tokens=["kinase"])
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
        if kind == "llama":
            model.get_output_embeddings().weight += 1
    print_movement(audit, audit_after(audit, model, initial, after))
    assert capsys.readouterr().out.count("0 did not move at all") == (kind == "llama")


def test_rows_that_never_occur_may_stay(capsys):
    audit, _, after, _, initial, model = audit_of(["the"], tokens=["kinase"])
    print_movement(audit, audit_after(audit, model, initial, after))
    printed = capsys.readouterr().out
    assert "2 did not move at all" in printed
    assert "warning" not in printed


def test_copies_are_copies():
    _, _, _, extension, initial, model = audit_of(["the"], tokens=["kinase"])
    kept = initial["input"].clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert torch.equal(initial["input"], kept)
    assert initial["input"].dtype == torch.float32
    assert initial_rows(model.bfloat16(), extension)["input"].dtype == torch.float32
    assert initial_rows(model.double(), extension)["input"].dtype == torch.float64


def test_nearest_rows(capsys):
    """Planted: cosines 1, 1, 1, .8, .6 whatever the lengths; equal ones by id; no spare row, no hole, not itself."""
    model = make_model("gpt2", vocab_size=384)
    weight = model.get_input_embeddings().weight
    rows = tuple(AddedRow(t, i, False, (), "mean", t) for t, i in (("a", 330), ("b", 320), ("zero", 331)))
    extension = Extension(rows, (), 320, holes=(5,))
    tokenizer = make_tokenizer()
    with torch.no_grad():
        weight.zero_()
        weight[:320, 5] = 1.0
        weight[320, 1] = 1.0
        weight[330, 0] = 2.0
        for number, values in {300: (7, 0), 7: (1e-3, 0), 9: (1, 0), 5: (1, 0), 340: (1, 0), 12: (0.8, 0.6),
                               11: (0.6, 0.8)}.items():  # fmt: skip
            weight[number] = 0
            weight[number, 0], weight[number, 2] = values
        weight[13] = 0
    initial = initial_rows(model, extension)
    none = (TextFigures(0, 0, 0, 0), [])
    audit = audit_before(extension, none, {}, tokenizer, tokenizer, 384, 384, initial)
    movements = audit_after(audit, model, initial, tokenizer)
    assert [n.id for n in movements[330].nearest_old_rows] == [7, 9, 300, 12, 11]
    assert [n.cosine for n in movements[330].nearest_old_rows] == [1, 1, 1, 0.8, 0.6]
    assert [n.id for n in movements[320].nearest_old_rows] == [0, 1, 2, 3, 4]  # all alike, at right angles
    assert {n.cosine for n in movements[320].nearest_old_rows} == {0}
    assert movements[331].nearest_old_rows == ()
    assert movements[331].moved_relative == {"input": None}
    shown = readable_tokens(tokenizer, [7, 9, 300, 12, 11])
    assert [n.text for n in movements[330].nearest_old_rows] == [shown[number] for number in (7, 9, 300, 12, 11)]


def test_nearest_rows_of_matrices_in_parts(monkeypatch):
    """Equal to one product of the whole, however it is cut."""
    monkeypatch.setattr("kit.model.vocabulary_audit._OLD_ROWS", 3)
    monkeypatch.setattr("kit.model.vocabulary_audit._NEW_ROWS", 2)
    audit, _, after, _, initial, model = audit_of(["the"], tokens=WORDS)
    weight = model.get_input_embeddings().weight.detach().double()
    unit = weight / weight.norm(dim=1, keepdim=True)
    for id_, movement in audit_after(audit, model, initial, after).items():
        cosines = (unit[:320] @ unit[id_]).numpy()
        best = np.lexsort((np.arange(320), -cosines))[:5]
        assert [n.id for n in movement.nearest_old_rows] == best.tolist()
        np.testing.assert_allclose([n.cosine for n in movement.nearest_old_rows], cosines[best], atol=1e-6)


def test_fewer_old_rows_than_are_asked_for():
    model = make_model("gpt2", vocab_size=4)
    extension = Extension((AddedRow("x", 3, False, (), "mean", "x"),), (), 3)
    tokenizer, none = make_tokenizer(), (TextFigures(0, 0, 0, 0), [])
    initial = initial_rows(model, extension)
    audit = audit_before(extension, none, {}, tokenizer, tokenizer, 3, 4, initial)
    assert {n.id for n in audit_after(audit, model, initial, tokenizer)[3].nearest_old_rows} == {0, 1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_is_plain_and_finite(value, capsys):
    audit, _, after, _, initial, model = audit_of(TRAINING_TEXT, SETS, tokens=WORDS, initialize="zeros")
    id_, other = audit.tokens[0].rows[0].id, audit.tokens[0].rows[1].id
    with torch.no_grad():
        model.get_input_embeddings().weight[id_] = value
        model.get_input_embeddings().weight[7] = value
        model.get_input_embeddings().weight[other] = 1.0
    movements = audit_after(audit, model, initial, after)
    print_movement(audit, movements)
    assert "nan" not in capsys.readouterr().out
    for saved in (audit_as_json(audit), audit_as_json(audit, movements)):
        text = json.dumps(saved, allow_nan=False)
        assert json.loads(text) == json.loads(json.dumps(saved))
    broken, grown = saved["tokens"][0]["rows"]
    assert broken["moved"] == broken["moved_relative"] == grown["moved_relative"] == {"input": None}
    assert grown["moved"] == {"input": pytest.approx(32**0.5)}
    assert broken["nearest_old_rows"] == ()
    assert 7 not in [n["id"] for n in grown["nearest_old_rows"]]


def test_json_holds_what_there_is_to_know():
    audit, _, after, extension, initial, model = audit_of(TRAINING_TEXT, SETS, tokens=WORDS)
    saved = audit_as_json(audit, audit_after(audit, model, initial, after))
    figures = saved["texts"]["evaluation/domain"]
    assert {"documents", "num_bytes", "tokens_before", "tokens_after", "saved", "share"} < figures.keys()
    assert {"bytes_per_token_before", "bytes_per_token_after"} < figures.keys()
    assert saved["embedding_rows"] == {"before": 320, "after": 384, "spare": 384 - 320 - len(extension.rows)}
    token = saved["tokens"][0]
    assert (token["token"], token["special"], token["method"]) == ("kinase", False, "subword-mean")
    assert token["occurrences"]["training"] == 5
    row = token["rows"][0]
    assert row["id"] == extension.rows[0].id
    assert row["piece_ids"] == extension.rows[0].pieces
    assert "".join(row["pieces"]) == row["text"] == "␣kinase"
    assert len(row["nearest_old_rows"]) == 5
    assert row["moved"] == {"input": 0}


# ---- real data


def test_real_tokenizer_and_text(capsys):
    folder, corpus = DATA / "base_novels", DATA / "python_docs" / "corpus.txt"
    if not folder.is_dir() or not corpus.is_file():
        pytest.skip(f"{folder} or {corpus} is not on this machine")
    before, after = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    whole = corpus.read_text(encoding="utf-8")
    start = whole.index("asyncio")
    texts = whole[start : start + 200_000].split("\n\n")
    extension = extend_tokenizer(after, VocabularySection(tokens=["asyncio", "iterable", "Zzyzxian"]))
    model = make_model("gpt2", vocab_size=len(before))
    rows_before, rows_after, initial = grow(model, extension)
    text = audited_text(before, after, texts)
    audit = audit_before(extension, text, {}, before, after, rows_before, rows_after, initial)
    figures = audit.texts["training"]
    assert audit.never_in_training == ["Zzyzxian"]
    # The estimate differs from the exact number only where the words' neighbours change.
    about = sum(token.saved["training"] for token in audit.tokens)
    assert about == pytest.approx(figures.saved, rel=0.05)
    for token in audit.tokens:
        assert "".join(token.rows[0].pieces) == f"␣{token.token}"
    print_audit(audit)
    assert "Zzyzxian" in capsys.readouterr().out

"""Added tokens lose no text, are found whole or not at all, and begin as the rows that the recipe asks for."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from kit.errors import UserError
from kit.model.encoding import FastEncoder
from kit.model.vocabulary import (
    AddedRow,
    Extension,
    audit_occurrences,
    extend_tokenizer,
    read_tokens,
    resize_and_initialise,
)
from kit.recipe.vocabulary import VocabularySection
from tests.material import documents, make_model, make_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = ["kinase", "Phosphorylation", "naïveté", "日本語", "theka", "gradients"]
SPECIAL = ["<|user|>", "<|assistant|>"]
CLASSES = {
    "gpt2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer, "qwen3": Qwen2Tokenizer, "gpt_neox": GPTNeoXTokenizer,
    "llama": LlamaTokenizer, "gemma2": GemmaTokenizer,
}  # fmt: skip


def sentencepiece(legacy=True, split=False):
    """A BPE tokenizer as converted from Llama 2's (legacy), or as transformers builds it with Metaspace."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=["▁"],
        show_progress=False,
    )
    backend.train_from_iterator(documents(200, seed=0), trainer)
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    state["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        state = {**json.loads(backend.to_str()), "pre_tokenizer": None}
        backend = Tokenizer.from_str(json.dumps(state))
    else:
        backend.pre_tokenizer = metaspace
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen():
    """A byte-level BPE with Qwen's split, which joins punctuation to words, and tokens numbered behind the model's."""
    tokenizer = make_tokenizer()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def real(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    if name == "gpt2_bpe":
        return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS = {
    "byte-level": make_tokenizer,
    "qwen": qwen,
    "legacy": sentencepiece,
    "metaspace": lambda: sentencepiece(legacy=False),
    "metaspace-split": lambda: sentencepiece(legacy=False, split=True),
    "GPT-2": lambda: real("gpt2_bpe"),
    "base_novels": lambda: real("base_novels"),
    "stories260K": lambda: real("stories260K/hf"),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def section(**values):
    return VocabularySection(**values)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def random_texts(number, words, seed=0):
    rng = random.Random(seed)
    between = [
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\t",
        "(",
        ")",
        ", ",
        ".",
        "'s",
        "-",
        "_",
        "x",
        "é",
        "\u00a0",
        "<0x0A>",
        "7",
        "🧪",
    ]
    for _ in range(number):
        yield "".join(
            rng.choice([*words, "the", "of", "corpus"]) + rng.choice(between) for _ in range(rng.randint(1, 12))
        )


# ---- the tokenizer


def test_no_text_is_lost(tokenizer):
    before = FastEncoder(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    texts = list(random_texts(400, WORDS))
    kept = [text for text in texts if before.backend.decode(before([text])[0]) == text]
    assert len(kept) > 200
    extension = extend_tokenizer(tokenizer, section(tokens=WORDS, special_tokens=SPECIAL))
    new = {row.id for row in extension.rows if not row.special}
    found = set()
    for text in kept:
        ids = ids_of(tokenizer, text)
        found |= new & set(ids)
        assert decode(tokenizer, ids) == text
        assert tokenizer.backend_tokenizer.decode(ids) == text
    assert found == new


def test_text_without_added_words_is_read_as_before(tokenizer):
    before = FastEncoder(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    texts = [*documents(50, seed=3), *random_texts(200, ["model", "kin", "Phos", "日本"], seed=1), "<0x0A>", "kinases"]
    expected = before(texts)
    extend_tokenizer(tokenizer, section(tokens=WORDS, special_tokens=SPECIAL))
    assert [ids_of(tokenizer, text) for text in texts] == expected


def test_a_word_is_one_token_with_the_space_before_it(tokenizer):
    before = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    extension = extend_tokenizer(tokenizer, section(tokens=["kinase", "dynein"]))
    rows = {row.text: row for row in extension.rows}
    assert set(rows) == {" kinase", "kinase", " dynein", "dynein"}
    ids, expected = ids_of(tokenizer, "the kinase kinase dynein of"), [" kinase", " kinase", " dynein"]
    start = ids.index(rows[" kinase"].id)
    assert ids[start : start + 3] == [rows[text].id for text in expected]
    assert ids[:start] == before.encode("the", add_special_tokens=False).ids
    assert ids_of(tokenizer, "x\nkinase\n").count(rows["kinase"].id) == 1
    for longer in ("kinases", " kinases", "xkinase", "a dyneinX", "akinase"):
        assert not {row.id for row in extension.rows} & set(ids_of(tokenizer, longer))
    # The pieces are what the old tokenizer read in the word's place.
    inside = before.encode("the kinase of", add_special_tokens=False).ids
    pieces = list(rows[" kinase"].pieces)
    assert any(inside[i : i + len(pieces)] == pieces for i in range(len(inside)))
    assert before.decode(rows["kinase"].pieces).strip() == "kinase"
    assert all(row.method == "subword-mean" for row in extension.rows)


def test_saved_tokenizer_reads_the_same(tokenizer, tmp_path):
    extend_tokenizer(tokenizer, section(tokens=[*WORDS, "IL-6"], special_tokens=SPECIAL))
    texts = [*random_texts(100, [*WORDS, "IL-6"]), "<|user|> kinase<|assistant|>"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert [ids_of(loaded, text) for text in texts] == [ids_of(tokenizer, text) for text in texts]
    assert loaded("kinase").keys() == tokenizer("kinase").keys()
    again = extend_tokenizer(loaded, section(tokens=WORDS, special_tokens=SPECIAL))
    assert not again.rows
    assert set(again.existing) == {*WORDS, *SPECIAL}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3", "gpt_neox", "llama", "gemma2"])
def test_classes_that_build_their_inside_anew(kind, tmp_path):
    """Saved as what they were, they would come back with words that nothing reaches."""
    model = json.loads(
        (sentencepiece() if kind in ("llama", "gemma2") else make_tokenizer()).backend_tokenizer.to_str()
    )
    vocabulary, merges = model["model"]["vocab"], [tuple(pair) for pair in model["model"]["merges"]]
    for token in ("<pad>", "<eos>", "<bos>"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = CLASSES[kind](vocab=vocabulary, merges=merges)
    tokenizer.chat_template, tokenizer.padding_side = "{{ messages }}", "left"
    before = tokenizer("the")
    words = ["kinase", "dynein"] if kind == "qwen2" else ["kinase", "naïveté"]
    extension = extend_tokenizer(tokenizer, section(tokens=words, special_tokens=SPECIAL), kind)
    assert len(extension.rows) == (4 if kind == "qwen2" else 6)  # AutoTokenizer forces a class upon qwen2
    assert tokenizer("the") == before
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the") == before
    texts = [f"a kinase ({words[1]}) {words[1]}", "<|user|>the kinase<|assistant|>", "kinases\nkinase"]
    assert [loaded(text) for text in texts] == [tokenizer(text) for text in texts]
    found = {number for text in texts for number in ids_of(loaded, text)}
    assert {row.id for row in extension.rows} <= found
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.padding_side == ("right" if kind == "qwen2" else "left")  # transformers does not save a changed one
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_an_old_entry_that_nothing_reached_stays_unreached():
    """Words are then matched before pre-tokenization, for a lone space more."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["Ġdormant"] = 320
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>")
    before = ids_of(tokenizer, "a dormant b")
    extension = extend_tokenizer(tokenizer, section(tokens=["kinase"]))
    assert ids_of(tokenizer, "a dormant b") == before
    assert [(row.id, row.text) for row in extension.rows] == [(321, "kinase")]
    assert extension.rows[0].id in ids_of(tokenizer, "the kinase")
    assert decode(tokenizer, ids_of(tokenizer, "the kinase b")) == "the kinase b"


def test_special_tokens_are_skipped_on_request():
    tokenizer = make_tokenizer()
    described = {"token": "<|user|>", "description": "the model"}
    extension = extend_tokenizer(tokenizer, section(special_tokens=[described, "<|assistant|>"]))
    user, assistant = extension.rows
    assert (user.method, assistant.method, assistant.pieces) == ("description", "mean", ())
    assert list(user.pieces) == ids_of(make_tokenizer(), "the model")
    ids = ids_of(tokenizer, "<|user|>the<|assistant|>")
    assert [ids[0], ids[-1]] == [user.id, assistant.id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the"
    assert {user.id, assistant.id} <= set(tokenizer.all_special_ids)


def test_words_that_the_pre_tokenizer_splits():
    """They cost a token for the space before them, and no text."""
    tokenizer = make_tokenizer()
    extension = extend_tokenizer(tokenizer, section(tokens=["IL-6", "p53", "protein kinase"]))
    assert [row.text for row in extension.rows] == ["IL-6", "p53", "protein kinase"]
    for text in ("a IL-6 b", "IL-6", "(p53)\np53", "the protein kinase of", "p533 IL-67"):
        ids = ids_of(tokenizer, text)
        assert decode(tokenizer, ids) == text
        assert bool({row.id for row in extension.rows} & set(ids)) == (text != "p533 IL-67")


def test_tokens_that_exist_are_left_alone(capsys):
    tokenizer = make_tokenizer()
    extension = extend_tokenizer(tokenizer, section(tokens=["the"], special_tokens=["<eos>"]))
    assert extension.rows == ()
    assert extension.existing == ("<eos>", "the")
    assert "<eos>, the" in capsys.readouterr().out
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert ids_of(tokenizer, "the kit <eos>") == ids_of(make_tokenizer(), "the kit <eos>")


def test_more_than_half_is_a_warning(capsys):
    extend_tokenizer(make_tokenizer(), section(tokens=[f"{a}{b}{b}qz" for a in "bcdfghjkl" for b in "bcdfghjklm"]))
    assert "warning" in capsys.readouterr().out


def wordpiece():
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghiklmnopqrstu",
        *(f"##{c}" for c in "abcdefghiklmnopqrstu"),
    ]
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]")


def test_wordpiece():
    tokenizer = wordpiece()
    old = tokenizer.get_vocab()
    extension = extend_tokenizer(tokenizer, section(tokens=["kinase"]))
    [row] = extension.rows
    assert row.pieces == tuple(old[t] for t in ("k", "##i", "##n", "##a", "##s", "##e"))
    assert ids_of(tokenizer, "a Kinase, kinases").count(row.id) == 1
    with pytest.raises(UserError, match="'Kinase' would never be found: the normaliser makes 'kinase'"):
        extend_tokenizer(wordpiece(), section(tokens=["Kinase"]))


def test_a_word_that_the_normaliser_changes():
    with pytest.raises(UserError, match="normaliser"):
        extend_tokenizer(qwen(), section(tokens=["naivete\u0301"]))


def test_a_special_token_that_would_not_be_read_back():
    """Byte-level decoding takes the letters of an added token for bytes."""
    with pytest.raises(UserError, match="losing text"):
        extend_tokenizer(make_tokenizer(), section(special_tokens=["<é>"]))


# ---- reading


def test_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mined\nkinase  # 321\n\n  C#\nnaïveté\r\n", encoding="utf-8-sig")
    special, ordinary = read_tokens(section(tokens={"from_file": str(file)}, special_tokens=["<|user|>"]))
    assert [token.token for token in special] == ["<|user|>"]
    assert [token.token for token in ordinary] == ["kinase", "C#", "naïveté"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kinase\nnaïveté\n".encode("latin-1"), r"words.txt:2: no UTF-8"),
        (b"kinase\n# a\nkinase\n", r"words.txt:3: `kinase` is declared already, in .*words.txt:1"),
        (b"# nothing\n", "holds no tokens"),
        (None, "No such file"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_tokens(section(tokens={"from_file": str(file)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": ["  "]}, r"tokens\[0\]: found '  '; .*more than whitespace"),
        ({"special_tokens": ["\n"]}, r"special_tokens\[0\]: .*more than whitespace"),
        ({"tokens": ["a", " kinase"]}, r"tokens\[1\]: found ' kinase'; .*without whitespace at its ends"),
        (
            {"tokens": ["kinase", "b", "kinase"]},
            r"tokens\[2\]: `kinase` is declared already, in vocabulary.tokens\[0\]",
        ),
        ({"tokens": ["<x>"], "special_tokens": [{"token": "<x>"}]}, r"tokens\[0\]: .* vocabulary.special_tokens\[0\]"),
    ],
)
def test_bad_tokens(values, message):
    with pytest.raises(UserError, match=message):
        read_tokens(section(**values))


def test_an_empty_token_is_refused_by_the_recipe():
    with pytest.raises(ValidationError):
        section(tokens=[""])


# ---- the model

MODELS = {
    "gpt2": lambda **c: make_model("gpt2", **c),
    "gpt2-untied": lambda **c: make_model("gpt2", tie_word_embeddings=False, **c),
    "gpt_neox": lambda **c: make_model("gpt_neox", tie_word_embeddings=False, **c),
    "llama": lambda **c: make_model("llama", tie_word_embeddings=False, **c),
    "llama-tied": lambda **c: make_model("llama", tie_word_embeddings=True, **c),
    "qwen3": lambda **c: make_model("qwen3", tie_word_embeddings=True, **c),
    "gemma3": lambda vocab_size=320, **c: gemma("gemma3_text", vocab_size, **c),
    "gemma2": lambda vocab_size=320, **c: gemma("gemma2", vocab_size, **c),
    "bert": lambda **c: bert(**c),
    "bert-untied": lambda **c: bert(tie_word_embeddings=False, **c),
}  # fmt: skip


def gemma(kind, vocab_size, **config):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": vocab_size,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **config))


def bert(vocab_size=320, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=vocab_size, **sizes, **config))
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    return model


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def extended(initialize="subword-mean", tokens=("kinase",), special=("<|user|>", "<|assistant|>"), described=False):
    tokenizer = make_tokenizer()
    special = [{"token": token, "description": "a corpus"} if described else token for token in special]
    return tokenizer, extend_tokenizer(
        tokenizer, section(tokens=list(tokens), special_tokens=special, initialize=initialize)
    )


def parts(model):
    """Copies of all that has a row for each token."""
    outputs = model.get_output_embeddings()
    found = {"inputs": model.get_input_embeddings().weight, "outputs": outputs.weight, "bias": outputs.bias}
    return {name: p.detach().clone() for name, p in found.items() if p is not None}


def grow(model, extension, initialize="subword-mean", multiple=64, seed=0):
    size = max([extension.old_size, *(row.id + 1 for row in extension.rows)])
    return resize_and_initialise(model, extension, size, initialize, multiple, seed)


def logits(model, ids=(1, 5, 320, 321, 322)):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_rows_are_the_means_of_the_right_rows(build):
    model = build()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = parts(model)
    _, extension = extended()
    reports = grow(model, extension)
    after = parts(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert after.keys() == before.keys()
    for name, old in before.items():
        new = after[name]
        assert len(new) == 384
        assert torch.equal(new[:320], old)
        mean = old.numpy().astype(np.float64).mean(0)
        for row in extension.rows:
            expected = old.numpy().astype(np.float64)[list(row.pieces)].mean(0) if row.pieces else mean
            np.testing.assert_allclose(new[row.id].numpy(), expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(new[324:].numpy(), np.broadcast_to(mean, new[324:].shape), rtol=1e-6, atol=1e-8)
    assert model.config.vocab_size == 384
    assert model.get_input_embeddings().num_embeddings == 384
    assert [report.row.method for report in reports] == ["mean", "mean", "subword-mean", "subword-mean"]
    assert reports[0].norms[0] == pytest.approx(float(after["inputs"][320].norm()))


def test_saved_model_computes_the_same(build, tmp_path):
    model = build()
    grow(model, extended()[1])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert logits(model).shape[-1] == 384
    assert torch.equal(logits(loaded), logits(model))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_padding_rows_are_used_first_and_do_not_count(build):
    model = build(vocab_size=330)
    with torch.no_grad():
        model.get_input_embeddings().weight[320:] = 1e6
        model.get_output_embeddings().weight[320:] = 1e6
    before = parts(model)
    _, extension = extended()
    grow(model, extension)
    after = parts(model)
    for name in ("inputs", "outputs"):
        assert len(after[name]) == 330
        assert torch.equal(after[name][324:], before[name][324:])
        torch.testing.assert_close(after[name][320], before[name][:320].mean(0))
    assert model.config.vocab_size == 330


@pytest.mark.parametrize(("multiple", "size"), [(None, 324), (1, 324), (64, 384), (100, 400)])
def test_size(multiple, size):
    model = make_model("llama", tie_word_embeddings=False)
    grow(model, extended()[1], multiple=multiple)
    assert {len(p) for p in parts(model).values()} == {size}


def test_never_shrinks():
    model = make_model("gpt2", vocab_size=1000)
    grow(model, extended()[1], multiple=64)
    assert model.config.vocab_size == len(parts(model)["inputs"]) == 1000


@pytest.mark.parametrize("method", ["mean", "mean-covariance", "zeros", "random"])
def test_methods(build, method):
    model, again, other = build(), build(), build()
    old = parts(model)
    _, extension = extended(method)
    for which, seed in ((model, 1), (again, 1), (other, 2)):
        grow(which, extension, method, seed=seed)
    new, same, different = parts(model), parts(again), parts(other)
    ids = [row.id for row in extension.rows]
    for name in old:
        assert torch.equal(new[name], same[name])
        assert torch.equal(new[name][:320], old[name])
        drawn = (method == "random" and name != "bias") or method == "mean-covariance"
        if old[name].std() > 0:
            assert torch.equal(new[name][ids], different[name][ids]) != drawn
        if method == "zeros":
            assert not new[name][320:].any()
        if method in ("mean", "mean-covariance"):
            mean = old[name].mean(0).expand_as(new[name][ids])
            torch.testing.assert_close(new[name][ids], mean, atol=1e-4, rtol=1e-4)
    if method == "random":
        assert 0.5 < new["inputs"][ids].std() / old["inputs"].std() < 1.5


@pytest.mark.parametrize("method", ["random", "mean-covariance"])
def test_global_random_state_is_left_alone(method):
    model, extension = make_model("gpt2"), extended(method)[1]
    state = torch.get_rng_state()
    grow(model, extension, method)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_old_rows_covariance():
    """Independent of how it is drawn: many samples against numpy's covariance."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            torch.randn(320, 32, generator=torch.Generator().manual_seed(0)) * 1e3
        )
    old = parts(model)["inputs"].numpy().astype(np.float64)
    rows = tuple(AddedRow(f"w{i}", 320 + i, False, (), "mean-covariance", f"w{i}") for i in range(4000))
    model.double()
    resize_and_initialise(model, Extension(rows, (), 320), 4320, "mean-covariance", None, 0)
    sample = parts(model)["inputs"][320:].numpy()
    np.testing.assert_allclose(sample.mean(0), old.mean(0), atol=1e-2)
    expected = 1e-9 * np.cov(old.T, bias=True)
    assert np.abs(np.cov(sample.T) - expected).max() < 0.1 * np.diag(expected).max()


def test_description():
    model = make_model("gpt2")
    old = parts(model)["inputs"]
    _, extension = extended("zeros", described=True)
    grow(model, extension, "zeros")
    pieces = ids_of(make_tokenizer(), "a corpus")
    torch.testing.assert_close(parts(model)["inputs"][320], old[pieces].mean(0))


def test_half_precision_keeps_its_type_and_old_rows():
    model = make_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
    old = parts(model)
    _, extension = extended()
    grow(model, extension)
    for name, new in parts(model).items():
        assert new.dtype == torch.bfloat16
        assert torch.equal(new[:320], old[name])
        row = extension.rows[-1]
        assert torch.equal(new[row.id], old[name][list(row.pieces)].double().mean(0).to(torch.bfloat16))


def test_real_model_understands_an_added_word_at_once(tmp_path):
    folder = DATA / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    old = logits(model, (1, 5, 9, 300))
    extension = extend_tokenizer(tokenizer, section(tokens=["elephant", "butterfly"]))
    grow(model, extension)
    assert torch.equal(logits(model, (1, 5, 9, 300))[..., :512], old[..., :512])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Once there was an elephant.")["input_ids"]
    assert extension.rows[0].id in ids
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


# ---- the audit


def test_occurrences(tmp_path):
    rows = [AddedRow("a", 9, False, (), "mean", "a"), AddedRow("b", 12, False, (), "mean", "b")]
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 12, 5_000_000).astype(np.uint16), np.array([8, 9, 13, 11], dtype=np.int32)
    first.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    assert audit_occurrences(rows, [mapped, second, second[:0]]) == {9: int((first == 9).sum()) + 1, 12: 0}
    assert audit_occurrences([], [second]) == {}

"""Added tokens lose no text, and are found whole or not at all."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from kit.errors import UserError
from kit.model.encoding import FastEncoder
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.vocabulary import VocabularySection
from tests.material import documents, make_tokenizer

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
    described = {"content": "<|user|>", "description": "the model"}
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
    with pytest.raises(UserError, match="losing text"):  # what stands for a space, in the vocabulary already
        extend_tokenizer(make_tokenizer(), section(special_tokens=["Ġ"]))


def test_all_words_that_cannot_be_added_are_named_at_once():
    with pytest.raises(UserError, match=r"'Größe-2'.*losing text\n.*'naïve-7'.*losing text$"):
        extend_tokenizer(make_tokenizer(), section(tokens=["Größe-2", "kinase", "naïve-7"]))
    with pytest.raises(UserError, match=r"(?s)'Ka'.*'Kt' .*\nand 6 more like them$"):
        extend_tokenizer(wordpiece(), section(tokens=[f"K{c}" for c in "abcdefghijklmnopqrstuvwxyz"]))


@pytest.mark.parametrize("legacy", [True, False])
def test_the_longest_of_words_with_the_same_beginning_is_found(legacy):
    tokenizer, words = sentencepiece(legacy), ["ki", "kin", "kinas", "kinase", "kinas-7", "k.n"]
    extension = extend_tokenizer(tokenizer, section(tokens=words))
    ids = {row.text: row.id for row in extension.rows}
    for word in words:
        assert ids[f" {word}"] in ids_of(tokenizer, f"the {word} is")
    for other in ("kina", "kinases", "kan", "kinas7"):
        assert not set(ids.values()) & set(ids_of(tokenizer, f"the {other} is"))

"""Tokens of each kind of tokenizer are shown as the text that they are, on one line."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from kit.model.readable import readable_tokens, visible
from tests.material import make_tokenizer


def test_readable_text_of_byte_level_tokens():
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    shown = readable_tokens(tokenizer, [*ids.values(), 10**6])
    assert shown[ids["<eos>"]] == "<eos>"
    assert shown[ids["Ġ"]] == "␣"
    assert shown[ids["Ċ"]] == "⏎"
    assert shown[ids["Ã"]] == "\\xc3"  # the first half of an `é`
    assert shown[10**6] == f"[{10**6}]"
    assert all(text.isprintable() and " " not in text for text in shown.values())


def test_readable_text_of_other_tokens():
    vocabulary = {"<unk>": 0, "▁kin": 1, "ase": 2, "<0xC3>": 3, "<0x0A>": 4, "é": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = token_decoders.Sequence(
        [token_decoders.Replace("▁", " "), token_decoders.ByteFallback(), token_decoders.Fuse(),
         token_decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert list(readable_tokens(metaspace, range(6)).values()) == ["<unk>", "␣kin", "ase", "<0xC3>", "⏎", "é"]
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "kin": 1, "##ase": 2}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = token_decoders.WordPiece()
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert readable_tokens(wordpiece, [0, 1, 2]) == {0: "[UNK]", 1: "kin", 2: "##ase"}


def test_visible():
    assert visible(" a\n\tb\x1b\r") == "␣a⏎⇥b\\x1b\\r"
    assert visible("protein kinase", space=" ") == "protein kinase"

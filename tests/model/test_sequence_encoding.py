"""Texts are encoded as the tokenizer's own call does it, and cut to what is asked for."""

import copy
import itertools
import pickle
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, ByT5Tokenizer, CanineTokenizer, GPT2Config, PreTrainedTokenizerFast, RobertaConfig

from kit.errors import UserError
from kit.model.sequence_encoding import prepare_for_pipeline, sequence_coding_key, sequence_encoder
from tests.material import WORDS, make_tokenizer

TEMPLATES = {
    "bert": {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"},
    "roberta": {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] [SEP] $B [SEP]"},
    "llama": {"single": "[CLS] $A", "pair": "[CLS] $A $B:1"},
}


def words_tokenizer(template):
    """One token for each word, with a template of special tokens."""
    vocabulary = {
        token: number for number, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *dict.fromkeys(WORDS)])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(**template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


TOKENIZERS = {
    "gpt2": make_tokenizer, **{name: lambda t=t: words_tokenizer(t) for name, t in TEMPLATES.items()},
    "byt5": ByT5Tokenizer, "canine": CanineTokenizer,
}  # fmt: skip
TRUNCATIONS = ["head", "tail", "head+tail"]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def some_texts(seed, longest=30):
    rng = random.Random(seed)
    return [
        "",
        *(" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest))) for _ in range(12)),
        "[SEP] <eos>",
    ]


def called(tokenizer, text, pair, **options):
    one = tokenizer(text, pair, **options)
    return one["input_ids"], one.get("token_type_ids")


def cases():
    texts = some_texts(1)
    return [(text, None) for text in texts], list(zip(texts, some_texts(2), strict=True)) + [
        ("the kit", ""),
        ("", "the kit"),
    ]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_texts_that_fit_are_what_the_tokenizers_own_call_gives(tokenizer, truncation):
    for limit, rows in itertools.product((2000, None), cases()):
        encode = sequence_encoder(tokenizer, limit, truncation)
        texts, pairs = [text for text, _ in rows], [pair for _, pair in rows]
        encoded = encode(texts, None if pairs[0] is None else pairs)
        for (text, pair), (ids, types, length) in zip(rows, encoded, strict=True):
            assert (ids, types) == called(tokenizer, text, pair)
            assert length == len(ids)


@pytest.mark.parametrize(("truncation", "side"), [("head", "right"), ("tail", "left")])
@pytest.mark.parametrize("max_length", [5, 6, 13])
def test_beginning_and_end_are_what_the_tokenizers_own_truncation_gives(tokenizer, truncation, side, max_length):
    encode, own = sequence_encoder(tokenizer, max_length, truncation), copy.deepcopy(tokenizer)
    own.truncation_side = side
    cut = 0
    for rows in cases():
        texts, pairs = [text for text, _ in rows], [pair for _, pair in rows]
        for (text, pair), (ids, types, length) in zip(
            rows, encode(texts, pairs if pairs[0] is not None else None), strict=True
        ):
            assert (ids, types) == called(own, text, pair, truncation=True, max_length=max_length)
            # Slow tokenizers lose an empty second text when they cut from the left.
            assert len(ids) == min(length, max_length) or pair == ""
            assert length == len(called(own, text, pair)[0])
            cut += length > max_length
    assert cut > 5


@pytest.mark.parametrize("max_length", [5, 6, 13])
def test_half_of_each_end(tokenizer, max_length):
    """Worked out from the tokens alone: half of what remains of each text, the odd one from its beginning."""
    encode, special = sequence_encoder(tokenizer, max_length, "head+tail"), tokenizer.num_special_tokens_to_add(False)
    for text in some_texts(1):
        content = tokenizer(text, add_special_tokens=False)["input_ids"]
        [(ids, types, length)] = encode([text])
        assert length == len(content) + special
        if length <= max_length:
            continue
        room = max_length - special
        expected = content[: room - room // 2] + (content[-(room // 2) :] if room // 2 else [])
        whole = tokenizer(text)["input_ids"]
        begin = next(n for n in range(len(whole)) if whole[n : n + len(content)] == content)
        assert ids == [*whole[:begin], *expected, *whole[begin + len(content) :]]
        assert types is None or len(types) == len(ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_half_of_each_end_of_both_texts(template):
    tokenizer = words_tokenizer(TEMPLATES[template])
    distinct = list(dict.fromkeys(WORDS))
    first, second = distinct[:9], distinct[10:15]
    special, texts = tokenizer.num_special_tokens_to_add(True), ([" ".join(first)], [" ".join(second)])
    [(ids, types, length)] = sequence_encoder(tokenizer, special + 9, "head+tail")(*texts)
    assert length == special + 14
    words = [token for token in tokenizer.convert_ids_to_tokens(ids) if not token.startswith("[")]
    kept = len([word for word in words if word in first])
    # Longest first: 9 and 5 become 4 and 5, or 5 and 4, as the tokenizer itself shares the room.
    [(head, head_types, _)] = sequence_encoder(tokenizer, special + 9, "head")(*texts)
    assert kept == len([token for token in tokenizer.convert_ids_to_tokens(head) if token in first])
    rest = 9 - kept
    assert {kept, rest} == {4, 5}
    expected = first[: (kept + 1) // 2] + first[9 - kept // 2 :] + second[: (rest + 1) // 2] + second[5 - rest // 2 :]
    assert words == expected
    assert types == head_types


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts, pairs = some_texts(1), some_texts(2)
    for truncation in TRUNCATIONS:
        encode = sequence_encoder(tokenizer, 9, truncation)
        assert encode(texts) == [row for text in texts for row in encode([text])]
        assert encode(texts, pairs) == [
            row for text, pair in zip(texts, pairs, strict=True) for row in encode([text], [pair])
        ]
    assert encode([]) == []
    assert encode([], []) == []


def test_limits_of_a_tokenizer_file_and_sides_do_not_leak_in():
    plain = words_tokenizer(TEMPLATES["bert"])
    limited = copy.deepcopy(plain)
    limited.backend_tokenizer.enable_truncation(4, direction="left")
    limited.backend_tokenizer.enable_padding(length=50)
    limited.truncation_side = limited.padding_side = "left"
    limited.model_max_length = 3
    texts, pairs = some_texts(1), some_texts(2)
    for truncation in TRUNCATIONS:
        expected = sequence_encoder(plain, 9, truncation)
        encode = sequence_encoder(limited, 9, truncation)
        assert encode(texts) == expected(texts)
        assert encode(texts, pairs) == expected(texts, pairs)
        assert sequence_coding_key(limited, 9, truncation) == sequence_coding_key(plain, 9, truncation)
    assert limited.truncation_side == "left"
    assert limited.backend_tokenizer.truncation["max_length"] == 4


def test_an_encoder_can_be_sent_to_another_process(tokenizer):
    encode = sequence_encoder(tokenizer, 9, "head+tail")
    texts = some_texts(1)
    assert pickle.loads(pickle.dumps(encode))(texts) == encode(texts)


def test_key_tells_templates_and_lengths_apart():
    keys = [sequence_coding_key(words_tokenizer(t), 9, "head") for t in TEMPLATES.values()]
    bert = words_tokenizer(TEMPLATES["bert"])
    bert.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    keys[0] = sequence_coding_key(bert, 9, "head")
    keys += [sequence_coding_key(bert, 10, "head"), sequence_coding_key(bert, 9, "tail")]
    without_types = copy.deepcopy(bert)
    without_types.model_input_names = ["input_ids", "attention_mask"]
    keys.append(sequence_coding_key(without_types, 9, "head"))
    assert len(set(keys)) == len(keys)
    again = copy.deepcopy(bert)
    again.pad_token = "[SEP]"
    assert sequence_coding_key(again, 9, "head") == keys[0]


def test_no_room_for_a_text():
    bert = words_tokenizer(TEMPLATES["bert"])
    with pytest.raises(
        UserError, match=r"data\.max_length: found 2; expected at least 3.*2 special tokens to each text"
    ):
        sequence_encoder(bert, 2, "head")
    with pytest.raises(UserError, match=r"expected at least 4.*3 special tokens to each pair"):
        sequence_encoder(bert, 3, "head")(["the kit"], ["the corpus"])
    with pytest.raises(ValueError, match="middle"):
        sequence_encoder(bert, 9, "middle")


def test_what_the_pipeline_needs_survives_saving(tmp_path):
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token is None
    tokenizer.backend_tokenizer.enable_truncation(4)
    prepare_for_pipeline(tokenizer, 17, "tail", GPT2Config())
    tokenizer.save_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (saved.pad_token, saved.padding_side, saved.truncation_side) == ("<eos>", "right", "left")
    assert saved.model_max_length == 17
    long = " ".join(some_texts(1))
    [(ids, types, _)] = sequence_encoder(tokenizer, 17, "tail")([long])
    assert types is None
    assert dict(saved(long, truncation=True)) == {"input_ids": ids, "attention_mask": [1] * 17}
    assert len(saved(long)["input_ids"]) > 17


def test_types_of_tokens_go_to_models_that_have_them():
    for config, has in ((BertConfig(), True), (RobertaConfig(type_vocab_size=1), False), (GPT2Config(), False)):
        tokenizer = words_tokenizer(TEMPLATES["bert"])
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        prepare_for_pipeline(tokenizer, 20, "head", config)
        assert ("token_type_ids" in tokenizer("the kit")) is has
        assert tokenizer.pad_token == "[PAD]"

"""Encoders reach another process with all that decides which tokens they make."""

import pickle

import pytest
from transformers import ByT5Tokenizer

from kit.model.encoding import FastEncoder, SlowEncoder
from kit.model.tokenizer import encoder
from tests.material import documents, make_tokenizer

TEXTS = [*documents(20, seed=3), "<eos>", "a <eos> b", "", " <eos>\n"]


@pytest.mark.parametrize("split", [True, False])
def test_a_fast_encoder_survives_pickling(split):
    """Whether a special token in a text is that token is a flag that the tokenizer's own form does not hold."""
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = split
    encode = encoder(tokenizer)
    assert isinstance(encode, FastEncoder)
    copy = pickle.loads(pickle.dumps(encode))
    assert copy(TEXTS) == encode(TEXTS)
    assert copy.backend.encode_special_tokens == encode.backend.encode_special_tokens
    flipped = pickle.loads(pickle.dumps(encode))
    flipped.backend.encode_special_tokens = not encode.backend.encode_special_tokens
    assert pickle.loads(pickle.dumps(flipped))(TEXTS) == flipped(TEXTS) != encode(TEXTS)


def test_a_fast_encoder_adds_no_token_of_its_own_accord():
    tokenizer = make_tokenizer()
    assert encoder(tokenizer)(TEXTS) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def test_a_slow_encoder_survives_pickling():
    tokenizer = ByT5Tokenizer()  # one of those that transformers has in Python alone
    encode = encoder(tokenizer)
    assert isinstance(encode, SlowEncoder)
    assert pickle.loads(pickle.dumps(encode))(TEXTS) == encode(TEXTS)
    assert encode(["kit"]) == [tokenizer.convert_tokens_to_ids(list("kit"))]

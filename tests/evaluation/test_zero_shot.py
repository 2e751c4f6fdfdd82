"""Likelihoods of labels' words against the plainest computation: one prompt and one label at a time."""

import numpy as np
import pytest
import torch

from kit.errors import UserError
from kit.evaluation.zero_shot import zero_shot
from tests.evaluation.rows import in_two_processes
from tests.material import documents, make_model, make_tokenizer

NAMES = ["tensor", "loss", "a corpus of documents"]
CONTEXT = 0
QUESTION = "\nQuestion: Is the text above tensor, loss or a corpus of documents?\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def model(architecture="gpt2"):
    return make_model(architecture, initializer_range=0.3, **LONG[architecture])


LONG = {"gpt2": {"n_positions": 256}, "llama": {"max_position_embeddings": 256}}
TEXTS = documents(12, seed=3, longest=20)


@torch.no_grad()
def plain(model, tokenizer, prompts, spoken):
    """Return ln p of each label's words after each whole prompt."""
    found = []
    for prompt in prompts:
        before = [CONTEXT, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        found.append([])
        for words in spoken:
            label = tokenizer(" " + words, add_special_tokens=False)["input_ids"]
            log_p = model(torch.tensor([before + label])).logits[0].double().log_softmax(-1)
            found[-1].append(sum(log_p[len(before) - 1 + k, token].item() for k, token in enumerate(label)))
    return np.array(found)


def ask(model, tokenizer, texts=TEXTS, names=NAMES, prompt=None, words=None, positions=256, most=600, **options):
    return zero_shot(model, tokenizer, texts, names, prompt, words or names, positions, most, CONTEXT, **options)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("max_positions", [1, 300, 100_000])
def test_likelihoods_are_those_of_each_label_alone(architecture, max_positions, tokenizer):
    asked = model(architecture).train()
    found = ask(asked, tokenizer, most=max_positions)
    assert asked.training
    expected = plain(asked.eval(), tokenizer, [text + QUESTION for text in TEXTS], NAMES)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found.dtype == np.float64
    assert np.ptp(expected, axis=0).min() > 0.1


def single_tokens(tokenizer):
    return [word for word in ("the", "kit", "that", "loss") if len(tokenizer(" " + word)["input_ids"]) == 1]


@pytest.mark.parametrize("max_positions", [1, 100_000])
def test_labels_of_one_token_take_one_pass(max_positions, tokenizer):
    names = single_tokens(tokenizer)
    assert len(names) >= 2
    asked, calls = model().eval(), []
    asked.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = ask(asked, tokenizer, names=names, prompt="Words: {text} What?", most=max_positions)
    assert sum(calls) == len(TEXTS)
    asked._forward_pre_hooks.clear()
    assert found == pytest.approx(plain(asked, tokenizer, [f"Words: {t} What?" for t in TEXTS], names), abs=1e-4)


def test_labels_that_begin_alike_share_a_row(tokenizer):
    """A label of one token needs no row of its own, nor does one whose tokens another one's begin with."""
    one, *_ = single_tokens(tokenizer)
    names = [one, f"{one} of documents", f"{one} of", "a corpus"]
    tokens = [tokenizer(" " + name)["input_ids"] for name in names]
    assert tokens[1][: len(tokens[2])] == tokens[2]
    assert len(tokens[0]) == 1 < len(tokens[3])
    asked, calls = model().eval(), []
    asked.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = ask(asked, tokenizer, names=names, prompt="Words: {text} What?")
    assert sum(calls) == 2 * len(TEXTS)
    asked._forward_pre_hooks.clear()
    assert found == pytest.approx(plain(asked, tokenizer, [f"Words: {t} What?" for t in TEXTS], names), abs=1e-4)


def test_words_stand_for_labels(tokenizer):
    asked = model().eval()
    found = ask(asked, tokenizer, names=["0", "1"], words=["0", "yes indeed"], prompt="{text}\nGood?")
    expected = plain(asked, tokenizer, [text + "\nGood?" for text in TEXTS], ["0", "yes indeed"])
    assert found == pytest.approx(expected, abs=1e-4)


def test_braces_in_a_text_are_text(tokenizer):
    asked = model().eval()
    found = ask(asked, tokenizer, texts=["{text} {0}"], prompt="{text} is {x}")
    assert found == pytest.approx(plain(asked, tokenizer, ["{text} {0} is {x}"], NAMES), abs=1e-4)


def test_a_long_text_loses_its_end_and_is_counted(tokenizer, capsys):
    asked = model().eval()
    long = " ".join(documents(20, seed=5)) + " naïve Größe"
    seen = []
    hook = lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist())  # noqa: E731
    asked.register_forward_pre_hook(hook, with_kwargs=True)
    ask(asked, tokenizer, texts=[long, "short"], positions=200, most=1, name="test")
    assert "1 of 2 texts of test were cut to fit 200 positions" in capsys.readouterr().out
    longest = max(seen, key=len)
    read = tokenizer.decode(longest)
    assert len(longest) == 200
    assert QUESTION in read
    assert long.startswith(read[len("<eos>") : read.index(QUESTION)])
    assert len(read.partition(QUESTION)[0]) > 100


def test_characters_of_several_bytes_are_cut_whole(tokenizer):
    seen = []
    asked = model().eval()
    hook = lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist())  # noqa: E731
    asked.register_forward_pre_hook(hook, with_kwargs=True)
    for positions in range(120, 128):
        ask(asked, tokenizer, texts=["🦊" * 500], positions=positions, most=1)
    assert not any("\ufffd" in tokenizer.decode(ids) for ids in seen)
    assert all("🦊🦊🦊" in tokenizer.decode(ids) for ids in seen)


def test_two_processes_give_the_bits_of_one(tmp_path):
    alone = _scores()
    for found in in_two_processes(_scores, tmp_path):
        assert (found == alone).all()


def _scores():
    return ask(model(), make_tokenizer())


def test_a_tokenizer_that_writes_the_space_itself_gets_none():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {"<eos>": 0, "▁good": 1, "▁bad": 2, "▁": 3, "▁it": 4, "▁is": 5}
    backend = Tokenizer(models.WordLevel(pieces, unk_token="▁"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    asked = make_model(vocab_size=6, initializer_range=0.3).eval()
    found = ask(asked, tokenizer, texts=["it"], names=["good", "bad"], prompt="{text} is", positions=64)
    with torch.no_grad():
        expected = asked(torch.tensor([[0, 4, 5]])).logits[0, -1].double().log_softmax(-1)[[1, 2]]
    assert found[0] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["tensor", "tensor", "x"]}, r"`tensor` and `loss` have the same words, 'tensor'"),
        ({"positions": 30}, r"zero_shot\.prompt: found \d+ tokens without any text, and there is room for \d+"),
    ],
)
def test_nonsense_is_a_users_error(options, message, tokenizer):
    with pytest.raises(UserError, match=message):
        ask(model(), tokenizer, **options)


def test_no_texts(tokenizer):
    assert ask(model(), tokenizer, texts=[]).shape == (0, 3)

"""Text becomes ids exactly as the tokenizer would have it, and a tokenizer of one's own learns from training text."""

import json
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from kit.data.corpus import training_documents, training_documents_key
from kit.errors import UserError
from kit.model.tokenizer import encoder, load_tokenizer, tokenizer_key
from kit.recipe.models import DataSection, ModelSection
from tests.material import documents, make_tokenizer

ODD_TEXTS = [
    "", " ", "\n\n\n", "\x00\x1b[0m", "the <eos> of it", "<eos>", "naïve Größe", "日本語のテキスト", "🧪👩‍🔬",
    "e\u0301 = \u00e9", "\u202eright to left", "\ufeffBOM", "a" * 5_000, "the kit reads " * 500, "\r\n\ttabs",
]  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    """A function that saves a tokenizer with changed files and loads it as a recipe would."""

    def load(tokenizer=None, **settings):
        folder = tmp_path / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        values = {**json.loads(file.read_text()), **settings}
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
        return load_tokenizer(ModelSection(name_or_path=str(folder)), tmp_path, lambda: (), lambda: "")

    return load


def with_limits():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    return tokenizer


def with_bos():
    """A tokenizer that puts BOS before every text, as Llama's does."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


# ---- encoding


@pytest.mark.parametrize("make", [make_tokenizer, with_limits, with_bos])
@pytest.mark.parametrize("settings", [{}, {"split_special_tokens": True}, {"model_max_length": 16}], ids=str)
def test_encoder_equals_the_tokenizer(loaded, make, settings):
    tokenizer = loaded(make(), **settings)
    expected = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in ODD_TEXTS]
    assert encoder(tokenizer)(ODD_TEXTS) == expected
    assert any(len(ids) > 1_000 for ids in expected)


def test_limits_in_a_tokenizer_file_do_not_cut_documents(loaded):
    tokenizer = loaded(with_limits())
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer.backend_tokenizer.padding["length"] == 9
    encode = encoder(tokenizer)
    assert tokenizer.decode(encode(["the kit reads a corpus and cuts it"])[0]) == "the kit reads a corpus and cuts it"
    assert encode([""]) == [[]]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4  # the tokenizer itself is left alone


# ---- loading


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_folder_without_a_tokenizer(tiny_models, tmp_path, architecture):
    """Transformers makes up a tokenizer of `<|endoftext|>` alone, to which every document is empty."""
    folder = shutil.copytree(tiny_models(architecture), tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer") as error:
        load_tokenizer(ModelSection(name_or_path=str(folder)), tmp_path, lambda: (), lambda: "")
    assert str(folder) in str(error.value)


def test_missing_tokenizer_names_its_own_key(tmp_path, tiny_models):
    section = ModelSection(name_or_path=str(tiny_models()), tokenizer=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^model\.tokenizer: .*no such folder"):
        load_tokenizer(section, tmp_path, lambda: (), lambda: "")


def test_tokenizer_of_its_own_folder_beside_the_model(tmp_path, tiny_models, loaded):
    other = make_tokenizer(vocab_size=300)
    other.save_pretrained(tmp_path / "other")
    section = ModelSection(name_or_path=str(tiny_models()), tokenizer=str(tmp_path / "other"))
    assert len(load_tokenizer(section, tmp_path, lambda: (), lambda: "")) == 300


# ---- training


def train(store, texts, vocab_size=300, key="documents"):
    asked = []

    def give():
        asked.append(True)
        return iter(texts)

    section = ModelSection(from_config={"model_type": "gpt2"}, tokenizer={"vocab_size": vocab_size})
    return load_tokenizer(section, store, give, lambda: key), len(asked)


def test_training_is_deterministic(tmp_path):
    texts = documents(100, seed=7)
    (first, _), (second, _) = (train(tmp_path / name, texts) for name in ("a", "b"))
    assert tokenizer_key(first) == tokenizer_key(second)
    assert len(first) == 300
    assert first.eos_token == first.bos_token == "<|endoftext|>"


def test_trained_once(tmp_path, capsys):
    texts = documents(50, seed=7)
    first, asked = train(tmp_path, texts)
    assert asked == 1
    assert "training a byte-level BPE tokenizer" in capsys.readouterr().out
    again, asked = train(tmp_path, texts)
    assert asked == 0
    assert "training" not in capsys.readouterr().out
    assert tokenizer_key(first) == tokenizer_key(again)


@pytest.mark.parametrize("change", [{"vocab_size": 301}, {"key": "other documents"}])
def test_trained_anew_for_another_size_or_corpus(tmp_path, change):
    train(tmp_path, documents(50, seed=7))
    _, asked = train(tmp_path, documents(50, seed=7), **change)
    assert asked == 1


def test_trained_tokenizer_keeps_every_byte(tmp_path):
    tokenizer, _ = train(tmp_path, documents(50, seed=7))
    encode = encoder(tokenizer)
    for text in [text for text in ODD_TEXTS if text] + ["".join(map(chr, range(1, 0x250)))]:
        [ids] = encode([text])
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_held_out_documents_are_not_learned_from(tmp_path):
    """A word of the validation split in the vocabulary would make the evaluation easier than the world is."""
    files = DataSection(
        train=[{"path": str(tmp_path / "corpus.txt"), "separator": "\n\n\n"}], validation={"fraction": 0.3}
    )
    texts = documents(40, seed=8)
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(texts))
    kept = set(training_documents(files))
    held = [text for text in texts if text not in kept]
    assert 3 < len(held) < 20
    # The hash of a document decides, so a word is put where it is wanted by leaving the others as they are.
    written = [*kept]
    for number in range(1_000):
        candidate = f"xylophonic{number % 7} " * 40 + str(number)
        (tmp_path / "corpus.txt").write_text(candidate)
        if not list(training_documents(files)):
            written.append(candidate)
        if len(written) == len(kept) + 5:
            break
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(written))
    section = ModelSection(from_config={"model_type": "gpt2"}, tokenizer={"vocab_size": 350})
    tokenizer = load_tokenizer(
        section, tmp_path, lambda: training_documents(files), lambda: training_documents_key(files)
    )
    everything, _ = train(tmp_path / "all", written, vocab_size=350)
    assert any("xylo" in token for token in everything.get_vocab())
    assert not any("xy" in token for token in tokenizer.get_vocab())


# ---- the key


def test_key_is_the_same_after_saving_and_use(loaded):
    tokenizer = loaded(with_limits())
    key = tokenizer_key(tokenizer)
    tokenizer("a call switches the limits of the file off")
    assert tokenizer_key(tokenizer) == key
    assert tokenizer_key(loaded(tokenizer)) == key


def test_key_changes_with_vocabulary_and_special_tokens(loaded):
    def changed(**special):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens(special)
        return tokenizer

    def other_eos():
        backend = make_tokenizer().backend_tokenizer
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="the")

    tokenizers = [
        make_tokenizer(), make_tokenizer(vocab_size=321), changed(bos_token="<eos>"), changed(bos_token="<bos>"),
        other_eos(), loaded(split_special_tokens=True),
    ]  # fmt: skip
    keys = [tokenizer_key(tokenizer) for tokenizer in tokenizers]
    assert len(set(keys)) == len(keys)

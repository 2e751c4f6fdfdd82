"""OpenAI's folder: TensorFlow's files written and read, by TensorFlow 1's own means too; and its tokenizer."""

import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from kit.checkpoints.conversion import from_hf, to_hf
from kit.checkpoints.formats import tensorflow_bundle
from kit.checkpoints.layouts import openai_tf
from kit.errors import UserError
from tests.checkpoints.gpt2_models import lazy, logits_of, make_model, random_ids, tensors_of

WHY = "reads and writes OpenAI's files; pip install 'domain-adaptation-kit[tensorflow]'"


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow", reason=WHY)


@pytest.fixture
def written(tf, tmp_path):
    """A model and the folder that it was written to."""
    model = make_model(2, 16, 2)
    own, settings, _ = from_hf(lazy(tensors_of(model)), model.config, openai_tf, {})
    assert tensorflow_bundle.write(tmp_path, own, settings) == []
    return model, tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_comes_back_from_tensorflows_files_bit_for_bit(tf, tmp_path, dtype):
    model = make_model(2, 16, 2, dtype=dtype)
    own, settings, _ = from_hf(lazy(tensors_of(model)), model.config, openai_tf, {})
    notes = tensorflow_bundle.write(tmp_path, own, settings)
    assert bool(notes) == (dtype != torch.float32)
    checkpoint = tensorflow_bundle.read(tmp_path)
    assert checkpoint.settings == settings
    back, config, _, _ = to_hf(checkpoint, openai_tf, {})
    assert config.n_head == 2
    assert back.keys() == tensors_of(model).keys()
    for name, tensor in tensors_of(model).items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].read(), tensor), name


def test_the_files_are_those_that_openais_code_restores(tf, written):
    """As https://github.com/openai/gpt-2 does it: a graph of its own, TensorFlow 1's Saver, the newest checkpoint."""
    model, folder = written
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
    }
    hparams = json.loads((folder / "hparams.json").read_text())
    assert hparams == {"n_vocab": 23, "n_ctx": 12, "n_embd": 16, "n_head": 2, "n_layer": 2}
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        with v1.variable_scope("model"):
            v1.get_variable("wte", [23, 16])
            v1.get_variable("wpe", [12, 16])
            with v1.variable_scope("h1"), v1.variable_scope("attn"), v1.variable_scope("c_proj"):
                v1.get_variable("w", [1, 16, 16])
            with v1.variable_scope("ln_f"):
                v1.get_variable("g", [16])
        variables = v1.trainable_variables()
        v1.train.Saver(variables).restore(session, tf.train.latest_checkpoint(str(folder)))
        wte, wpe, proj, gain = session.run(variables)
    state = {name: tensor.numpy() for name, tensor in tensors_of(model).items()}
    np.testing.assert_array_equal(wte, state["transformer.wte.weight"])
    np.testing.assert_array_equal(wpe, state["transformer.wpe.weight"])
    np.testing.assert_array_equal(proj[0], state["transformer.h.1.attn.c_proj.weight"])
    np.testing.assert_array_equal(gain, state["transformer.ln_f.weight"])


def test_files_that_tensorflow_1_saved_are_read(tf, tmp_path):
    model = make_model(1, 8, 2)
    own, settings, _ = from_hf(lazy(tensors_of(model)), model.config, openai_tf, {})
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        for name, tensor in own.items():
            v1.get_variable(name, initializer=tensor.read().numpy())
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    (tmp_path / "hparams.json").write_text(json.dumps(settings["settings"]))
    checkpoint = tensorflow_bundle.read(tmp_path)
    _, _, read, _ = to_hf(checkpoint, openai_tf, {})
    ids = random_ids()
    with torch.no_grad():
        logits = openai_tf.reference_logits(lambda name: checkpoint.tensors[name].read(), read, ids)
    torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("said", [None, b"garbage {{{", b"\xff\xfe\x00", b'model_checkpoint_path: "/nowhere/x"\n'])
def test_the_only_checkpoint_of_a_folder_is_read_whatever_the_file_that_names_it_says(written, said):
    _, folder = written
    (folder / "checkpoint").unlink()
    if said is not None:
        (folder / "checkpoint").write_bytes(said)
    assert len(tensorflow_bundle.read(folder).tensors) == 2 + 2 * 12 + 2
    (folder / "other.index").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a file `checkpoint` .* found model\.ckpt\.index, other\.index"):
        tensorflow_bundle.read(folder)


def test_without_hparams_the_heads_are_asked_for(written):
    _, folder = written
    (folder / "hparams.json").unlink()
    with pytest.raises(UserError, match="--set n_head"):
        to_hf(tensorflow_bundle.read(folder), openai_tf, {})
    (folder / "hparams.json").write_text("{n_vocab")
    with pytest.raises(UserError, match=r"hparams\.json: not JSON"):
        tensorflow_bundle.read(folder)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.ckpt.index", lambda raw: b"", "not an index of TensorFlow's checkpoints"),
        ("model.ckpt.index", lambda raw: raw[:20], "not an index of TensorFlow's checkpoints"),
        ("model.ckpt.index", lambda raw: b"x" * len(raw), "not an index of TensorFlow's checkpoints"),
        ("model.ckpt.index", lambda raw: raw[:100] + b"zzzz" + raw[104:], "not an index of TensorFlow's checkpoints"),
        ("model.ckpt.data-00000-of-00001", lambda raw: raw[:-5], "cut off: 5 of its"),
        ("model.ckpt.data-00000-of-00001", lambda raw: b"", "bytes are missing"),
    ],
)
def test_damaged_files_are_refused(written, name, damage, said):
    _, folder = written
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=said):
        tensorflow_bundle.read(folder)


def test_a_changed_byte_is_found_when_its_tensor_is_read(written):
    _, folder = written
    path = folder / "model.ckpt.data-00000-of-00001"
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    checkpoint = tensorflow_bundle.read(folder)
    with pytest.raises(UserError, match=r"cannot be read: .*Checksum does not match"):
        [tensor.read() for tensor in checkpoint.tensors.values()]


def test_without_tensorflow_its_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install 'domain-adaptation-kit\[tensorflow\]'"):
        tensorflow_bundle.read(tmp_path)
    with pytest.raises(UserError, match=r"writing .* need TensorFlow"):
        tensorflow_bundle.write(tmp_path, {}, {"settings": {}})
    assert list(tmp_path.iterdir()) == []


# ---- the tokenizer, without TensorFlow

TEXTS = ["Hello, world! It's  a café.", "naïve\n\n  12 345 -- and so on", " the thing that there is", ""]


def train(folder, **pre_tokenizer):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_a_tokenizer_like_gpt2s_comes_back_from_openais_two_files(tmp_path):
    before = train(tmp_path / "hf")
    (tmp_path / "openai").mkdir()
    assert tensorflow_bundle.write_tokenizer(tmp_path / "hf", tmp_path / "openai")
    # As OpenAI's encoder.py reads them: https://github.com/openai/gpt-2/blob/master/src/encoder.py
    assert json.loads((tmp_path / "openai" / "encoder.json").read_text()) == before.get_vocab()
    merges = (tmp_path / "openai" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    stored = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["merges"]
    assert [tuple(line.split()) for line in merges] == [tuple(merge) for merge in stored]
    assert len(merges) > 20

    assert tensorflow_bundle.save_tokenizer(tmp_path / "openai", tmp_path / "back")
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.eos_token_id == before.token_to_id("<|endoftext|>")
    for text in TEXTS:
        assert back(text)["input_ids"] == before.encode(text).ids
        assert back.decode(back(text)["input_ids"]) == text


def test_a_tokenizer_of_another_kind_is_not_written_as_gpt2s(tmp_path):
    target = tmp_path / "openai"
    target.mkdir()
    train(tmp_path / "prefix", add_prefix_space=True)
    train(tmp_path / "whole", use_regex=False)
    train(tmp_path / "merges")
    stored = json.loads((tmp_path / "merges" / "tokenizer.json").read_text())
    stored["model"]["ignore_merges"] = True
    (tmp_path / "merges" / "tokenizer.json").write_text(json.dumps(stored))
    for name in ("prefix", "whole", "merges", "absent"):
        assert not tensorflow_bundle.write_tokenizer(tmp_path / name, target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"encoder.json": "{}"}, r"vocab\.bpe: No such file"),
        ({"encoder.json": "[", "vocab.bpe": ""}, "are no tokenizer"),
        ({"encoder.json": '{"a": 0}', "vocab.bpe": "#version: 0.2\nx y\n"}, "are no tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        tensorflow_bundle.save_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert not tensorflow_bundle.save_tokenizer(tmp_path, tmp_path / "out")

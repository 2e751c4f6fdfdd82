"""llama2.c: its files byte by byte, its layout by logits against Hugging Face's Llama, its tokenizer by encodings."""

import errno
import filecmp
import json
import math
import os
import random
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.conversion import from_hf, to_hf
from kit.checkpoints.formats import llama2c_bin, llama2c_tokenizer
from kit.checkpoints.layout import matches
from kit.checkpoints.layouts import llama2c
from kit.checkpoints.reading import read_checkpoint
from kit.checkpoints.writing import write_pickled
from kit.errors import UserError

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K"
RAW, HF = STORIES / "raw", STORIES / "hf"
real = pytest.mark.skipif(not STORIES.is_dir(), reason=f"the shared model is not on this machine ({STORIES})")

# Sizes of a header in its order; among them one whose matrices are all square.
GROUPED = (32, 24, 2, 4, 2, 40, 16)
SQUARE = (16, 16, 1, 4, 4, 16, 8)
SIZES = {
    "one head": (8, 12, 1, 1, 1, 20, 8),
    "two heads": (16, 40, 3, 2, 2, 30, 9),
    "one head of keys": (32, 24, 2, 4, 1, 40, 16),
    "two heads of keys": GROUPED,
    "square": SQUARE,
}


def lazy(tensors):
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t.clone()) for name, t in tensors.items()}


def make_llama(sizes=GROUPED, tied=False, **config):
    """A Llama of random weights, norms among them."""
    dim, hidden, layers, heads, kv_heads, vocab, positions = sizes
    torch.manual_seed(sum(sizes))
    sized = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    sized |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions}
    fixed = {"rms_norm_eps": 1e-5, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**{**sized, **fixed, **config})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def weights(model):
    left_out = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: t for name, t in model.state_dict().items() if name not in left_out}


def written(path, model, version):
    """Write a model as llama2.c's file; return what is read of it."""
    tensors, settings, _ = from_hf(lazy(weights(model)), model.config, llama2c, {})
    llama2c_bin.write(path, tensors, {**settings, "version": version})
    return llama2c_bin.read(path)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def reference(checkpoint, ids):
    settings, _ = llama2c.read_settings(checkpoint, {})
    return llama2c.reference_logits(lambda name: checkpoint.tensors[name].read(), settings, ids)


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# ---- The real model


@real
def test_the_real_file_has_the_tensors_and_the_configuration_of_hugging_face():
    checkpoint = llama2c_bin.read(RAW / "stories260K.bin")
    tensors, config, _, report = to_hf(checkpoint, llama2c, {})
    expected = load_file(HF / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name].read(), expected[name]) for name in expected)
    assert report.buffers == ["freqs_cos", "freqs_sin"]
    stored = json.loads((HF / "config.json").read_text())
    ours = json.loads(config.to_json_string(use_diff=False))
    not_told = {"architectures", "transformers_version"}
    assert {key: ours[key] for key in stored.keys() - not_told} == {k: stored[k] for k in stored.keys() - not_told}


@real
def test_the_real_file_comes_back_byte_by_byte(tmp_path):
    config = LlamaConfig.from_pretrained(HF)
    tensors, settings, _ = from_hf(lazy(load_file(HF / "model.safetensors")), config, llama2c, {})
    llama2c_bin.write(tmp_path / "model.bin", tensors, settings)
    assert filecmp.cmp(tmp_path / "model.bin", RAW / "stories260K.bin", shallow=False)


@real
def test_the_real_model_gives_hugging_faces_logits():
    ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = logits(LlamaForCausalLM.from_pretrained(HF, attn_implementation="eager").eval(), ids)
    assert (reference(llama2c_bin.read(RAW / "stories260K.bin"), ids) - expected).abs().max() < 1e-4


@real
def test_the_real_tokenizer_is_that_of_hugging_face_byte_by_byte_and_comes_back(tmp_path):
    llama2c_tokenizer.save_tokenizer(RAW / "tok512.bin", tmp_path, 512)
    assert filecmp.cmp(tmp_path / "tokenizer.json", HF / "tokenizer.json", shallow=False)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved == json.loads((HF / "tokenizer_config.json").read_text())
    for folder in (HF, tmp_path):
        llama2c_tokenizer.write_tok_bin(folder, tmp_path / "tok.bin")
        assert filecmp.cmp(tmp_path / "tok.bin", RAW / "tok512.bin", shallow=False)


STRINGS = [
    "",
    " ",
    "   ",
    "\n",
    " a",
    "a ",
    "Once upon a time, there was a little girl named Lily.",
    "tabs\tand\r\nline\nbreaks \n\n  and   spaces ",
    "Zoë's café – “quoted” … €5 & ñandú",
    "数学 и кириллица עברית العربية",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\u00a0\u2028\ufeff",
    "▁ meta ▁▁ <0x41> <unk>",
    "\x00\x01\x7f\x80",
    "aaaaaaaa hehehehehe ttttthe",
]


@real
def test_the_real_tokenizer_encodes_and_decodes_as_hugging_faces(tmp_path):
    llama2c_tokenizer.save_tokenizer(RAW / "tok512.bin", tmp_path, 512)
    ours, expected = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(HF)
    draw = random.Random(0)
    strings = STRINGS + ["".join(chr(draw.randrange(0xD800)) for _ in range(20)) for _ in range(100)]
    for text in strings:
        ids = ours(text)["input_ids"]
        assert ids == expected(text)["input_ids"], text
        assert ours.decode(ids) == expected.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == text or "<unk>" in text or "▁" in text, text


@real
def test_the_real_tokenizer_encodes_as_llama2_c_does():
    tokenizer, tokens = llama2c_tokenizer.read_tokenizer(RAW / "tok512.bin"), entries(RAW / "tok512.bin")
    draw = random.Random(0)
    words = [piece for piece, _ in tokens[259:]]
    strings = [text for text in STRINGS if "▁" not in text and "\x00" not in text]
    for text in strings + ["".join(draw.choices(words, k=30)).strip() for _ in range(50)]:
        assert tokenizer.encode(text).ids == [1, *merged(text, tokens)], text


# ---- The file


def laid_out(version, tied):
    """The names of a file of one layer in their order, by hand from export.py."""
    if version == 0:
        names = "tok_embeddings.weight 0.attention_norm 0.attention.wq 0.attention.wk 0.attention.wv 0.attention.wo"
        names += " 0.ffn_norm 0.feed_forward.w1 0.feed_forward.w2 0.feed_forward.w3 norm.weight freqs_cos freqs_sin"
    else:
        names = "0.attention_norm 0.ffn_norm norm.weight tok_embeddings.weight 0.attention.wq 0.attention.wk"
        names += " 0.attention.wv 0.attention.wo 0.feed_forward.w1 0.feed_forward.w2 0.feed_forward.w3"
    names = [f"layers.{name}.weight" if name[0] == "0" else name for name in names.split()]
    return names if tied else [*names, "output.weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_each_tensor_is_read_from_its_place(tmp_path, version, tied):
    """A file made by hand: a wrong order would be read without complaint where sizes are equal."""
    dim, hidden, heads, kv_heads, vocab, positions = 8, 12, 2, 1, 5, 3
    keys = dim // heads * kv_heads
    shapes = {"wk": (keys, dim), "wv": (keys, dim), "w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
    shapes |= {"wq": (dim, dim), "wo": (dim, dim), "tok_embeddings": (vocab, dim), "output": (vocab, dim)}
    shapes |= {"freqs_cos": (positions, 2), "freqs_sin": (positions, 2)}
    shape_of = {
        name: shapes.get(name.removesuffix(".weight").split(".")[-1], (dim,)) for name in laid_out(version, tied)
    }
    values = np.arange(sum(map(math.prod, shape_of.values())), dtype=np.float32)
    sizes = struct.pack("<7i", dim, hidden, 1, heads, kv_heads, vocab if tied or version else -vocab, positions)
    if version:
        sizes = (b"24ka" + struct.pack("<i", 1) + sizes + bytes([tied])).ljust(256, b"\0")
    path = tmp_path / "model.bin"
    path.write_bytes(sizes + values.tobytes())
    checkpoint = llama2c_bin.read(path)
    assert llama2c_bin.recognises(path)
    assert list(checkpoint.tensors) == list(shape_of)
    assert checkpoint.settings["header"]["vocab_size"] == vocab
    at = 0
    for name, shape in shape_of.items():
        tensor = checkpoint.tensors[name].read()
        assert torch.equal(tensor, torch.arange(at, at + math.prod(shape), dtype=torch.float32).view(shape)), name
        at += math.prod(shape)
    llama2c_bin.write(tmp_path / "again.bin", checkpoint.tensors, checkpoint.settings)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_model_comes_back_bit_by_bit_and_gives_the_same_logits(tmp_path, sizes, tied, version):
    model = make_llama(sizes, tied)
    checkpoint = written(tmp_path / "model.bin", model, version)
    tensors, config, settings, _ = to_hf(checkpoint, llama2c, {})
    expected = weights(model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name].read(), expected[name]) for name in expected)
    compared = ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "head_dim")
    assert all(getattr(config, name) == getattr(model.config, name) for name in compared)
    ids = torch.randint(sizes[5], (3, sizes[6]), generator=torch.Generator().manual_seed(0))
    ours = llama2c.reference_logits(lambda name: checkpoint.tensors[name].read(), settings, ids)
    assert (ours - logits(model, ids)).abs().max() < 1e-5
    assert logits(model, ids).abs().max() > 0.1
    own, back, _ = from_hf(tensors, config, llama2c, {})
    llama2c_bin.write(tmp_path / "again.bin", own, {**back, "version": version})
    assert filecmp.cmp(tmp_path / "again.bin", tmp_path / "model.bin", shallow=False)


def test_types_of_fewer_bits_are_widened_with_a_note_and_of_more_refused(tmp_path):
    model = make_llama().bfloat16()
    own, settings, _ = from_hf(lazy(weights(model)), model.config, llama2c, {})
    own["norm.weight"] = lazy({"": model.model.norm.weight.data.float()})[""]
    (note,) = llama2c_bin.write(tmp_path / "model.bin", own, settings)
    assert "written as float32" in note
    assert "layers.{0–1}.attention.wq.weight" in note
    assert ", norm.weight" not in note
    tensors = to_hf(llama2c_bin.read(tmp_path / "model.bin"), llama2c, {})[0]
    assert all(torch.equal(tensors[name].read(), t.float()) for name, t in weights(model).items())
    assert "64 bits, where the file has 32: layers.{0–1}" in refusal(
        written, tmp_path / "m.bin", make_llama().double(), 0
    )


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written(path, make_llama(), 0)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_file_has_no_place_for_is_not_written(tmp_path):
    tensors, settings, _ = from_hf(lazy(weights(make_llama())), make_llama().config, llama2c, {})
    path = tmp_path / "model.bin"
    missing = {name: t for name, t in tensors.items() if name != "norm.weight"}
    assert "missing: norm.weight" in refusal(llama2c_bin.write, path, missing, settings)
    more = {**tensors, "layers.0.attention.wq.bias": tensors["norm.weight"]}
    assert "unknown: layers.0.attention.wq.bias" in refusal(llama2c_bin.write, path, more, settings)
    other = {**tensors, "layers.1.feed_forward.w2.weight": tensors["layers.1.feed_forward.w1.weight"]}
    assert "mean: layers.1.feed_forward.w2.weight" in refusal(llama2c_bin.write, path, other, settings)
    assert "version 2 cannot be written" in refusal(llama2c_bin.write, path, tensors, {**settings, "version": 2})
    assert list(tmp_path.iterdir()) == []


def test_truncated_and_trailing_bytes_are_counted(tmp_path):
    path = tmp_path / "model.bin"
    for version, begin in ((0, 28), (1, 256)):
        written(path, make_llama(), version)
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        assert f"{len(whole) - 5:,} bytes, of which 5 are missing" in refusal(llama2c_bin.read, path)
        assert llama2c_bin.recognises(path)
        path.write_bytes(whole + b"123")
        assert "of which 3 are too many: its header (dim 32, " in refusal(llama2c_bin.read, path)
        path.write_bytes(whole[: begin - 1])
        assert f"{begin - 1} bytes; the header of llama2.c's version {version} alone has {begin}" in refusal(
            llama2c_bin.read, path
        )
    path.write_bytes(whole[:6])
    assert "cut off before its version" in refusal(llama2c_bin.read, path)


def sizes_only(*sizes):
    return struct.pack("<7i", *sizes)


BAD = {
    "empty": (b"", "0 bytes; the header"),
    "zeros": (bytes(4096), "dim 0, expected 1 to 131,072"),
    "text": (b"<!DOCTYPE html>" * 20, "dim 1,329,865,020, expected"),
    "torch": (b"PK\x03\x04" + bytes(range(256)), "dim 67,324,752, expected"),
    "safetensors": (struct.pack("<Q", 64) + b'{"a":{"dtype":"F32"' * 4, "hidden_dim 0, expected"),
    "other byte order": (struct.pack(">7i", *GROUPED) + bytes(99), "dim 536,870,912, expected"),
    "negative": (sizes_only(32, 24, -2, 4, 2, 40, 16), "n_layers -2, expected 1 to 1,024"),
    "no vocabulary": (sizes_only(32, 24, 2, 4, 2, 0, 16), "vocab_size 0, expected"),
    "smallest number": (sizes_only(32, 24, 2, 4, 2, -(2**31), 16), "vocab_size 2,147,483,648, expected"),
    "odd heads": (sizes_only(36, 24, 2, 4, 2, 40, 16), "dim 36 and n_heads 4, expected heads of an even width"),
    "keys": (sizes_only(32, 24, 2, 4, 3, 40, 16), "n_heads 4 and n_kv_heads 3, expected a divisor"),
}


@pytest.mark.parametrize(("content", "told"), BAD.values(), ids=BAD)
def test_what_is_no_such_file_is_told(tmp_path, content, told):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert not llama2c_bin.recognises(path)
    assert told in refusal(llama2c_bin.read, path)


def test_a_file_is_no_pickle_whose_first_size_begins_like_one(tmp_path):
    """128 is the byte that every pickle begins with; 640 is 128 and 2, its second version."""
    for dim in (128, 640):
        whole = written(tmp_path / "model.bin", make_llama((dim, 8, 1, 2, 1, 10, 4)), 0)
        assert read_checkpoint(tmp_path / "model.bin").format == whole.format == "llama2.c, version 0"
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert not llama2c_bin.recognises(tmp_path / "old.bin")


def test_a_folder_is_no_such_file(tmp_path):
    assert not llama2c_bin.recognises(tmp_path)
    assert not llama2c_bin.recognises(tmp_path / "absent")


def test_other_versions_are_refused_by_name(tmp_path):
    path = tmp_path / "model.bin"
    for version, told in ((2, "version 2: 8-bit integers; expected version 0 or 1"), (3, "version 3; expected")):
        path.write_bytes(b"24ka" + struct.pack("<i", version) + bytes(400))
        assert llama2c_bin.recognises(path)
        assert told in refusal(llama2c_bin.read, path)


def test_the_largest_sizes_take_no_memory(tmp_path):
    """Seven numbers may mean petabytes: nothing may be allocated for them."""
    path = tmp_path / "model.bin"
    path.write_bytes(sizes_only(131072, 1 << 20, 1024, 4096, 4096, 1 << 24, 1 << 24))
    assert "28 bytes, of which 1,9" in refusal(llama2c_bin.read, path)


# ---- The layout


@pytest.mark.parametrize("fault", ["query and key", "square wo", "query not turned", "key not turned"])
def test_a_wrong_conversion_shows_in_the_logits(tmp_path, fault):
    """Of a model whose matrices are all square, so that no shape tells."""
    model = make_llama(SQUARE)
    ids = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
    checkpoint = written(tmp_path / "model.bin", model, 1)
    expected = reference(checkpoint, ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-5
    layer, own = model.model.layers[0].self_attn, checkpoint.tensors
    with torch.no_grad():
        if fault == "query and key":
            layer.q_proj.weight, layer.k_proj.weight = layer.k_proj.weight, layer.q_proj.weight
        elif fault == "square wo":
            layer.o_proj.weight.copy_(layer.o_proj.weight.T.clone())
        elif fault == "query not turned":
            layer.q_proj.weight.copy_(own["layers.0.attention.wq.weight"].read())
        else:
            layer.k_proj.weight.copy_(own["layers.0.attention.wk.weight"].read())
    assert (logits(model, ids) - expected).abs().max() > 1e-3


def test_rows_of_a_head_are_pairs_where_hugging_face_has_halves():
    """Two heads of four rows; the rotation turns rows 0 and 1 of llama2.c, 0 and 2 of Hugging Face's."""
    model = make_llama((8, 12, 1, 2, 1, 20, 8))
    tensors, _, _ = from_hf(lazy(weights(model)), model.config, llama2c, {})
    query, key = (tensors[f"layers.0.attention.{name}.weight"].read() for name in ("wq", "wk"))
    layer = model.model.layers[0].self_attn
    assert torch.equal(query, layer.q_proj.weight[[0, 2, 1, 3, 4, 6, 5, 7]])
    assert torch.equal(key, layer.k_proj.weight[[0, 2, 1, 3]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_its_training_is_read_and_written(tmp_path, tied):
    model = make_llama(tied=tied)
    own, settings, _ = from_hf(lazy(weights(model)), model.config, llama2c, {})
    arguments = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "max_seq_len": 16}
    state = {f"_orig_mod.{name}": tensor.read() for name, tensor in own.items()}
    assert "_orig_mod.output.weight" in state
    state["_orig_mod.layers.0.attention.mask"] = torch.zeros(1, 1, 16, 16)
    stored = {"model": state, "optimizer": {"state": {}}, "model_args": {**arguments, "multiple_of": 8}, "iter_num": 9}
    torch.save(stored, tmp_path / "ckpt.pt")
    tensors, config, _, report = to_hf(read_checkpoint(tmp_path / "ckpt.pt"), llama2c, {})
    assert config.tie_word_embeddings == tied
    assert report.buffers == ["layers.0.attention.mask"]
    assert all(torch.equal(tensors[name].read(), t) for name, t in weights(model).items())
    assert arguments.items() <= settings["model_args"].items()
    write_pickled(tmp_path / "again.pt", own, settings)
    checkpoint = read_checkpoint(tmp_path / "again.pt")
    assert matches(llama2c, checkpoint.tensors) == (len(own), 0)
    again, config, *_ = to_hf(checkpoint, llama2c, {})
    assert (config.tie_word_embeddings, config.intermediate_size) == (tied, 24)
    assert all(torch.equal(again[name].read(), t) for name, t in weights(model).items())


def test_the_width_inside_is_what_training_would_work_out():
    """`train.py` hands `multiple_of` to its model, not `hidden_dim`."""
    for dim, hidden in ((64, 172), (288, 768), (512, 1376), (4096, 11008)):
        config = LlamaConfig(hidden_size=dim, intermediate_size=hidden, num_attention_heads=4, rms_norm_eps=1e-5)
        multiple = llama2c.own_settings(config, {})["model_args"]["multiple_of"]
        assert multiple * ((int(2 * (4 * dim) / 3) + multiple - 1) // multiple) == hidden


def test_heads_that_nobody_tells_are_asked_for(tmp_path):
    own = written(tmp_path / "model.bin", make_llama(), 1).tensors
    bare = Checkpoint(Path("x.pt"), "pickle", own)
    assert "--set num_attention_heads=" in refusal(llama2c.read_settings, bare, {})
    settings, notes = llama2c.read_settings(bare, {"num_attention_heads": 4, "max_position_embeddings": 16})
    assert (settings["num_key_value_heads"], notes) == (2, [])
    _, (note,) = llama2c.read_settings(bare, {"num_attention_heads": 4})
    assert "max_position_embeddings: 2,048" in note
    for given, told in (
        ({"num_attention_heads": 5}, "num_attention_heads 5: expected a divisor of half the width, 16"),
        ({"num_attention_heads": 1}, "the 16 rows of the keys are no whole heads of 32"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "--set says num_key_value_heads 4, its tensors 2"),
        ({"num_attention_head": 4}, "did you mean `num_attention_heads`"),
        ({"num_attention_heads": "four"}, "num_attention_heads four; expected a number"),
    ):
        assert told in refusal(llama2c.read_settings, bare, given)


def test_a_file_and_its_tensors_have_to_agree(tmp_path):
    checkpoint = written(tmp_path / "model.bin", make_llama(), 1)
    arguments = {"n_heads": 4, "n_layers": 3}
    trained = Checkpoint(Path("ckpt.pt"), "pickle", checkpoint.tensors, {"model_args": arguments})
    assert "the file says num_hidden_layers 3, its tensors 2" in refusal(llama2c.read_settings, trained, {})
    given = {"num_attention_heads": 8}
    assert "--set says num_attention_heads 8, the file says 4" in refusal(llama2c.read_settings, checkpoint, given)


def test_other_rotations_are_no_silent_matter(tmp_path):
    checkpoint = written(tmp_path / "model.bin", make_llama(), 0)
    assert checkpoint.tensors["freqs_sin"].read()[1, 0] == pytest.approx(math.sin(1))
    others = dict(zip(("freqs_cos", "freqs_sin"), llama2c_bin.rotations(8, 16, 500000.0), strict=True))
    checkpoint.tensors.update(lazy(others))
    told = refusal(llama2c.read_settings, checkpoint, {})
    assert "`freqs_cos` are not the rotations of rope_theta 10,000; they look like those of 500,000" in told
    settings, _ = llama2c.read_settings(checkpoint, {"rope_theta": 500000})
    config = llama2c.make_config(settings)
    assert config.rope_parameters["rope_theta"] == 500000
    assert "no place for rope_theta 500,000" in refusal(llama2c.own_settings, config, {})


REFUSED = {
    "biases": ({"attention_bias": True}, "attention_bias True"),
    "inner biases": ({"mlp_bias": True}, "mlp_bias True"),
    "width of heads": ({"head_dim": 16}, "head_dim 16"),
    "epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 500,000"),
    "scaling": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
}


@pytest.mark.parametrize(("changed", "told"), REFUSED.values(), ids=REFUSED)
def test_a_llama_that_llama2_c_does_not_compute_is_refused(changed, told):
    model = make_llama(**changed)
    message = refusal(from_hf, lazy(weights(model)), model.config, llama2c, {})
    assert "the layout llama2.c has no place for" in message
    assert told in message


def test_missing_and_unknown_and_misshaped_tensors_are_all_named(tmp_path):
    checkpoint = written(tmp_path / "model.bin", make_llama(), 1)
    tensors = checkpoint.tensors
    tensors["layers.1.attention.wz.weight"] = tensors.pop("layers.1.attention.wo.weight")
    tensors["layers.0.feed_forward.w2.weight"] = tensors["layers.0.feed_forward.w1.weight"]
    tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wk.weight"]
    told = refusal(to_hf, checkpoint, llama2c, {})
    assert "missing: layers.1.attention.wo.weight" in told
    assert "not in the layout: layers.1.attention.wz.weight" in told
    assert "`layers.0.feed_forward.w2.weight` (24, 32)" in told
    assert "`layers.0.attention.wq.weight` (16, 32)" in told


# ---- The tokenizer


WORDS = ["▁t", "he", "▁the", "re", "▁there", "ll", "▁he", "▁hell", "▁", "t", "h", "e", "r", "l", "o", "é", "数"]


def tok_bin(path, words=WORDS, scores=None):
    """Write a small tokenizer as llama2.c's code does."""
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [token.encode() for token in tokens] + [word.replace("▁", " ").encode() for word in words]
    scores = [0.0] * 259 + (scores or [-float(rank) for rank in range(len(words))])
    packed = (struct.pack("<fi", score, len(t)) + t for score, t in zip(scores, tokens, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, tokens))) + b"".join(packed))
    return path


def entries(path):
    """Return text and score of each token."""
    data, at, found = path.read_bytes(), 4, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        found.append((data[at + 8 : at + 8 + size].decode(), score))
        at += 8 + size
    return found


def merged(text, tokens):
    """Encode as run.c does: characters, or their bytes, then again and again the pair of the best score, leftmost."""
    ids = {token: number for number, (token, _) in enumerate(tokens)}
    if not text:
        return []
    found = [i for c in f" {text}" for i in ([ids[c]] if c in ids else [3 + byte for byte in c.encode()])]
    while True:
        pairs = [
            (-tokens[joined][1], at, joined)
            for at, (one, other) in enumerate(pairwise(found))
            if (joined := ids.get(tokens[one][0] + tokens[other][0])) is not None
        ]
        if not pairs:
            return found
        _, at, joined = min(pairs)
        found[at : at + 2] = [joined]


def test_a_tokenizer_encodes_as_llama2_c_does_and_comes_back(tmp_path):
    path = tok_bin(tmp_path / "tok.bin")
    tokenizer = llama2c_tokenizer.read_tokenizer(path)
    assert llama2c_tokenizer.recognises(path)
    for text in ("the there hello", "rehell the\nthé 数学 🙂", "  o  ", "", "tttheee<", "\t数"):
        ids = tokenizer.encode(text).ids
        assert ids == [1, *merged(text, entries(path))]
        assert tokenizer.decode(ids) == text
    llama2c_tokenizer.save_tokenizer(path, tmp_path, 77)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.model_max_length) == (1, 2, 0, 77)
    assert loaded("there")["input_ids"] == tokenizer.encode("there").ids == [1, ids_of("▁there")]
    llama2c_tokenizer.write_tok_bin(tmp_path, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def ids_of(word):
    return 259 + WORDS.index(word)


def test_scores_decide_not_the_order_of_tokens(tmp_path):
    """`here` is `he` and `re` by the one, `h`, `er` and `e` by the other."""
    words = ["he", "er", "re", "▁", "h", "e", "r"]
    by_order = llama2c_tokenizer.read_tokenizer(tok_bin(tmp_path / "a.bin", words))
    scored = llama2c_tokenizer.read_tokenizer(tok_bin(tmp_path / "b.bin", words, [-1.0, -0.0, -2, -3, -4, -5, -6]))
    assert by_order.encode("here").tokens == ["<s>", "▁", "he", "re"]
    assert scored.encode("here").tokens == ["<s>", "▁", "h", "er", "e"]


def test_a_tokenizer_file_that_is_cut_off_is_refused(tmp_path):
    """Between two tokens it is a smaller vocabulary, as whole as any, unless bytes or special tokens are missing."""
    path = tok_bin(tmp_path / "tok.bin")
    whole = path.read_bytes()
    last = 8 + len("数".encode())
    for missing in range(1, last):
        path.write_bytes(whole[:-missing])
        told = "bytes, where" if missing < last - 8 + 1 else "cut off in the header of token 275"
        assert told in refusal(llama2c_tokenizer.read_tokenizer, path), missing
    path.write_bytes(whole[:-last])
    assert llama2c_tokenizer.read_tokenizer(path).get_vocab_size() == 275
    first = 4 + sum(8 + len(token.encode()) for token, _ in entries(tok_bin(path))[:258])
    path.write_bytes(whole[:first])
    assert "token 258 to be '<0xFF>'; there is none" in refusal(llama2c_tokenizer.read_tokenizer, path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "token 0 to be '<unk>'; there is none"),
        (struct.pack("<ifi", 9, 0.0, -1), "token 0 would have -1 bytes, where 0 are left"),
        (struct.pack("<ifi", 9, 0.0, 2**31 - 1) + b"abc", "token 0 would have 2,147,483,647 bytes, where 3 are left"),
        (struct.pack("<ifi", 9, 0.0, 2) + b"\xff\xfe", "token 0 is not UTF-8"),
        (struct.pack("<ifi", 9, 0.0, 3) + b"abc", "token 0 to be '<unk>'; it is 'abc'"),
        (struct.pack("<if", 9, 0.0), "cut off in the header of token 0"),
    ],
)
def test_what_is_no_tokenizer_is_told(tmp_path, content, told):
    path = tmp_path / "tok.bin"
    path.write_bytes(content)
    assert not llama2c_tokenizer.recognises(path)
    assert told in refusal(llama2c_tokenizer.read_tokenizer, path)


def test_tokens_that_occur_twice_are_named(tmp_path):
    assert "more than once: 'he'" in refusal(
        llama2c_tokenizer.read_tokenizer, tok_bin(tmp_path / "t", ["he", "a", "he"])
    )


def changed(folder, change):
    """Save a small tokenizer with its tokenizer.json changed; return how it is refused."""
    llama2c_tokenizer.save_tokenizer(tok_bin(folder / "tok.bin"), folder, 64)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    told = refusal(llama2c_tokenizer.write_tok_bin, folder, folder / "again.bin")
    assert not (folder / "again.bin").exists()
    return told


def test_a_tokenizer_that_llama2_c_cannot_have_is_refused(tmp_path):
    def added(content):
        special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": 276, "content": "<pad>", "special": True, **special})

    def gap(content):
        content["model"]["vocab"]["数"] = 400

    assert "no place for added tokens: <pad>" in changed(tmp_path, added)
    assert "its ids have gaps" in changed(tmp_path, gap)
    assert "not in the order of its ids" in changed(tmp_path, lambda c: c["model"]["merges"].reverse())
    assert "by llama2.c's tokenizer" in changed(tmp_path, lambda c: c["normalizer"]["normalizers"].pop(0))
    assert "without byte fallback" in changed(tmp_path, lambda c: c["model"].update(byte_fallback=False))


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    assert "no tokenizer.json" in refusal(llama2c_tokenizer.write_tok_bin, tmp_path, tmp_path / "tok.bin")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert "WordLevel without byte fallback" in refusal(llama2c_tokenizer.write_tok_bin, tmp_path, tmp_path / "tok.bin")
    assert not (tmp_path / "tok.bin").exists()

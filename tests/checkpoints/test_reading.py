"""What a path leads to: folders, shards, prefixes, and everything that is no checkpoint."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kit.checkpoints.reading import read_checkpoint
from kit.errors import UserError

STATE = {"a.w": torch.arange(6.0).view(2, 3), "b.w": torch.ones(2, dtype=torch.bfloat16)}


def check(checkpoint, expected=STATE):
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor.read(), expected[name])


def save_shards(folder, suffix="safetensors", **changed):
    """Write each tensor into its own shard, and the index; `changed` replaces places in it."""
    save, whole = (save_file, "model") if suffix == "safetensors" else (torch.save, "pytorch_model")
    placed = {}
    for number, (name, tensor) in enumerate(STATE.items(), 1):
        placed[name] = f"{whole}-{number:05d}-of-00002.{suffix}"
        save({name: tensor}, folder / placed[name])
    index = {"metadata": {}, "weight_map": {**placed, **changed}}
    (folder / f"{whole}.{suffix}.index.json").write_text(json.dumps(index))
    return placed


# ---- folders


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "any.pt", "weights.pth", "x.safetensors"])
def test_a_folder_means_the_file_in_it_with_the_configuration_beside(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.bin").write_bytes(b"no checkpoint")
    for path in (tmp_path, tmp_path / name):
        checkpoint = read_checkpoint(path)
        check(checkpoint)
        assert checkpoint.settings["config.json"] == {"model_type": "gpt2"}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(tmp_path, suffix):
    save_shards(tmp_path, suffix)
    checkpoint = read_checkpoint(tmp_path)
    check(checkpoint)
    assert checkpoint.format.endswith(", 2 shards")
    assert checkpoint.path == tmp_path


def test_safetensors_come_before_pickles_and_this_is_told(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    checkpoint = read_checkpoint(tmp_path)
    check(checkpoint)
    assert checkpoint.notes == ("read from model.safetensors; pytorch_model.bin beside it was not",)


def test_a_run_directory_means_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(STATE, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "scorecard.json").write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    check(checkpoint)
    assert checkpoint.settings["config.json"] == {"model_type": "gpt2"}


def test_a_configuration_that_is_broken_is_refused(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    for content, message in (("{", r"config\.json: not JSON"), ("[]", r"config\.json: holds list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path)


def test_of_two_configurations_each_is_kept_under_its_own_name(tmp_path):
    torch.save({"model": STATE, "config": {"lr": 1}}, tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt").settings["config"] == {"lr": 1}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.settings["config.json"] == {"model_type": "gpt2"}
    assert checkpoint.settings["config"] == {"lr": 1}


def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path):
    save_file(STATE, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="kit merge"):
        read_checkpoint(tmp_path)


def test_a_folder_with_several_or_no_checkpoints_is_listed(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint; .* In it: nothing"):
        read_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoint; .* In it: notes\.txt, sub/"):
        read_checkpoint(tmp_path)
    torch.save(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"holds 2 checkpoints, name one of them: a\.pt, b\.pt"):
        read_checkpoint(tmp_path)


# ---- shards


def test_a_missing_shard_is_named(tmp_path):
    placed = save_shards(tmp_path)
    (tmp_path / placed["b.w"]).unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_that_its_shard_lacks_is_named(tmp_path, suffix):
    whole = "model" if suffix == "safetensors" else "pytorch_model"
    save_shards(tmp_path, suffix, **{"lost.w": f"{whole}-00001-of-00002.{suffix}"})
    with pytest.raises(UserError, match=r"names a file that does not hold it for lost\.w$"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    placed = save_shards(tmp_path)
    save_file({"b.w": STATE["b.w"], "a.w": STATE["a.w"]}, tmp_path / placed["b.w"])
    with pytest.raises(UserError, match=r"`a\.w` is in both model-00001-of-00002\.safetensors and model-00002"):
        read_checkpoint(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_read_and_told(tmp_path):
    placed = save_shards(tmp_path)
    save_file({"b.w": STATE["b.w"], "c.w": STATE["a.w"]}, tmp_path / placed["b.w"])
    checkpoint = read_checkpoint(tmp_path)
    check(checkpoint, {**STATE, "c.w": STATE["a.w"]})
    assert checkpoint.notes == ("model.safetensors.index.json does not name what its files hold as well: c.w",)


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    placed = save_shards(tmp_path)
    shard = tmp_path / placed["a.w"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: .* cut off"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: (not JSON|no `weight_map`)"):
        read_checkpoint(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    save_shards(tmp_path, **{"a.w": "../model.safetensors"})
    with pytest.raises(UserError, match=r"names `\.\./model\.safetensors`, which is no file of this folder"):
        read_checkpoint(tmp_path)


def test_an_index_by_itself_leads_to_its_folder(tmp_path):
    save_shards(tmp_path)
    with pytest.raises(UserError, match="the index of shards; name its folder"):
        read_checkpoint(tmp_path / "model.safetensors.index.json")


# ---- prefixes


@pytest.mark.parametrize(
    ("name", "plain", "note"),
    [
        ("module.a.w", "a.w", "removed `module.` from 1 name"),
        ("_orig_mod.module.a.w", "a.w", "removed `_orig_mod.` from 1 name, `module.` from 1 name"),
        ("module.module.a.w", "a.w", "removed `module.` from 1 name"),
        ("h.0._fsdp_wrapped_module.a.w", "h.0.a.w", "removed `_fsdp_wrapped_module.` from 1 name"),
        (
            "h._fsdp_wrapped_module.0._orig_mod.w",
            "h.0.w",
            "removed `_fsdp_wrapped_module.` from 1 name, `_orig_mod.` from 1 name",
        ),
        ("my_module.w", "my_module.w", None),
        ("a.module", "a.module", None),
    ],
)
def test_prefixes_of_wrapped_models_are_removed_and_told(tmp_path, name, plain, note):
    save_file({name: STATE["a.w"]}, tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    check(checkpoint, {plain: STATE["a.w"]})
    assert checkpoint.notes == ((note,) if note else ())


def test_the_names_with_a_prefix_are_counted(tmp_path):
    save_file({f"module.h.{n}.w": torch.ones(1) for n in range(12)} | {"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert read_checkpoint(tmp_path / "x.safetensors").notes == ("removed `module.` from 12 names",)


def test_names_that_become_one_without_their_prefix_are_refused(tmp_path):
    save_file({"module.a": torch.ones(1), "a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"without module\. these have one name: a, module\.a$"):
        read_checkpoint(tmp_path / "x.safetensors")


# ---- no checkpoint at all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected safetensors"),
        (b"\x00" * 200, r"no checkpoint; it begins with b'\\x00"),
        (b"abc\xfe" + b"\xff" * 200, "no checkpoint; it begins with"),
        (b"To be, or not to be,\nthat is the question", "text; it begins with b'To be, or not to'"),
        (b'{"model_type": "gpt2"}', "text; it begins with"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n<html lang='en'>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "git lfs pull"),
        (gzip.compress(b"weights", mtime=0), "compressed; unpack it first"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "a numpy array"),
        (b"PK\x05\x06" + b"\x00" * 18, "no checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt", "model.bin"])
def test_what_is_no_checkpoint_is_told_for_what_it_is(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read_checkpoint(tmp_path / name)


def test_a_pointer_of_git_lfs_in_a_model_folder_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_checkpoint(tmp_path)


def test_a_path_that_leads_nowhere_is_refused_with_the_nearest(tmp_path):
    torch.save(STATE, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt2\.pt: no such file or folder; did you mean `ckpt\.pt`"):
        read_checkpoint(tmp_path / "ckpt2.pt")
    with pytest.raises(UserError, match="no such file or folder"):
        read_checkpoint(tmp_path / "none" / "ckpt.pt")


def test_a_broken_link_is_told(tmp_path):
    (tmp_path / "x.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(UserError, match=r"x\.pt: a link to .*gone\.pt, which does not exist"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_link_to_a_checkpoint_is_followed(tmp_path):
    torch.save(STATE, tmp_path / "ckpt.pt")
    (tmp_path / "x").symlink_to(tmp_path / "ckpt.pt")
    check(read_checkpoint(tmp_path / "x"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_told(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    (tmp_path / "x.pt").chmod(0)
    with pytest.raises(UserError, match=r"x\.pt: cannot be read: Permission denied"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_name_on_the_hub_is_told_as_that():
    with pytest.raises(UserError, match="no such file or folder; names on the Hub are not taken"):
        read_checkpoint(Path("openai-community/gpt2"))

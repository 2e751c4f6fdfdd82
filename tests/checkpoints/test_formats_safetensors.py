"""safetensors files: read lazily, written with the library's own bytes, damaged in every place."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kit.checkpoints.formats import safetensors_files
from kit.checkpoints.formats.safetensors_files import DTYPES
from kit.checkpoints.reading import read_checkpoint
from kit.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"b.w": torch.arange(6.0).view(2, 3), "a": torch.tensor(7)}, path, {"format": "pt"})
    return path


def test_tensors_are_those_that_the_library_saved(file):
    checkpoint = read_checkpoint(file)
    assert list(checkpoint.tensors) == ["a", "b.w"]  # int64 lies before float32
    assert checkpoint.tensors["b.w"].shape == (2, 3)
    assert torch.equal(checkpoint.tensors["b.w"].read(), torch.arange(6.0).view(2, 3))
    assert checkpoint.tensors["a"].read() == 7
    assert checkpoint.format == "safetensors"
    assert checkpoint.settings == {"metadata": {"format": "pt"}}


def test_a_tensor_is_read_anew_each_time(file):
    tensor = read_checkpoint(file).tensors["b.w"]
    tensor.read().zero_()
    assert torch.equal(tensor.read(), torch.arange(6.0).view(2, 3))


def test_the_name_of_the_file_does_not_matter(file):
    for name in ("weights.pt", "weights", "weights.bin"):
        other = file.rename(file.with_name(name))
        assert read_checkpoint(other).format == "safetensors"
        file = other


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_is_read_as_torch_has_it(tmp_path, code):
    size = DTYPES[code].itemsize
    value = torch.arange(2 * size, dtype=torch.uint8).fmod(2).view(DTYPES[code])
    save_file({"x": value}, tmp_path / "x.safetensors")
    tensor = read_checkpoint(tmp_path / "x.safetensors").tensors["x"]
    assert (tensor.dtype, tensor.shape, tensor.bytes) == (DTYPES[code], (2,), 2 * size)
    assert torch.equal(tensor.read().view(torch.uint8), value.view(torch.uint8))


def test_nan_and_infinity_are_values_like_others(tmp_path):
    save_file({"x": torch.tensor([float("nan"), float("inf")])}, tmp_path / "x.safetensors")
    value = read_checkpoint(tmp_path / "x.safetensors").tensors["x"].read()
    assert value.isnan().tolist() == [True, False]
    assert value.isinf().tolist() == [False, True]


@pytest.mark.parametrize("kept", [20, 60, -1], ids=["header", "end of header", "data"])
def test_a_file_that_is_cut_off_is_refused(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"weights\.safetensors: a safetensors file of [\d,]+ bytes that is damaged or"):
        read_checkpoint(file)


def test_bytes_after_the_data_are_refused(file):
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match="damaged or cut off"):
        read_checkpoint(file)


def test_a_huge_header_is_not_believed(file):
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    assert not safetensors_files.recognises(file.read_bytes())
    with pytest.raises(UserError, match="expected safetensors"):
        read_checkpoint(file)


def test_a_header_that_is_no_json_is_refused(file):
    data = bytearray(file.read_bytes())
    data[9:12] = b"}}}"
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(file)


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="without tensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_metadata_of_others_stay_apart_from_settings(tmp_path):
    metadata = {"config": "not a dictionary", "settings": json.dumps({"model_args": {"n_head": 2}})}
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    assert read_checkpoint(tmp_path / "x.safetensors").settings == {
        "metadata": {"config": "not a dictionary"},
        "model_args": {"n_head": 2},
    }


@pytest.mark.parametrize("settings", ["no JSON", "[1]"])
def test_settings_that_are_not_ours_are_metadata(tmp_path, settings):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", {"settings": settings})
    assert read_checkpoint(tmp_path / "x.safetensors").settings == {"metadata": {"settings": settings}}

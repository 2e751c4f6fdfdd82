"""torch.save's files: wrappers, nesting, numpy arrays, and pickles that hold more than they should."""

import argparse
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kit.checkpoints.reading import read_checkpoint
from kit.errors import UserError

STATE = {"h.0.w": torch.arange(6.0).view(2, 3), "h.0.b": torch.ones(2, dtype=torch.bfloat16)}


@dataclass
class GPTConfig:
    """A class beside the weights, as build-nanogpt saves one."""

    n_head: int = 2


@dataclass
class Command:
    """Runs a command when it is unpickled."""

    target: Path

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def save(tmp_path, content, **options):
    path = tmp_path / "ckpt.pt"
    torch.save(content, path, **options)
    return path


def check(checkpoint, expected=STATE):
    assert list(checkpoint.tensors) == list(expected)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.shape, tensor.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        assert torch.equal(tensor.read(), expected[name])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict_is_read(tmp_path, zipped):
    checkpoint = read_checkpoint(save(tmp_path, OrderedDict(STATE), _use_new_zipfile_serialization=zipped))
    check(checkpoint)
    assert checkpoint.settings == {}
    assert any("all tensors are held in memory" in note for note in checkpoint.notes) == (not zipped)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module", "params"])
def test_wrappers_are_taken_off_and_told(tmp_path, wrapper):
    checkpoint = read_checkpoint(save(tmp_path, {wrapper: STATE, "step": 3}))
    check(checkpoint)
    assert checkpoint.settings == {"step": 3}
    assert checkpoint.notes == (f"the tensors were taken from `{wrapper}`",)


def test_a_checkpoint_of_nanogpt_gives_its_settings_without_its_optimizer(tmp_path):
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {
        "model": STATE,
        "optimizer": moments,
        "model_args": {"n_head": 2, "bias": False, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "betas": [0.9, 0.95]},
    }
    checkpoint = read_checkpoint(save(tmp_path, content))
    check(checkpoint)
    left = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    assert checkpoint.settings == {**left, "best_val_loss": 2.5}
    assert "left out: `optimizer`, an optimizer's state" in checkpoint.notes


def test_of_model_and_average_the_model_is_taken(tmp_path):
    average = {name: tensor + 1 for name, tensor in STATE.items()}
    checkpoint = read_checkpoint(save(tmp_path, {"ema": average, "model": STATE}))
    check(checkpoint)
    assert "left out: `ema`, which holds 2 other tensors" in checkpoint.notes


def test_two_wrappers_come_off_and_no_third(tmp_path):
    check(read_checkpoint(save(tmp_path, {"state_dict": {"model": STATE, "epoch": 1}})))
    thrice = read_checkpoint(save(tmp_path, {"module": {"state_dict": {"model": STATE}}}))
    assert list(thrice.tensors) == [f"model.{name}" for name in STATE]


def test_nested_dictionaries_and_lists_get_dotted_names(tmp_path):
    one, other = torch.ones(2, 2), torch.zeros(3)
    blocks = [{"attn": {"c_attn": {"w": one, "b": other}}}, {"attn": {"c_attn": {"w": one + 1, "b": other}}}]
    checkpoint = read_checkpoint(save(tmp_path, {"settings": {"n_head": 2}, "params": {"wte": one, "blocks": blocks}}))
    expected = {"wte": one, "blocks.0.attn.c_attn.w": one, "blocks.0.attn.c_attn.b": other}
    check(checkpoint, {**expected, "blocks.1.attn.c_attn.w": one + 1, "blocks.1.attn.c_attn.b": other})
    assert checkpoint.settings == {"settings": {"n_head": 2}}


def test_what_is_no_tensor_is_left_out_and_told(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path, {**STATE, "h.0._extra_state": b"x", "step": 1, "none": None}))
    check(checkpoint)
    assert checkpoint.notes == ("left out, since they are no tensors of the model: h.0._extra_state, none, step",)


def test_parameters_views_and_tied_tensors_are_read_whole(tmp_path):
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    expected = {"head": weight.detach(), "turned": weight.detach().mT, "part": weight.detach()[1:, :2]}
    checkpoint = read_checkpoint(save(tmp_path, {"wte": weight, **expected}))
    check(checkpoint, {"wte": weight.detach(), **expected})
    read = [tensor.read() for tensor in checkpoint.tensors.values()]
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in read)


def test_a_tensor_is_read_anew_each_time_also_after_the_file_was_mapped_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("kit.checkpoints.formats.pickled._MAPPED", 1)
    for zipped in (True, False):
        checkpoint = read_checkpoint(save(tmp_path, {"model": STATE}, _use_new_zipfile_serialization=zipped))
        for tensor in checkpoint.tensors.values():
            tensor.read().zero_()
        check(checkpoint)


# ---- numpy


def arrays():
    return {"w": np.arange(6, dtype="f4").reshape(2, 3), "t": np.asfortranarray(np.ones((2, 3))), "i": np.array([1, 2])}


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_arrays_become_tensors(tmp_path, zipped):
    content = {"settings": {"n_head": np.int64(2), "loss": np.float32(0.5)}, "params": {"blocks": [arrays()]}}
    checkpoint = read_checkpoint(save(tmp_path, content, _use_new_zipfile_serialization=zipped))
    check(checkpoint, {f"blocks.0.{name}": torch.from_numpy(array) for name, array in arrays().items()})
    assert checkpoint.settings == {"settings": {"n_head": 2, "loss": 0.5}}
    assert "3 numpy arrays are held in memory" in checkpoint.notes


def test_arrays_that_numpy_1_pickled_are_read(tmp_path):
    path = save(tmp_path, {**arrays(), "best": np.float64(1)}, _use_new_zipfile_serialization=False)
    assert b"numpy._core" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    check(read_checkpoint(path), {name: torch.from_numpy(array) for name, array in arrays().items()})


def test_big_endian_arrays_keep_their_values(tmp_path):
    check(read_checkpoint(save(tmp_path, {"x": np.array([1.5, 2], dtype=">f4")})), {"x": torch.tensor([1.5, 2])})


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([b"a"]), np.array([{}], dtype=object)])
def test_arrays_that_no_tensor_can_hold_are_refused(tmp_path, array):
    with pytest.raises(UserError, match="a numpy array of the type"):
        read_checkpoint(save(tmp_path, {"x": array, **STATE}))


class ForgedType:
    """A float32 whose flags say that its bytes are addresses of objects."""

    def __reduce__(self):
        return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 63)


class ForgedArray:
    """An array of that type."""

    def __reduce__(self):
        state = (1, (2,), ForgedType(), False, b"\x41" * 8)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


def test_flags_that_a_pickle_states_of_a_numpy_type_are_not_believed(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path, {"x": ForgedArray()}))
    check(checkpoint, {"x": torch.frombuffer(bytearray(b"\x41" * 8), dtype=torch.float32)})


# ---- what is refused


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    path = save(tmp_path, {"model": STATE, "x": Command(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds code: posix\.system; nothing of it was run") as caught:
        read_checkpoint(path)
    assert "save it anew" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path, protocol):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"x": Command(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(UserError, match=r"holds code: posix\.system; nothing of it was run"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("config", [GPTConfig(), argparse.Namespace(n_head=2)])
def test_a_class_beside_the_weights_is_refused_with_the_way_to_save_them(tmp_path, config, zipped):
    path = save(tmp_path, {"model": STATE, "config": config}, _use_new_zipfile_serialization=zipped)
    name = f"{type(config).__module__}.{type(config).__name__}".replace(".", r"\.")
    with pytest.raises(
        UserError, match=rf"holds code: {name}; nothing .* save it anew: `c = torch\.load\(\"ckpt\.pt\""
    ):
        read_checkpoint(path)


def test_a_whole_module_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds code: .*torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        read_checkpoint(save(tmp_path, torch.nn.Linear(2, 2)))


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="a TorchScript archive"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_torch_did_not_write_is_refused(tmp_path, protocol):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"x": [1.0]}, protocol=protocol))
    with pytest.raises(UserError, match=r"a pickle that torch\.save did not write"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(tmp_path, zipped, part):
    path = save(tmp_path, {"model": {"w": torch.ones(5000)}}, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=r"ckpt\.pt: damaged, cut off, or not written by torch\.save"):
        read_checkpoint(path)


def test_another_zip_file_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(UserError, match=r"not written by torch\.save"):
        read_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(3, device="meta"),
    ],
    ids=["sparse", "csr", "quantized", "meta"],
)
def test_tensors_that_are_not_dense_are_refused_by_name(tmp_path, tensor):
    with pytest.raises(UserError, match=r"the tensor `odd` is .*; expected dense ones"):
        read_checkpoint(save(tmp_path, {**STATE, "odd": tensor}))


@pytest.mark.parametrize(
    "content", [{}, {"step": 1}, [], 3, "text", {"optimizer": {"m": torch.ones(2)}}, {"model": {}}]
)
def test_a_file_without_tensors_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="holds no named tensors"):
        read_checkpoint(save(tmp_path, content))


def test_a_single_tensor_is_refused(tmp_path):
    with pytest.raises(UserError, match="one tensor without a name"):
        read_checkpoint(save(tmp_path, torch.ones(3)))


def test_two_tensors_of_one_dotted_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"two tensors of the name `a\.b`"):
        read_checkpoint(save(tmp_path, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}))


def test_a_list_that_holds_itself_is_refused(tmp_path):
    content = {"model": STATE, "x": []}
    content["x"].append(content["x"])
    with pytest.raises(UserError, match="hold each other"):
        read_checkpoint(save(tmp_path, content))

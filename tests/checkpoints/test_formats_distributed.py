"""Folders of torch.distributed.checkpoint: what FSDP runs write, read without unpickling anything but DCP's classes."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import fully_shard

from kit.checkpoints.reading import read_checkpoint
from kit.errors import UserError

STATE = {"h.0.w": torch.arange(6.0).view(2, 3), "h.0.b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7)}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder, content):
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def check(checkpoint, expected=STATE):
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.shape, tensor.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        assert torch.equal(tensor.read(), expected[name])


def change_metadata(folder, change):
    known = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(known) or known))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"app": {"model": s}}])
def test_tensors_are_those_that_were_saved(tmp_path, wrap):
    checkpoint = read_checkpoint(save(tmp_path / "step", wrap(STATE)))
    check(checkpoint)
    assert checkpoint.format == "DCP, 1 file"


def test_a_model_of_its_own_in_the_names_is_no_wrapper(tmp_path):
    # Llama's names begin with `model.`: only what DCP has flattened is a dictionary.
    check(read_checkpoint(save(tmp_path, {"model": {"model.norm": torch.ones(2)}})), {"model.norm": torch.ones(2)})
    check(read_checkpoint(save(tmp_path / "b", {"model.norm": torch.ones(2)})), {"model.norm": torch.ones(2)})


def test_optimizers_and_what_is_no_tensor_are_left_out_and_told(tmp_path):
    moments = {"state": {"h.0.w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    checkpoint = read_checkpoint(save(tmp_path, {"app": {"model": STATE, "optim": moments}, "step": 3}))
    check(checkpoint)
    assert "left out: `optim`, an optimizer's state" in checkpoint.notes
    assert "left out, since they are no tensors: step" in checkpoint.notes


def test_the_folder_of_the_model_is_found_in_a_checkpoint_of_accelerate(tmp_path):
    save(tmp_path / "pytorch_model_fsdp_0", {"model": STATE})
    save(tmp_path / "optimizer_0", {"optimizer": STATE})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    checkpoint = read_checkpoint(tmp_path)
    check(checkpoint)
    assert checkpoint.settings == {"config.json": {"model_type": "gpt2"}}


def _train(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 4, bias=False))
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/whole.pt")
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/step")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_of_two_processes_are_put_together(tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    checkpoint = read_checkpoint(tmp_path / "step")
    assert checkpoint.format == "DCP, 2 files"
    check(checkpoint, torch.load(tmp_path / "whole.pt"))


@dataclass
class Command:
    """Runs a command when it is unpickled."""

    target: Path

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_metadata_with_code_are_refused_and_not_run(tmp_path):
    save(tmp_path / "step", {"model": STATE})

    def change(known):
        known.planner_data["x"] = Command(tmp_path / "ran")

    change_metadata(tmp_path / "step", change)
    with pytest.raises(UserError, match=r"\.metadata: holds `posix\.system`, which is none of DCP's own classes"):
        read_checkpoint(tmp_path / "step")
    assert not (tmp_path / "ran").exists()


def test_nothing_is_unpickled_a_second_time_when_a_tensor_is_read(tmp_path, monkeypatch):
    checkpoint = read_checkpoint(save(tmp_path, {"model": STATE}))

    def refuse(*args, **kwargs):
        raise AssertionError("plain pickle.load")

    monkeypatch.setattr(pickle, "load", refuse)
    check(checkpoint)


def test_a_tensor_with_code_is_refused_and_not_run(tmp_path):
    save(tmp_path / "step", {"a": torch.ones(2)})
    checkpoint = read_checkpoint(tmp_path / "step")
    [file] = (tmp_path / "step").glob("*.distcp")
    torch.save(Command(tmp_path / "ran"), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()

    def change(known):
        for place in known.storage_data.values():
            place.length = len(evil)

    file.write_bytes(evil)
    change_metadata(tmp_path / "step", change)
    checkpoint = read_checkpoint(tmp_path / "step")
    with pytest.raises(UserError, match=r"`a` cannot be read: it holds code: posix\.system; nothing of it was run"):
        checkpoint.tensors["a"].read()
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(tmp_path):
    save(tmp_path, {"model": STATE})
    [file] = tmp_path.glob("*.distcp")
    file.unlink()
    with pytest.raises(UserError, match=r"1 of 1 files are missing: __0_0\.distcp"):
        read_checkpoint(tmp_path)


def test_a_file_that_is_cut_off_is_named_with_its_size(tmp_path):
    save(tmp_path, {"model": STATE})
    [file] = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"__0_0\.distcp: cut off: it has [\d,]+ bytes; expected"):
        read_checkpoint(tmp_path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    save(tmp_path, {"model": STATE})

    def change(known):
        for place in known.storage_data.values():
            place.relative_path = "../" + place.relative_path

    change_metadata(tmp_path, change)
    with pytest.raises(UserError, match=r"names `\.\./__0_0\.distcp`, which is no file of this folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 50, -1])
def test_metadata_that_are_cut_off_are_refused(tmp_path, kept):
    save(tmp_path, {"model": STATE})
    (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"\.metadata: damaged or cut off"):
        read_checkpoint(tmp_path)


def test_metadata_of_another_kind_are_refused(tmp_path):
    save(tmp_path, {"model": STATE})
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="holds dict; expected DCP's Metadata"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["state_dict_metadata", "storage_data"])
@pytest.mark.parametrize("value", [None, 3, {"a": 1}])
def test_metadata_with_nonsense_are_refused(tmp_path, name, value):
    save(tmp_path, {"model": STATE})
    change_metadata(tmp_path, lambda known: setattr(known, name, value))
    with pytest.raises(UserError):
        read_checkpoint(tmp_path)


def test_a_size_that_the_file_does_not_hold_is_refused(tmp_path):
    save(tmp_path, {"model": STATE})

    def change(known):
        for stored in known.state_dict_metadata.values():
            assert isinstance(stored, TensorStorageMetadata)
            stored.size = torch.Size([1 << 50])

    change_metadata(tmp_path, change)
    with pytest.raises(UserError, match=r"`model\.h\.0\.w` is said to have"):
        read_checkpoint(tmp_path)


def test_files_without_metadata_are_refused(tmp_path):
    save(tmp_path, {"model": STATE})
    (tmp_path / ".metadata").unlink()
    with pytest.raises(UserError, match=r"files of DCP without \.metadata"):
        read_checkpoint(tmp_path)


def test_where_a_checkpoint_lay_does_not_matter(tmp_path):
    save(tmp_path, {"model": STATE})
    change_metadata(tmp_path, lambda known: setattr(known.storage_meta, "checkpoint_id", Path("/elsewhere")))
    check(read_checkpoint(tmp_path))

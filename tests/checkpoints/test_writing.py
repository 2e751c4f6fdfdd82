"""Checkpoints that are whole or absent: the library's own bytes, one tensor at a time, onto nothing that matters."""

import errno
import os
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.checkpoints.checkpoint import LazyTensor
from kit.checkpoints.formats.safetensors_files import DTYPES
from kit.checkpoints.reading import read_checkpoint
from kit.checkpoints.writing import check_target, describe, write_pickled, write_safetensors
from kit.errors import UserError
from kit.files import disk_fault


def lazy(tensors):
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def tensors():
    generator = torch.Generator().manual_seed(0)
    mixed = {
        f"{code}.{n}": torch.randint(0, 2, (n, DTYPES[code].itemsize), generator=generator, dtype=torch.uint8).view(
            DTYPES[code]
        )
        for code in DTYPES
        for n in (1, 3)
    }
    odd = {
        "naïve": torch.ones(1),
        "": torch.ones(2),
        'a"b\\c\n\x7f': torch.ones(1),
        "Z": torch.ones(1),
        "é": torch.ones(3),
    }
    shapes = {"scalar": torch.tensor(1.5), "none": torch.empty(0, 3), "turned": torch.arange(6.0).view(2, 3).mT}
    return {**mixed, **odd, **shapes, "nan": torch.tensor([float("nan"), -0.0])}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, {"settings": '{"naïve": "\\"x\\""}'}])
def test_the_bytes_are_those_of_the_library(tmp_path, metadata):
    write_safetensors(tmp_path / "ours.safetensors", lazy(tensors()), metadata)
    plain = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(plain, tmp_path / "theirs.safetensors", metadata or None)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_what_is_written_is_read_again_with_its_settings(tmp_path):
    settings = {"model_args": {"n_head": 2, "bias": False}, "name": "naïve"}
    write_safetensors(tmp_path / "x.safetensors", lazy(tensors()), describe(settings))
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.settings == {"metadata": {"format": "pt"}, **settings}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors().items()
    }
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name].nan_to_num(), tensors()[name].nan_to_num()) for name in ("nan", "turned", "Z"))


def test_a_type_that_safetensors_lacks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"safetensors has no type torch\.complex128, as `x` is"):
        write_safetensors(tmp_path / "x.safetensors", lazy({"x": torch.ones(1, dtype=torch.complex128)}), {})
    assert list(tmp_path.iterdir()) == []


def test_pickles_load_with_weights_only_and_share_what_is_given_twice(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    one = lazy({"w": weight})["w"]
    settings = {"model_args": {"n_head": 2}, "iter_num": 3}
    write_pickled(tmp_path / "x.pt", OrderedDict(wte=one, head=one, b=lazy({"b": weight[0]})["b"]), settings)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {key: value for key, value in loaded.items() if key != "model"} == settings
    assert list(loaded["model"]) == ["wte", "head", "b"]
    assert torch.equal(loaded["model"]["head"], weight)
    assert loaded["model"]["wte"].data_ptr() == loaded["model"]["head"].data_ptr()
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.settings == settings
    assert torch.equal(checkpoint.tensors["b"].read(), weight[0])


@pytest.mark.parametrize("write", [write_safetensors, write_pickled])
@pytest.mark.parametrize("before", [None, b"before"])
def test_a_failure_leaves_what_was_there(tmp_path, write, before):
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "x"
    if before:
        path.write_bytes(before)
    broken = {**lazy({"a": torch.ones(1000)}), "b": LazyTensor((1,), torch.float32, fail)}
    with pytest.raises(OSError, match="Input/output error"):
        write(path, broken, {})
    assert [each.name for each in tmp_path.iterdir()] == (["x"] if before else [])
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize("write", [write_safetensors, write_pickled])
def test_a_full_disk_is_told_as_one_and_leaves_nothing_behind(tmp_path, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)) as caught:
            write(tmp_path / "x", lazy({"a": torch.ones(50_000)}), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in disk_fault(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_safetensors, write_pickled])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_open_gives(tmp_path, write, mask):
    previous = os.umask(mask)
    try:
        write(tmp_path / "x", lazy({"a": torch.ones(1)}), {})
    finally:
        os.umask(previous)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    mebibytes = 8
    content = {f"h.{n}.w": torch.full((mebibytes << 18,), float(n)) for n in range(12)}
    save_file(content, tmp_path / "x.safetensors")
    torch.save(content, tmp_path / "x.pt")
    del content
    # Not getrusage, whose maximum a process inherits from the one that starts it.
    code = """
import re
from pathlib import Path
from kit.checkpoints.formats import pickled
from kit.checkpoints.reading import read_checkpoint
from kit.checkpoints.writing import write_safetensors
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
pickled._MAPPED = 1
before = peak()
for name in ("x.safetensors", "x.pt"):
    write_safetensors(Path(f"copy of {name}"), read_checkpoint(Path(name)).tensors, {})
    print(peak() - before)
"""
    # With its usual threshold glibc keeps freed tensors of this size for the next ones, now more of them and now fewer.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert max(map(int, done.stdout.split())) < 3 * mebibytes + 20
    for name in ("x.safetensors", "x.pt"):
        assert torch.equal(load_file(tmp_path / f"copy of {name}")["h.7.w"], torch.full((mebibytes << 18,), 7.0))


# ---- targets


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_source_is_never_a_target(tmp_path, source, overwrite):
    (tmp_path / "link").symlink_to(source)
    os.link(source / "model.safetensors", tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(source / "model.safetensors")
    file = source / "model.safetensors"
    for one, other, reason in (
        (source, source, "is the source itself"),
        (source, tmp_path / "link", "is the source itself"),
        (tmp_path / "link", source, "is the source itself"),
        (source, source / ".." / "source", "is the source itself"),
        (source, source / "new.safetensors", "lies in the source"),
        (source, tmp_path / "link" / "new", "lies in the source"),
        (source, file, "is the source itself"),
        (source, tmp_path / "hard.safetensors", "is the source itself"),
        (source, tmp_path / "soft.safetensors", "is the source itself"),
        (file, tmp_path / "hard.safetensors", "is the source itself"),
        (file, file, "is the source itself"),
        (file, source, "holds the source"),
        (source, tmp_path, "holds the source"),
    ):
        with pytest.raises(UserError, match=reason):
            check_target(one, other, (), overwrite)


def test_a_new_name_is_a_target(tmp_path, source):
    check_target(source, tmp_path / "new", (), overwrite=False)
    check_target(source, tmp_path / "source2", (), overwrite=False)
    check_target(source / "model.safetensors", source / "other.safetensors", (), overwrite=False)


def test_what_exists_is_replaced_only_on_request(tmp_path, source):
    (tmp_path / "x.pt").write_bytes(b"x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a link"):
        check_target(source, tmp_path / "nowhere", (), overwrite=True)
    for name in ("x.pt", "empty"):
        with pytest.raises(UserError, match="exists already; --overwrite replaces it"):
            check_target(source, tmp_path / name, (), overwrite=False)
        check_target(source, tmp_path / name, (), overwrite=True)


def test_a_folder_of_something_else_is_not_replaced(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a folder that a conversion has written"):
        check_target(source, tmp_path / "home", (), overwrite=True)
    (tmp_path / "home" / "conversion.json").write_text("{}")
    check_target(source, tmp_path / "home", (), overwrite=True)


def test_a_target_needs_a_folder_to_lie_in(tmp_path, source):
    for target in (tmp_path / "none" / "x.pt", source.parent / "x" / "y"):
        with pytest.raises(UserError, match="there is no folder"):
            check_target(source, Path(target), (), overwrite=True)

"""Files are whole or absent, and a folder's marker vouches for what lies in it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kit.files
from kit.files import build_once, hash_values, read_json, read_seal, replaced_folder, seal, write_json, write_text


@pytest.fixture
def folder(tmp_path):
    """A sealed folder of two files, one of them nested."""
    folder = tmp_path / "folder"
    write_text(folder / "a.txt", "alpha")
    write_text(folder / "nested" / "b.txt", "beta")
    seal(folder, step=7, name="Größe")
    return folder


# ---- Single files ----


def test_text_is_written_whole_in_a_folder_made_for_it(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    write_text(str(path), "short")
    assert path.read_bytes() == b"short"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    if failing != "write":
        monkeypatch.setattr(kit.files.os, failing, fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(path, "new" * 100_000 + ("\ud800" if failing == "write" else ""))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_old_file_stands_until_the_new_one_is_flushed(tmp_path, monkeypatch):
    path, seen = tmp_path / "file.txt", []
    write_text(path, "old")
    monkeypatch.setattr(kit.files.os, "fsync", lambda fd: seen.append((path.read_text(), os.fstat(fd).st_size)))
    write_text(path, "newer")
    assert seen == [("old", 5)]
    assert path.read_text() == "newer"


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": "Größe"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


def test_hash_of_values_tells_them_apart_and_ignores_the_order_of_keys():
    assert hash_values({"a": 1, "b": 2}) == hash_values({"b": 2, "a": 1})
    values = [(), (1,), ("1",), (1, 2), ([1, 2],), ("12",), ("1", "2"), (None,), ({"a": 1},), (1.5,), (True,)]
    assert len({hash_values(*v) for v in values}) == len(values)


# ---- Markers ----


def test_a_seal_says_what_it_was_given_and_what_it_vouches_for(folder):
    marker = read_seal(folder)
    assert (marker["step"], marker["name"]) == (7, "Größe")
    assert {name: facts["bytes"] for name, facts in marker["files"].items()} == {"a.txt": 5, "nested/b.txt": 4}
    assert kit.files.is_sealed(folder)


@pytest.mark.parametrize("name", ["a.txt", "nested/b.txt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text().upper()),
        lambda path: path.write_text(path.read_text()[:-1]),
        lambda path: path.write_text(""),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["changed", "truncated", "emptied", "missing", "folder"],
)
def test_a_seal_does_not_vouch_for_a_damaged_file(folder, name, damage):
    damage(folder / name)
    assert read_seal(folder) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", "{}", '{"files": []}', '{"files": {"a.txt": 3}}', b"\xff", '{"files": {"a.txt": {}}}'],
)
def test_a_broken_marker_is_no_marker(folder, content):
    (folder / "complete.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_seal(folder) is None


def test_an_unsealed_or_missing_folder_has_no_seal(tmp_path, folder):
    (folder / "complete.json").unlink()
    assert read_seal(folder) is None
    assert not kit.files.is_sealed(folder)
    assert read_seal(tmp_path / "nowhere") is None


def test_sealing_again_vouches_for_what_is_there_now(folder):
    write_text(folder / "a.txt", "another")
    write_text(folder / "c.txt", "new")
    seal(folder)
    assert set(read_seal(folder)["files"]) == {"a.txt", "nested/b.txt", "c.txt"}


# ---- Folders ----


def test_a_folder_is_replaced_as_a_whole(folder):
    with replaced_folder(folder) as temporary:
        write_text(temporary / "only.txt", "new")
        assert (folder / "a.txt").read_text() == "alpha"
    assert sorted(os.listdir(folder)) == ["only.txt"]
    assert os.listdir(folder.parent) == ["folder"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(folder):
    def fail():
        with replaced_folder(folder) as temporary:
            write_text(temporary / "half.txt", "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_seal(folder)["step"] == 7
    assert os.listdir(folder.parent) == ["folder"]


def test_a_folder_is_built_once_and_again_when_it_is_damaged(tmp_path):
    built = []

    def build(temporary):
        built.append(temporary)
        write_text(temporary / "content.txt", "content")
        return {"number": len(built)}

    folder = tmp_path / "made" / "key"
    assert build_once(folder, build)["number"] == 1
    assert build_once(folder, build) == read_seal(folder)
    assert len(built) == 1
    (folder / "content.txt").write_text("tampered")
    assert build_once(folder, build)["number"] == 2
    assert (folder / "content.txt").read_text() == "content"
    assert not any(path.exists() for path in built)


def test_a_damaged_folder_is_gone_before_it_is_built_again(tmp_path):
    """Were it put aside at the end, a kill between the renames and its removal would leave it there for good."""
    store = tmp_path / "store"
    build_once(store, lambda folder: write_text(folder / "a.txt", "hello"))
    write_text(store / "a.txt", "other")
    there = []
    build_once(store, lambda folder: there.append(store.exists()))
    assert there == [False]


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path):
    def fail(temporary):
        write_text(temporary / "half.txt", "half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(tmp_path / "key", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert build_once(tmp_path / "key", lambda temporary: None)["files"] == {}


def test_leftovers_of_this_folder_are_removed_and_of_no_other(tmp_path):
    for name in (".key.0123abcd", ".other.0123abcd", "key2"):
        write_text(tmp_path / name / "file.txt", "x")
    build_once(tmp_path / "key", lambda temporary: None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".other.0123abcd", "key", "key2"]


def test_one_of_many_threads_builds(tmp_path):
    threads, built, markers = 8, [], []
    together = threading.Barrier(threads)

    def build(temporary):
        built.append(temporary)
        write_text(temporary / "content.txt", "x" * 100_000)

    def run():
        together.wait(timeout=30)
        markers.append(build_once(tmp_path / "key", build))

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
    assert len(built) == 1
    assert markers == [read_seal(tmp_path / "key")] * threads


WRITE = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from kit.files import put_in_place, replaced_folder, seal
here = Path(sys.argv[1])
with replaced_folder(here / "model") as folder:
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "deep").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "deep/model.safetensors")
(here / "checkpoint").mkdir()
save_file({"a": torch.zeros(1)}, here / "checkpoint/model.safetensors")
seal(here / "checkpoint")
save_file({"a": torch.zeros(1)}, here / "made")
put_in_place(here / "made", here / "file")
"""


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_are_readable_by_whom_the_umask_lets_read(tmp_path, mask):
    """Safetensors writes them for their owner alone."""
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], check=True, umask=mask, cwd=Path(__file__).parents[1])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}

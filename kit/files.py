"""Files that are either whole or absent: atomic writes, and folders that are built once however many ask for them."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from kit.errors import UserError

COMPLETE = "complete.json"
# Asked for once, since that takes setting it; no thread is writing yet.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_CHUNK = 1 << 22

# A folder that cannot be written, a full disk: mended by the user, and clear without a traceback.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
# What the libraries that write weights, tokenizers and arrays say instead; torch and numpy do not tell the cause.
_NO_ROOM_SAID = re.compile(r"No space left on device|Disk quota exceeded|File too large", re.IGNORECASE)
_CUT_OFF_SAID = re.compile(
    r"inline_container.*unexpected pos|basic_ios::clear: iostream error|PytorchStreamWriter failed"
    r"|^\d+ requested and \d+ written$"
)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def make_folder(key: str, path: str | Path) -> None:
    """Make a folder that the recipe's `key` names, with those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {Path(path).absolute()} cannot be written: {error.strerror}") from None


def hash_file(path: str | Path) -> str:
    """Return the 128-bit xxHash of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_array(array: np.ndarray) -> str:
    """Return the 128-bit xxHash of an array's values, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array))


def hash_values(*values: Any) -> str:
    """Return a 128-bit xxHash over the JSON form of `values`: the key of something derived from them."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())


def seal(folder: str | Path, **facts: Any) -> None:
    """Write the marker that makes `folder` complete: size and hash of each file in it, and `facts` beside them.

    Everything is flushed to disk before the marker is, so a marker that exists vouches for files that do.
    """
    folder = Path(folder)
    _allow_what_umask_does(folder)
    files = {}
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    write_json(folder / COMPLETE, {**facts, "files": files})
    _sync_folder(folder)


def is_sealed(folder: str | Path) -> bool:
    """Tell whether a folder carries its marker, without reading the files that it vouches for."""
    return (Path(folder) / COMPLETE).is_file()


def read_seal(folder: str | Path) -> dict[str, Any] | None:
    """Return what the marker of `folder` says, or None where the marker is missing or any file differs from it."""
    folder = Path(folder)
    try:
        marker = read_json(folder / COMPLETE)
        for name, facts in marker["files"].items():
            path = folder / name
            if path.stat().st_size != facts["bytes"] or hash_file(path) != facts["xxh3_128"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            yield path


def _allow_what_umask_does(made: Path) -> None:
    """Let others read what a library wrote for its owner alone (safetensors from 0.8 on), as far as the umask does."""
    for path in (made, *made.rglob("*")):
        if path.is_file() and not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o666 & ~_UMASK)


def _sync_folder(folder: Path) -> None:
    # A rename or a new name is durable only once the folder that holds it is flushed too (POSIX).
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(made: str | Path, place: str | Path) -> None:
    """Give a finished file or folder its name; what had the name is removed only then."""
    place = Path(place)
    _allow_what_umask_does(Path(made))
    aside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}") if place.is_dir() else None
    if aside:
        os.replace(place, aside)
    os.replace(made, place)
    _sync_folder(place.parent)
    if aside:
        shutil.rmtree(aside)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place, sealed by a rename, if the block succeeds."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_once(folder: str | Path, build: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
    """Return the marker of `folder`, after building the folder if it is missing or damaged.

    Any number of processes may call this at the same time: one builds, under a lock that the operating system
    releases if it dies, and the others wait for it. `build` fills the folder that it is given and returns facts
    for the marker.
    """
    folder = Path(folder)
    if marker := read_seal(folder):
        return marker
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if marker := read_seal(folder):
            return marker
        _remove_leftovers(folder)
        with replaced_folder(folder) as temporary:
            seal(temporary, **(build(temporary) or {}))
        return read_seal(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed builder of `folder` left behind, and a damaged `folder`, which no kill may leave aside.

    The caller holds its lock, so no builder is alive.
    """
    for path in (folder, *folder.parent.glob(f".{folder.name}.*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def disk_fault(error: BaseException, folders: Mapping[str, str | Path] | None = None) -> str | None:
    """Return what on this machine's disks made a command fail, in words, or None where it was something else.

    Args:
        error: what was raised; safetensors, tokenizers, torch and numpy each have a kind of their own for a full disk.
        folders: where the command writes, under the recipe's keys.
    """
    code, named = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if code in _NO_ACCESS and named:
        return f"{_key_of(named, folders or {})}{named}: {error.strerror}"
    reason = " ".join(str(error).split())
    if code in _NO_ROOM:
        reason = error.strerror
    elif said := _NO_ROOM_SAID.search(reason):
        reason = said[0]
    elif _CUT_OFF_SAID.search(reason):
        reason = "a file could not be written to its end"
    else:
        return None
    what = f"{f'{named}: ' if named else ''}the disk is full ({reason})"
    if not folders:
        return f"{what}; make room on it, or name other folders (`run.output_dir`, `data.store_dir`, HF_HOME)"
    left = ", ".join(f"{_free_space(folder)} for `{key}` ({folder})" for key, folder in folders.items())
    return (
        f"{what}; left once what did not fit is removed: {left}. Make room and start the same command again, which "
        f"goes on from the last checkpoint, or name folders on another disk with `run.output_dir=…` and "
        f"`data.store_dir=…`"
    )


def _key_of(path: str | Path, folders: Mapping[str, str | Path]) -> str:
    inside = (key for key, folder in folders.items() if Path(path).absolute().is_relative_to(Path(folder).absolute()))
    return next((f"{key}: " for key in inside), "")


def _free_space(folder: str | Path) -> str:
    try:
        existing = next(f for f in (Path(folder), *Path(folder).absolute().parents) if f.exists())
        return f"{shutil.disk_usage(existing).free / 2**20:,.1f} MiB"
    except OSError:
        return "unknown space"

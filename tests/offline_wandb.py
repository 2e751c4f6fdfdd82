"""A reader of the files that W&B's client writes offline; the package has the record types, but no reader of its own.

A file is LevelDB's log format: 32 KiB blocks of records, each with checksum (4 bytes), length (2) and type (1: full,
2: first, 3: middle, 4: last), after a header of 7 bytes.
"""

import json
import struct
from dataclasses import dataclass, field

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = 7


@dataclass
class OfflineRun:
    """What the files of one run id hold, in the order of writing."""

    parts: int = 0
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)  # by name, each a list of dictionaries
    artifacts: dict = field(default_factory=dict)  # by name, the records, without those of tables
    preempted: bool = False
    exit_codes: list[int] = field(default_factory=list)
    facts: object = None  # the last record of the run itself: its names and where it belongs


def read_runs(folder):
    """Return the runs in all offline files below a folder, by run id."""
    runs = {}
    for path in sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_mtime):
        run = runs.setdefault(path.stem.removeprefix("run-"), OfflineRun())
        run.parts += 1
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            _add(run, record, path.parent / "files")
    return runs


def _add(run, record, files):
    kind = record.WhichOneof("record_type")
    if kind == "history":
        entry = {_key(item): json.loads(item.value_json) for item in record.history.item}
        run.history.append({key: value for key, value in entry.items() if not key.startswith("_")})
    elif kind == "run":
        run.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        run.config.pop("_wandb", None)
        run.facts = record.run
    elif kind == "preempting":
        run.preempted = True
    elif kind == "exit":
        run.exit_codes.append(record.exit.exit_code)
    elif kind == "artifact" and record.artifact.type != "run_table":
        run.artifacts[record.artifact.name] = record.artifact
    elif kind == "summary":
        # The client adds what it logged last; the scorecard is what the kit sets itself.
        values = {_key(item): json.loads(item.value_json) for item in record.summary.update}
        run.summary.update({key: value for key, value in values.items() if key.startswith("scorecard/")})
        for key, value in values.items():
            if key.startswith("tables/"):
                table = json.loads((files / value["path"]).read_text())
                rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
                run.tables[key.removeprefix("tables/")] = rows


def _key(item):
    return item.key or "/".join(item.nested_key)


def _records(data):
    """Yield the records of a file; a last one that was cut off by a kill is left out."""
    position, parts = _HEADER, []
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        body = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind == 0 or len(body) < length:
            return
        parts = [body] if kind in (1, 2) else [*parts, body]
        if kind in (1, 4):
            yield b"".join(parts)

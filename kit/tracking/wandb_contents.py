"""What a W&B run holds beside its history: figures of the scorecard, tables, artifacts; text only where it may."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.files import read_json

_MOST_ROWS = 10_000  # that W&B shows of a table


def scorecard_figures(scorecard: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of a scorecard under the way to it: `scorecard/domain/after/bits_per_byte`."""
    return dict(_figures("scorecard", scorecard["sets"]))


def make_tables(folder: Path, scorecard: Mapping[str, Any], with_text: bool) -> dict[str, Any]:
    """Return the tables of a run, made of the files in its directory.

    The tokens that the recipe adds are part of it, as are the names of classes; prompts with their continuations and
    rows that were taken for another class are text of the data.

    Args:
        folder: the run directory.
        scorecard: of the run.
        with_text: whether tables of text are among them.
    """
    tables = {f"confusion/{name}": _confusion(card) for name, card in scorecard["sets"].items()}
    tables["freezing"] = _rows(_read(folder, "freezing.json"))
    tables["vocabulary"] = _vocabulary(_read(folder, "vocabulary.json"))
    if with_text:
        tables["samples"] = _rows(_read(folder, "samples.json"))
        tables["mistakes"] = _rows(_read(folder, "mistakes.jsonl"))
    with _kept_in(folder):
        return {f"tables/{name}": _table(*content) for name, content in tables.items() if content}


def log_artifacts(
    run: Any, name: str, folder: Path, scorecard: Mapping[str, Any], with_model: bool, with_data: bool
) -> None:
    """Log what the run was made of and what it made, so that W&B draws the way from one to the other.

    Of data and base model these are facts alone: names, sizes, hashes.

    Args:
        run: the W&B run.
        name: its name, with which those of the artifacts begin.
        folder: the run directory.
        scorecard: of the run.
        with_model: whether `model/` is uploaded.
        with_data: whether the data's ledger is.
    """
    manifest = read_json(folder / "manifest.json")
    recipe = run.config.as_dict()
    with _kept_in(folder):
        if with_data:
            ledger = {"fingerprint": manifest.get("data"), "sources": _read(folder, "ledger.json")}
            _use(run, _facts(f"{name}-data", "dataset", ledger))
        if with_model:
            base = {"fingerprint": manifest.get("model"), **(recipe.get("model") or {})}
            _use(run, _facts(f"{name}-base", "model", base))
            # Below one key: W&B takes a hundred, and a classifier has more figures.
            made = _artifact(f"{name}-model", "model", {"figures": scorecard_figures(scorecard)})
            made.add_dir(str(folder / "model"), policy="immutable", skip_cache=True)  # no copy beside the one there
            run.log_artifact(made)


def _use(run: Any, artifact: Any) -> None:
    # `run.use_artifact` does just this, then waits for the server; offline it refuses.
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _facts(name: str, kind: str, facts: Mapping[str, Any]) -> Any:
    artifact = _artifact(name, kind, {"fingerprint": facts["fingerprint"]})
    # W&B tells versions apart by their files alone.
    with artifact.new_file(f"{kind}.json") as file:
        json.dump(facts, file, indent=2, default=str)
    return artifact


def _artifact(name: str, kind: str, metadata: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Artifact(re.sub(r"[^\w.-]", "-", name), kind, metadata=dict(metadata))


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let W&B keep what it still has to upload in the run directory, with the rest of an offline run."""
    name = "WANDB_DATA_DIR"
    before = os.environ.get(name)
    os.environ[name] = before or str(folder.absolute() / "wandb")
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.is_file():
        return None
    lines = path.suffix == ".jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if lines else read_json(path)


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=rows[:_MOST_ROWS], allow_mixed_types=True)


def _rows(entries: list[Mapping[str, Any]] | None) -> tuple[list[str], list[list[Any]]] | None:
    """Return columns and rows of a list of mappings."""
    if not entries:
        return None
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    return columns, [[_cell(entry.get(name)) for name in columns] for entry in entries]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _confusion(card: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """Return the pairs of classes that occur: that of the row, the one predicted, how often."""
    if not card.get("confusion"):
        return None
    names = list(card["per_class"])
    counts = zip(names, card["confusion"], strict=True)
    pairs = [
        [actual, predicted, count]
        for actual, row in counts
        for predicted, count in zip(names, row, strict=True)
        if count
    ]
    return ["Actual", "Predicted", "nPredictions"], pairs


def _vocabulary(audit: Mapping[str, Any] | None) -> tuple[list[str], list[list[Any]]] | None:
    """Return a line for each new row of the embeddings."""
    if not audit:
        return None
    lines = [
        {
            "token": token["token"],
            "id": row["id"],
            "method": token["method"],
            "in training": row["occurrences"].get("training"),
            "saved each": row["saved_each"],
            "initial norm": row["initial_norm"].get("input"),
            "moved": row.get("moved", {}).get("input"),
        }
        for token in audit["tokens"]
        for row in token["rows"]
    ]
    return _rows(lines)


def _figures(path: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _figures(f"{path}/{name}", value)
        elif isinstance(value, int | float):
            yield f"{path}/{name}", value

"""Datasets as the `datasets` library knows them: on the Hub, streamed, or in a folder."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from kit.data.readers import Rows, columns_of, hash_content
from kit.errors import UserError, did_you_mean, suggest
from kit.files import hash_values
from kit.network import why_offline
from kit.recipe.data import Source

_ROWS = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_fingerprint(source: Source) -> str:
    """Return a hash of what a dataset holds: of its files where it is a folder, else of its commit on the Hub."""
    folder = _folder(source)
    if folder is None:
        return hash_values(source.dataset, _commit(source))
    return hash_values([(path.relative_to(folder).as_posix(), hash_content(path)) for path in local_files(source)])


def local_files(source: Source) -> list[Path]:
    """Return the files of a dataset that is a folder, sorted; none where it is on the Hub."""
    folder = _folder(source)
    if folder is None:
        return []
    # Hidden ones are no part of it: `.git` changes with every look that git takes at the folder.
    visible = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(path for path in visible if path.is_file())


def open_dataset(source: Source) -> tuple[Any, dict[str, bool]]:
    """Return a dataset's split, and its columns with which of them hold text.

    Raises:
        UserError: there is no such dataset, configuration or split; those that there are, are listed.
    """
    import datasets

    datasets.disable_progress_bars()
    folder, split = _folder(source), source.split or "train"
    if folder is not None and (folder / "config.json").is_file():
        raise UserError(f"data source `{source.dataset}`: is a model folder (it holds config.json), not a dataset")
    if folder is None and (offline := why_offline()):
        raise UserError(f"data source `{source.dataset}`: is no folder here, and the Hub cannot be reached ({offline})")
    with _explained(source):
        if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(folder)).with_format(None)  # it may have been saved with one
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise _no_split(source, split, list(dataset))
                dataset = dataset[split]
            elif source.split not in (None, str(dataset.split)):
                raise _no_split(source, split, [str(dataset.split)] if dataset.split else [])
        else:
            revision = None if folder is not None else _commit(source)
            # A bare name such as `json` would be a format of the library's, not the folder.
            path = str(folder.absolute()) if folder is not None else source.dataset
            dataset = datasets.load_dataset(path, source.config, split=split, revision=revision, streaming=True)
        features = dataset.features
        if features is None:
            dataset = dataset._resolve_features()  # reads the first rows
            features = dataset.features
    return dataset, columns_of(features.arrow_schema)


def read_rows(source: Source, dataset: Any, columns: list[str]) -> Rows:
    """Yield the rows of a dataset with the columns that are asked for; images beside them are not decoded."""
    number = 0
    with _explained(source):
        for batch in dataset.select_columns(list(dict.fromkeys(columns))).iter(batch_size=_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{source.name}, row {number}", dict(zip(batch, values, strict=True))


def _folder(source: Source) -> Path | None:
    folder = Path(source.dataset).expanduser()
    if folder.is_dir():
        return folder
    if source.dataset.startswith((".", "/", "~")) or source.dataset.count("/") > 1:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings)
        raise UserError(f"data source `{source.dataset}`: no such folder (resolved to {folder.absolute()}){hint}")
    return None


def _commit(source: Source) -> str:
    """Return the commit of a dataset on the Hub: what is stored stays keyed by what was read.

    The client keeps what a branch stood for, so that the same run goes on without a network.
    """
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    with _explained(source):
        return _resolve_commit(source.dataset, source.revision)


@lru_cache
def _resolve_commit(dataset: str, revision: str | None) -> str:
    """Resolve a branch once a process: what is read has to be what the key of its store says."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = snapshot_download(
            dataset,
            repo_type="dataset",
            revision=revision,
            allow_patterns="README.md",
            local_files_only=why_offline() is not None,
        )
        return Path(folder).name
    except LocalEntryNotFoundError:
        # Of a dataset without a README the cache has no snapshot, but it knows the branch.
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
        branch = folder / "refs" / (revision or "main")
        if not branch.is_file():
            raise
        return branch.read_text()


def _no_split(source: Source, split: str, available: list[str]) -> UserError:
    listed = f"available: {', '.join(available)}" if available else "it was saved without splits, so leave `split` out"
    return UserError(f"data source `{source.dataset}`: no split `{split}`; {listed}{suggest(split, available)}")


def _unusable() -> tuple[type[Exception], ...]:
    """Return what the Hub's client, `datasets` and the formats that it reads raise; anything else is our fault."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError

    return (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        DatasetsError,
        HTTPError,
        pa.ArrowException,
    )


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn what the libraries raise for an absent or unusable dataset into a UserError."""
    try:
        yield
    except UserError:
        raise
    except _unusable() as error:
        reason = " ".join(str(error).split())
        if type(error).__name__ == "LocalEntryNotFoundError" or isinstance(error, ConnectionError):
            from huggingface_hub import constants

            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{error.__cause__ or error}"
            reason = f"is no folder here, and the Hub cannot be reached ({' '.join(why.split())[:200]})"
        elif type(error).__name__ == "RepositoryNotFoundError":
            reason = "is no folder here, and there is no such dataset on the Hub, or it is private: `hf auth login`"
        elif "revision" in type(error).__name__.lower():
            reason = f"no revision `{source.revision}`"
        elif split := re.search(r"Bad split: .*Available splits: \[(.*?)\]", reason):
            available = [name.strip(" '\"") for name in split[1].split(",")]
            raise _no_split(source, source.split or "train", available) from error
        elif found := re.search(r"BuilderConfig '.*?' not found\. Available: \[(.*?)\]", reason):
            available = [name.strip(" '\"") for name in found[1].split(",")]
            reason = f"no config `{source.config}`; available: {', '.join(available)}"
            reason += suggest(source.config or "", available)
        elif found := re.search(r"Config name is missing.*?available configs: \[(.*?)\]", reason):
            reason = f"it has several configurations, name one with `config`: {found[1]}"
        raise UserError(f"data source `{source.dataset}`: {reason[:600]}") from error

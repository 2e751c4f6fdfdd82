"""Corpora that are on every machine: the Python documentation and the docstrings of installed packages.

Nothing is downloaded and nothing redistributed. Sources are parsed with `ast`: no module of them is imported, so no
code of theirs runs.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

from kit.data.columns import LeftOut
from kit.errors import UserError, did_you_mean
from kit.files import hash_values

# Shorter docstrings ("Return the name.") repeat their function's name and teach next to nothing.
_LEAST_CHARACTERS = 80
# Half a surrogate pair, which an escape in a literal can make, is nothing that a tokenizer takes.
_SURROGATE = re.compile("[\ud800-\udfff]")
UNPARSABLE = "file that does not parse"
_HOLDERS = (ast.stmt, ast.excepthandler, ast.match_case)
_NOT_DOCUMENTATION = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "dist-packages",
    "idlelib",
    "__pycache__",
    "pydoc_data",
}


@lru_cache
def corpus_fingerprint(name: str, packages: tuple[str, ...]) -> str:
    """Return a hash of the names and sizes of the files that the corpus is read from."""
    # Installed files do not change but by another version: their content (150 MB for torch's) is not read for a key.
    listing = [
        (path.relative_to(root).as_posix(), path.stat().st_size)
        for root in _roots(name, packages)
        for path in _python_files(root)
    ]
    return hash_values(name, sorted(packages), _LEAST_CHARACTERS, listing)


@lru_cache(maxsize=16)  # a tokenizer that is trained reads it before the store does; a corpus has some megabytes
def read_corpus(name: str, packages: tuple[str, ...]) -> tuple[str | LeftOut, ...]:
    """Return the documents of a built-in corpus, each text once, in a stable order; and the files that do not parse."""
    topics = _read_topics() if name == "python-reference" else ()
    files = (path for root in _roots(name, packages) for path in _python_files(root))
    # Overloads and aliases carry the same docstring many times over.
    return tuple(dict.fromkeys(chain(topics, chain.from_iterable(map(_docstrings, files)))))


def _roots(name: str, packages: Sequence[str]) -> list[Path]:
    return [Path(sysconfig.get_path("stdlib"))] if name == "python-reference" else [_package_root(p) for p in packages]


def _package_root(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        from importlib.metadata import packages_distributions

        known = [name for name in packages_distributions() if name.isidentifier() and not name.startswith("_")]
        raise UserError(f"data source `docstrings`: no installed package `{package}`{did_you_mean(package, known)}")
    return Path(next(iter(spec.submodule_search_locations)))


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _NOT_DOCUMENTATION.intersection(path.relative_to(root).parts) and path.is_file():
            yield path


def _read_topics() -> Iterator[str]:
    """Yield the language reference: the topics that `help()` shows, which CPython ships as one dictionary."""
    source = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not source.is_file():
        raise UserError(f"data source `python-reference`: this Python has no language reference ({source} is missing)")
    for node in ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.Assign):
            for text in ast.literal_eval(node.value).values():
                yield text.strip()


def _docstrings(path: Path) -> Iterator[str | LeftOut]:
    try:
        # Old code holds escapes that the parser warns of; they are not ours to mend.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        yield LeftOut(UNPARSABLE, str(path))  # a template, or a file for other Python versions
        return
    for node in _blocks(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
            if len(text) > _LEAST_CHARACTERS and not _SURROGATE.search(text):
                yield text


def _blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that hold statements, in the order of `ast.walk`, which also visits each of their expressions."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            children = getattr(node, name)
            if isinstance(children, list):
                waiting.extend(child for child in children if isinstance(child, _HOLDERS))

"""The built-in corpora: read without importing anything, each text once, in a stable order."""

import ast
import inspect
import json
import subprocess
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import filelock
import pytest

from kit.data import builtin
from kit.data.columns import LeftOut
from kit.data.sources import read_documents, source_fingerprint
from kit.errors import UserError
from kit.recipe.data import Source

LONG = "This sentence is longer than the eighty characters that a docstring must have to be read at all."

# 500 documents reach beyond the topics into modules whose import shows: `antigravity` opens a browser.
READ_IN_ANOTHER_PROCESS = """
import json, sys
from itertools import islice
from kit.data import builtin
from kit.data.columns import LeftOut
from kit.data.sources import read_documents
from kit.recipe.data import Source
documents = list(islice(read_documents(Source(builtin="python-reference")), 500))
print(json.dumps([documents, sorted(sys.modules)]))
"""


@pytest.fixture(autouse=True)
def _read_anew():
    """Installed files do not change while a process runs; here they do."""
    builtin.corpus_fingerprint.cache_clear()
    builtin.read_corpus.cache_clear()
    yield
    builtin.corpus_fingerprint.cache_clear()
    builtin.read_corpus.cache_clear()


@pytest.fixture
def fake_stdlib(tmp_path, monkeypatch):
    """A standard library of a few files, one of which betrays that it was imported."""
    files = {
        "pydoc_data/topics.py": f"topics = {{1: 'About if.\\n', 2: ' About for. ', 3: 'About if.', 4: '{LONG}'}}",
        "b.py": f'"""{LONG} b"""\nclass C:\n    """{LONG} C"""\n    async def f(self):\n        """{LONG} f"""\n',
        "a.py": f'"""{LONG}"""\ndef g():\n    """{LONG} b"""\ndef short():\n    """Return it."""\n',
        "imported.py": f'"""{LONG} i"""\nimport pathlib\npathlib.Path({str(tmp_path / "imported")!r}).touch()\n',
        "python2.py": 'print "no Python 3"',
        "surrogate.py": f'"""{LONG} \\ud800"""',
        "test/test_a.py": f'"""{LONG} test"""',
        "pkg/tests/test_b.py": f'"""{LONG} test"""',
        "site-packages/other.py": f'"""{LONG} other"""',
    }
    root = tmp_path / "stdlib"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "dangling.py").symlink_to(root / "nothing")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_topics_and_docstrings_come_once_each_and_in_order(fake_stdlib):
    source = Source(builtin="python-reference")
    topics = ["About if.", "About for.", LONG]
    expected = [*topics, f"{LONG} b", f"{LONG} C", f"{LONG} f", f"{LONG} i"]
    unparsable = LeftOut("file that does not parse", str(fake_stdlib / "python2.py"))
    assert list(read_documents(source)) == [*expected, unparsable]
    assert not (fake_stdlib.parent / "imported").exists()


def test_fingerprint_follows_the_files(fake_stdlib):
    source = Source(builtin="python-reference")
    before = source_fingerprint(source)
    assert source_fingerprint(source) == before
    (fake_stdlib / "new.py").write_text(f'"""{LONG} new"""')
    builtin.corpus_fingerprint.cache_clear()
    assert source_fingerprint(source) != before


def test_a_python_without_its_reference_is_refused(fake_stdlib):
    (fake_stdlib / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(UserError, match="no language reference"):
        next(read_documents(Source(builtin="python-reference")))


def test_the_real_reference_is_read_alike_by_every_process_and_nothing_of_it_imported():
    result = subprocess.run(
        [sys.executable, "-c", READ_IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True, timeout=120
    )
    documents, modules = json.loads(result.stdout)
    assert documents == list(islice(read_documents(Source(builtin="python-reference")), 500))
    assert len(set(documents)) == 500
    assert any(text.startswith('The "if" statement') for text in documents)
    source = (Path(sysconfig.get_path("stdlib")) / "asyncio" / "base_events.py").read_text()
    assert ast.get_docstring(ast.parse(source)) in documents  # so what sorts before `asyncio` was read
    assert not {"antigravity", "asyncio.base_events", "pydoc_data.topics", "this"} & set(modules)


def test_docstrings_of_an_installed_package():
    documents = list(read_documents(Source(builtin="docstrings", packages=["filelock"])))
    assert inspect.getdoc(filelock.BaseFileLock.acquire) in documents
    assert len(documents) == len(set(documents))
    assert min(map(len, documents)) > 80


def test_several_packages_are_read_one_after_another():
    def read(*packages):
        return list(read_documents(Source(builtin="docstrings", packages=packages)))

    assert read("filelock", "safetensors") == read("filelock") + read("safetensors")
    assert read("filelock", "filelock") == read("filelock")


def test_an_unknown_package_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"no installed package `filelok`; did you mean `filelock`\?"):
        list(read_documents(Source(builtin="docstrings", packages=["filelok"])))
    with pytest.raises(UserError, match="no installed package `file-lock`"):
        source_fingerprint(Source(builtin="docstrings", packages=["file-lock"]))

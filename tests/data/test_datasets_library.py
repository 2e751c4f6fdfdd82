"""Datasets by name and by folder: the right config, split and revision, streamed no further than is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.data.columns import LeftOut
from kit.data.sources import read_documents, source_fingerprint, watch
from kit.errors import UserError
from kit.recipe.data import Source
from kit.recipe.models import EvaluationSet
from tests.data.fake_hub import FakeHub
from tests.data.reading import left_out, texts

ROOT = Path(__file__).resolve().parents[2]

CARD = """---
configs:
- config_name: news
  data_files:
  - {split: train, path: news/train-*.jsonl}
  - {split: test, path: news/test.jsonl}
- config_name: law
  data_files: law.jsonl
---
# A dataset
"""


def rows(kind, number, **more):
    return "".join(json.dumps({"text": f"{kind} {n}", "id": n, **more}) + "\n" for n in range(number))


def hub_layout(**changes):
    files = {
        "README.md": CARD,
        "news/train-0.jsonl": rows("train", 3),
        "news/train-1.jsonl": rows("more", 2),
        "news/test.jsonl": rows("test", 4),
        "law.jsonl": rows("law", 6),
    }
    return {**files, **changes}


def save_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return str(folder)


def read(dataset, **settings):
    return list(read_documents(Source(dataset=str(dataset), **settings)))


def refusal(dataset, **settings):
    with pytest.raises(UserError) as caught:
        read(dataset, **settings)
    return str(caught.value)


@pytest.fixture
def layout(tmp_path):
    """A folder as it lies on the Hub: two configs, one of them with two splits."""
    return save_files(tmp_path / "layout", hub_layout())


@pytest.fixture
def saved(tmp_path):
    """What `save_to_disk` leaves of a dataset, and of several."""
    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, None]}, split="train")
    nameless = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.disable_progress_bars()
    train.save_to_disk(tmp_path / "one")
    nameless.save_to_disk(tmp_path / "nameless")
    datasets.DatasetDict(train=train, validation=train.select([1])).save_to_disk(tmp_path / "several")
    return tmp_path


# ---- Folders ----


def test_what_save_to_disk_left(saved):
    assert read(saved / "one") == read(saved / "one", split="train") == ["a", "b", "c"]
    assert read(saved / "several") == ["a", "b", "c"]
    assert read(saved / "several", split="validation") == ["b"]
    assert read(saved / "nameless") == ["x"]


def test_a_split_that_is_not_there_is_told_with_those_that_are(saved, layout):
    message = refusal(saved / "several", split="validatoin")
    assert "no split `validatoin`; available: train, validation; did you mean `validation`?" in message
    assert "no split `test`; available: train" in refusal(saved / "one", split="test")
    assert "no split `test`; it was saved without splits, so leave `split` out" in refusal(
        saved / "nameless", split="test"
    )
    assert "no split `tset`; available: train, test; did you mean `test`?" in refusal(
        layout, config="news", split="tset"
    )


def test_columns_templates_and_bad_rows(saved):
    assert "./" not in refusal(saved / "one", text_column="n")
    assert refusal(saved / "one", text_column="n").startswith(f"{saved / 'one'}, row 1: column `n` holds int")
    assert "no column `txt` (`text_column`); columns: `text`, `n`; did you mean" in refusal(
        saved / "one", text_column="txt"
    )
    documents = read(saved / "one", template="{n} {text} {n}", on_bad_text="skip")
    assert documents == ["1 a 1", "2 b 2", LeftOut("unusable text", f"{saved / 'one'}, row 3")]


def test_columns_beside_the_text_are_not_decoded(tmp_path):
    """Images would be, one after the other, or fail where the library that decodes them is missing."""
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    table = pa.table({"caption": ["a", "b"], "image": [{"bytes": b"no image", "path": None}] * 2})
    datasets.Dataset(table.cast(features.arrow_schema)).save_to_disk(tmp_path / "images")
    assert read(tmp_path / "images") == ["a", "b"]


def test_a_folder_as_on_the_hub_is_read_by_config_and_split(layout):
    assert read(layout, config="news") == ["train 0", "train 1", "train 2", "more 0", "more 1"]
    assert read(layout, config="news", split="test") == [f"test {n}" for n in range(4)]
    assert read(layout, config="law", template="{id}: {text}") == [f"{n}: law {n}" for n in range(6)]


def test_a_config_that_is_missing_or_not_there_is_told(layout):
    assert "no config `nwes`; available: news, law; did you mean `news`?" in refusal(layout, config="nwes")
    message = refusal(layout)
    assert "several configurations, name one with `config`" in message
    assert "news" in message
    assert "law" in message


def test_a_folder_of_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    assert read(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", ["json", "text"])
def test_a_folder_may_be_named_as_a_format_is(tmp_path, monkeypatch, name):
    """`load_dataset("json")` means the format, whatever lies here."""
    save_files(tmp_path / name, {"rows.jsonl": rows("a", 2)})
    monkeypatch.chdir(tmp_path)
    assert read(name) == ["a 0", "a 1"]


def test_folders_that_are_none(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    message = refusal("./layuot")
    assert f"no such folder (resolved to {tmp_path / 'layuot'}); did you mean `layout`?" in message
    assert "no such folder" in refusal("a/b/c")
    (tmp_path / "empty").mkdir()
    assert "data files" in refusal("./empty")


def test_the_first_documents_are_read_and_no_more(layout):
    documents = read(layout, config="news", max_documents=3)
    assert documents == ["train 0", "train 1", "train 2"]
    documents = read(layout, config="law", max_documents=2, min_characters=6)
    assert left_out(documents) == [("shorter than min_characters", f"{layout} law, row {n}") for n in range(1, 7)]


def test_an_evaluation_set_takes_the_first_documents_that_it_holds_out(tmp_path):
    """Not what its fraction leaves of the first documents, which would be next to none."""
    save_files(tmp_path, {"rows.jsonl": rows("a", 400)})
    wanted = EvaluationSet(dataset=str(tmp_path), fraction=0.1, max_documents=10)
    documents = list(read_documents(wanted))
    every_one = EvaluationSet(dataset=str(tmp_path), fraction=0.1, max_documents=400)
    assert len(documents) == 10
    assert documents == texts(read_documents(every_one))[:10]
    assert 20 < len(texts(read_documents(every_one))) < 60


def test_the_key_of_a_folder_is_its_content(tmp_path, layout):
    def key(folder, **settings):
        return source_fingerprint(Source(dataset=str(folder), **{"config": "law", **settings}))

    moved = save_files(tmp_path / "moved", hub_layout())
    assert key(layout) == key(moved)
    (tmp_path / "moved" / ".git").mkdir()
    (tmp_path / "moved" / ".git" / "index").write_text("changes whenever git looks")
    assert key(layout) == key(moved)
    assert key(save_files(tmp_path / "other", hub_layout(**{"law.jsonl": rows("law", 7)}))) != key(layout)
    keys = {key(layout, **s) for s in ({}, {"config": "news"}, {"split": "test"}, {"text_column": "text"})}
    assert len(keys) == 4


def test_a_folder_that_changes_while_it_is_read_is_refused(layout):
    source = Source(dataset=layout, config="law")
    check_unchanged = watch(source)
    next(read_documents(source))
    (Path(layout) / "law.jsonl").write_text(rows("other", 6))
    with pytest.raises(UserError, match=r"changed while it was read"):
        check_unchanged()


@pytest.mark.parametrize("format", ["pandas", "arrow", "numpy"])
def test_a_dataset_saved_with_a_format_is_read_alike(tmp_path, format):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).with_format(format).save_to_disk(tmp_path / "saved")
    assert list(read_documents(Source(dataset=str(tmp_path / "saved")))) == ["a", "b"]


# ---- The Hub ----


@pytest.mark.parametrize("settings", [{}, {"revision": "v1"}, {"revision": "a" * 40}])
@pytest.mark.parametrize("name", ["org/name", "name"])
def test_without_a_network_a_name_is_refused_at_once(monkeypatch, tmp_path, name, settings):
    monkeypatch.chdir(tmp_path)
    message = refusal(name, **settings)
    assert message == (
        f"data source `{name}`: is no folder here, and the Hub cannot be reached (HF_HUB_OFFLINE is set)"
    )


def test_a_name_that_can_be_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("my data/set?").startswith("data source `my data/set?`: ")


# Opens each store that it is given, and tells what is in it, or why not.
CLIENT = """
import json, sys
from kit.data.sources import read_documents, source_fingerprint
from kit.data.store import open_store
from kit.errors import UserError
from kit.recipe.data import Source

calls = 0
def encode(texts):
    global calls
    calls += 1
    return [list(text.encode()) for text in texts]

answers = []
for settings in json.loads(sys.argv[2]):
    source, calls = Source(**settings), 0
    try:
        store = open_store(
            sys.argv[1], source.name, source_fingerprint(source), "bytes", lambda: read_documents(source), encode,
            256, 257, source.max_tokens,
        )
        documents = [bytes(store.document(n).tolist()).decode() for n in range(min(3, store.num_documents))]
        answers.append([store.key, store.num_documents, len(store.tokens), store.stopped, documents, calls])
    except UserError as error:
        answers.append(str(error))
print("\\n" + json.dumps(answers))
"""


def ask(tmp_path, url, *sources, **environment):
    """Open the stores of some datasets in a new process, whose Hub is at `url`."""
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "store"), json.dumps(sources)], capture_output=True, text=True,
        env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **environment},
        cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """What processes got that opened datasets of a Hub on this machine: before, again, and after it went away."""
    tmp_path = tmp_path_factory.mktemp("hub")
    files = {name: content.encode() for name, content in hub_layout().items()}
    files["news/train-0.jsonl"] = rows("train", 600).encode()
    old = {**files, "law.jsonl": rows("old", 6).encode()}
    repos = {"org/name": {"main": files, "v1": old}}
    repos |= {f"org/{name}": {"main": {"train.jsonl": rows(name, 3).encode()}} for name in ("bare", "moves")}
    wanted = {
        "law": {"dataset": "org/name", "config": "law"},
        "old": {"dataset": "org/name", "config": "law", "revision": "v1"},
        "test": {"dataset": "org/name", "config": "news", "split": "test"},
        "tokens": {"dataset": "org/name", "config": "news", "max_tokens": 20},
        "documents": {"dataset": "org/name", "config": "news", "max_documents": 2},
        "bare": {"dataset": "org/bare"},
        "moves": {"dataset": "org/moves"},
        "no config": {"dataset": "org/name", "config": "lwa"},
        "no split": {"dataset": "org/name", "config": "news", "split": "tset"},
        "no revision": {"dataset": "org/name", "config": "law", "revision": "v2"},
        "no dataset": {"dataset": "org/nothing"},
        "which config": {"dataset": "org/name"},
    }
    with FakeHub(repos) as hub:
        commit, _ = hub.commit("org/name", "v1")
        wanted["commit"] = {**wanted["old"], "revision": commit}
        first = dict(zip(wanted, ask(tmp_path, hub.url, *wanted.values()), strict=True))
        sent = dict(hub.sent)
        good = {name: wanted[name] for name, answer in first.items() if isinstance(answer, list)}
        hub.sent.clear()
        repos["org/moves"]["main"] = {"train.jsonl": rows("new", 3).encode()}
        again = dict(zip(good, ask(tmp_path, hub.url, *good.values()), strict=True))
        sent_again = dict(hub.sent)
    away = dict(zip(good, ask(tmp_path, hub.url, *good.values()), strict=True))
    return {"first": first, "sent": sent, "again": again, "sent_again": sent_again, "away": away}


def test_a_name_on_the_hub_is_read_by_config_split_and_revision(streamed):
    first = streamed["first"]
    assert [first[name][4][0] for name in ("law", "old", "commit", "test", "bare")] == [
        "law 0", "old 0", "old 0", "test 0", "bare 0",
    ]  # fmt: skip
    assert [first[name][1] for name in ("law", "old", "commit", "test", "bare")] == [6, 6, 6, 4, 3]
    assert first["law"][0] != first["old"][0] == first["commit"][0]


def test_a_stream_ends_at_max_tokens_and_max_documents(streamed):
    key, documents, tokens, stopped, _, _ = streamed["first"]["tokens"]
    assert (documents, tokens, stopped) == (2, 16, True)  # `train 0` and the end of a document are eight bytes
    assert streamed["first"]["documents"][1:4] == [2, 16, False]
    assert key != streamed["first"]["documents"][0]
    assert "news/train-1.jsonl" not in streamed["sent"], "the second file of the split was never asked for"


def test_a_second_start_reads_and_tokenises_nothing(streamed):
    first, again = streamed["first"], streamed["again"]
    unmoved = set(again) - {"moves"}
    assert len(unmoved) == 7
    assert all(again[name] == [*first[name][:5], 0] for name in unmoved)
    assert set(streamed["sent_again"]) == {"train.jsonl"}, "of the branch that moved"


def test_a_branch_that_moved_is_read_anew(streamed):
    assert streamed["first"]["moves"][4] == ["moves 0", "moves 1", "moves 2"]
    assert streamed["again"]["moves"][4] == ["new 0", "new 1", "new 2"]
    assert streamed["again"]["moves"][0] != streamed["first"]["moves"][0]


def test_without_the_hub_what_was_read_is_still_known(streamed):
    """The client keeps which commit a branch was, also of a dataset without a README."""
    assert streamed["away"] == {name: [*answer[:5], 0] for name, answer in streamed["again"].items()}


def test_what_is_not_on_the_hub_is_told(streamed):
    first = streamed["first"]
    assert "no config `lwa`; available: news, law; did you mean `law`?" in first["no config"]
    assert "no split `tset`; available: train, test; did you mean `test`?" in first["no split"]
    assert first["no revision"] == "data source `org/name`: no revision `v2`"
    assert "there is no such dataset on the Hub" in first["no dataset"]
    assert "several configurations, name one with `config`" in first["which config"]

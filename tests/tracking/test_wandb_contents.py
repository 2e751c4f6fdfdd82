"""Tables and artifacts of a W&B run: what a run directory holds, text only where the recipe lets it out."""

import json

import pytest

from kit.recipe.loading import load_recipe
from kit.tracking.wandb_run import tracked
from tests.offline_wandb import read_runs

PROMPT, CONTINUATION, MISTAKE = "Patient Quartermaine", "was admitted on Sunday", "Dear Mr Featherstone"
CARD = {
    "sets": {
        "test": {
            "after": {"accuracy": 0.75, **{f"figure_{number}": 0.5 for number in range(100)}},
            "baselines": {"tfidf_logreg": {"accuracy": 0.5}},
            "per_class": {"ham": {"f1": 0.8}, "spam": {"f1": 0.6}},
            "confusion": [[2, 1], [0, 1]],
        }
    }
}
FILES = {
    "freezing.json": [{"part": "head", "tensors": 1, "learning_rate": 0.1}, {"part": "blocks 0–1", "tensors": 24}],
    "vocabulary.json": {
        "tokens": [
            {
                "token": "naïve",
                "method": "subword-mean",
                "rows": [
                    {"id": 320, "occurrences": {"training": 7}, "saved_each": 2, "initial_norm": {"input": 1.5},
                     "moved": {"input": 0.5}, "nearest_old_rows": [{"id": 3, "text": CONTINUATION, "cosine": 0.5}]}
                ],
            }
        ]
    },
    "samples.json": [{"prompt": PROMPT, "before": "the the", "after": CONTINUATION}],
    "manifest.json": {"data": "hash-of-data", "model": "hash-of-model"},
    "ledger.json": [{"source": "letters", "documents": 12}],
    "model/config.json": {"model_type": "gpt2"},
}  # fmt: skip


@pytest.fixture
def track(write_recipe, tmp_path):
    """A function that tracks a finished run directory; it returns the run, and all that W&B keeps to upload."""

    def run(**section):
        folder = tmp_path / "run"
        (folder / "model").mkdir(parents=True)
        for name, content in FILES.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "mistakes.jsonl").write_text(json.dumps({"where": "row 3", "text": MISTAKE}) + "\n")
        recipe = load_recipe(write_recipe(tracking={"wandb": {"name": "a run", **section}}))
        with tracked(recipe, folder) as tracker:
            tracker.summarise(CARD)
        kept = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*") if path.is_file())
        return next(iter(read_runs(folder).values())), kept

    return run


def test_tables_without_text(track):
    run, kept = track()
    assert run.tables == {
        "confusion/test": [
            {"Actual": "ham", "Predicted": "ham", "nPredictions": 2},
            {"Actual": "ham", "Predicted": "spam", "nPredictions": 1},
            {"Actual": "spam", "Predicted": "spam", "nPredictions": 1},
        ],
        "freezing": [
            {"part": "head", "tensors": 1, "learning_rate": 0.1},
            {"part": "blocks 0–1", "tensors": 24, "learning_rate": None},
        ],
        "vocabulary": [
            {"token": "naïve", "id": 320, "method": "subword-mean", "in training": 7, "saved each": 2,
             "initial norm": 1.5, "moved": 0.5}
        ],
    }  # fmt: skip
    assert run.summary["scorecard/test/baselines/tfidf_logreg/accuracy"] == 0.5
    assert run.history == []  # a table is no step
    assert run.artifacts == {}
    for text in (PROMPT, CONTINUATION, MISTAKE):
        assert text.encode() not in kept


def test_text_where_the_recipe_lets_it_out(track):
    run, _ = track(log_text=True)
    assert run.tables["samples"] == FILES["samples.json"]
    assert run.tables["mistakes"] == [{"where": "row 3", "text": MISTAKE}]


def test_artifacts_show_what_the_model_was_made_of(track, tmp_path):
    run, kept = track(log_model=True, log_data=True)
    assert {name: (each.type, each.use_after_commit) for name, each in run.artifacts.items()} == {
        "a-run-data": ("dataset", True),
        "a-run-base": ("model", True),
        "a-run-model": ("model", False),
    }
    files = {name: [entry.path for entry in each.manifest.contents] for name, each in run.artifacts.items()}
    assert files == {"a-run-data": ["dataset.json"], "a-run-base": ["model.json"], "a-run-model": ["config.json"]}
    assert json.loads(run.artifacts["a-run-data"].metadata) == {"fingerprint": "hash-of-data"}
    assert json.loads(run.artifacts["a-run-model"].metadata)["figures"]["scorecard/test/after/accuracy"] == 0.75
    # What is to be uploaded later lies in the run directory, the model where it is already.
    places = {entry.path: entry.local_path for each in run.artifacts.values() for entry in each.manifest.contents}
    assert places["config.json"] == str(tmp_path / "run/model/config.json")
    assert all(place.startswith(str(tmp_path / "run/")) for place in places.values())
    assert b"hash-of-model" in kept
    assert MISTAKE.encode() not in kept

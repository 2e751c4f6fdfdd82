"""Runs that are hit in each part in turn end as if nothing had happened; the page's table is that of the results."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.faults import BEGIN, END, PAGE, PARTS, RESULT, Runs, differences, in_turn, run_case, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("processes", [1, 2])
def test_hit_in_each_part_in_turn(runs, processes):
    hits = in_turn(processes)
    assert [hit.part for hit in hits] == list(PARTS)
    result = run_case(runs, hits, f"hit-{processes}")
    assert result["wrong"] == []
    assert len(result["exit_codes"]) == len(PARTS) + 1


def _other_weights(folder):
    file = folder / "run/model/model.safetensors"
    weights = load_file(file)
    weights["transformer.ln_f.bias"][0] += 1e-7
    save_file(weights, file)


def _other_loss(folder):
    file = folder / "run/metrics.jsonl"
    file.write_text(file.read_text().replace('"loss": ', '"loss": 1', 1))


def _other_scorecard(folder):
    file = folder / "run/scorecard.json"
    file.write_text(file.read_text().replace("0", "1", 1))


def _a_row_twice(folder):
    file = folder / "notes/1/rows-0.jsonl"
    notes = [json.loads(line) for line in file.read_text().splitlines()]
    notes[3]["rows"] = notes[2]["rows"]
    file.write_text("\n".join(map(json.dumps, notes)))


def _nothing_tracked(folder):
    for file in folder.rglob("*.wandb"):
        file.unlink()


def _a_leftover(folder):
    (folder / "run/.model.0123abcd").mkdir()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_weights, ["other weights"]),
        (_other_loss, ["another metrics.jsonl"]),
        (_other_scorecard, ["another scorecard.json"]),
        (_a_row_twice, ["other rows"]),
        (_a_leftover, ["too many or too few files: ['run/.model.0123abcd']"]),
        (_nothing_tracked, ["W&B holds something else"]),
        (lambda folder: None, []),
    ],
)
def test_what_is_lost_is_seen(runs, tmp_path, change, told):
    undisturbed = runs.undisturbed(1)
    copy = shutil.copytree(undisturbed, tmp_path / "copy", symlinks=True)
    change(copy)
    assert list(differences(copy, undisturbed)) == told


def test_the_page_shows_the_results():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    cases = [case for case in result["cases"] if "skipped" not in case]
    assert len(cases) >= 30
    assert all(not case["wrong"] for case in cases)
    for part in PARTS:
        assert sum(case["part"] == part for case in cases) >= 3
        assert {case["processes"] for case in cases if case["part"] == part} == {1, 2}
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(result)

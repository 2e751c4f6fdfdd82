"""The real launcher with two gloo processes: what one process gives, each row once, each file by one of them."""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import classifiers
from tests.harness import run_kit
from tests.material import documents, save_tiny_model
from tests.watched_kit import read_notes, watch

ROOT = Path(__file__).parents[1]
CPU_2PROC = ROOT / "accelerate_configs/cpu_2proc.yaml"
# In float64: two processes add the same numbers as one in another order, and Adam divides by what may be next to zero,
# so that in float32 differences of the last bit grow to some 1e-4 of a step. A row too many or a wrong divisor is 1e-2.
CLOSE = {"rtol": 1e-7, "atol": 1e-10}
TRAINING = {"logging_steps": 1, "bf16": False, "learning_rate": 1e-3, "weight_decay": 0.1}
SPECIAL = ["<|user|>", "<|assistant|>"]


def launch(*arguments, **environment):
    """Run `accelerate launch` and return what became of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def read(path):
    return json.loads(path.read_text())


class Pair:
    """The same recipe by one process and by two, in folders with `run`, `store` and `notes`; the global batch is one.

    Attributes:
        one: the folder of the process that is alone.
        two: that of the two processes.
        output: what they printed.
    """

    def __init__(self, folder, write):
        """Train in both ways; `write` writes the recipe to a path, with values of its `training`."""
        self.one, self.two = folder / "one", folder / "two"
        for place, rows in ((self.one, 4), (self.two, 2)):
            place.mkdir()
            write(place / "run.yaml", {**TRAINING, "per_device_train_batch_size": rows})
        command = ("--config_file", CPU_2PROC, "-m", "tests.watched_kit", "train", self.two / "run.yaml")
        result = launch(*command, KIT_NOTES=str(self.two / "notes"))
        assert result.returncode == 0, f"{result.stderr[:6000]}\n…{result.stdout[-2000:]}"
        self.output = result.stdout
        assert run_kit(["train", self.one / "run.yaml"], change=functools.partial(watch, self.one / "notes")) == [0]

    def assert_same_weights(self, name="run/model", file="model.safetensors"):
        """Compare the tensors of a file of both runs; return those of the one that was alone."""
        alone, together = (load_file(place / name / file) for place in (self.one, self.two))
        assert alone.keys() == together.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
        return alone

    def assert_same_figures(self, steps):
        """Compare loss and gradient norm of each step, and what the scorecards say."""
        histories = [
            [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
            for place in (self.one, self.two)
        ]
        assert sum("grad_norm" in entry for entry in histories[0]) == steps
        for alone, together in zip(*histories, strict=True):
            for figure in ("loss", "grad_norm"):
                assert together.get(figure, 0) == pytest.approx(alone.get(figure, 0), rel=1e-7)
        one, two = (dict(_numbers(read(place / "run/scorecard.json"))) for place in (self.one, self.two))
        assert two == pytest.approx(one, rel=1e-6, abs=1e-9)
        assert one


def _numbers(value, path=""):
    """Yield every number in nested values, under the way to it."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(each, f"{path}/{key}")
    elif isinstance(value, int | float):
        yield path, value


def pair_of_language_models(folder, training=None, number=20, **sections):
    """Train a tiny GPT-2 by one process and by two."""
    base, corpus = save_tiny_model(folder / "base"), folder / "corpus.txt"
    texts = [f"{SPECIAL[0]}{text}{SPECIAL[1]}" for text in documents(number, seed=6)]
    corpus.write_text("\n\n\n".join(texts))

    def write(path, values):
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(base), "dtype": "float64"},
            "data": {
                "train": [{"path": str(corpus), "separator": "\n\n\n"}],
                "validation": {"fraction": 0.1},
                "block_size": 32,
                "store_dir": str(path.parent / "store"),
            },
            "training": {**values, **(training or {})},
            "run": {"output_dir": str(path.with_suffix(""))},
            **sections,
        }
        path.write_text(yaml.safe_dump(recipe))

    return Pair(folder, write)


# ---- a causal LM, all of it trained for an epoch


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    return pair_of_language_models(
        tmp_path_factory.mktemp("epoch"), {"max_steps": -1, "num_train_epochs": 1, "save_steps": 5}
    )


def steps_of(pair):
    return read(pair.one / "run/checkpoints" / newest(pair) / "trainer_state.json")["global_step"]


def newest(pair):
    return max(os.listdir(pair.one / "run/checkpoints"), key=lambda name: int(name.split("-")[1]))


def test_loss_gradient_norm_and_weights_are_those_of_one_process(epoch):
    assert read(epoch.two / "run/manifest.json")["topology"]["processes"] == 2
    assert epoch.output.count("Scorecard") == 1  # the first process alone prints
    epoch.assert_same_figures(steps_of(epoch))
    trained = epoch.assert_same_weights()
    before = load_file(epoch.one.parent / "base/model.safetensors")
    assert not any(torch.equal(trained[name].float(), tensor) for name, tensor in before.items())


def test_each_row_is_trained_on_once_by_one_of_them(epoch):
    first, second = read_notes(epoch.two / "notes", "rows")
    [alone] = read_notes(epoch.one / "notes", "rows")
    rows = [row for note in first + second for row in note["rows"] if row != -1]
    assert sorted(rows) == list(range(len(rows)))
    for of_first, of_second, of_one in zip(first, second, alone, strict=True):
        assert of_first["rows"] + [row for row in of_second["rows"] if row != -1] == of_one["rows"]
    # The epoch ends in the middle of a global batch: the second process repeats nothing, its row has no weight.
    assert second[-1]["rows"] == [-1]
    assert [-1] not in [note["rows"] for note in first + second[:-1]]


def test_one_process_builds_the_stores(epoch):
    first, second = read_notes(epoch.two / "notes", "files")
    built = [file for file in first if file.startswith("store/")]
    assert {Path(file).name for file in built} > {"tokens.bin", "offsets.npy", "complete.json", "before.json"}
    assert len(built) == len(set(built))
    assert not [file for file in second if file.startswith("store/")]
    there = {path.relative_to(epoch.two).as_posix() for path in (epoch.two / "store").rglob("*") if path.is_file()}
    assert there == set(built)


def test_each_file_of_the_run_is_written_once(epoch):
    written = [
        Counter(file for file in files if file.startswith("run/")) for files in read_notes(epoch.two / "notes", "files")
    ]
    there = {path.relative_to(epoch.two).as_posix() for path in (epoch.two / "run").rglob("*") if path.is_file()}
    assert there == written[0].keys() | written[1].keys()
    assert not written[0].keys() & written[1].keys()
    assert {Path(file).name for file in written[1]} == {"rng_state_1.pth", "loss_1.pt"}
    # A line more at each log entry, a fact more at each stage.
    again = {file for files in written for file, number in files.items() if number > 1}
    assert again == {"run/metrics.jsonl", "run/manifest.json"}


# ---- new tokens, in phases


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """New tokens alone, then the last block as well, then all blocks; a checkpoint after each step."""
    schedule = [
        {"trainable": {"new_tokens": True}},
        {"step": 2, "trainable": {"new_tokens": True, "last_blocks": 1}, "warmup_steps": 2},
        {"step": 4, "trainable": {"new_tokens": True, "last_blocks": 2, "final_norm": True}},
    ]
    return pair_of_language_models(
        tmp_path_factory.mktemp("phases"),
        {"max_steps": 6, "save_steps": 1},
        vocabulary={"special_tokens": SPECIAL, "tokens": ["embedding"]},
        freezing={"schedule": schedule},
    )


def test_vocabulary_and_each_phase_of_freezing_are_those_of_one_process(phases):
    phases.assert_same_figures(6)
    states = [phases.assert_same_weights(f"run/checkpoints/checkpoint-{step}") for step in range(1, 7)]
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in itertools.pairwise(states)]
    embeddings, block = {"transformer.wte.weight"}, {name for name in states[0] if ".h.1." in name}
    assert moved[0] == embeddings
    assert moved[1] == moved[2] == embeddings | block
    assert moved[3] == moved[4] == set(states[0]) - {"transformer.wpe.weight"}
    old = load_file(phases.one.parent / "base/model.safetensors")["transformer.wte.weight"].double()
    assert all(torch.equal(state["transformer.wte.weight"][: len(old)], old) for state in states)
    phases.assert_same_weights()


def test_vocabulary_is_the_same_on_disk(phases):
    for name in ("model/tokenizer.json", "freezing.json", "samples.json"):
        assert (phases.one / "run" / name).read_bytes() == (phases.two / "run" / name).read_bytes()
    one, two = (dict(_numbers(read(place / "run/vocabulary.json"))) for place in (phases.one, phases.two))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)


# ---- an adapter, a classifier


def test_adapter_is_that_of_one_process(tmp_path):
    pair = pair_of_language_models(tmp_path, {"max_steps": 3}, adapter={"type": "lora", "r": 4})
    pair.assert_same_figures(3)
    trained = pair.assert_same_weights(file="adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)  # which begin at zero


def test_classifier_is_that_of_one_process(tmp_path):
    base = classifiers.save_base(tmp_path / "base", "bert", classifier_dropout=0.0)
    rows = classifiers.write_rows(tmp_path / "rows.csv", classifiers.labeled_rows(60))
    pair = Pair(
        tmp_path,
        lambda path, training: classifiers.write_recipe(
            path, base, rows, model={"dtype": "float64"}, training={**training, "max_steps": 4}
        ),
    )
    pair.assert_same_figures(4)
    pair.assert_same_weights()


# ---- what goes wrong


def test_user_error_of_the_main_process_ends_every_process_without_a_traceback(write_recipe, tmp_path):
    recipe = write_recipe(data={"train": [{"path": str(tmp_path / "missing.txt")}]})
    assert run_kit(["train", recipe], processes=2, output=tmp_path / "out.txt") == [2, 2]
    text = (tmp_path / "out.txt").read_text()
    assert text.count("error:") == 1
    assert "Traceback" not in text


def test_mistake_found_before_the_processes_are_connected_is_told_by_each(write_recipe, tmp_path):
    """By the others later: a launcher ends all once one has ended, and process 0 may be the slowest."""
    output = tmp_path / "out.txt"
    assert run_kit(["train", write_recipe(), "data.blocksize=1"], 2, output=output) == [2, 2]
    told, again = sorted(output.read_text().splitlines())
    assert told.startswith("error: ")
    assert again == f"process 1: {told}"


def test_announced_processes_that_do_not_exist_are_refused(write_recipe, tmp_path):
    """With `--cpu --num_processes 2` accelerate starts one process, which would train alone on half the batch."""
    result = launch("--cpu", "--num_processes", 2, "-m", "kit", "train", write_recipe())
    assert result.returncode != 0
    assert "announces 2 processes, accelerate has 1" in result.stderr
    assert read(tmp_path / "run/manifest.json")["status"] == "user-error"

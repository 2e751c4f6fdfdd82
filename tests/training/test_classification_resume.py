"""A classifier's run that was killed and resumed ends bit-identical to one that was not."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from tests.classifiers import labeled_rows, multi_rows, read, save_base, write_recipe, write_rows
from tests.harness import Fault, run_kit
from tests.history import computed, read_history
from tests.training.test_resume import assert_equal_nested

TRAINING = {
    "max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 3e-2, "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "logging_steps": 3, "label_smoothing_factor": 0.1,
}  # fmt: skip
# Noise is drawn in every step: its state has to be resumed too.
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
SCHEDULE = [
    {"trainable": {"head": True}},
    {"step": 2, "trainable": {"last_blocks": 1, "head": True}, "warmup_steps": 1},
    {"step": 4, "trainable": "all"},
]
VARIANTS = {
    "weighted": (1, {"data": {"balance": "class-weights"}, "evaluation": {"temperature_scaling": True}}),
    "by-length": (1, {"data": {"group_by_length": True, "max_tokens_per_batch": 48}}),
    "augmented": (1, {"data": {"balance": "oversample", "augment": {"copies": 2, "characters": 0.3, "words": 0.3}}}),
    "gradual": (1, {"freezing": {"schedule": SCHEDULE, "layer_decay": 0.5}}),
    "lora": (1, {"adapter": {"type": "lora", "r": 4, "lora_dropout": 0.1}}),
    "several-labels": (1, {"evaluation": {"temperature_scaling": True}}),
    "in-two-by-length": (2, {"data": {"group_by_length": True, "max_tokens_per_batch": 48}}),
}

STEP = "kit.training.trainer:KitTrainer.training_step"
EVALUATION = "kit.training.trainer:KitTrainer._poll"
SAVE = "transformers:Trainer._save_optimizer_and_scheduler"
CASES = [
    ("weighted", Fault("kit.evaluation.baselines:TfidfVectorizer.fit_transform", 1, signal.SIGTERM)),
    ("weighted", Fault(STEP, 7, signal.SIGKILL)),
    ("weighted", Fault(EVALUATION, 10, signal.SIGKILL)),
    ("weighted", Fault(SAVE, 2, signal.SIGKILL)),
    ("weighted", Fault("kit.tasks.sequence_classification:settle", 1, signal.SIGKILL)),
    ("by-length", Fault(EVALUATION, 10, signal.SIGTERM)),
    ("augmented", Fault(STEP, 7, signal.SIGTERM)),
    ("gradual", Fault(STEP, 11, signal.SIGKILL)),
    ("lora", Fault(STEP, 7, signal.SIGKILL)),
    ("several-labels", Fault("kit.stages:save_model", 1, signal.SIGKILL)),
    ("in-two-by-length", Fault(STEP, 7, signal.SIGTERM, rank=1)),
    ("in-two-by-length", Fault(EVALUATION, 6, signal.SIGKILL, rank=1)),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that runs a variant in a folder, and one that gives the folder of its uninterrupted run."""
    shared = tmp_path_factory.mktemp("shared")
    base = save_base(shared / "base", "gpt2", **DROPOUT)
    rows = write_rows(shared / "rows.csv", labeled_rows(60))
    several = write_rows(shared / "several.csv", multi_rows(60))
    finished = {}

    def start(variant, folder, fault=None):
        processes, sections = VARIANTS[variant]
        is_multi = variant == "several-labels"
        source = {"path": str(several), "label_separator": "|"} if is_multi else {"path": str(rows)}
        data = {"train": [source], "split": {"validation": 0.3, "test": 0.1}, **sections.get("data", {})}
        evaluation = {
            # The baselines of two processes are tried in `tests/test_classification_run.py`.
            "baselines": ["majority", "tfidf_logreg"], "examples": ["tensor kit"], "bootstrap_resamples": 100,
            "train_sample": 10, **sections.get("evaluation", {}),
        }  # fmt: skip
        training = {**TRAINING, "per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4}
        path = write_recipe(
            folder / "run.yaml", base, rows, **{**sections, "data": data, "evaluation": evaluation},
            training=training, run={"early_stopping": {"patience": 50}},
        )  # fmt: skip
        return run_kit(["train", path], processes, fault)

    def reference(variant):
        if variant not in finished:
            folder = tmp_path_factory.mktemp("reference")
            assert start(variant, folder) == [0] * VARIANTS[variant][0]
            finished[variant] = folder / "run"
        return finished[variant]

    return start, reference


@pytest.mark.parametrize(("variant", "fault"), CASES, ids=lambda value: getattr(value, "target", value))
def test_resumed_run_equals_uninterrupted_one(launch, tmp_path, variant, fault):
    start, reference = launch
    expected, found = reference(variant), tmp_path / "run"
    codes = start(variant, tmp_path, fault)
    assert (143 if fault.signal == signal.SIGTERM else -signal.SIGKILL) in codes
    assert not (found / "scorecard.json").exists()
    if fault.signal == signal.SIGTERM:
        assert read(found / "manifest.json")["status"] == "preempted"
    assert start(variant, tmp_path) == [0] * len(codes)
    assert_equal_runs(found, expected)


def assert_equal_runs(found, expected):
    assert read_history(found) == read_history(expected)
    for name in ("scorecard.json", "samples.json", "mistakes.jsonl", "ledger.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    last = max((expected / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("-")[1])).name
    for folder in ("model", f"checkpoints/{last}"):
        files = [path.name for path in (expected / folder).glob("*.safetensors")]
        assert files
        for name in [*files, "config.json"]:
            assert (found / folder / name).read_bytes() == (expected / folder / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt"):
        each = (torch.load(run / "checkpoints" / last / name, weights_only=True) for run in (found, expected))
        assert_equal_nested(*each)
    states = [read(run / "checkpoints" / last / "trainer_state.json") for run in (found, expected)]
    for key in ("best_metric", "best_global_step", "epoch", "global_step"):
        assert states[0][key] == states[1][key], key
    histories = [[computed(entry) for entry in state["log_history"]] for state in states]
    assert histories[0] == histories[1]


def test_the_variants_do_what_they_say(launch):
    """Else the comparisons above would be of plain runs."""
    _, reference = launch
    logs = {}
    for variant in VARIANTS:
        run = reference(variant)
        logs[variant] = json.dumps(read_history(run))
        state = read(run / "checkpoints/checkpoint-6/trainer_state.json")
        assert state["best_global_step"] in (2, 4, 6)
        assert len({json.dumps(entry) for entry in state["log_history"] if "eval_validation_nll" in entry}) == 3
    assert len(set(logs.values())) == len(VARIANTS)


def test_a_merged_adapter_is_a_plain_classifier(launch, tmp_path):
    _, reference = launch
    run = reference("lora")
    assert {path.suffix for path in (run / "model").iterdir()} >= {".safetensors", ".json"}
    assert run_kit(["merge", run, "--output", tmp_path / "merged"]) == [0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "ham", 1: "spam"}
    [sample] = read(run / "samples.json")
    [answer] = pipeline("text-classification", str(tmp_path / "merged"))(sample["prompt"])
    assert sample["after"] == [f"{answer['label']} ({answer['score']:.3f})"] != sample["before"]

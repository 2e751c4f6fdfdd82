"""Runs with an adapter, through the commands: it alone trains, is saved, resumed, measured; the base keeps each bit."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.check import check
from kit.errors import UserError
from kit.files import hash_file
from kit.model.adapter_files import base_facts
from kit.model.loading import load_causal_lm
from kit.recipe.models import ModelSection
from kit.run import evaluate, train
from tests.harness import Fault, run_kit
from tests.history import read_history
from tests.material import documents, save_tiny_model

LORA = {"type": "lora", "r": 4}
KINDS = {
    "lora": ("gpt2", {}, LORA),
    "lora-untied": ("llama", {}, LORA),
    "dora": ("llama", {"tie_word_embeddings": True}, {**LORA, "use_dora": True}),
    "rslora": ("gpt2", {"tie_word_embeddings": False}, {**LORA, "use_rslora": True, "lora_dropout": 0.1}),
    "ia3": ("llama", {}, {"type": "ia3"}),
}
TRAINING = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "weight_decay": 0.1}
MEASURED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
TOKENS = {"special_tokens": ["<|x|>", "<|y|>"], "tokens": ["embedding", "Größe"]}
ROWS = {"trainable": {"new_tokens": True}}


@pytest.fixture
def recipe(write_recipe, tiny_models, tmp_path):
    """A function that writes the recipe of a run with an adapter into a folder of its own name."""

    def write(name="run", adapter=LORA, base=None, training=None, **sections):
        return write_recipe(
            name,
            model={"name_or_path": str(base or tiny_models())},
            adapter=adapter,
            training=TRAINING | (training or {}),
            run={"output_dir": str(tmp_path / name), **sections.pop("run", {})},
            **sections,
        )

    return write


def read(path):
    return json.loads(Path(path).read_text())


def after(run):
    """The figures of the trained model in a run's scorecard."""
    return {name: figures["after"] for name, figures in read(run / "scorecard.json")["sets"].items()}


def measured(target, folder, model=None):
    """The figures that `kit evaluate` finds."""
    evaluate(str(target), [], model and str(model), str(folder / "figures.json"))
    return read(folder / "figures.json")["sets"]


def adapter_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def printable(text):
    """What a terminal shows; tiny models also say control characters."""
    return "".join(filter(str.isprintable, text))


def hashes(folder):
    return {path.name: hash_file(path) for path in Path(folder).iterdir()}


def refusal(tmp_path, *arguments):
    """What a command that ends with exit code 2 says, as one line."""
    output = tmp_path / "refusal.txt"
    output.unlink(missing_ok=True)
    assert run_kit(arguments, output=output) == [2], output.read_text()
    text = output.read_text()
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    return " ".join(text[text.index("error: ") :].split())


# ---- what a run leaves


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_an_adapter_and_nothing_of_the_base(recipe, tiny_models, tmp_path, capsys, kind):
    """Measured, continued and loaded by peft alone, what was saved is the model that training ended with."""
    architecture, config, adapter = KINDS[kind]
    base = tiny_models(architecture, **config)
    before = hashes(base)
    greedy = {"prompts": ["the kit"], "generation": {"max_new_tokens": 8, "do_sample": False}}
    # One at which six steps change what the most probable token is.
    rate = 1.0 if kind == "ia3" else 0.1
    train(str(recipe(adapter=adapter, base=base, evaluation=greedy, training={"learning_rate": rate})), [])
    run = tmp_path / "run"
    assert hashes(base) == before

    saved = {path.name for path in (run / "model").iterdir()}
    assert {name for name in saved if name.endswith((".safetensors", ".bin"))} == {"adapter_model.safetensors"}
    assert {"adapter_config.json", "base.json", "config.json", "tokenizer.json"} <= saved
    plain = AutoModelForCausalLM.from_pretrained(base)
    record = read(run / "model/base.json")
    assert (record["name"], record["revision"]) == (str(base), None)
    assert record["fingerprint"] == base_facts(plain).fingerprint
    assert read(run / "manifest.json")["reloaded_logits_differ_by"] == 0.0

    parts = {row["part"]: row for row in read(run / "freezing.json")}
    assert parts.keys() >= {"adapter", "embeddings", "blocks 0–1", "final norm"}
    assert {name for name, row in parts.items() if row["learning_rate"] is not None} == {"adapter"}
    tensors = adapter_weights(run / "model")
    row = {"part": "adapter", "tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values())}
    assert parts.pop("adapter").items() >= {**row, "learning_rate": rate, "from_step": 0}.items()
    assert sum(row["parameters"] for row in parts.values()) == plain.num_parameters()
    assert_equal(adapter_weights(run / "checkpoints/checkpoint-6"), tensors)

    scorecard = read(run / "scorecard.json")["sets"]["domain"]
    assert measured(run, tmp_path) == {"domain": scorecard["after"]} != {"domain": scorecard["before"]}
    # Loaded without the kit.
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer("the kit")["input_ids"]])
    greedy = PeftModel.from_pretrained(plain, run / "model").generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    continued = tokenizer.decode(greedy[0])
    [sample] = read(run / "samples.json")
    assert sample["before"] != sample["after"] == [continued]
    generate = ["generate", run, "--prompt", "the kit", "--max-new-tokens", 8, "--greedy"]
    assert run_kit(generate, output=tmp_path / "said.txt") == [0]
    assert printable(continued) in printable((tmp_path / "said.txt").read_text())


def test_finished_is_finished(recipe, tmp_path, capsys):
    for _ in range(2):
        train(str(recipe()), [])
    assert "is finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"adapter\.r: 4 -> 8"):
        train(str(recipe(adapter={**LORA, "r": 8})), [])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_old_rows_keep_every_bit_beside_new_ones(recipe, tiny_models, tmp_path, name):
    base = tiny_models(name)
    train(str(recipe(base=base, vocabulary=TOKENS, freezing=ROWS)), [])
    run = tmp_path / "run"
    parts = {row["part"] for row in read(run / "freezing.json") if row["learning_rate"] is not None}
    assert parts == {"adapter", "new tokens"}
    model = load_causal_lm(ModelSection(name_or_path=str(run / "model")), None, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (name == "gpt2")
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(each, part)().weight for each in (plain, model))
        assert len(new) == 384 > len(old)
        assert torch.equal(new[: len(old)], old)
    rows = load_file(run / "model/new_rows.safetensors")
    added = sorted(r["id"] for token in read(run / "vocabulary.json")["tokens"] for r in token["rows"])
    assert {"ids", "input"} <= rows.keys()
    assert read(run / "model/base.json")["trained_ids"] == added
    assert set(added) <= set(rows["ids"].tolist()) <= set(range(320, 384))
    moved = [load_file(run / f"checkpoints/checkpoint-{step}/new_rows.safetensors") for step in (2, 6)]
    assert not torch.equal(moved[0]["input"], moved[1]["input"])
    assert measured(run, tmp_path) == after(run)


# ---- killed and resumed

STEP = "kit.training.trainer:KitTrainer.training_step"
SAVE = "transformers:Trainer._save_optimizer_and_scheduler"
VARIANTS = {
    "lora": (1, "gpt2", {"adapter": {**LORA, "lora_dropout": 0.1}}),
    "dora": (1, "llama", {"adapter": {**LORA, "use_dora": True}}),
    "new-tokens": (1, "llama", {"adapter": LORA, "vocabulary": TOKENS, "freezing": ROWS}),
    "tied-new-tokens-in-two": (2, "gpt2", {"adapter": LORA, "vocabulary": TOKENS, "freezing": ROWS}),
}
CASES = [
    ("lora", Fault(STEP, 9, signal.SIGKILL)),
    ("lora", Fault(STEP, 9, signal.SIGTERM)),
    ("lora", Fault(SAVE, 2, signal.SIGKILL)),
    ("lora", Fault("kit.stages:save_model", 1, signal.SIGKILL)),
    ("dora", Fault(STEP, 7, signal.SIGTERM)),
    ("new-tokens", Fault(STEP, 9, signal.SIGKILL)),
    ("new-tokens", Fault("kit.training.trainer:KitTrainer._poll", 2, signal.SIGTERM)),
    ("tied-new-tokens-in-two", Fault(STEP, 9, signal.SIGKILL, rank=1)),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that runs a variant in a folder, and one that gives the folder of its uninterrupted run."""
    shared = tmp_path_factory.mktemp("shared")
    (shared / "corpus.txt").write_text("\n\n\n".join(documents(60, seed=3)))
    finished = {}

    def start(variant, folder, fault=None):
        processes, architecture, sections = VARIANTS[variant]
        if not (shared / architecture).exists():
            save_tiny_model(shared / architecture, architecture)
        training = {
            "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 3,
            "per_device_train_batch_size": 4 // processes, "bf16": False,
        }  # fmt: skip
        data = {
            "train": [{"path": str(shared / "corpus.txt"), "separator": "\n\n\n"}], "block_size": 32,
            "validation": {"fraction": 0.2}, "store_dir": str(shared / "store"),
        }  # fmt: skip
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(shared / architecture)},
            "data": data,
            "training": {**TRAINING, **MEASURED, **training},
            "run": {"output_dir": str(folder / "run")},
            **sections,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return run_kit(["train", folder / "recipe.yaml"], processes, fault)

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
    assert start(variant, tmp_path) == [0] * len(codes)
    assert read_history(found) == read_history(expected)
    assert (found / "scorecard.json").read_bytes() == (expected / "scorecard.json").read_bytes()
    files = [path.name for path in (expected / "model").glob("*.safetensors")]
    assert ("new_rows.safetensors" in files) == ("new-tokens" in variant)
    for name in files:
        assert (found / "model" / name).read_bytes() == (expected / "model" / name).read_bytes(), name


def test_two_processes_equal_one(recipe, tmp_path):
    sections = {"vocabulary": TOKENS, "freezing": ROWS}
    one = recipe("one", **sections)
    two = recipe("two", training={"per_device_train_batch_size": 2}, **sections)
    assert run_kit(["train", one, "model.dtype=float64"]) == [0]
    assert run_kit(["train", two, "model.dtype=float64"], processes=2) == [0, 0]
    for name in ("adapter_model.safetensors", "new_rows.safetensors"):
        a, b = (load_file(tmp_path / folder / "model" / name) for folder in ("one", "two"))
        assert any(tensor.dtype == torch.float64 for tensor in a.values())
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_activation_checkpointing_changes_no_weight(recipe, tiny_models, tmp_path, architecture):
    for name, on in (("without", False), ("with", True)):
        train(str(recipe(name, base=tiny_models(architecture), training={"gradient_checkpointing": on})), [])
    assert_equal(*(adapter_weights(tmp_path / name / "model") for name in ("with", "without")))


@pytest.mark.parametrize("stops", [False, True])
def test_the_best_adapter_is_restored(recipe, tmp_path, stops):
    """The rate is one at which later steps make it worse: the last adapter is not the best."""
    diverges = {**MEASURED, "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 12}
    early = {"early_stopping": {"patience": 2}} if stops else {}
    train(str(recipe(training=diverges, run=early, vocabulary=TOKENS, freezing=ROWS)), [])
    run = tmp_path / "run"
    last = max(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").iterdir())
    state = read(run / f"checkpoints/checkpoint-{last}/trainer_state.json")
    best = state["best_global_step"]
    assert best < last <= (11 if stops else 12)
    for name in ("adapter_model.safetensors", "new_rows.safetensors"):
        final = load_file(run / "model" / name)
        assert_equal(final, load_file(run / f"checkpoints/checkpoint-{best}" / name))
        at_end = load_file(run / f"checkpoints/checkpoint-{last}" / name)
        assert any(not torch.equal(final[key], at_end[key]) for key in final)
    assert after(run)["domain"]["bits_per_byte"] == state["best_metric"]
    assert measured(run, tmp_path) == after(run)


# ---- checked before it trains


@pytest.mark.parametrize("kind", KINDS)
def test_check_knows_the_memory(recipe, tiny_models, tmp_path, capsys, kind):
    architecture, config, adapter = KINDS[kind]
    base = tiny_models(architecture, **config)
    check(str(recipe(adapter=adapter, base=base, vocabulary=TOKENS, freezing=ROWS)), [])
    out = capsys.readouterr().out
    assert re.search(r"activations +│ +[\d.]+ [KMG]iB", out)
    assert "unknown" not in out
    assert f"adapter: {adapter['type']}" in out
    assert not (tmp_path / "run").exists()


def test_probe_trains_what_the_run_will(recipe, tiny_models, tmp_path, capsys):
    path = recipe(base=tiny_models("llama"), vocabulary=TOKENS, freezing=ROWS)
    check(str(path), [], probe=True)
    out = capsys.readouterr().out
    assert "probe: 2 steps" in out
    assert "the model gives the same logits" in out
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "store").glob(".probe-*"))


# ---- the base that it belongs to


def test_the_base_is_found_and_loaded_as_it_was_trained(recipe, tmp_path, monkeypatch):
    """From another working directory, with the attributes that the recipe overrode: they make another function."""
    save_tiny_model(tmp_path / "bases/gpt2", "gpt2")
    monkeypatch.chdir(tmp_path)
    path = recipe(base="bases/gpt2")
    train(str(path), ["model.config={layer_norm_epsilon: 1.0}"])
    assert read("run/model/base.json")["name"] == "bases/gpt2"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert measured(tmp_path / "run", tmp_path) == after(tmp_path / "run")
    assert run_kit(["merge", tmp_path / "run/checkpoints/checkpoint-6", "-o", "merged"]) == [0]
    figures = measured(tmp_path / "run", tmp_path, model="merged")["domain"]["bits_per_byte"]
    assert figures == pytest.approx(after(tmp_path / "run")["domain"]["bits_per_byte"], abs=1e-4)


def change_a_weight(folder):
    """Another value in one matrix: no shape, name or configuration tells."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "change"), [("gpt2", "changed"), ("llama", "changed"), ("gpt2", "gone"), ("llama", "emptied")]
)
def test_another_base_or_none(recipe, tiny_models, tmp_path, architecture, change):
    """An adapter on weights that it was not trained on would give plausible nonsense."""
    base = shutil.copytree(tiny_models(architecture), tmp_path / "base")
    train(str(recipe(base=base, training={"max_steps": 2})), [])
    run = tmp_path / "run"
    fingerprint = read(run / "model/base.json")["fingerprint"]
    if change == "changed":
        change_a_weight(base)
        found = base_facts(AutoModelForCausalLM.from_pretrained(base)).fingerprint
        wanted = [f"another base model, {base}: expected weights with the fingerprint {fingerprint}, found {found}"]
    else:
        shutil.rmtree(base)
        if change == "emptied":
            base.mkdir()
        wanted = ["the base model that this adapter belongs to cannot be used", str(base)]
    for command in (["evaluate", run], ["merge", run], ["generate", run, "--prompt", "the"]):
        said = refusal(tmp_path, *command)
        assert f"{run / 'model'}:" in said, said
        assert all(text in said for text in wanted), said
    assert not (run / "merged").exists()


def test_starting_from_an_adapter_is_refused(recipe, tmp_path):
    train(str(recipe(training={"max_steps": 2})), [])
    adapter = tmp_path / "run/model"
    for command in ("train", "check", "prepare"):
        for section in (LORA, None):
            said = refusal(tmp_path, command, recipe("second", base=adapter, adapter=section))
            assert f"`{adapter}` holds an adapter" in said
            assert "`kit merge`" in said
    assert not (tmp_path / "second/model").exists()


# ---- whole modules beside the adapter


@pytest.mark.parametrize(
    ("architecture", "modules"), [("gpt2", ["wte", "lm_head"]), ("llama", ["embed_tokens", "lm_head"])]
)
def test_whole_embeddings_train_with_new_tokens(recipe, tiny_models, tmp_path, architecture, modules):
    base = tiny_models(architecture, tie_word_embeddings=False)
    adapter = {**LORA, "modules_to_save": modules}
    path = recipe(base=base, adapter=adapter, vocabulary=TOKENS, training=MEASURED)
    assert run_kit(["train", path], fault=Fault(STEP, 4, signal.SIGKILL)) == [-signal.SIGKILL]
    assert run_kit(["train", path]) == [0]
    run = tmp_path / "run"
    assert read(run / "manifest.json")["reloaded_logits_differ_by"] == 0.0
    whole = {name: t for name, t in adapter_weights(run / "model").items() if "lora" not in name}
    assert [len(tensor) for tensor in whole.values()] == [384, 384]
    head = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight
    assert all((t[:320] != head).any() for name, t in whole.items() if "lm_head" in name)
    assert measured(run, tmp_path) == after(run)


def test_embeddings_that_learn_by_half_are_refused(recipe, tiny_models, tmp_path):
    for modules in (["embed_tokens"], ["lm_head"]):
        adapter = {**LORA, "modules_to_save": modules}
        path = recipe(base=tiny_models("llama"), adapter=adapter, vocabulary=TOKENS)
        assert "would never learn" in refusal(tmp_path, "train", path)
    path = recipe(adapter={**LORA, "modules_to_save": ["wte"]}, vocabulary=TOKENS)
    assert "the matrix that embeddings and head share" in refusal(tmp_path, "train", path)

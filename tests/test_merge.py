"""`kit merge`: a plain model that needs neither peft nor the base, and gives the logits of the adapted one."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kit.errors import UserError
from kit.files import hash_file
from kit.merge import merge
from kit.model.adapter import add_adapter
from kit.model.adapter_files import Adapter, base_facts
from kit.model.classifier import load_classifier
from kit.model.loading import load_adapted
from kit.model.saving import save_model
from kit.recipe.adapter import AdapterSection
from kit.recipe.models import ModelSection
from kit.run import evaluate, train
from tests.harness import Fault, run_kit

LORA = {"type": "lora", "r": 4}
TOKENS = {
    "vocabulary": {"special_tokens": ["<|x|>", "<|y|>"], "tokens": ["embedding", "Größe"]},
    "freezing": {"trainable": {"new_tokens": True}},
}
ROLES = {"special_tokens": ["<|x|>", "<|end|>"], "roles": {"eos_token": "<|end|>"}}
WHOLE = {"vocabulary": TOKENS["vocabulary"], "adapter": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}}
# Architecture, its changed configuration, what the recipe says beside.
CASES = {
    "gpt2": ("gpt2", {}, {}),
    "llama": ("llama", {}, {}),
    "dora-tied": ("llama", {"tie_word_embeddings": True}, {"adapter": {**LORA, "use_dora": True}}),
    "rslora-untied": ("gpt2", {"tie_word_embeddings": False}, {"adapter": {**LORA, "use_rslora": True}}),
    "ia3": ("llama", {}, {"adapter": {"type": "ia3"}}),
    "new-tokens-tied": ("gpt2", {}, TOKENS),
    "new-tokens": ("llama", {}, TOKENS),
    "new-tokens-with-a-bias": ("gpt_neox", {}, TOKENS),
    "roles": ("gpt2", {}, {**TOKENS, "vocabulary": ROLES}),
    "whole-embeddings": ("llama", {}, WHOLE),
}


@pytest.fixture
def recipe(write_recipe, tiny_models, tmp_path):
    """A function that writes the recipe of a run with an adapter that changes the model well beyond rounding."""

    def write(architecture="gpt2", config=None, **sections):
        model = {"name_or_path": str(tiny_models(architecture, **(config or {}))), **sections.pop("model", {})}
        training = {"max_steps": 6, "save_steps": 3, "learning_rate": 3e-2}
        return write_recipe(**{"adapter": LORA, "training": training, **sections, "model": model})

    return write


def read(path):
    return json.loads(Path(path).read_text())


def hashes(folder):
    """Of every file and folder below, whatever it is called."""
    return {path: hash_file(path) if path.is_file() else None for path in Path(folder).rglob("*")}


@torch.no_grad()
def logits(model, rows):
    ids = torch.randint(rows, (3, 24), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids, use_cache=False).logits.double()


def refusal(tmp_path, *arguments):
    """What a command that ends with exit code 2 says, as one line."""
    output = tmp_path.parent / f"{tmp_path.name}.refusal.txt"
    output.unlink(missing_ok=True)
    assert run_kit(arguments, output=output) == [2], output.read_text()
    text = output.read_text()
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    return " ".join(text[text.index("error: ") :].split())


def assert_refused(tmp_path, *arguments, expected):
    """Exit code 2 with this message, and not a file more or less than before."""
    before = hashes(tmp_path)
    assert expected in refusal(tmp_path, "merge", *arguments)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_the_adapted_one(recipe, tiny_models, tmp_path, case):
    """A matrix that is merged twice, not at all, or tied where it was not, gives other logits."""
    architecture, config, sections = CASES[case]
    base = tiny_models(architecture, **config)
    train(str(recipe(architecture, config, **sections)), [])
    run, merged = tmp_path / "run", tmp_path / "run/merged"
    kept, of_base = hashes(run / "model"), hashes(base)
    merge(str(run), None)
    assert hashes(run / "model") == kept
    assert hashes(base) == of_base
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in merged.iterdir()}
    assert not [path for path in merged.iterdir() if "adapter" in path.name or path.name == "base.json"]

    adapted = load_adapted(run / "model", ModelSection(name_or_path=str(base))).get_base_model()
    # Elsewhere, and without the base: nothing of what was there before is needed.
    alone = shutil.move(merged, tmp_path / "elsewhere")
    plain, info = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name or "base_layer" in name for name, _ in plain.named_parameters())
    start = AutoModelForCausalLM.from_pretrained(base)
    tied = start.config.tie_word_embeddings
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    assert plain.config.tie_word_embeddings == tied
    has_new = "vocabulary" in sections
    rows = plain.get_input_embeddings().weight.shape[0]
    assert rows == plain.get_output_embeddings().weight.shape[0] == plain.config.vocab_size == (384 if has_new else 320)
    want = logits(adapted, rows)
    limit = 1e-5 * want.abs().max()
    assert (logits(plain, rows) - want).abs().max() < limit
    without = (logits(start, 320) - logits(adapted, 320)[..., :320]).abs().max()
    assert without > 100 * limit
    if not has_new:  # what peft alone makes of the folder
        assert torch.equal(logits(PeftModel.from_pretrained(start, run / "model"), rows), want)
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (alone, run / "model", base)]
    assert vocabularies[0] == vocabularies[1]
    assert (vocabularies[0] == vocabularies[2]) != has_new


def test_the_manifest_tells_of_the_merge(recipe, tmp_path):
    train(str(recipe()), [])
    before = read(tmp_path / "run/manifest.json")
    merge(str(tmp_path / "run"), None)
    facts = read(tmp_path / "run/manifest.json")
    assert 0 <= facts.pop("merged_logits_differ_by") < 1e-5
    assert facts | {"updated": ""} == before | {"updated": ""}


def test_measured_and_trained_on(recipe, tmp_path, capsys):
    train(str(recipe("llama", **TOKENS)), [])
    run = tmp_path / "run"
    merge(str(run), None)
    assert f"{run / 'merged'}" in capsys.readouterr().out
    evaluate(str(run), [], str(run / "merged"), str(tmp_path / "figures.json"))
    after = read(run / "scorecard.json")["sets"]["domain"]["after"]
    found = read(tmp_path / "figures.json")["sets"]["domain"]
    assert found.keys() == after.keys()
    for name, value in after.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    again = {"model": {"name_or_path": str(run / "merged")}, "run": {"output_dir": str(tmp_path / "second")}}
    train(str(recipe("llama", name="second", **again)), [])
    before = read(tmp_path / "second/scorecard.json")["sets"]["domain"]["before"]
    assert before["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-4)


def test_special_ids_and_generation_settings(recipe, tmp_path):
    train(str(recipe(**{**TOKENS, "vocabulary": ROLES})), [])
    merge(str(tmp_path / "run"), None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/merged")
    assert tokenizer.eos_token == "<|end|>"
    ends = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in ends


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types_of_numbers(recipe, tmp_path, dtype):
    path = recipe("llama", model={"dtype": dtype})
    train(str(path), [])
    run = tmp_path / "run"
    merge(str(run), None)
    plain = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert str(plain.dtype) == f"torch.{dtype}"
    section = ModelSection(name_or_path=str(run / "model"))
    want = logits(load_adapted(run / "model", section).get_base_model(), 320)
    limit = {"bfloat16": 3e-2, "float64": 1e-12}[dtype]
    assert (logits(plain, 320) - want).abs().max() < limit * want.abs().max()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_adapted_classifier(tiny_models, tmp_path, architecture):
    """With its head, its labels and nothing of an adapter; `kit merge` is told nothing of the task."""
    section = ModelSection(name_or_path=str(tiny_models(architecture)))
    tokenizer = AutoTokenizer.from_pretrained(section.name_or_path)
    model, _ = load_classifier(section, tokenizer, ("no", "yes"), False, seed=0)
    facts = base_facts(model, section)
    adapter = Adapter(add_adapter(model, AdapterSection(**LORA)), facts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_model(model, tokenizer, tmp_path / "adapter", adapter)
    assert run_kit(["merge", tmp_path / "adapter", "--output", tmp_path / "merged"]) == [0]
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.id2label == {0: "no", 1: "yes"}
    assert (plain.config.problem_type, plain.config.pad_token_id) == ("single_label_classification", 0)
    want = logits(model, 320)
    assert want.shape == (3, 2)
    assert (logits(plain, 320) - want).abs().max() < 1e-5 * want.abs().max()


def test_checkpoint_into_another_folder(recipe, tmp_path):
    train(str(recipe("gpt2", **TOKENS)), [])
    checkpoints = [tmp_path / f"run/checkpoints/checkpoint-{step}" for step in (3, 6)]
    assert_refused(tmp_path, checkpoints[0], expected="--output: the folder to write the plain model to")
    merged = []
    for folder in checkpoints:
        output = tmp_path / f"of-{folder.name}"
        assert run_kit(["merge", folder, "--output", output]) == [0]
        adapted = load_adapted(folder, ModelSection(name_or_path=str(folder))).get_base_model()
        plain = AutoModelForCausalLM.from_pretrained(output)
        want = logits(adapted, 384)
        assert (logits(plain, 384) - want).abs().max() < 1e-5 * want.abs().max()
        assert len(AutoTokenizer.from_pretrained(output)("<|x|>")["input_ids"]) == 1
        merged.append(want)
    assert (merged[0] - merged[1]).abs().max() > 1e-3
    assert not (tmp_path / "run/merged").exists()


def test_what_is_there_is_not_overwritten(recipe, tmp_path):
    train(str(recipe()), [])
    run = tmp_path / "run"
    assert run_kit(["merge", run]) == [0]
    assert_refused(tmp_path, run, expected=f"{run / 'merged'} is there already: {run} has been merged")
    assert_refused(tmp_path, run, "-o", run / "model", expected=f"{run / 'model'} is there already")
    assert_refused(tmp_path, run, "-o", tmp_path / "no/such", expected="--output: the folder that")
    assert run_kit(["merge", run, "-o", tmp_path / "other"]) == [0]
    files = [
        sorted((hash_file(p), p.name) for p in folder.iterdir()) for folder in (run / "merged", tmp_path / "other")
    ]
    assert files[0] == files[1]
    # Nor is a merged model one with an adapter.
    assert_refused(tmp_path, run / "merged", "-o", tmp_path / "third", expected="nothing to merge: no adapter")


def test_nothing_to_merge(recipe, tiny_models, tmp_path):
    train(str(recipe(adapter=None)), [])
    run = tmp_path / "run"
    assert_refused(tmp_path, run, expected=f"{run / 'model'}: nothing to merge: no adapter")
    base = tiny_models()
    assert_refused(tmp_path, base, "-o", tmp_path / "out", expected=f"{base}: nothing to merge: no adapter")
    assert_refused(tmp_path, tmp_path / "nowhere", expected=f"{tmp_path / 'nowhere'}: no such folder")


def test_a_run_that_has_not_ended(recipe, tmp_path):
    stop = Fault("kit.training.trainer:KitTrainer.training_step", 5, signal.SIGKILL)
    assert run_kit(["train", recipe()], fault=stop) == [-signal.SIGKILL]
    run = tmp_path / "run"
    assert_refused(tmp_path, run, expected=f"{run}: the run has no model/ yet")
    # What it has saved on the way is an adapter all the same.
    assert run_kit(["merge", run / "checkpoints/checkpoint-3", "-o", tmp_path / "merged"]) == [0]


@pytest.mark.parametrize("adapter", [{"type": "lily", "r": 4}, {**LORA, "lora_bias": True}], ids=["lily", "lora_bias"])
def test_a_type_that_cannot_be_merged(recipe, tmp_path, adapter):
    train(str(recipe("llama", adapter=adapter)), [])
    run = tmp_path / "run"
    expected = f"merge: peft cannot merge an adapter of type {adapter['type']}"
    assert_refused(tmp_path, run, expected=expected)
    assert_refused(tmp_path, run, "-o", tmp_path / "out", expected=expected)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "new_rows.safetensors", "base.json"])
def test_a_damaged_adapter(recipe, tmp_path, name):
    train(str(recipe(**TOKENS)), [])
    path = tmp_path / "run/model" / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data) if name != "base.json" else b"{}")
    assert_refused(tmp_path, tmp_path / "run", expected=f"{path.parent}: the adapter is damaged")
    path.unlink()
    what = "no adapter of the kit" if name == "base.json" else "the adapter is damaged"
    assert_refused(tmp_path, tmp_path / "run", expected=f"{path.parent}: {what}: {name} is missing")


def test_a_merge_that_was_killed_leaves_no_merged_model(recipe, tmp_path):
    """A folder with half of a model would be taken for the model."""
    train(str(recipe()), [])
    run = tmp_path / "run"
    stop = Fault("transformers:PreTrainedTokenizerFast.save_pretrained")  # after the weights
    assert run_kit(["merge", run], fault=stop) == [-signal.SIGKILL]
    assert not (run / "merged").exists()
    assert run_kit(["merge", run]) == [0]


def test_wrong_logits_leave_no_merged_model(recipe, tmp_path, monkeypatch):
    train(str(recipe()), [])
    before = hashes(tmp_path)
    plain_merge = BaseTuner.merge_and_unload

    def wrong(self, *args, **options):
        model = plain_merge(self, *args, **options)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[3] += 1
        return model

    monkeypatch.setattr(BaseTuner, "merge_and_unload", wrong)
    with pytest.raises(RuntimeError, match="the merged model gives other logits than the adapted one"):
        merge(str(tmp_path / "run"), None)
    assert hashes(tmp_path) == before
    with pytest.raises(UserError, match="no such folder"):
        merge(str(tmp_path / "elsewhere"), None)

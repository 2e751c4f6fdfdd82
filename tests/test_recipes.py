"""Every shipped recipe and launch file is used: on the smallest stand-in that leaves all other keys as they are."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from kit import run, stages
from kit.check import check
from kit.recipe.classification import ClassificationRecipe
from kit.recipe.loading import dump_recipe, load_recipe
from kit.recipe.vocabulary import TokensFile
from tests.classifiers import ENCODERS, labeled_rows, multi_rows, save_base
from tests.material import documents

ROOT = Path(__file__).parents[1]
RECIPES = {path.relative_to(ROOT / "recipes").as_posix(): path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

GPT2 = ("gpt2", {"n_positions": 1024, "n_layer": 3})
# What stands in for a recipe's model: its architecture, with as many positions as its rows need.
STAND_INS = {
    "openai-community/gpt2": GPT2,
    "openai-community/gpt2-medium": GPT2,
    "openai-community/gpt2-large": GPT2,
    "openai-community/gpt2-xl": GPT2,
    "distilbert/distilgpt2": GPT2,
    "runs/lm_gpt2_pretrain/model": ("gpt2", {"n_positions": 256}),
    "runs/lm_gpt2_words/model": ("gpt2", {"n_positions": 256}),
    "HuggingFaceTB/SmolLM2-135M": ("llama", {"max_position_embeddings": 1024}),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", {"max_position_embeddings": 1024}),
    "distilbert/distilbert-base-uncased": ("distilbert", {"max_position_embeddings": 512}),
    "answerdotai/ModernBERT-base": ("modernbert", {"max_position_embeddings": 512}),
}
# The fresh model of a `from_config` has no path to put another in the place of: only its sizes change.
SIZES = {
    "model.from_config.n_layer": 2,
    "model.from_config.n_head": 2,
    "model.from_config.n_embd": 32,
    "model.tokenizer.vocab_size": 320,
}
# In the place of packages with more documentation.
SMALL_PACKAGES = ("evaluate", "filelock", "jinja2", "psutil", "safetensors", "tokenizers")


def test_the_sweep_sees_every_file():
    assert list(RECIPES) == [
        "chat/lm_gpt2_chat.yaml",
        "chat/lm_gpt2_lora-tokens.yaml",
        "chat/lm_gpt2_new-tokens.yaml",
        "offline/cls_gpt2_packages.yaml",
        "offline/lm_gpt2_adapt.yaml",
        "offline/lm_gpt2_control.yaml",
        "offline/lm_gpt2_pretrain.yaml",
        "offline/lm_gpt2_words.yaml",
        "spam/cls_distilbert_full.yaml",
        "spam/cls_gpt2_full.yaml",
        "spam/cls_gpt2_last-block.yaml",
        "spam/cls_gpt2_last-two-blocks.yaml",
        "spam/cls_gpt2_lora.yaml",
        "spam/cls_gpt2_norm-frozen.yaml",
        "spam/cls_modernbert_full.yaml",
        "tags/cls_modernbert_multi-label.yaml",
        "text/lm_distilgpt2_full.yaml",
        "text/lm_gpt2-large_checkpointing.yaml",
        "text/lm_gpt2-medium_checkpointing.yaml",
        "text/lm_gpt2-xl_checkpointing.yaml",
        "text/lm_gpt2_full.yaml",
        "text/lm_gpt2_gradual.yaml",
        "text/lm_gpt2_layer-decay.yaml",
        "text/lm_gpt2_lora.yaml",
        "text/lm_gpt2_scratch.yaml",
        "text/lm_gpt2_words.yaml",
        "text/lm_qwen3_full.yaml",
        "text/lm_qwen3_qlora.yaml",
        "text/lm_smollm2_full.yaml",
    ]
    assert len(RECIPES) == 29
    assert len(LAUNCH_FILES) == 9


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_and_every_key_arrives(name, tmp_path, tiny_models, monkeypatch, capsys):
    recipe = load_recipe(RECIPES[name])
    if recipe.model.load_in_4bit:  # which bitsandbytes can do on a CPU, though too slowly for use
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        monkeypatch.setattr("kit.model.quantization._has_device", lambda: True)
    overrides = {
        **model_overrides(recipe, tiny_models, tmp_path),
        **(labeled_overrides if isinstance(recipe, ClassificationRecipe) else data_overrides)(recipe, tmp_path),
        **vocabulary_overrides(recipe, tmp_path),
        "data.store_dir": tmp_path / "store",
        "run.output_dir": tmp_path / "run",
    }
    in_epochs = recipe.freezing is not None and bool(recipe.freezing.schedule)  # its phases need them all
    if not in_epochs:
        overrides["training.max_steps"] = 1 if recipe.training.get("gradient_accumulation_steps", 1) > 32 else 2
    if "num_train_epochs" in recipe.training and not in_epochs:
        overrides["training.num_train_epochs"] = "null"
    trainers = []

    class Trainer(stages.KitTrainer):
        def train(self, *args, **kwargs):
            trainers.append(self)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(stages, "KitTrainer", Trainer)
    changes = [f"{key}={value}" for key, value in overrides.items()]
    check(str(RECIPES[name]), changes)
    assert "nothing found that would stop it" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    run.train(str(RECIPES[name]), changes)

    [trainer] = trainers
    assert (tmp_path / "run/scorecard.json").is_file()
    assert trainer.model.is_gradient_checkpointing == bool(recipe.training.get("activation_checkpointing"))
    for key, value in recipe.training.items():
        if f"training.{key}" not in overrides:
            assert getattr(trainer.args, key) == value, key
    written, arrived = flat(dump_recipe(recipe)), flat((tmp_path / "run/recipe.yaml").read_text())
    replaced = {key for key in [*written, *arrived] if any(f"{key}.".startswith(f"{name}.") for name in overrides)}
    assert {key: arrived.get(key) for key in written if key not in replaced} == {
        key: value for key, value in written.items() if key not in replaced
    }
    assert set(arrived) - replaced == set(written) - replaced


def model_overrides(recipe, tiny_models, folder):
    if recipe.model.from_config:
        return SIZES
    architecture, sizes = STAND_INS[recipe.model.name_or_path]
    if architecture in ENCODERS:
        return {"model.name_or_path": save_base(folder / architecture, architecture, **sizes)}
    return {"model.name_or_path": tiny_models(architecture, **sizes)}


def data_overrides(recipe, folder):
    """Return the overrides that put a few documents in the place of files, and one small package in that of corpora.

    Reading documentation as large as torch's takes longer than a test should.
    """
    overrides = {}

    rows = recipe.training["per_device_train_batch_size"] * recipe.training.get("gradient_accumulation_steps", 1)

    def stand_in(key, source, seed, number):
        if source.path:
            path = folder / source.path
            lines = documents(number, seed=seed)
            if source.template:
                lines = [json.dumps(dict.fromkeys(re.findall(r"{(\w+)}", source.template), text)) for text in lines]
            path.write_text("\n".join(lines), encoding="utf-8")
            overrides[f"{key}.path"] = path
        else:
            overrides.update({f"{key}.builtin": "docstrings", f"{key}.packages": "[accelerate]"})

    for i, source in enumerate(recipe.data.train):
        stand_in(f"data.train.{i}", source, seed=i, number=12 * rows)  # a document has some sixty tokens
    for i, source in enumerate(recipe.data.validation if isinstance(recipe.data.validation, tuple) else ()):
        stand_in(f"data.validation.{i}", source, seed=100 + i, number=20)
    for i, (name, wanted) in enumerate(recipe.evaluation.sets.items()):
        if wanted.split is None:
            stand_in(f"evaluation.sets.{name}", wanted, seed=200 + i, number=20)
    return overrides


def labeled_overrides(recipe, folder):
    """Return the overrides that put a few rows in the place of files of labelled ones, and of packages' docstrings."""
    overrides = {}
    for number, source in enumerate(recipe.data.train):
        key, path = f"data.train.{number}", folder / f"rows{number}.txt"
        if source.builtin:
            overrides[f"{key}.packages"] = f"[{SMALL_PACKAGES[number]}]"
            continue
        if source.template:
            path, overrides[f"{key}.format"] = path.with_suffix(".jsonl"), "jsonl"
            fields = re.findall(r"{(\w+)}", source.template)
            rows = multi_rows(120)
            lines = [
                json.dumps({**dict.fromkeys(fields, text), source.label_column: tags.split("|") if tags else []})
                for tags, text in rows
            ]
        else:
            assert source.column_names == ("label", "text")
            lines = ["\t".join(row) for row in labeled_rows(160)]
        path.write_text("\n".join(lines), encoding="utf-8")
        overrides[f"{key}.path"] = path
    return overrides


def vocabulary_overrides(recipe, folder):
    """Return the override that puts a file of three words in the place of mined ones."""
    if recipe.vocabulary is None or not isinstance(recipe.vocabulary.tokens, TokensFile):
        return {}
    path = folder / "words.txt"
    path.write_text("checkpoint\nscheduler    # 5 times\nreturns\n", encoding="utf-8")
    return {"vocabulary.tokens": f"{{from_file: {path}}}"}


def flat(text):
    """Return `{dotted key: value}` of a recipe's text."""

    def visit(value, prefix):
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not value or not isinstance(value, (dict, list)):
            return {prefix: value}
        return {key: v for name, child in entries for key, v in visit(child, f"{prefix}.{name}".lstrip(".")).items()}

    return visit(yaml.safe_load(text), "")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_points_at_the_schema_and_says_what_it_is(name):
    path = RECIPES[name]
    first, *rest = path.read_text().splitlines()
    target = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / target).resolve() == ROOT / "recipes/recipe.schema.json"
    header = [line for line in rest if line.startswith("#")]
    assert any("Needs:" in line for line in header)
    [launch] = [line for line in header if "Launch:" in line]
    if "make train" in launch:
        assert launch.endswith(f"make train RECIPE=recipes/{name}")
    assert max(map(len, rest)) <= 120


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("text/")])
def test_overrides_in_the_header_and_sections_in_comments_are_valid(name):
    text = RECIPES[name].read_text()
    [line] = [line for line in text.splitlines() if line.startswith("# Override:")]
    overrides = line.partition('ARGS="')[2].removesuffix('"').split()
    assert overrides
    load_recipe(RECIPES[name], overrides)


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if "# Also:" in path.read_text()])
def test_what_a_header_suggests_also_is_valid(name):
    [line] = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("# Also:")]
    overrides = re.findall(r"\S+=\S+", line)
    assert overrides
    for override in overrides:
        assert dump_recipe(load_recipe(RECIPES[name], [override])) != dump_recipe(load_recipe(RECIPES[name]))


def test_the_last_block_recipe_has_the_numbers_of_the_book():
    """Raschka 2024, Build a Large Language Model (From Scratch), chapter 6."""
    recipe = load_recipe(RECIPES["spam/cls_gpt2_last-block.yaml"])
    assert recipe.data.balancing.model_dump() == {"method": "undersample", "rows": "all", "seed": 123, "weights": None}
    assert (recipe.data.split.validation, recipe.data.split.test) == (0.1, 0.2)
    assert recipe.freezing.trainable.named() == {"last_blocks", "final_norm", "head"}
    keys = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay", "eval_steps", "seed")
    assert [recipe.training[key] for key in keys] == [5, 8, 5e-5, 0.1, 50, 123]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("spam/")])
def test_spam_recipes_are_measured_on_the_same_split(name):
    first, other = (load_recipe(RECIPES[each]).data for each in ("spam/cls_gpt2_last-block.yaml", name))
    assert (other.train, other.split) == (first.train, first.split)


def test_commented_sections_are_valid(tmp_path):
    text = RECIPES["text/lm_gpt2_full.yaml"].read_text()
    for line in ("# tracking:", "#   wandb: ", "    # general: "):
        assert text.count(line) == 1
        text = text.replace(line, line.replace("# ", "", 1).replace("#   ", "  ", 1))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert recipe.tracking.wandb.project == "my-domain"
    assert set(recipe.evaluation.sets) == {"domain", "general"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("text/")])
def test_steps_of_the_fine_tuning_recipes_have_equally_many_tokens(name):
    recipe = load_recipe(RECIPES[name])
    training = recipe.training
    tokens = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * recipe.data.block_size
    assert tokens == (131_072 if "scratch" in name else 16_384)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.stem)
def test_launch_file_is_topology_only(path):
    values = yaml.safe_load(path.read_text())
    assert load_config_from_file(str(path)).num_processes == values["num_processes"]
    # The recipe decides on precision; a launch file that did would do so unseen.
    assert not {"mixed_precision", "downcast_bf16"} & set(values)
    assert len([line for line in path.read_text().splitlines() if line and not line.startswith("#")]) <= 12

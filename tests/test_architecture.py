"""The rules of the house: imports run downward only, files and functions stay small, the surface is deliberate."""

import ast
from pathlib import Path

import pytest

from kit.cli import app
from kit.recipe import adapter, classification, data, freezing, models, running, tracking, vocabulary

KIT = Path(__file__).parents[1] / "kit"
FILES = sorted(KIT.rglob("*.py"))

# From the bottom up; a module may import from its own room and from lower layers. Rooms of one layer stay apart.
LAYERS = [
    ["errors"],
    ["console", "files", "names"],
    ["network"],
    ["recipe"],
    ["data", "model", "evaluation", "tracking", "checkpoints"],
    ["tasks"],
    ["training"],
    ["stages"],
    ["run", "generate", "predict", "merge", "convert", "verify", "export", "environment"],
    ["check", "vocabulary", "interpolate"],
    ["model_commands"],
    ["cli"],
    ["__main__"],
]
# Longer than the house would like, each for a reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def room(path):
    return path.relative_to(KIT).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kit":
            parts = node.module.split(".")
            yield from (parts[1:2] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kit."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(KIT).as_posix())
def test_imports_run_downward(path):
    layer_of = {name: level for level, names in enumerate(LAYERS) for name in names}
    own = room(path)
    if path == KIT / "__init__.py":
        assert not list(imported_rooms(path))
        return
    for other in imported_rooms(path):
        assert other == own or layer_of[other] < layer_of[own], f"{own} imports {other}"


def test_every_module_has_a_layer():
    assert {room(path) for path in FILES} - {"__init__"} == {name for names in LAYERS for name in names}


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_init_files_hold_a_docstring_only(path):
    [statement] = ast.parse(path.read_text()).body
    assert isinstance(statement, ast.Expr)


def test_files_and_functions_are_short():
    long_files, long_functions = set(), set()
    for path in FILES:
        text = path.read_text()
        name = path.relative_to(KIT).as_posix()
        if len(text.splitlines()) > 400:
            long_files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long_functions.add(f"{name}:{node.name}")
    assert long_files == set(LONG_FILES)
    assert long_functions == set(LONG_FUNCTIONS)


def test_commands_change_deliberately():
    assert {command.callback.__name__ for command in app.registered_commands} == {
        "train", "check", "prepare", "evaluate", "generate", "predict", "merge", "convert", "verify", "interpolate",
        "export", "inspect", "schema", "recipes", "env", "status",
    }  # fmt: skip
    groups = {group.name: group.typer_instance.registered_commands for group in app.registered_groups}
    assert {name: [command.callback.__name__ for command in commands] for name, commands in groups.items()} == {
        "vocabulary": ["mine"]
    }


def test_recipe_keys_change_deliberately():
    origin = (
        "path dataset config split revision builtin packages format encoding delimiter quoting column_names "
        "text_column template on_bad_text min_characters max_characters max_documents"
    )
    source = f"{origin} sample_by separator max_tokens"
    common = "vocabulary freezing adapter training evaluation run tracking"
    parts = "embeddings position_embeddings first_blocks last_blocks final_norm head biases norms patterns"
    sections = {
        models: {
            "Recipe": f"task model data {common}",
            "CausalLmRecipe": f"task model data {common}",
            "ModelSection": "name_or_path revision from_config tokenizer eos_token config dtype attn_implementation "
            "load_in_4bit trust_remote_code",
            "TrainedTokenizer": "vocab_size",
            "EvaluationSection": "sets prompts generation",
            "EvaluationSet": f"{source} fraction seed",
            "Generation": "max_new_tokens do_sample top_k temperature seed",
        },
        running: {
            "RunSection": "output_dir resume resume_with global_batch_size early_stopping save_minutes "
            "skip_nonfinite_steps",
            "EarlyStopping": "patience threshold",
        },
        tracking: {
            "TrackingSection": "wandb peak_tflops",
            "WandbSection": "project entity name group job_type tags notes mode log_text log_model log_data",
        },
        data: {
            "DataSection": "train validation replay exact_duplicates near_duplicates evaluation_overlap block_size "
            "packing max_dropped num_proc store_dir",
            "Origin": origin,
            "Source": source,
            "TrainSource": f"{source} weight",
            "ValidationFraction": "fraction seed",
            "Replay": "sources share",
            "NearDuplicates": "threshold ngram",
            "EvaluationOverlap": "ngram min_shared",
        },
        classification: {
            "LabeledSource": f"{origin} label_column label_columns label_separator label text_pair_column group_column "
            "on_bad_label",
            "Split": "validation test seed stratify",
            "Balance": "method rows seed weights",
            "Augment": "copies characters words seed",
            "LabeledDataSection": "train validation test split label_names min_rows_per_label balance augment "
            "exact_duplicates max_length truncation group_by_length max_tokens_per_batch store_dir",
            "ZeroShot": "prompt words max_rows",
            "LabeledEvaluationSection": "sets train_sample baselines zero_shot temperature_scaling "
            "bootstrap_resamples mistakes examples",
            "ClassificationRecipe": f"task model data {common}",
        },
        vocabulary: {
            "AddedToken": "content description",
            "TokensFile": "from_file",
            "TemplateFile": "from_file",
            "Roles": "bos_token eos_token pad_token system user assistant",
            "VocabularySection": "special_tokens tokens roles chat_template initialize pad_to_multiple_of",
        },
        adapter: {"AdapterSection": "type"},
        freezing: {
            "Parts": parts,
            "TrainableParts": f"{parts} new_tokens",
            "PhaseSection": "epoch step fraction trainable warmup_steps",
            "GroupSection": "parts learning_rate weight_decay",
            "FreezingSection": "trainable frozen schedule layer_decay groups cache cache_gib",
        },
    }
    for module, expected in sections.items():
        defined = {name: kind for name, kind in vars(module).items() if getattr(kind, "model_fields", None)}
        own = {name: kind for name, kind in defined.items() if kind.__module__ == module.__name__}
        assert {name: " ".join(kind.model_fields) for name, kind in own.items()} == expected


def test_what_the_help_shows_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys; sys.argv = ['kit', '--help']\nimport kit.cli as c\nc._run()\nprint(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "numpy", "pydantic", "yaml"} & set(modules)

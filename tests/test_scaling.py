"""The tables of docs/scaling.md are those of the formulas, which agree with what the kit counts of architectures."""

import importlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/scaling.md"
BEGIN, END = "<!-- scaling: written by `make docs` -->\n", "<!-- end of scaling -->"
SMALL = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", autouse=True)
def _benchmarks():
    """Benchmarks are scripts: they import each other from the folder that they are in."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def formulas():
    return importlib.import_module("scaling_formulas")


def config(family):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    rest = no_dropout if family == "gpt2" else sizes
    return {"model_type": family, "vocab_size": 100, "eos_token_id": 0, "bos_token_id": 0, **rest, **SMALL[family]}


def test_the_tables_are_those_of_the_formulas():
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    if os.environ.get("KIT_WRITE_DOCS") == "1":
        PAGE.write_text(text.replace(found[0], BEGIN + formulas().tables() + END), encoding="utf-8")
        return
    assert found[1] == formulas().tables(), "make docs"


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    ("number", "checkpointing", "tolerance"),
    [(0, False, 0.003), (2, False, 0.003), (3, False, 0.06), (4, False, 0.035), (1, True, 0.06)],
)
def test_formulas_agree_with_what_the_kit_counts(family, number, checkpointing, tolerance):
    scaling = importlib.import_module("scaling")
    strategy = replace(scaling.ON_ONE[number], checkpointing=checkpointing)
    shape = scaling.shape_of(config(family))
    counted = scaling.counted(scaling.build(config(family), strategy), strategy, 3, 64)
    expected = scaling.expected(shape, strategy, 3, 64)
    assert counted.keys() == expected.keys()
    for use, size in counted.items():
        assert expected[use] == pytest.approx(size, rel=tolerance if use == "activations" else 1e-9), use


def test_parameters_of_the_models_are_those_of_transformers():
    scaling = importlib.import_module("scaling")
    for name in ("GPT-2", "Llama-3.2-3B", "Llama-3-8B", "Qwen3-14B"):
        built = scaling.build(formulas().MODELS[name], scaling.STRATEGIES[0])
        assert formulas().shape_of(name).parameters == built.num_parameters(), name


def test_every_launch_file_of_gpus_has_a_line_and_shards_shrink_with_their_number():
    module = formulas()
    files = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert {each.launch for each in module.STRATEGIES} == files - {"cpu", "cpu_2proc", "multi_node"}
    shape = module.shape_of("Llama-3-8B")
    fsdp2 = next(each for each in module.STRATEGIES if each.launch == "fsdp2")
    on_8, on_16 = (module.training_memory(shape, replace(fsdp2, gpus=n)) for n in (8, 16))
    for use, size in on_8.items():
        assert on_16[use] == (size / 2 if use in ("weights", "gradients", "optimizer") else size)


def test_choice_fits_and_what_stands_before_it_does_not():
    module = formulas()
    shape, memory = module.shape_of("Llama-3-8B"), 80e9
    assert module.choose(shape, 8, memory) == "`fsdp2` (shards), checkpointing"
    ddp = next(each for each in module.STRATEGIES if each.launch == "ddp")
    assert module.device_peak(shape, ddp, 2048) > memory
    assert module.choose(shape, 1, 1e9) == "–"

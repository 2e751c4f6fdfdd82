"""The kit's figures against a script that shares no code with it, on pretrained models and, everywhere, on a tiny one.

`golden.json` holds that script's figures with all their digits. The text is ours; its documents are ragged, some are
cut at both block sizes, and some end exactly where a window of stories260K does.
"""

import json
from pathlib import Path

import pytest
import yaml

from kit import run
from tests.evaluation import golden
from tests.harness import run_kit
from tests.material import save_tiny_model

HERE = Path(__file__).parent
TEXT = HERE / "golden_text.txt"
GOLDEN = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))["values"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# The order of a matrix product's sums is free: fp32 figures of one text agree to this, not to the last digit.
BITS = 1e-6
RELATIVE = {"nats_per_token": 1e-6, "perplexity": 5e-6, "eos_nats": 1e-6}
EXACT = ("tokens", "bytes", "documents", "token_accuracy")  # the two best logits are nowhere closer than 1e-4

needs_models = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the pretrained models are not here: no {SHARED}")
each_value = pytest.mark.parametrize("value", GOLDEN, ids=lambda v: f"{Path(v['model']).parts[0]}-{v['block_size']}")


def assert_same(found, expected):
    names = {"bits_per_byte", *RELATIVE, *EXACT}
    assert names <= found.keys()
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=0, abs=BITS)
    for name, tolerance in RELATIVE.items():
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}


@pytest.fixture
def kit_figures(tmp_path):
    """A function that measures a model on the golden text with `kit evaluate`; nothing is shared between two calls."""

    def measure(model, block_size, batch_size, processes):
        folder = tmp_path / f"{batch_size}-{processes}"
        folder.mkdir()
        other = folder / "other.txt"
        other.write_text("One document.\n\n\nAnother document, of a few more words.", encoding="utf-8")
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(model)},
            "data": {
                "train": [{"path": str(other), "separator": "\n\n\n"}],
                "block_size": block_size,
                "store_dir": str(folder / "store"),
            },
            "training": {"bf16": False, "per_device_eval_batch_size": batch_size},
            "evaluation": {"sets": {"golden": {"path": str(TEXT), "separator": "\n\n\n"}}},
        }
        path, output = folder / "recipe.yaml", folder / "figures.json"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        if processes == 1:
            run.evaluate(str(path), [], None, str(output))
        else:
            assert run_kit(["evaluate", path, "-o", output], processes=processes) == [0] * processes
        return json.loads(output.read_text(encoding="utf-8"))["sets"]["golden"]

    return measure


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A tiny model whose weights are large enough that its probabilities depend on the context."""
    return save_tiny_model(tmp_path_factory.mktemp("golden"), "gpt2", initializer_range=0.3)


@needs_models
@each_value
def test_the_script_still_gives_its_golden_values(value):
    assert_same(golden.measure(SHARED / value["model"], TEXT, value["block_size"]), value)


@needs_models
@each_value
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_kit_gives_the_golden_values(value, batch_size, kit_figures):
    assert_same(kit_figures(SHARED / value["model"], value["block_size"], batch_size, processes=1), value)


@needs_models
@pytest.mark.parametrize(("value", "batch_size"), [(GOLDEN[0], 16), (GOLDEN[1], 1)], ids=["64-16", "512-1"])
def test_two_processes_give_the_golden_values(value, batch_size, kit_figures):
    assert_same(kit_figures(SHARED / value["model"], value["block_size"], batch_size, processes=2), value)


# This tokenizer has no BOS: the context token is EOS.
@pytest.mark.parametrize("block_size", [16, 64])
def test_the_kit_agrees_with_the_script_on_a_tiny_model(block_size, tiny_model, kit_figures):
    expected = golden.measure(tiny_model, TEXT, block_size)
    for batch_size, processes in [(1, 1), (16, 1), (1, 2), (16, 2)]:
        assert_same(kit_figures(tiny_model, block_size, batch_size, processes), expected)


@needs_models
def test_documents_end_before_at_and_after_the_edge_of_a_window():
    _, tokenizer = golden.load(SHARED / "stories260K" / "hf")
    lengths = {len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in golden.read_documents(TEXT)}
    assert {63, 64, 512} <= lengths
    assert min(lengths) <= 2
    assert max(lengths) > 2 * 512


# ---- what the comparison can tell apart: mistakes in the reference move its bits by far more than the tolerance


def _context_is_scored(sequence, block_size):
    return golden.cut([sequence[0], *sequence], block_size)


def _first_token_is_forgotten(sequence, block_size):
    return [sequence[start : start + block_size + 1] for start in range(0, len(sequence) - 1, block_size + 1)]


def _shared_token_is_scored_twice(sequence, block_size):
    return [sequence[max(start - 1, 0) : start + block_size + 1] for start in range(0, len(sequence) - 1, block_size)]


def _every_window_begins_with_bos(sequence, block_size):
    return [[sequence[0], *window[1:]] for window in golden.cut(sequence, block_size)]


def _mean_of_means(documents, scores):
    each = [golden.figures([text], [pairs])["bits_per_byte"] for text, pairs in zip(documents, scores, strict=True)]
    return {"bits_per_byte": sum(each) / len(each)}


def _eos_is_counted(documents, scores):
    return golden.figures(documents, [[*pairs, pairs[-1]] for pairs in scores])


def _characters_are_counted(documents, scores):
    found = golden.figures(documents, scores)
    return {"bits_per_byte": found["bits_per_byte"] * found["bytes"] / sum(map(len, documents))}


CUTS = [_context_is_scored, _first_token_is_forgotten, _shared_token_is_scored_twice, _every_window_begins_with_bos]
SUMS = [_mean_of_means, _eos_is_counted, _characters_are_counted]


def assert_told_apart(folder, block_size):
    model, tokenizer = golden.load(folder)
    documents = golden.read_documents(TEXT)
    scores = golden.score(model, tokenizer, documents, block_size)
    right = golden.figures(documents, scores)["bits_per_byte"]
    wrong = {figures.__name__: figures(documents, scores) for figures in SUMS}
    for cut in CUTS:
        wrong[cut.__name__] = golden.figures(documents, golden.score(model, tokenizer, documents, block_size, cut))
    if tokenizer.bos_token_id is not None:
        tokenizer.bos_token = tokenizer.eos_token
        wrong["eos_for_bos"] = golden.figures(documents, golden.score(model, tokenizer, documents, block_size))
    distances = {name: abs(found["bits_per_byte"] - right) for name, found in wrong.items()}
    assert min(distances.values()) > 100 * BITS, distances


@needs_models
@pytest.mark.parametrize("block_size", [64, 512])
def test_mistakes_show_on_a_pretrained_model(block_size):
    assert_told_apart(SHARED / "stories260K" / "hf", block_size)


def test_mistakes_show_on_a_tiny_model(tiny_model):
    assert_told_apart(tiny_model, 16)

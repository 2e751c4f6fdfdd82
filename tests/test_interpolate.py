"""`kit interpolate`: the ends of the curve are the two models to the bit, what lies between is their average."""

import errno
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kit.errors import UserError
from kit.files import hash_file
from kit.interpolate import Rule, Sets, choose_sets, interpolate, parse_alphas
from kit.merge import merge
from kit.run import evaluate, train
from kit.stages import TASKS
from tests.classifiers import labeled_rows, save_base, write_rows
from tests.classifiers import write_recipe as write_labeled_recipe
from tests.material import documents, make_model

LORA = {"type": "lora", "r": 4}


def moved(base, folder, seed=1, scale=0.05, **saving):
    """Save a model like the base with other weights, as fine-tuning would leave it."""
    model, generator = AutoModelForCausalLM.from_pretrained(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.to(saving.get("dtype", torch.float32)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(write_recipe, tmp_path):
    """A function that writes a recipe with a domain and a general set."""
    general = tmp_path / "general.txt"
    general.write_text("\n\n\n".join(documents(20, seed=7)))

    def write(**sections):
        sets = {"domain": {"split": "validation"}, "general": {"path": str(general), "separator": "\n\n\n"}}
        return write_recipe(**{"evaluation": {"sets": sets}, **sections})

    return write


def run(base, tuned, recipe, output, overrides=(), **options):
    interpolate(str(base), str(tuned), str(recipe), list(overrides), output=str(output), **options)
    return json.loads((output / "interpolation.json").read_text())


def measured(recipe, model, tmp_path):
    """What `kit evaluate` says of a model."""
    evaluate(str(recipe), [], str(model), str(tmp_path / "figures.json"))
    return json.loads((tmp_path / "figures.json").read_text())["sets"]


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def hashes(folder):
    return {path: hash_file(path) for path in folder.rglob("*") if path.is_file()}


ENDS = [("gpt2", {}), ("llama", {}), ("llama", {"tie_word_embeddings": True})]


@pytest.mark.parametrize(("architecture", "config"), ENDS)
def test_the_ends_are_the_models_and_the_middle_their_average(recipe, tiny_models, tmp_path, architecture, config):
    base = tiny_models(architecture, **config)
    tuned = moved(base, tmp_path / "tuned")
    path = recipe(model={"name_or_path": str(base)})
    before = hashes(base) | hashes(tuned)
    report = run(base, tuned, path, tmp_path / "out", alphas="0,0.25,1", limit=9e9)
    assert hashes(base) | hashes(tuned) == before
    curve = {point["alpha"]: point["sets"] for point in report["curve"]}
    assert list(curve) == [0, 0.25, 1]
    assert curve[0] == measured(path, base, tmp_path) == report["base_with_its_own_tokenizer"]
    assert curve[1] == measured(path, tuned, tmp_path) != curve[0]
    assert curve[0.25] not in (curve[0], curve[1])

    report = run(base, tuned, path, tmp_path / "one", alphas="0.25", limit=9e9)
    assert report["chosen"]["alpha"] == 0.25
    assert report["curve"][0]["sets"] == curve[0.25] == measured(path, tmp_path / "one/model", tmp_path)
    found, ours, theirs = (weights(folder) for folder in (tmp_path / "one/model", base, tuned))
    assert found.keys() == ours.keys() == theirs.keys()
    for name, tensor in found.items():
        expected = 0.75 * ours[name].numpy().astype(np.float64) + 0.25 * theirs[name].numpy().astype(np.float64)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=3e-7, err_msg=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one/model")
    tied = architecture == "gpt2" or bool(config)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / "one/model", tuned)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_of_added_tokens_are_the_tuned_models_at_every_alpha(recipe, tiny_models, tmp_path, architecture):
    base = tiny_models(architecture)
    path = recipe(
        model={"name_or_path": str(base)}, training={"learning_rate": 3e-2},
        vocabulary={"special_tokens": ["<|x|>"], "tokens": ["embedding", "Größe"]},
    )  # fmt: skip
    train(str(path), [])
    tuned, out = tmp_path / "run", tmp_path / "run/interpolated"
    interpolate(str(base), str(tuned), str(path), [], alphas="0,0.5,1", limit=9e9)
    report = json.loads((out / "interpolation.json").read_text())
    of_base, of_tuned = weights(base), weights(tuned / "model")
    name = next(name for name in of_base if name.endswith(("wte.weight", "embed_tokens.weight")))
    assert report["new_rows"] == len(of_tuned[name]) - len(of_base[name]) > 0
    scorecard = json.loads((tuned / "scorecard.json").read_text())["sets"]
    curve = {point["alpha"]: point["sets"] for point in report["curve"]}
    for which in ("domain", "general"):
        assert report["base_with_its_own_tokenizer"][which] == scorecard[which]["before"]
        assert curve[1][which] == scorecard[which]["after"]
        # The same documents in other tokens.
        assert curve[0][which]["bytes"] == scorecard[which]["before"]["bytes"]
    assert curve[0]["domain"]["tokens"] < scorecard["domain"]["before"]["tokens"]
    for alpha in (0, 0.5):
        run(base, tuned, path, tmp_path / f"at-{alpha}", alphas=str(alpha), limit=9e9)
        found = weights(tmp_path / f"at-{alpha}/model")
        rows = len(of_base[name])
        assert torch.equal(found[name][rows:], of_tuned[name][rows:])
        expected = (1 - alpha) * of_base[name] + alpha * of_tuned[name][:rows]
        assert torch.allclose(found[name][:rows], expected, rtol=0, atol=1e-7)
        assert torch.equal(found[name][:rows], of_base[name]) == (alpha == 0)


def test_rows_to_spare_that_a_token_took_are_not_averaged(recipe, tiny_models, tmp_path):
    """A base with more rows than tokens: the row of a new token is noise in it."""
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_models())
    make_model("gpt2", 400).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tuned = moved(base, tmp_path / "tuned")
    tokenizer.add_tokens(["<|x|>"])
    tokenizer.save_pretrained(tuned)
    new = tokenizer.convert_tokens_to_ids("<|x|>")
    report = run(base, tuned, recipe(model={"name_or_path": str(base)}), tmp_path / "out", alphas="0.5", limit=9e9)
    assert report["new_rows"] == 1
    found, ours, theirs = (weights(f)["transformer.wte.weight"] for f in (tmp_path / "out/model", base, tuned))
    assert torch.equal(found[new], theirs[new])
    assert torch.allclose(found[new + 1], 0.5 * ours[new + 1] + 0.5 * theirs[new + 1])


def test_bfloat16_is_averaged_in_float32_and_saved_as_it_was(recipe, tiny_models, tmp_path):
    base = tiny_models()
    tuned = moved(base, tmp_path / "tuned", dtype=torch.bfloat16)
    report = run(base, tuned, recipe(), tmp_path / "out", alphas="0.3", limit=9e9)
    assert report["dtype"] == "bfloat16"
    found, ours, theirs = (weights(folder) for folder in (tmp_path / "out/model", base, tuned))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (0.7 * ours[name].float() + 0.3 * theirs[name].float()).bfloat16()), name


def test_merged_adapters_are_averaged_and_others_refused(recipe, tiny_models, tmp_path):
    path = recipe(adapter=LORA, training={"learning_rate": 3e-2})
    train(str(path), [])
    with pytest.raises(UserError, match="holds an adapter, not a whole model: `kit merge"):
        run(tiny_models(), tmp_path / "run", path, tmp_path / "out", alphas="0.5")
    merge(str(tmp_path / "run"), None)
    report = run(tiny_models(), tmp_path / "run", path, tmp_path / "out", alphas="1", limit=9e9)
    assert report["curve"][0]["sets"] == measured(path, tmp_path / "run/merged", tmp_path)


# ---- which is best


def rule(limit=0.1, general="general", task="causal-lm"):
    key = {"causal-lm": "bits_per_byte", "sequence-classification": "f1_macro"}[task]
    figures = curve_of({0: (0.0, 0.0)}, key)[0]
    return Rule(TASKS[task], Sets("domain", general), limit, figures)


def curve_of(points, key="bits_per_byte"):
    return {alpha: {"domain": {key: d}, "general": {key: g}} for alpha, (d, g) in points.items()}


def test_the_best_domain_figure_within_the_limit_is_chosen():
    points = {0: (3, 0), 0.2: (2, 0.1), 0.4: (1, 0.1001), 0.6: (0.5, 5)}
    assert rule().choose(curve_of(points)) == 0.2
    assert rule(limit=5).choose(curve_of(points)) == 0.6
    assert rule(general=None).choose(curve_of(points)) == 0.6
    assert rule(limit=0).choose(curve_of(points)) == 0
    assert rule().choose(curve_of({0.5: (1, 1), 1: (0, 2)})) is None
    assert rule().choose(curve_of({0.5: (1, 0), 0.1: (1, 0)})) == 0.1  # of equals the nearer to the base
    higher = curve_of({0: (0.5, 0), 0.5: (0.9, -0.1), 1: (0.95, -0.2)}, "f1_macro")
    assert rule(task="sequence-classification").choose(higher) == 0.5


def test_figures_that_are_no_numbers_are_not_chosen(capsys):
    nan = math.nan
    assert rule().choose(curve_of({0: (2, 0), 0.5: (nan, 0), 1: (1, nan)})) == 0
    assert "at α = 0.5" in capsys.readouterr().out
    with pytest.raises(UserError, match="no average gives a bits/byte"):
        rule().choose(curve_of({0: (nan, 0)}))


def test_where_all_lose_too_much_the_curve_is_kept_and_no_model(recipe, tiny_models, tmp_path, capsys):
    tuned = moved(tiny_models(), tmp_path / "tuned", scale=1.0)
    report = run(tiny_models(), tuned, recipe(), tmp_path / "out", alphas="0.9,1", limit=0.001)
    assert report["chosen"]["alpha"] is None
    assert report["chosen"]["why"].startswith("none: ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curve.png", "interpolation.json"]
    assert "no model is saved" in capsys.readouterr().out


def test_one_set_alone_is_plotted_over_alpha(write_recipe, tiny_models, tmp_path):
    tuned = moved(tiny_models(), tmp_path / "tuned")
    report = run(tiny_models(), tuned, write_recipe(), tmp_path / "out", alphas="0:1:0.5")
    assert (report["domain"], report["general"], report["limit"]) == ("domain", None, None)
    losses = {point["alpha"]: point["sets"]["domain"]["bits_per_byte"] for point in report["curve"]}
    assert report["chosen"]["alpha"] == min(losses, key=losses.get)
    picture = imread(tmp_path / "out/curve.png")
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    with pytest.raises(UserError, match="--limit: there is no general set"):
        run(tiny_models(), tuned, write_recipe(), tmp_path / "other", alphas="0", limit=0.1)


def test_sets_are_found_by_name_or_split_or_asked_for():
    def sets(domain=None, general=None, names=None, **splits):
        given = {name: SimpleNamespace(data_split=split) for name, split in splits.items()}
        recipe = SimpleNamespace(evaluation=SimpleNamespace(sets=given))
        found = choose_sets(recipe, list(names or splits), domain, general)
        return found.domain, found.general

    assert sets(domain_=None, x=None, domain="x") == ("x", "domain_")
    assert sets(novels=None, held_out="validation") == ("held_out", "novels")
    assert sets(names=["a", "general", "b"], domain="a") == ("a", "general")
    assert sets(seen="train", held_out="validation") == ("held_out", None)
    assert sets(held_out="validation", kept="replay") == ("held_out", "kept")
    assert sets(names=["validation", "train_sample", "test"]) == ("validation", None)
    assert sets(names=["validation", "test"], general="test") == ("validation", "test")
    for wrong, match in (
        ({"a": None, "b": None}, "--domain: name the set"),
        ({"names": ["domain", "a", "b"]}, "--general: name the set"),
        ({"names": ["domain", "a"], "general": "aa"}, "--general: the recipe has no evaluation set `aa`"),
        ({"names": ["domain", "a"], "domain": "a", "general": "a"}, "the domain's set already"),
    ):
        with pytest.raises(UserError, match=match):
            sets(**wrong)


# ---- what cannot be


@pytest.mark.parametrize(("text", "values"), [
    ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]), ("0, 0.3,1", [0, 0.3, 1]), ("0.5", [0.5]),
    ("1,0,1", [0, 1]), ("0:1:0.4", [0, 0.4, 0.8, 1]), ("0.2:0.2:1", [0.2]),
])  # fmt: skip
def test_alphas(text, values):
    assert parse_alphas(text) == values


@pytest.mark.parametrize("text", [
    "", "a", "0:1", "0:1:0", "0:1:-0.1", "1:0:0.1", "0,2", "-0.1,0", "nan", "0:nan:1", "0:1:nan", "inf", "0:1:1e-9",
    "0:1:1e-400", "0,,1", "0:1:0.1:2", "0;1", "0:1e999999:1",
])  # fmt: skip
def test_nonsense_for_alphas_is_refused(text):
    with pytest.raises(UserError, match="--alphas: found"):
        parse_alphas(text)


def test_models_that_are_not_alike_are_refused_with_what_differs(recipe, tiny_models, tmp_path):
    base, path, out = tiny_models("llama"), recipe(), tmp_path / "out"
    others = {
        "the tensor `model.layers.0.mlp.gate_proj.weight` is of shape": tiny_models("llama", intermediate_size=32),
        "the tensor `model.layers.1.": tiny_models("llama", num_hidden_layers=1),
        "config.rms_norm_eps: found": tiny_models("llama", rms_norm_eps=1e-3),
        "BASE is a LlamaForCausalLM and TUNED a GPT2LMHeadModel": tiny_models("gpt2"),
        "one matrix in TUNED and two in the other": tiny_models("llama", tie_word_embeddings=True),
    }
    for message, tuned in others.items():
        with pytest.raises(UserError) as error:
            run(base, tuned, path, out, alphas="0.5")
        assert message in str(error.value)
    # Fewer rows than the base has are no extension; what does not count in evaluation may differ.
    larger = tmp_path / "larger"
    make_model("gpt2", 400).save_pretrained(larger)
    AutoTokenizer.from_pretrained(base).save_pretrained(larger)
    with pytest.raises(UserError, match=r"wte\.weight` is of shape"):
        run(larger, tiny_models(), path, out, alphas="0.5")
    run(tiny_models(), tiny_models(resid_pdrop=0.3), path, out, alphas="0.5")


def test_other_tokenizers_are_refused(recipe, tiny_models, tmp_path):
    tuned = moved(tiny_models(), tmp_path / "tuned")
    file = tuned / "tokenizer.json"
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[tokens[0]], vocabulary[tokens[1]] = vocabulary[tokens[1]], vocabulary[tokens[0]]
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="different tokenizers: token 318 is"):
        run(tiny_models(), tuned, recipe(), tmp_path / "out", alphas="0.5")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_interpolation_is_replaced(recipe, tiny_models, tmp_path):
    base, path, out = tiny_models(), recipe(), tmp_path / "out"
    tuned = moved(base, tmp_path / "tuned")
    options = {"alphas": "1", "limit": 9e9}
    with pytest.raises(UserError, match="--output: the folder to write"):
        interpolate(str(base), str(tuned), str(path), [])
    for place in (tuned, tuned / "inside", tmp_path):
        with pytest.raises(UserError, match="lie in each other"):
            run(base, tuned, path, place, overwrite=True, **options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="no earlier interpolation"):
        run(base, tuned, path, other, overwrite=True, **options)
    with pytest.raises(UserError, match="would be in does not exist"):
        run(base, tuned, path, tmp_path / "no/such", **options)
    run(base, tuned, path, out, **options)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        run(base, tuned, path, out, **options)
    assert run(base, tuned, path, out, alphas="0", overwrite=True)["chosen"]["alpha"] == 0
    with pytest.raises(UserError, match="lie in each other"):
        run(base, out / "model", path, out, overwrite=True, **options)


def test_a_full_disk_leaves_nothing(recipe, tiny_models, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    tuned = moved(tiny_models(), tmp_path / "tuned")
    path = recipe()
    (tmp_path / "store").mkdir()
    monkeypatch.setattr("kit.interpolate.plot_curve", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        run(tiny_models(), tuned, path, tmp_path / "out", alphas="0.5", limit=9e9)
    assert set(tmp_path.iterdir()) == before


# ---- classifiers


def test_classifiers_are_averaged_by_their_f1_without_the_test(tmp_path):
    base = save_base(tmp_path / "base", "bert", labels=("ham", "spam"))
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))
    split = {"validation": 0.2, "test": 0.2}
    path = write_labeled_recipe(
        tmp_path / "recipe.yaml", base, rows, data={"split": split}, training={"max_steps": 6, "learning_rate": 1e-2}
    )
    train(str(path), [])
    report = run(base, tmp_path / "recipe", path, tmp_path / "out", alphas="0,0.5,1")
    assert (report["figure"], report["domain"], report["general"]) == ("f1_macro", "validation", None)
    assert all(point["sets"].keys() == {"validation", "train_sample"} for point in report["curve"])
    scorecard = json.loads((tmp_path / "recipe/scorecard.json").read_text())["sets"]["validation"]
    assert report["curve"][0]["sets"]["validation"] == scorecard["before"]
    assert report["curve"][-1]["sets"]["validation"] == scorecard["after"] != scorecard["before"]
    best = {point["alpha"]: -point["sets"]["validation"]["f1_macro"] for point in report["curve"]}
    assert report["chosen"]["alpha"] == min(best, key=best.get)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model")

    no_head = save_base(tmp_path / "lm", "gpt2")
    with pytest.raises(UserError, match=r"BASE: .* is no classifier: it has no head"):
        run(no_head, tmp_path / "recipe", path, tmp_path / "other")
    labels = save_base(tmp_path / "labels", "bert", labels=("ham", "eggs"))
    with pytest.raises(UserError, match="id2label: BASE tells apart"):
        run(labels, tmp_path / "recipe", path, tmp_path / "other")

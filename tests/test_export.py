"""`kit export`: a folder that transformers loads alone, a card without secrets or places, nothing sent unasked."""

import errno
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from kit.errors import UserError
from kit.export import export, set_generation
from kit.files import hash_file, read_json, write_json
from kit.merge import merge
from kit.model.loading import load_adapted
from kit.model.saving import fixed_logits
from kit.recipe.models import Generation, ModelSection
from kit.run import train
from tests.classifiers import labeled_rows, multi_rows, save_base, write_rows
from tests.classifiers import write_recipe as write_labeled_recipe

LORA = {"type": "lora", "r": 4}
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def plain_runs():
    """Where the finished run is kept that most tests begin with."""
    return {}


@pytest.fixture
def run(write_recipe, plain_runs, tmp_path, tmp_path_factory):
    """A function that makes a finished run and returns its folder."""

    def make(**sections):
        if not sections and plain_runs:
            return Path(shutil.copytree(plain_runs["run"], tmp_path / "run"))
        train(str(write_recipe(**sections)), [])
        if not sections:
            plain_runs["run"] = shutil.copytree(tmp_path / "run", tmp_path_factory.mktemp("plain") / "run")
        return tmp_path / "run"

    return make


@pytest.fixture
def cached(tiny_models, tmp_path, monkeypatch):
    """The tiny GPT-2 as a model of the Hub that is in the cache; returns its name."""
    root = tmp_path / "cache/models--team--base"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    shutil.copytree(tiny_models(), root / "snapshots" / COMMIT)
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    return "team/base"


def hashes(folder):
    return {path: hash_file(path) for path in Path(folder).rglob("*") if path.is_file()}


def snippet(folder):
    """Run the code of the card as a reader would, with the folder in its place; return what it defines."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    assert "path/to/this/folder" in code
    defined = {}
    exec(code.replace("path/to/this/folder", str(folder)), defined)
    return defined


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_folder_gives_the_runs_logits_alone(run, tiny_models, tmp_path, capsys, architecture):
    folder, out = run(model={"name_or_path": str(tiny_models(architecture))}), tmp_path / "out"
    before = hashes(folder)
    export(str(folder), str(out))
    assert hashes(folder) == before
    assert "bit for bit" in capsys.readouterr().out
    logits = [fixed_logits(AutoModelForCausalLM.from_pretrained(path)) for path in (out, folder / "model")]
    assert torch.equal(*logits)
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"} | {
        path.name for path in (folder / "model").iterdir() if path.name.startswith("tokenizer")
    }
    assert snippet(out)["model"].config.model_type == architecture


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_type_of_numbers_is_told_with_what_it_does(run, tmp_path, capsys, dtype):
    folder, out = run(), tmp_path / "out"
    export(str(folder), str(out), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    for (name, found), given in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, given.to(model.dtype)), name
    said = " ".join(capsys.readouterr().out.split())
    card = (out / "README.md").read_text()
    if dtype == "float32":
        assert "differ by" not in said
        assert "before they were turned" not in card
        return
    difference = (fixed_logits(model).double() - fixed_logits(plain).double()).abs().max().item()
    assert f"they differ by up to {difference:.2g}" in said
    assert f"in float32, before they were turned into {dtype}" in card


def test_weights_that_do_not_fit_the_type_are_refused(run, tmp_path):
    folder, out = run(), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6  # float16 ends at 65,504
    model.save_pretrained(folder / "model")
    with pytest.raises(UserError, match="in float16 the model gives logits that are no numbers"):
        export(str(folder), str(out), dtype="float16")
    assert not out.exists()
    export(str(folder), str(out), dtype="bfloat16")


def test_generation_settings_are_the_recipes_with_the_tokenizers_ids(run, tmp_path):
    roles = {"special_tokens": ["<|end|>"], "roles": {"eos_token": "<|end|>"}}
    generation = {"max_new_tokens": 7, "do_sample": False}
    folder, out = run(vocabulary=roles, evaluation={"generation": generation}), tmp_path / "out"
    export(str(folder), str(out))
    saved, tokenizer = read_json(out / "generation_config.json"), AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.eos_token_id in torch.tensor(saved["eos_token_id"]).flatten().tolist()
    assert saved["pad_token_id"] == tokenizer.eos_token_id
    assert (saved["max_new_tokens"], saved["do_sample"]) == (7, False)
    assert "temperature" not in saved
    model = AutoModelForCausalLM.from_pretrained(out)
    inputs = tokenizer("the kit", return_tensors="pt")
    assert model.generate(**inputs).shape[1] <= inputs.input_ids.shape[1] + 7
    assert "1 tokens were added" in (out / "README.md").read_text()


def test_what_ended_a_text_before_goes_on_ending_it(tiny_models):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_models()), AutoTokenizer.from_pretrained(tiny_models())
    model.generation_config.eos_token_id = [5, 6]
    set_generation(model, tokenizer, Generation(top_k=3, temperature=0.5))
    found = model.generation_config
    assert found.eos_token_id == [tokenizer.eos_token_id, 5, 6]
    assert (found.do_sample, found.top_k, found.temperature) == (True, 3, 0.5)
    set_generation(model, tokenizer, Generation())
    assert found.eos_token_id == [tokenizer.eos_token_id, 5, 6]


# ---- the card


def test_the_card_tells_figures_and_settings_and_no_place_or_text(run, tmp_path, corpus_file):
    sets = {"sets": {"domain": {"split": "validation"}, "general": {"path": str(corpus_file), "max_documents": 5}}}
    training = {"max_steps": 2, "learning_rate": 1e-3, "report_to": ["none"]}
    folder, out = run(evaluation=sets, training=training), tmp_path / "out"
    export(str(folder), str(out))
    text = (out / "README.md").read_text()
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["domain-adaptation-kit", "causal-lm"],
    }  # fmt: skip
    scorecard = read_json(folder / "scorecard.json")["sets"]
    for name, scores in scorecard.items():
        old, new, delta = (scores[when]["bits_per_byte"] for when in ("before", "after", "delta"))
        assert f"| {name} | bits per byte | {old:.4f} | {new:.4f} | {delta:+.4f} |" in text
    assert "| `learning_rate` | 0.001 |" in text
    manifest = read_json(folder / "manifest.json")
    assert f"{manifest['parameters']:,} of {manifest['parameters']:,} parameters trained" in text
    assert f"torch {torch.__version__}" in text
    for private in (
        str(tmp_path),
        str(corpus_file),
        corpus_file.name,
        "/tmp",
        "secret-plan",
        manifest["git"]["commit"],
    ):
        assert private not in text
    documents = corpus_file.read_text().split("\n\n\n")
    assert not [document for document in documents if len(document) > 20 and document in text]
    assert "{{" not in text
    assert "{%" not in text


def test_the_card_names_a_base_of_the_hub(run, cached, tmp_path):
    folder, out = run(model={"name_or_path": cached}), tmp_path / "out"
    export(str(folder), str(out))
    assert ModelCard.load(out / "README.md").data.base_model == cached
    # A relative folder that is gone looks like a name.
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(cached, "runs/model"))
    export(str(folder), str(out), overwrite=True)
    assert ModelCard.load(out / "README.md").data.base_model is None
    assert "runs/model" not in (out / "README.md").read_text()


# ---- adapters


def test_an_adapter_of_a_hub_model_stays_one_until_it_is_merged(run, cached, tmp_path, capsys):
    training = {"max_steps": 6, "learning_rate": 3e-2}
    folder, out = run(model={"name_or_path": cached}, adapter=LORA, training=training), tmp_path / "out"
    export(str(folder), str(out))
    assert "exported is the adapter alone" in capsys.readouterr().out
    want = fixed_logits(load_adapted(folder / "model", ModelSection(name_or_path=cached)).get_base_model())
    assert torch.equal(fixed_logits(snippet(out)["model"]), want)
    assert torch.equal(fixed_logits(load_adapted(out, ModelSection(name_or_path=cached)).get_base_model()), want)
    assert not (out / "model.safetensors").exists()
    for path in out.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    data = ModelCard.load(out / "README.md").data
    assert (data.base_model, data.library_name, data.base_model_relation) == (cached, "peft", "adapter")
    assert '"r": 4' in (out / "README.md").read_text()
    with pytest.raises(UserError, match="an adapter, which stays as it is; `kit merge"):
        export(str(folder), str(tmp_path / "other"), dtype="bfloat16")
    merge(str(folder), None)
    export(str(folder), str(out), overwrite=True)
    assert not (out / "adapter_config.json").exists()
    plain = [fixed_logits(AutoModelForCausalLM.from_pretrained(path)) for path in (out, folder / "merged")]
    assert torch.equal(*plain)


def test_an_adapter_that_others_could_not_load_is_refused(run, tmp_path):
    folder = run(adapter=LORA)
    with pytest.raises(UserError, match="which others do not have; `kit merge"):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_rows_of_new_tokens_is_refused(run, cached, tmp_path):
    tokens = {"vocabulary": {"special_tokens": ["<|x|>"]}, "freezing": {"trainable": {"new_tokens": True}}}
    folder = run(model={"name_or_path": cached}, adapter=LORA, **tokens)
    with pytest.raises(UserError, match="rows of new tokens, which peft alone does not load"):
        export(str(folder), str(tmp_path / "out"))


# ---- classifiers


@pytest.mark.parametrize("multi", [False, True])
def test_a_classifier_works_in_the_pipeline_alone(tmp_path, multi):
    base = save_base(tmp_path / "base", "bert")
    rows = write_rows(tmp_path / "rows.csv", multi_rows(60) if multi else labeled_rows(60))
    source = {"path": str(rows), **({"label_separator": "|"} if multi else {})}
    data = {"train": [source], "split": {"validation": 0.2, "test": 0.2}}
    train(str(write_labeled_recipe(tmp_path / "recipe.yaml", base, rows, data=data)), [])
    folder, out = tmp_path / "recipe", tmp_path / "out"
    export(str(folder), str(out))
    models = [AutoModelForSequenceClassification.from_pretrained(path) for path in (out, folder / "model")]
    assert torch.equal(*map(fixed_logits, models))
    text = "tensor kit tensor kit"
    found, expected = (pipeline("text-classification", model=str(path))(text) for path in (out, folder / "model"))
    assert found == expected
    assert "classify" in snippet(out)
    card = (out / "README.md").read_text()
    scores = read_json(folder / "scorecard.json")["sets"]
    assert f"| test | macro-F1 | – | {scores['test']['after']['f1_macro']:.3f} | – |" in card
    assert "Labels: " in card
    assert not [line.split(",")[1] for line in rows.read_text().splitlines()[1:] if line.split(",")[1] in card]


# ---- what cannot be exported, and where to


def test_runs_that_have_not_ended_well_are_refused(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such folder; expected a run directory"):
        export(str(tmp_path / "ru"), str(out))
    with pytest.raises(UserError, match="no run directory"):
        export(str(tmp_path), str(out))
    folder = run()
    manifest = read_json(folder / "manifest.json")
    for status in ("preempted", "failed", "running"):
        write_json(folder / "manifest.json", {**manifest, "status": status})
        with pytest.raises(UserError, match=f"status: {status.replace('running', 'killed')}"):
            export(str(folder), str(out))
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match="--dtype: found `bfloat`; expected one of"):
        export(str(folder), str(out), dtype="bfloat")
    (folder / "scorecard.json").unlink()
    with pytest.raises(UserError, match="expected a finished run"):
        export(str(folder), str(out))
    assert not out.exists()


def test_only_an_earlier_export_is_replaced(run, tmp_path):
    folder, other = run(), tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("my thesis")
    before = hashes(tmp_path)
    for place in (folder, folder / "model", folder / "inside", tmp_path):
        with pytest.raises(UserError, match="lie in each other"):
            export(str(folder), str(place), overwrite=True)
    with pytest.raises(UserError, match="no earlier export"):
        export(str(folder), str(other), overwrite=True)
    with pytest.raises(UserError, match="would be in does not exist"):
        export(str(folder), str(tmp_path / "no/such"))
    assert hashes(tmp_path) == before
    export(str(folder), str(tmp_path / "out"))
    with pytest.raises(UserError, match="--overwrite replaces it"):
        export(str(folder), str(tmp_path / "out"))
    export(str(folder), str(tmp_path / "out"), overwrite=True)


def test_a_full_disk_is_one_message_and_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = run()
    before = hashes(tmp_path)
    monkeypatch.setattr("kit.export.write_text", full)
    with pytest.raises(UserError, match="the disk is full"):
        export(str(folder), str(tmp_path / "out"))
    assert hashes(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if ".out" in path.name]


# ---- the Hub


class FakeHub:
    """What `HfApi` does, on nothing; notes what it was asked for."""

    def __init__(self, private=None, fault=None):
        """Begin as private or public, as nothing where None; `fault` is what an upload ends with."""
        self.private, self.fault, self.calls = private, fault, []

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private))
        self.private = private if self.private is None else self.private
        return SimpleNamespace(repo_id=name)

    def model_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.fault:
            raise self.fault
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    """A function that puts a fake Hub that can be reached in the place of the real one."""

    def put(**options):
        fake = FakeHub(**options)
        monkeypatch.setattr("kit.export.HfApi", lambda: fake)
        monkeypatch.setattr("kit.export.get_token", lambda: "a-token")
        monkeypatch.setattr("kit.export.why_offline", lambda: None)
        return fake

    return put


@pytest.mark.parametrize("public", [False, True])
def test_pushed_only_on_request_and_private_by_default(run, hub, tmp_path, capsys, public):
    folder, fake = run(), hub()
    export(str(folder), str(tmp_path / "out"))
    assert fake.calls == []
    export(str(folder), str(tmp_path / "out"), overwrite=True, push_to_hub="me/my-model", public=public)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert fake.calls == [("create", "me/my-model", not public), ("upload", "me/my-model", names)]
    card = (tmp_path / "out/README.md").read_text()
    assert "# my-model" in card
    assert 'from_pretrained("me/my-model")' in card
    assert "a-token" not in card + capsys.readouterr().out


def test_a_repository_that_is_public_gets_nothing_unasked(run, hub, tmp_path):
    folder, fake = run(), hub(private=False)
    with pytest.raises(UserError, match="is there and public: --public says"):
        export(str(folder), str(tmp_path / "out"), push_to_hub="me/my-model")
    assert [call[0] for call in fake.calls] == ["create"]
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_hub_that_does_not_take_it_is_one_message_and_the_folder_stays(run, hub, tmp_path, monkeypatch):
    folder, out = run(), tmp_path / "out"
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set; the folder .* is there, nothing was sent"):
        export(str(folder), str(out), push_to_hub="me/my-model")
    assert (out / "README.md").is_file()
    hub(fault=ConnectionError("reset\nby peer"))
    with pytest.raises(UserError, match=r"ConnectionError: reset by peer; the folder .* is there") as error:
        export(str(folder), str(out), push_to_hub="me/my-model", overwrite=True)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("kit.export.get_token", lambda: None)
    with pytest.raises(UserError, match="no token: `hf auth login`"):
        export(str(folder), str(out), push_to_hub="me/my-model", overwrite=True)
    assert (out / "model.safetensors").is_file()


def test_wrong_names_are_refused_before_anything_is_written(run, tmp_path):
    folder = run()
    with pytest.raises(UserError, match="--push-to-hub: `me/my/model` is no name"):
        export(str(folder), str(tmp_path / "out"), push_to_hub="me/my/model")
    with pytest.raises(UserError, match="--public goes with --push-to-hub"):
        export(str(folder), str(tmp_path / "out"), public=True)
    assert not (tmp_path / "out").exists()

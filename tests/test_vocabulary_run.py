"""Runs with a vocabulary of their own: from the recipe to a model that loads alone and knows its new tokens."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.check import check
from kit.errors import UserError
from kit.run import evaluate, prepare, train
from tests.harness import Fault, run_kit
from tests.material import documents

WORDS = ["embedding", "scheduler", "Größe"]  # of tests.material, each of several tokens
VOCABULARY = {"special_tokens": ["<|user|>", "<|assistant|>"], "tokens": WORDS}
ALONE = {"trainable": {"new_tokens": True}}
SHARED = Path(__file__).parents[2] / "shared" / "data"
ARCHITECTURES = {
    "gpt2": {},
    "gpt2-untied": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": True},
    "llama-untied": {"tie_word_embeddings": False},
    "gpt_neox": {"tie_word_embeddings": False},
}


@pytest.fixture
def chats(tmp_path):
    """A source of documents with the special tokens in them."""
    path = tmp_path / "chats.jsonl"
    texts = documents(120, seed=4)
    path.write_text("\n".join(json.dumps({"q": q, "a": a}) for q, a in zip(texts[::2], texts[1::2], strict=True)))
    return {"path": str(path), "template": "<|user|>{q}<|assistant|>{a}"}


@pytest.fixture
def recipe(write_recipe, chats):
    """A function that writes a recipe that extends the vocabulary."""

    def write(name="recipe", vocabulary=VOCABULARY, **sections):
        sections.setdefault("data", {"train": [chats]})
        return write_recipe(name, vocabulary=vocabulary, **sections)

    return write


def embeddings(model):
    """Copies of a model's input and output matrices."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    return [module.weight.detach().clone() for module in modules]


def test_a_run_that_adds_tokens(recipe, tmp_path, capsys):
    base = AutoTokenizer.from_pretrained(recipe_model(recipe()))
    train(str(recipe(evaluation={"prompts": ["<|user|>the kit"]})), [])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.get_vocab().items() >= base.get_vocab().items()
    for token in [*VOCABULARY["special_tokens"], *(f" {word}" for word in WORDS)]:
        assert len(tokenizer(token)["input_ids"]) == 1 < len(base(token)["input_ids"])
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.config.vocab_size == 384
    text = "<|user|>the Größe of it<|assistant|>the embedding"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "the Größe of itthe embedding"

    audit = json.loads((tmp_path / "run/vocabulary.json").read_text())
    trained = audit["texts"]["training"]
    assert trained["tokens_before"] > trained["tokens_after"]
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert trained["tokens_after"] == ledger[0]["trained"]
    tokens = {token["token"]: token for token in audit["tokens"]}
    assert tokens["<|user|>"]["occurrences"]["training"] == trained["documents"]
    assert all(row["moved"]["input"] > 0 for token in tokens.values() for row in token["rows"])
    assert set(audit["untrained"]) == {"domain"}
    out = capsys.readouterr().out
    assert "before any training" in out
    assert "Added tokens" in out


def recipe_model(path):
    import yaml

    return yaml.safe_load(Path(path).read_text())["model"]["name_or_path"]


def test_before_is_that_of_the_base_model_with_its_own_tokenizer(recipe, chats, tmp_path):
    train(str(recipe()), [])
    train(str(recipe("plain", vocabulary=None, run={"output_dir": str(tmp_path / "plain")})), [])
    extended, plain = (
        json.loads((tmp_path / folder / "scorecard.json").read_text())["sets"]["domain"] for folder in ("run", "plain")
    )
    assert extended["before"] == plain["before"]
    assert extended["after"]["bytes"] == plain["after"]["bytes"]
    assert extended["after"]["tokens"] < plain["after"]["tokens"]
    # Per token there is nothing to compare.
    assert set(extended["delta"]) == {"bits_per_byte"} < set(plain["delta"])


def test_documents_of_a_source_that_max_tokens_cuts_are_the_same_before_and_after(recipe, chats, tmp_path):
    train(str(recipe(data={"train": [{**chats, "max_tokens": 3000}]})), [])
    [figures] = json.loads((tmp_path / "run/scorecard.json").read_text())["sets"].values()
    assert figures["before"]["bytes"] == figures["after"]["bytes"]
    assert figures["before"]["documents"] == figures["after"]["documents"]
    audit = json.loads((tmp_path / "run/vocabulary.json").read_text())["texts"]["training"]
    assert audit["tokens_before"] > audit["tokens_after"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_new_rows_alone(recipe, tiny_models, tmp_path, name):
    """All else, the old rows of the same matrices included, keeps every bit, weight decay or not."""
    folder = tiny_models(name.removesuffix("-untied"), **ARCHITECTURES[name])
    training = {"max_steps": 20, "weight_decay": 0.1, "learning_rate": 1e-2, "save_steps": 10}
    changes = {"model": {"name_or_path": str(folder)}, "freezing": ALONE, "training": training}
    train(str(recipe(**changes)), [])

    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    added = json.loads((tmp_path / "run/vocabulary.json").read_text())["tokens"]
    ids = sorted(row["id"] for token in added for row in token["rows"])
    names = {id(p): n for n, p in after.named_parameters()}
    matrices = {names[id(module.weight)] for module in (after.get_input_embeddings(), after.get_output_embeddings())}
    old_parameters = dict(before.named_parameters())
    for parameter_name, parameter in after.named_parameters():
        if parameter_name not in matrices:
            assert torch.equal(parameter, old_parameters[parameter_name]), parameter_name
    for old, new in zip(embeddings(before), embeddings(after), strict=True):
        assert torch.equal(new[: len(old)], old)
    for row in (row for token in added for row in token["rows"]):
        assert row["moved"].get("output", 1) > 0
        # Where the head has rows of its own, what does not occur has no gradient.
        occurs = row["occurrences"]["training"]
        if len(matrices) == 1 or occurs > 20:
            assert row["moved"]["input"] > 0
        elif not occurs:
            assert row["moved"]["input"] == 0
    spare = [row for row in range(len(old), len(new)) if row not in ids]
    assert len({tuple(new[row].tolist()) for row in spare}) == 1  # as they were filled
    optimizer = torch.load(tmp_path / "run/checkpoints/checkpoint-20/optimizer.pt", weights_only=True)
    kept = sum(state["exp_avg"].numel() for state in optimizer["state"].values())
    assert kept == len(ids) * new.shape[1] * len(matrices)


def test_rows_and_last_blocks(recipe, tmp_path):
    path = recipe(freezing={"trainable": {"new_tokens": True, "last_blocks": 1}})
    train(str(path), [])
    before = AutoModelForCausalLM.from_pretrained(recipe_model(path)).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    moved = {name for name, old in before.items() if not torch.equal(old, after[name][: len(old)])}
    assert moved == {name for name in before if name.startswith("transformer.h.1.")}


@pytest.mark.parametrize("freezing", [None, ALONE], ids=["all", "new rows"])
def test_prepared_on_one_process_and_trained_on_two(recipe, tmp_path, freezing):
    def run(folder, processes, prepared):
        shared = {
            "model": {"name_or_path": recipe_model(recipe()), "dtype": "float64"},
            "training": {"max_steps": 4, "per_device_train_batch_size": 4 // processes},
            "freezing": freezing,
            "run": {"output_dir": str(tmp_path / folder)},
        }
        path = recipe(folder, **shared)
        if prepared:
            assert run_kit(["prepare", path]) == [0]
            assert (tmp_path / folder / "vocabulary.json").is_file()
        assert run_kit(["train", path], processes=processes) == [0] * processes
        return load_file(tmp_path / folder / "model/model.safetensors")

    one, two = run("one", 1, prepared=False), run("two", 2, prepared=True)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12)


# GPT-NeoX's head has another name in files than in memory.
@pytest.mark.parametrize(("processes", "architecture"), [(1, "gpt2"), (2, "gpt2"), (1, "gpt_neox")])
def test_killed_and_resumed_ends_bit_identical(recipe, tiny_models, tmp_path, processes, architecture):
    model = {"name_or_path": str(tiny_models(architecture, **ARCHITECTURES[architecture]))}
    changes = {"model": model, "freezing": ALONE, "training": {"max_steps": 6, "save_steps": 2, "weight_decay": 0.1}}
    straight = recipe("straight", **changes, run={"output_dir": str(tmp_path / "straight")})
    killed = recipe("killed", **changes, run={"output_dir": str(tmp_path / "killed")})
    assert run_kit(["train", straight], processes) == [0] * processes
    fault = Fault("kit.training.trainer:KitTrainer.training_step", call=5)
    assert -9 in run_kit(["train", killed], processes, fault)
    assert run_kit(["train", killed], processes) == [0] * processes
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    audits = [json.loads((tmp_path / name / "vocabulary.json").read_text()) for name in ("straight", "killed")]
    assert audits[0] == audits[1]


def test_a_finished_run_is_measured_and_continued_with_its_own_tokens(recipe, chats, tmp_path, capsys):
    train(str(recipe()), [])
    after = json.loads((tmp_path / "run/scorecard.json").read_text())["sets"]["domain"]["after"]
    evaluate(str(tmp_path / "run"), [], None, str(tmp_path / "figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text())["sets"]["domain"] == after
    capsys.readouterr()
    # The same tokens once more: nothing to add.
    again = recipe(
        "again", model={"name_or_path": str(tmp_path / "run/model")}, run={"output_dir": str(tmp_path / "b")}
    )
    train(str(again), [])
    assert "in the tokenizer already" in capsys.readouterr().out
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name / "model") for name in ("run", "b"))
    assert first.get_vocab() == second.get_vocab()
    scores = json.loads((tmp_path / "b/scorecard.json").read_text())["sets"]["domain"]
    assert scores["before"]["bits_per_byte"] == pytest.approx(after["bits_per_byte"], abs=1e-9)


def test_evaluating_a_recipe_measures_the_base_model(recipe, tmp_path):
    path = recipe()
    train(str(path), [])
    evaluate(str(path), [], None, str(tmp_path / "figures.json"))
    before = json.loads((tmp_path / "run/scorecard.json").read_text())["sets"]["domain"]["before"]
    assert json.loads((tmp_path / "figures.json").read_text())["sets"]["domain"] == before


def test_padding_rows_are_used_first(recipe, tiny_models, tmp_path):
    from tests.material import make_model, make_tokenizer

    folder = tmp_path / "padded"
    make_tokenizer().save_pretrained(folder)
    make_model(vocab_size=352).save_pretrained(folder)
    train(str(recipe(model={"name_or_path": str(folder)})), [])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.vocab_size == 352


def test_a_fresh_model_takes_words_too(recipe, tmp_path):
    fresh = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}
    model = {"name_or_path": None, "from_config": fresh, "tokenizer": {"vocab_size": 300}}
    train(str(recipe(model=model)), [])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert len(tokenizer(" scheduler")["input_ids"]) == 1


def test_roles_are_in_the_saved_model(recipe, tmp_path):
    vocabulary = {
        "special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"],
        "roles": {"user": "<|user|>", "assistant": "<|assistant|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"},
    }
    train(str(recipe(vocabulary=vocabulary)), [])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    chat = [{"role": "user", "content": "the kit"}, {"role": "assistant", "content": "reads"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|end|><|user|>the kit<|assistant|>reads<|end|>"


def test_check_shows_the_new_tokens_and_writes_nothing(recipe, tmp_path, capsys):
    check(str(recipe(freezing=ALONE)), [], probe=True)
    out = capsys.readouterr().out
    assert "Added tokens" in out
    assert "embeddings of 384 rows" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", ["stories260K/hf", "base_novels"])
def test_real_models(recipe, tmp_path, base):
    folder = SHARED / base
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    changes = {"model": {"name_or_path": str(folder)}, "freezing": ALONE}
    train(str(recipe(**changes, training={"max_steps": 20, "weight_decay": 0.1})), [])
    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    for old, new in zip(embeddings(before), embeddings(after), strict=True):
        assert torch.equal(new[: len(old)], old)
    tokens = json.loads((tmp_path / "run/vocabulary.json").read_text())["tokens"]
    assert all(row["moved"]["input"] > 0 for token in tokens for row in token["rows"])


def test_a_run_holds_its_own_words(recipe, chats, tmp_path):
    """Whatever becomes of the file that they were read from."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join([*WORDS, "checkpoint    # 5 times", "attention", "vocabulary"]))
    path = recipe(vocabulary={"tokens": {"from_file": str(words)}})
    train(str(path), [])
    words.unlink()
    again = tmp_path / "again"
    train(str(tmp_path / "run/recipe.yaml"), [f"run.output_dir={again}"])
    first, second = (AutoTokenizer.from_pretrained(folder / "model") for folder in (tmp_path / "run", again))
    assert first.get_vocab() == second.get_vocab()
    words.write_text("\n".join([*WORDS, "checkpoint", "attention", "tensor"]))
    audit = (tmp_path / "run/vocabulary.json").read_bytes()
    for command in (train, prepare):
        with pytest.raises(UserError, match=r'vocabulary.tokens: 6 entries -> 6: without "vocabulary"; with "tensor"'):
            command(str(path), [])
    assert (tmp_path / "run/vocabulary.json").read_bytes() == audit


def test_text_beyond_a_share_is_not_counted(recipe, chats, tmp_path):
    """The audit is of what an epoch holds: a word that stands only in what is left over never occurs."""
    rare = tmp_path / "rare.jsonl"
    texts = [*documents(200, seed=11), "zyxwvu here", "and zyxwvu there"]
    rare.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = {"train": [chats], "replay": {"sources": [{"path": str(rare)}], "share": 0.02}}
    train(str(recipe(vocabulary={"tokens": ["zyxwvu", *WORDS]}, data=data)), [])
    audit = json.loads((tmp_path / "run/vocabulary.json").read_text())
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert ledger[1]["dropped"]
    assert audit["never_in_training"] == ["zyxwvu"]
    assert audit["texts"]["training"]["documents"] < sum(row["documents"] for row in ledger)


@pytest.mark.parametrize("extra", [50, 100_000])
def test_max_tokens_that_only_the_extended_tokenizer_stays_below(recipe, chats, tmp_path, extra):
    prepare(str(recipe("all")), [])
    texts = json.loads((tmp_path / "run/vocabulary.json").read_text())["texts"]
    tokens = sum(figures["tokens_after"] for figures in texts.values()) + extra
    output = {"output_dir": str(tmp_path / "limited")}
    train(str(recipe("limited", data={"train": [{**chats, "max_tokens": tokens}]}, run=output)), [])
    limited = json.loads((tmp_path / "limited/vocabulary.json").read_text())["texts"]
    assert limited == texts


def test_untrained_figures_are_those_of_each_beginning(recipe, tmp_path):
    """They are kept in the store, and must not be taken from there for another beginning or seed."""
    found = []
    for number, changes in enumerate([{}, {"initialize": "zeros"}, {"initialize": "random"}, {"initialize": "random"}]):
        output = {"output_dir": str(tmp_path / str(number))}
        training = {"seed": number // 3}
        prepare(str(recipe(str(number), vocabulary={**VOCABULARY, **changes}, run=output, training=training)), [])
        untrained = json.loads((tmp_path / str(number) / "vocabulary.json").read_text())["untrained"]
        found.append(untrained["domain"]["bits_per_byte"])
    assert len(set(found)) == 4


def test_processes_with_different_rows_are_refused(recipe, tmp_path):
    output = tmp_path / "out.txt"
    assert run_kit(["train", recipe()], processes=2, change=_other_rows_on_rank_1, output=output) == [2, 2]
    assert "the same new embeddings" in output.read_text()


def _other_rows_on_rank_1():
    from kit.tasks import causal_lm

    extend = causal_lm.extend_model

    def extend_otherwise(model, *args):
        extend(model, *args)
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                model.get_input_embeddings().weight[320] += 1

    causal_lm.extend_model = extend_otherwise

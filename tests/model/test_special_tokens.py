"""What stands before, after and between documents follows from one rule, is said with its reason, and is saved."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kit.errors import UserError
from kit.model.tokenizer import (
    choose_special_tokens,
    describe_special_tokens,
    encoder,
    load_tokenizer,
    special_tokens,
    tokenizer_key,
)
from kit.recipe.models import ModelSection
from kit.run import train
from kit.tasks.causal_lm import token_coding
from tests.material import WORDS, documents, make_model, make_tokenizer

CONFIG_EOS = "`eos_token_id` of the model's configuration, as the tokenizer has no EOS"
NO_BOS, NO_PAD = "EOS, as there is no BOS", "EOS, as there is no pad token"


def words_tokenizer(*names, **special):
    """A tokenizer of whole words, with `names` in its vocabulary and the special tokens that are given."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["[UNK]", *names, *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


GPT2 = ("<|endoftext|>",), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
LLAMA = ("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}
QWEN = ("<|endoftext|>", "<|im_end|>"), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
BERT = ("[PAD]", "[CLS]", "[SEP]"), {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
BOS_ONLY = ("<s>",), {"bos_token": "<s>"}
UNNAMED = ("<|end_of_text|>", "</s>"), {}
BARE = ("<a>", "<b>"), {}

CASES = {
    # tokenizer, `model.eos_token`, `eos_token_id` of the configuration → context, EOS, pad, each with its reason
    "GPT-2": (GPT2, None, None, ("<|endoftext|>", "BOS"), ("<|endoftext|>", "EOS"), ("<|endoftext|>", NO_PAD)),
    "Llama, no pad": (LLAMA, None, 5, ("<s>", "BOS"), ("</s>", "EOS"), ("</s>", NO_PAD)),
    "Llama, EOS by the recipe": (
        LLAMA, "corpus", 5, ("<s>", "BOS"), ("corpus", "`model.eos_token`"), ("corpus", NO_PAD),
    ),
    "Qwen, no BOS": (QWEN, None, None, ("<|im_end|>", NO_BOS), ("<|im_end|>", "EOS"), ("<|endoftext|>", "pad token")),
    "BERT, CLS and SEP only": (
        BERT, None, None, ("[SEP]", NO_BOS), ("[SEP]", "SEP, as neither tokenizer nor configuration has an EOS"),
        ("[PAD]", "pad token"),
    ),
    "BERT with a configuration": (BERT, None, 2, ("[CLS]", NO_BOS), ("[CLS]", CONFIG_EOS), ("[PAD]", "pad token")),
    "one EOS in the configuration": (BOS_ONLY, None, 2, ("<s>", "BOS"), ("the", CONFIG_EOS), ("the", NO_PAD)),
    "several in the configuration": (UNNAMED, None, [2, 1], ("</s>", NO_BOS), ("</s>", CONFIG_EOS), ("</s>", NO_PAD)),
    "none of the tokenizer's in the configuration": (
        BOS_ONLY, None, 50_256, ("<s>", "BOS"), ("<s>", "BOS, as there is neither EOS nor SEP"), ("<s>", NO_PAD),
    ),
    "no EOS in the configuration": (
        BOS_ONLY, None, [], ("<s>", "BOS"), ("<s>", "BOS, as there is neither EOS nor SEP"), ("<s>", NO_PAD),
    ),
    "a usual name": (
        UNNAMED, None, None, ("<|end_of_text|>", NO_BOS),
        ("<|end_of_text|>", "by its name, as the tokenizer has no EOS, SEP or BOS"), ("<|end_of_text|>", NO_PAD),
    ),
    "nothing, EOS by the recipe": (BARE, "<b>", None, ("<b>", NO_BOS), ("<b>", "`model.eos_token`"), ("<b>", NO_PAD)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    (names, special), eos_token, config_eos, *expected = CASES[case]
    tokenizer = words_tokenizer(*names, **special)
    for _ in range(2):
        chosen = choose_special_tokens(tokenizer, eos_token, config_eos)
        found = [(part.token, part.reason) for part in (chosen.context, chosen.eos, chosen.pad)]
        assert found == expected
    vocabulary = tokenizer.get_vocab()
    assert all(part.id == vocabulary[part.token] for part in (chosen.context, chosen.eos, chosen.pad))


def test_nothing_to_end_documents_with():
    names, special = BARE
    with pytest.raises(UserError, match=r"has no EOS, SEP or BOS token .*</s>.* name one .* `model\.eos_token`"):
        choose_special_tokens(words_tokenizer(*names, **special))


@pytest.mark.parametrize(
    ("name", "hint"), [("<im_end>", "did you mean `<|im_end|>`?"), ("tokn", "did you mean `token`?"), ("ж" * 9, "")]
)
def test_unknown_eos_of_a_recipe_names_the_nearest(name, hint):
    names, special = QWEN
    with pytest.raises(UserError) as error:
        choose_special_tokens(words_tokenizer(*names, **special), name)
    assert str(error.value).startswith("model.eos_token: ")
    assert f"no token `{name}`" in str(error.value)
    assert hint in str(error.value)


# ---- what is loaded, printed and saved


@pytest.fixture
def load(tmp_path):
    """A function that saves a tokenizer beside a configuration and loads it as a recipe would."""

    def loaded(tokenizer, stored=None, **keys):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        values = {"model_type": "llama", **(stored or {})}
        (folder / "config.json").write_text(json.dumps(values))
        return load_tokenizer(ModelSection(name_or_path=str(folder), **keys), tmp_path, lambda: (), lambda: "")

    return loaded


@pytest.mark.parametrize("case", CASES)
def test_tokenizer_gets_the_eos_and_keeps_it_when_it_is_saved(load, tmp_path, case):
    """Naming a token without registering it gives a tokenizer that reads text differently once it was saved."""
    (names, special), eos_token, config_eos, *expected = CASES[case]
    tokenizer = load(words_tokenizer(*names, **special), {"eos_token_id": config_eos}, eos_token=eos_token)
    assert tokenizer.eos_token == expected[1][0]
    assert len(tokenizer) == 1 + len(names) + len(set(WORDS))
    coding = token_coding(tokenizer)
    assert [coding.context_token_id, coding.eos_token_id, coding.pad_token_id] == [
        tokenizer.convert_tokens_to_ids(token) for token, _ in expected
    ]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.eos_token == tokenizer.eos_token
    assert tokenizer_key(again) == tokenizer_key(tokenizer)
    texts = [*documents(20, seed=3), *names, " ".join(names), "the </s> corpus", ""]
    assert encoder(again)(texts) == encoder(tokenizer)(texts)


def test_description_gives_every_reason(load, capsys):
    names, special = BERT
    describe_special_tokens(load(words_tokenizer(*names, **special), {"eos_token_id": None}))
    printed = capsys.readouterr().out
    assert "before each document [SEP] (EOS, as there is no BOS), never scored; " in printed
    assert "after it [SEP] (SEP, as neither tokenizer nor configuration has an EOS), learned; " in printed
    assert "rows are filled up with [PAD] (pad token), masked by position" in printed


def test_eos_of_the_configuration_is_the_one_that_is_written(load):
    """Llama's class says 2 where a `config.json` says nothing; here that is the word `the`."""
    names, special = BOS_ONLY
    assert load(words_tokenizer(*names, **special)).eos_token == "<s>"
    assert load(words_tokenizer(*names, **special), {"eos_token_id": 2}).eos_token == "the"
    in_recipe = {"eos_token_id": 3}
    assert load(words_tokenizer(*names, **special), {"eos_token_id": 2}, config=in_recipe).eos_token == WORDS[1]
    nested = {"text_config": {"eos_token_id": 2}}
    assert load(words_tokenizer(*names, **special), nested).eos_token == "the"


def test_key_changes_with_the_eos(load):
    names, special = LLAMA
    keys = [tokenizer_key(load(words_tokenizer(*names, **special), eos_token=eos)) for eos in (None, "<s>", "corpus")]
    assert len(set(keys)) == 3
    assert tokenizer_key(load(words_tokenizer(*names, **special), eos_token="</s>")) == keys[0]


def test_choice_made_at_loading_is_the_one_that_is_used(load):
    names, special = LLAMA
    tokenizer = load(words_tokenizer(*names, **special), eos_token="corpus")
    assert special_tokens(tokenizer).eos.reason == "`model.eos_token`"
    assert special_tokens(make_tokenizer()).eos.reason == "EOS"


def test_trained_tokenizer_can_end_documents_otherwise(tmp_path):
    section = ModelSection(from_config={"model_type": "gpt2"}, tokenizer={"vocab_size": 300}, eos_token="a")
    tokenizer = load_tokenizer(section, tmp_path, lambda: documents(50, seed=7), lambda: "documents")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "a")


def test_run_learns_the_eos_and_the_saved_model_stops_there(tmp_path, write_recipe):
    """Tokenizer and configuration of the base model say nothing of an end."""
    folder = tmp_path / "base"
    tokenizer = words_tokenizer("<s>", "</s>", bos_token="<s>")
    make_model("llama", len(tokenizer), bos_token_id=1, eos_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = {"name_or_path": str(folder), "eos_token": "</s>"}
    train(str(write_recipe(model=model, training={"max_steps": 40, "learning_rate": 1e-2})), [])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").eos_token == "</s>"
    assert (saved.config.eos_token_id, saved.generation_config.eos_token_id) == (2, [2])
    scores = json.loads((tmp_path / "run/scorecard.json").read_text())["sets"]["domain"]
    assert scores["after"]["eos_nats"] < scores["before"]["eos_nats"]

"""Classifiers of decoders and encoders: a head of their own, labels in the configuration, the last token of a text."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from kit.errors import UserError
from kit.generate import generate
from kit.model.adapter import add_adapter, describe_adapter
from kit.model.adapter_files import Adapter, base_facts, load_adapter, merge_adapter
from kit.model.classifier import (
    check_classifier,
    classifier_positions,
    fold_temperature,
    load_classifier,
    needs_positions,
)
from kit.model.embeddings import resize_and_initialise
from kit.model.heads import head_modules, head_names, logits_layer
from kit.model.loading import load_adapted, load_causal_lm
from kit.model.parts import adapter_names
from kit.model.saving import fixed_logits, save_model, saved_model_difference
from kit.model.sequence_encoding import prepare_for_pipeline, sequence_encoder
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.adapter import AdapterSection, check_adapter
from kit.recipe.models import ModelSection
from kit.recipe.vocabulary import VocabularySection
from tests.material import make_tokenizer
from tests.model.models import MODELS

NAMES = ("ham", "spam", "no")
LORA = {"type": "lora", "r": 4}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320,
    "pad_token_id": 0,
}  # fmt: skip
DECODER = {**SMALL, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
ENCODERS = {
    "bert": SMALL,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 320},
    "roberta": {**SMALL, "max_position_embeddings": 66},
    "modernbert": {**SMALL, "cls_token_id": 0, "sep_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
}
DECODERS = {
    "opt": {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "mistral": {**DECODER, "num_key_value_heads": 1},
    "gemma": {**DECODER, "num_key_value_heads": 1, "head_dim": 16},
    **dict.fromkeys(["gpt2", "gpt2-untied", "gpt_neox", "llama", "llama-tied", "qwen3", "gemma3"]),
}
HEADS = {
    "bert": ("bert.pooler", "classifier"), "distilbert": ("pre_classifier", "classifier"), "roberta": ("classifier",),
    "modernbert": ("head", "classifier"), "deberta-v2": ("pooler", "classifier"),
}  # fmt: skip
BOTH = [*ENCODERS, *DECODERS]
SOME = ["gpt2", "llama", "gpt_neox", *ENCODERS]


def build(kind):
    """A tiny language model, as it would be pretrained."""
    if kind in MODELS and kind != "bert":
        return MODELS[kind]()
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(kind, **(ENCODERS.get(kind) or DECODERS[kind])))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A function from an architecture to the folder of a language model with its tokenizer."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def load(tokenizer):
    def load(folder, names=NAMES, multi=False, seed=3, **keys):
        return load_classifier(ModelSection(name_or_path=str(folder), **keys), tokenizer, names, multi, seed)

    return load


@pytest.fixture
def refusal(load):
    def message(*args, **keys):
        with pytest.raises(UserError) as error:
            load(*args, **keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def batch(model, rows, side="right"):
    """Rows as a batch, with what the model has to be told."""
    pad, width = model.config.pad_token_id, max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    told = {"input_ids": ids, "attention_mask": mask}
    return told | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if needs_positions(model.config) else {})


@torch.no_grad()
def logits(model, rows, side="right"):
    return model.eval()(**batch(model, rows, side)).logits


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


def trained(model, steps=8):
    """Change what trains, as training does."""
    rows = rows_of(3, 9, 5, 7)
    labels = torch.arange(len(rows)) % model.config.num_labels
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(**batch(model, rows)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# ---- from a language model


@pytest.mark.parametrize("kind", BOTH)
def test_a_language_model_gets_a_head_and_keeps_all_else(kind, folders, load, capsys):
    model, new = load(folders(kind))
    stored = load_file(folders(kind) / "model.safetensors")
    ours = model.state_dict()
    assert set(new) <= set(head_names(model))
    assert set(ours) - set(new) <= set(stored)
    assert all(torch.equal(ours[name], stored[name]) for name in ours if name not in new)
    assert logits(model, rows_of(4, 2)).shape == (2, 3)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert all(name in " ".join(out.split()) for name in new)
    assert head_modules(model) == HEADS.get(kind, ("score",))


def test_labels_are_in_the_configuration(folders, load):
    for multi, problem in ((False, "single_label_classification"), (True, "multi_label_classification")):
        config = load(folders("gpt2"), multi=multi)[0].config
        assert (config.num_labels, config.problem_type, config.pad_token_id) == (3, problem, 0)
        assert config.id2label == {0: "ham", 1: "spam", 2: "no"}
        assert config.label2id == {"ham": 0, "spam": 1, "no": 2}
        assert config.use_cache


@pytest.mark.parametrize("kind", SOME)
def test_a_new_head_depends_on_the_seed_alone(kind, folders, load):
    torch.manual_seed(11)
    first, new = load(folders(kind))
    torch.rand(1000)
    state = torch.random.get_rng_state()
    second, _ = load(folders(kind), names=("x", "y", "z"))
    other, _ = load(folders(kind), seed=4)
    assert new
    for name in new:
        weights = [dict(model.named_parameters())[name] for model in (first, second, other)]
        assert torch.equal(weights[0], weights[1])
        drawn = weights[0].std() > 0
        assert drawn == ("bias" not in name)
        assert torch.equal(weights[0], weights[2]) != drawn
        assert weights[0].std() < 0.5
    assert len(state)


def test_what_else_is_missing_is_refused(folders, refusal, load, tmp_path, capsys):
    build("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in whole.items() if key != name}, file, metadata={"format": "pt"})
    message = refusal(tmp_path)
    assert f"do not fit its architecture: missing: {name}" in message
    assert "pooler" not in message
    assert "classifier" not in message
    save_file({**whole, name: torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    assert f"mismatched: {name}" in refusal(tmp_path)
    save_file({**whole, "bert.extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    load(tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "unexpected: bert.extra.weight" in out
    assert "cls.predictions" not in out


def test_keys_of_the_recipe(folders, load):
    model, _ = load(folders("gpt2"), dtype="float64", attn_implementation="eager", config={"attn_pdrop": 0.3})
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.config._attn_implementation == "eager"
    assert model.transformer.h[0].attn.attn_dropout.p == 0.3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_labels": 2}, ["model.config.num_labels: found 2; expected 3", "`ham`, `spam`, `no`"]),
        ({"id2label": {0: "ham", 1: "no", 2: "spam"}}, ["model.config.id2label: found", "2: 'no'}"]),
        ({"label2id": {"ham": 0}}, ["model.config.label2id: found {'ham': 0}"]),
        ({"problem_type": "regression"}, ["found regression; expected single_label_classification"]),
        ({"atn_pdrop": 0.1}, ["model.config.atn_pdrop", "did you mean `attn_pdrop`"]),
    ],
)
def test_a_configuration_that_disagrees_with_the_data(folders, refusal, config, words):
    message = refusal(folders("gpt2"), config=config)
    assert all(word in message for word in words), message


def test_a_configuration_that_agrees_with_the_data(folders, load):
    config = {"num_labels": 3, "id2label": {"0": "ham", "1": "spam", "2": "no"}}
    assert load(folders("gpt2"), config=config)[0].config.id2label == {0: "ham", 1: "spam", 2: "no"}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "roberta"])
def test_a_fresh_classifier(kind, tokenizer):
    sizes = {"gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16}, "llama": DECODER, "bert": SMALL, "roberta": SMALL}[kind]
    section = ModelSection(from_config={"model_type": kind, **sizes, "num_labels": 2}, tokenizer="any")
    torch.manual_seed(1)
    model, new = load_classifier(section, tokenizer, ("a", "b"), False, 5)
    torch.rand(7)
    again, _ = load_classifier(section, tokenizer, ("a", "b"), False, 5)
    assert new == tuple(name for name, _ in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (model.config.num_labels, model.config.vocab_size, model.config.pad_token_id) == (2, 320, 0)
    assert check_classifier(section).hidden_size == model.config.hidden_size
    with pytest.raises(UserError, match=r"model\.from_config\.num_labels: found 2; expected 3"):
        load_classifier(section, tokenizer, NAMES, False, 5)


def test_architectures_without_a_classifier(tokenizer, refusal, tmp_path):
    section = ModelSection(from_config={"model_type": "xglm"}, tokenizer="any")
    with pytest.raises(UserError, match="`xglm` has no sequence classifier"):
        load_classifier(section, tokenizer, NAMES, False, 0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xglm"}))
    expected = "is of type `xglm`, which has no sequence classifier; `task: sequence-classification` needs"
    assert expected in refusal(tmp_path)
    with pytest.raises(UserError, match=expected):
        check_classifier(section_of(tmp_path))


def section_of(folder):
    return ModelSection(name_or_path=str(folder))


def test_what_the_configuration_alone_tells(folders, tmp_path):
    assert check_classifier(section_of(folders("bert"))).model_type == "bert"
    build("gpt2").save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(UserError, match="is cut off or damaged"):
        check_classifier(section_of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 320}))
    with pytest.raises(UserError, match=r"config\.pad_token_id: found 320"):
        check_classifier(section_of(tmp_path))


def test_positions_of_a_text():
    assert classifier_positions(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    # Positions begin behind the padding token's id, which is 1: BERT's 512 in RoBERTa's table of 514.
    assert classifier_positions(AutoConfig.for_model("roberta", max_position_embeddings=514)) == 512
    assert classifier_positions(AutoConfig.for_model("mpnet", max_position_embeddings=514)) == 512
    assert classifier_positions(AutoConfig.for_model("bert")) == 512
    assert classifier_positions(AutoConfig.for_model("bloom")) is None
    assert classifier_positions(AutoConfig.for_model("xlnet")) is None


def test_a_text_of_all_positions_can_be_read(folders, load):
    for kind in ("roberta", "gpt2", "bert"):
        model, _ = load(folders(kind))
        longest = classifier_positions(model.config)
        assert logits(model, rows_of(longest)).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, rows_of(longest + 1))


def test_another_models_padding_token_where_positions_are_counted_from_it(refusal, tmp_path):
    AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("roberta", **{**SMALL, "pad_token_id": 1, "max_position_embeddings": 66})
    ).save_pretrained(tmp_path)
    assert "fills up with `<eos>` (0)" in refusal(tmp_path)


# ---- the last token of a text


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_read_the_last_token_whatever_the_padding(kind, side, folders, load):
    """Padding is EOS here, and some texts hold it, or end with it: alone and in a batch the token before is read."""
    model, _ = load(folders(kind), dtype="float64")
    rows = rows_of(1, 3, 9, 5)
    rows += [[*rows[1], 0], [*rows[2], 0, 0], [5, 0, 6], [0, 5, 6]]
    assert needs_positions(model.config)
    alone = torch.cat([logits(model, [row]) for row in rows])
    assert (logits(model, rows, side) - alone).abs().max() < 1e-9
    assert (logits(model, [rows[4]]) - logits(model, [rows[1]])).abs().max() < 1e-12
    other = copy.deepcopy(rows)
    other[2][-1] += 1
    assert (logits(model, other)[2] - alone[2]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_do_not_see_padding(kind, folders, load):
    model, _ = load(folders(kind), dtype="float64")
    rows = rows_of(1, 3, 9, 5)
    assert not needs_positions(model.config)
    alone = torch.cat([logits(model, [row]) for row in rows])
    assert (logits(model, rows) - alone).abs().max() < 1e-9


def test_the_row_of_eos_trains_where_it_pads(tokenizer, tmp_path):
    model = MODELS["llama"](pad_token_id=0)
    model.save_pretrained(tmp_path)
    model, _ = load_classifier(section_of(tmp_path), tokenizer, NAMES, False, 0)
    model(**batch(model, [[5, 0, 6], [7, 8]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


# ---- from a classifier


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert"])
def test_a_classifier_of_the_same_labels_keeps_its_head(kind, folders, load, tmp_path, capsys):
    model = trained(load(folders(kind))[0])
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    rows = rows_of(3, 5, 8)
    again, new = load(tmp_path, seed=9)
    assert new == ()
    assert torch.equal(logits(again, rows), logits(model, rows))
    assert "head: kept" in capsys.readouterr().out
    moved, new = load(tmp_path, names=("no", "ham", "spam"))
    assert new == ()
    assert torch.equal(logits(moved, rows), logits(model, rows)[:, [2, 0, 1]])
    assert moved.config.id2label == {0: "no", 1: "ham", 2: "spam"}
    assert "put into the order of the data's" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("names", [("ham", "spam", "maybe"), ("ham", "spam"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "modernbert"])
def test_a_classifier_of_other_labels_gets_a_new_head_and_says_so(kind, names, folders, load, tmp_path, capsys):
    model = trained(load(folders(kind))[0])
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    other, new = load(tmp_path, names=names)
    path, layer = logits_layer(other)
    assert new == tuple(f"{path}.{name}" for name, _ in layer.named_parameters())
    out = " ".join(capsys.readouterr().out.split())
    assert "warning" in out
    assert all(f"`{name}`" in out for name in (*NAMES, *names))
    before = model.state_dict()
    for name, weight in other.state_dict().items():
        assert name in new or torch.equal(weight, before[name]), name
    assert 0 < layer.weight.std() < 0.3
    assert torch.equal(logits_layer(load(tmp_path, names=names)[0])[1].weight, layer.weight)
    assert not torch.equal(logits_layer(load(tmp_path, names=names, seed=4)[0])[1].weight, layer.weight)


def test_a_causal_lm_with_new_tokens_becomes_a_classifier_with_all_its_rows(folders, tokenizer, tmp_path):
    extended, lm = copy.deepcopy(tokenizer), build("gpt2")
    section = VocabularySection(special_tokens=["<|x|>", "<|y|>"], roles={"pad_token": "<|x|>"})
    extension = extend_tokenizer(extended, section, "gpt2")
    resize_and_initialise(lm, extension, len(extended), section.initialize, section.pad_to_multiple_of, 0)
    extended.pad_token = "<|x|>"
    save_model(lm, extended, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    model, _ = load_classifier(section_of(tmp_path), saved, NAMES, False, 0)
    assert torch.equal(model.get_input_embeddings().weight, lm.get_input_embeddings().weight)
    assert model.config.pad_token_id == extended.convert_tokens_to_ids("<|x|>") >= 320


# ---- saved, calibrated, and used without the kit


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_a_pipeline_alone_gives_the_models_probabilities(kind, multi, folders, load, tokenizer, tmp_path):
    model, own = trained(load(folders(kind), multi=multi)[0]), copy.deepcopy(tokenizer)
    prepare_for_pipeline(own, 12, "head", model.config)
    save_model(model, own, tmp_path)
    assert saved_model_difference(model, tmp_path) == 0.0
    texts = ["the kit reads a corpus", "layer", " ".join(["tensor gradient optimizer"] * 9), "loss batch<eos>", "no"]
    rows = [ids for ids, _, _ in sequence_encoder(own, 12, "head")(texts)]
    ours = torch.cat([logits(model, [row]) for row in rows])
    ours = ours.sigmoid() if multi else ours.softmax(-1)
    alone = pipeline("text-classification", str(tmp_path), top_k=None)
    for options in ({}, {"batch_size": 5}, {"batch_size": 2}):
        for row, found in zip(ours, alone(texts, truncation=True, **options), strict=True):
            scores = {each["label"]: each["score"] for each in found}
            assert scores.keys() == set(NAMES)
            torch.testing.assert_close(torch.tensor([scores[name] for name in NAMES]), row, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_a_temperature_becomes_a_part_of_the_model(kind, folders, load, tmp_path, tokenizer):
    model = trained(load(folders(kind), dtype="float64")[0])
    rows = rows_of(3, 5)
    before = logits(model, rows)
    fold_temperature(model, 2.5)
    torch.testing.assert_close(logits(model, rows), before / 2.5, rtol=0, atol=1e-12)
    adapted = trained(add_adapter(load(folders(kind), dtype="float64")[0], AdapterSection(**LORA)).get_base_model())
    before = logits(adapted, rows)
    original = [p.clone() for name, p in adapted.named_parameters() if "original_module" in name]
    fold_temperature(adapted, 0.5)
    torch.testing.assert_close(logits(adapted, rows), before / 0.5, rtol=0, atol=1e-12)
    after = [p for name, p in adapted.named_parameters() if "original_module" in name]
    assert original
    assert all(torch.equal(a, b) for a, b in zip(original, after, strict=True))


def test_a_temperature_where_the_last_layer_cannot_be_told(folders, load):
    names = [f"label {number}" for number in range(32)]
    model, _ = load(folders("roberta"), names=names)
    with pytest.raises(UserError, match=r"32 outputs.*found classifier\.dense, classifier\.out_proj"):
        fold_temperature(model, 2.0)


def test_a_changed_head_is_noticed(folders, load, tokenizer, tmp_path):
    model, _ = load(folders("llama"))
    save_model(model, tokenizer, tmp_path)
    with torch.no_grad():
        model.score.weight[1, 2] += 0.5
    with pytest.raises(RuntimeError, match="other logits than the model in memory"):
        saved_model_difference(model, tmp_path)


def test_generate_says_that_it_is_a_classifier(folders, load, tokenizer, tmp_path):
    save_model(load(folders("gpt2"))[0], tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"is a classifier.*`kit predict`"):
        generate(str(tmp_path), "the", revision=None, max_length=None, max_new_tokens=3)


# ---- adapters


@pytest.mark.parametrize("kind", ["gpt2-untied", "llama-tied", "gpt_neox", "opt", *ENCODERS])
def test_an_adapter_trains_the_whole_head_and_is_saved_loaded_and_merged(kind, folders, load, tokenizer, tmp_path):
    section = section_of(folders(kind))
    model, new = load(folders(kind))
    facts, before = base_facts(model, section), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert facts.fingerprint == base_facts(load(folders(kind), seed=77, names=NAMES[:2])[0]).fingerprint
    head, modules = head_names(model), head_modules(model)
    torch.manual_seed(0)
    adapted = add_adapter(model, AdapterSection(**LORA))
    plain = adapted.get_base_model()
    trainable = {name for name, p in plain.named_parameters() if p.requires_grad}
    parts = [(m, name.removeprefix(f"{m}.")) for name in head for m in modules if name.startswith(f"{m}.")]
    copies = {f"{m}.modules_to_save.default.{inner}" for m, inner in parts}
    assert len(copies) == len(head)
    assert copies <= trainable
    assert trainable <= set(adapter_names(plain))
    assert all("lora_" in name for name in trainable - copies)
    assert not [name for name in trainable if "lora_" in name and any(name.startswith(f"{m}.") for m in modules)]
    starts = {name: p.detach().clone() for name, p in plain.named_parameters() if name in copies}
    trained(plain)
    now = dict(plain.named_parameters())
    assert all(not torch.equal(now[name], start) for name, start in starts.items())
    for name, weight in before.items():
        m = next((m for m in modules if name.startswith(f"{m}.")), None)
        own = f"{m}.original_module.{name.removeprefix(f'{m}.')}" if m else name
        found = now.get(own, now.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"))
        assert torch.equal(found, weight), name

    rows = rows_of(3, 6)
    expected = logits(plain, rows)
    save_model(plain, tokenizer, tmp_path / "model", Adapter(adapted, facts))
    assert saved_model_difference(plain, tmp_path / "model", section) == 0.0
    loaded = load_adapted(tmp_path / "model", section)
    assert torch.equal(logits(loaded.get_base_model(), rows), expected)
    assert loaded.get_base_model().config.id2label == dict(enumerate(NAMES))
    # Another head at random in the base is none of the adapter's business.
    again = load_adapter(load(folders(kind), seed=99)[0], tmp_path / "model")
    assert torch.equal(logits(again.get_base_model(), rows), expected)
    used, new = load(tmp_path / "model")
    assert new == ()
    assert torch.equal(logits(used, rows), expected)

    merged, difference = merge_adapter(loaded)
    assert difference < 1e-4
    save_model(merged, tokenizer, tmp_path / "merged")
    assert saved_model_difference(merged, tmp_path / "merged") == 0.0
    assert list(merged.state_dict()) == list(load(folders(kind))[0].state_dict())
    torch.testing.assert_close(logits(load(tmp_path / "merged")[0], rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_beside_a_base_in_4_bits_the_head_is_not_rounded(kind, folders, load, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr("kit.model.quantization._has_device", lambda: True)
    section = ModelSection(name_or_path=str(folders(kind)), load_in_4bit=True)
    model, new = load(folders(kind), load_in_4bit=True)
    packed = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert packed
    assert not packed & set(head_names(model))
    plain = dict(load(folders(kind))[0].named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters() if name in new)
    facts = base_facts(model, section)
    adapter = Adapter(add_adapter(model, AdapterSection(**LORA)), facts)
    expected = logits(trained(model), rows_of(3, 5))
    save_model(model, tokenizer, tmp_path, adapter)
    assert saved_model_difference(model, tmp_path, section) == 0.0
    merged, _ = merge_adapter(load_adapted(tmp_path, section, dequantize=True))
    torch.testing.assert_close(logits(merged, rows_of(3, 5)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("values", [{"type": "ia3"}, {"type": "loha", "r": 4}, {**LORA, "use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_other_types_with_a_head_of_several_layers(kind, values, folders, load, tokenizer, tmp_path):
    section = section_of(folders(kind))
    model, _ = load(folders(kind))
    facts = base_facts(model, section)
    adapter = Adapter(add_adapter(model, AdapterSection(**values)), facts)
    expected = logits(trained(model), rows_of(3, 5))
    save_model(model, tokenizer, tmp_path, adapter)
    assert saved_model_difference(model, tmp_path, section) == 0.0
    merged, _ = merge_adapter(load_adapted(tmp_path, section))
    torch.testing.assert_close(logits(merged, rows_of(3, 5)), expected, rtol=0, atol=1e-5)


def test_an_adapter_of_a_trained_classifier_holds_its_head(folders, load, tokenizer, tmp_path):
    trained(load(folders("bert"))[0]).save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", names=("no", "ham", "spam"))
    facts = base_facts(model, section_of(tmp_path / "base"))
    adapted = add_adapter(model, AdapterSection(**LORA))
    trained(adapted.get_base_model())
    save_model(model, tokenizer, tmp_path / "adapter", Adapter(adapted, facts))
    assert saved_model_difference(adapted.get_base_model(), tmp_path / "adapter", section_of(tmp_path / "base")) == 0.0


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("bert", {"modules_to_save": ["classifier"]}, None),
        ("bert", {"target_modules": ["query", "dense"]}, None),
        ("roberta", {"target_modules": "all-linear"}, None),
        ("bert", {"target_modules": ["query", "classifier"]}, None),
        (
            "bert",
            {"modules_to_save": ["dense"]},
            r"`dense` matches `bert\.pooler\.dense`, a part of the",
        ),
        ("roberta", {"modules_to_save": ["out_proj"]}, r"`out_proj` matches `classifier\.out_proj`"),
        ("bert", {"modules_to_save": ["clasifier"]}, "did you mean `classifier`"),
    ],
)
def test_settings_cannot_leave_a_part_of_the_head_at_random(kind, values, message, folders, load):
    model, _ = load(folders(kind))
    head = {name: p.numel() for name, p in model.named_parameters() if name in head_names(model)}
    section = AdapterSection(**{**LORA, **values})
    if message:
        with pytest.raises(UserError, match=message):
            add_adapter(model, section)
        return
    plain = add_adapter(model, section).get_base_model()
    copies = [p.numel() for name, p in plain.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert sum(copies) == sum(head.values())
    assert not re.search(r"(classifier|pooler)\S*lora_", " ".join(name for name, _ in plain.named_parameters()))


def test_an_adapter_says_what_trains_whole(folders, load):
    model, _ = load(folders("bert"))
    adapted = add_adapter(model, AdapterSection(**LORA))
    assert describe_adapter(adapted).saved_modules == ("bert.pooler", "classifier")


def test_the_task_of_an_adapter():
    assert check_adapter(AdapterSection(**LORA)).task_type == "CAUSAL_LM"
    assert check_adapter(AdapterSection(**LORA), "sequence-classification").task_type == "SEQ_CLS"


def test_adapters_where_a_whole_model_is_needed(folders, load, refusal, tokenizer, tmp_path):
    lm = load_causal_lm(section_of(folders("llama")), None, 0)
    facts = base_facts(lm, section_of(folders("llama")))
    save_model(lm, tokenizer, tmp_path / "lm", Adapter(add_adapter(lm, AdapterSection(**LORA)), facts))
    model, _ = load(folders("llama"))
    facts = base_facts(model, section_of(folders("llama")))
    save_model(model, tokenizer, tmp_path / "cls", Adapter(add_adapter(model, AdapterSection(**LORA)), facts))
    for name, trains in (("lm", True), ("lm", False), ("cls", True)):
        with pytest.raises(UserError, match=r"holds an adapter.*`kit merge`"):
            check_classifier(section_of(tmp_path / name), trains)
    assert check_classifier(section_of(tmp_path / "cls")).num_labels == 3
    assert "tells apart `ham`, `spam`, `no`" in refusal(tmp_path / "cls", names=("no", "ham", "spam"))
    assert "holds an adapter" in refusal(tmp_path / "lm")
    with pytest.raises(UserError, match="is a classifier"):
        load_causal_lm(section_of(tmp_path / "cls"), None, 0)
    with pytest.raises(UserError, match=r"is a classifier.*`kit predict`"):
        generate(str(tmp_path / "cls"), "the", revision=None, max_length=None, max_new_tokens=3)


def test_fixed_logits_leave_the_model_as_it_was(folders, load):
    model, _ = load(folders("roberta"))
    model.train()
    assert torch.equal(fixed_logits(model), fixed_logits(model))
    assert model.training

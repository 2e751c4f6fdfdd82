"""Adapters train while the base keeps every bit; saved, loaded and merged they give the logits that they were."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kit.errors import UserError
from kit.model.adapter import (
    add_adapter,
    describe_adapter,
)
from kit.model.adapter_files import Adapter, base_facts, load_adapter, merge_adapter, merged_difference
from kit.model.embeddings import resize_and_initialise
from kit.model.new_rows import is_new_rows, new_row_ids
from kit.model.parts import adapter_names
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.adapter import AdapterSection
from kit.recipe.models import ModelSection
from kit.recipe.vocabulary import VocabularySection
from tests.material import make_tokenizer
from tests.model.models import MODELS

NAMES = ["gpt2", "gpt2-untied", "llama", "llama-tied", "gpt_neox", "qwen3", "gemma3"]
LORA = {"type": "lora", "r": 4}
KINDS = {
    "lora": LORA,
    "rslora": {**LORA, "use_rslora": True, "lora_dropout": 0.1},
    "dora": {**LORA, "use_dora": True},
    "ia3": {"type": "ia3"},
}
# As cheap to try, on a model of plain linear layers.
OTHERS = {
    "vera": {"r": 8}, "randlora": {"r": 4}, "hira": {"r": 4}, "loha": {"r": 4}, "lokr": {"r": 4}, "boft": {},
    "oft": {}, "hra": {"r": 4}, "miss": {"r": 8}, "delora": {"r": 4}, "fourierft": {"n_frequency": 100},
    "c3a": {"block_size": 16}, "gralora": {"r": 4}, "tinylora": {"r": 2}, "shira": {"r": 4}, "osf": {},
}  # fmt: skip
IDS = torch.tensor([[1, 5, 31, 11, 312, 7, 316], [312, 300, 3, 4, 14, 9, 2]])


@pytest.fixture(params=NAMES)
def build(request):
    return MODELS[request.param]


@pytest.fixture(params=KINDS)
def section(request):
    return AdapterSection(**KINDS[request.param])


def save_adapter(model, folder, base, added_ids=()):
    folder.mkdir(exist_ok=True)
    adapter = Adapter(model, base, added_ids)
    adapter.write(folder, adapter.state())


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def train(model, rows=320, steps=10):
    """Make steps with decay, dropout and clipping, as Trainer does."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        ids = torch.randint(rows - 30, rows, (4, 12), generator=generator)
        scores = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(scores.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def parameters(model):
    return {id(p): (name, p, p.detach().clone()) for name, p in model.named_parameters()}


def adapted_and_trained(model, section, new_ids=(), rows=320):
    """Add an adapter and train it; the base's weights are looked at as the model had them before."""
    base = parameters(model)
    torch.manual_seed(0)
    adapted = add_adapter(model, section, new_ids)
    own = [(name, p, p.detach().clone()) for name, p in adapted.named_parameters() if p.requires_grad]
    train(adapted, rows)
    assert own
    assert all(not torch.equal(p, before) for _, p, before in own), [n for n, p, b in own if torch.equal(p, b)]
    return adapted, base


# ---- without new tokens


def test_base_keeps_every_bit_and_everything_reloads(build, section, tmp_path):
    model, fresh = build(), logits(build())
    facts = base_facts(model, ModelSection(name_or_path="org/name", revision="main"))
    adapted, base = adapted_and_trained(model, section)
    assert all(torch.equal(p, before) and not p.requires_grad for _, p, before in base.values())
    expected = logits(adapted)
    assert not torch.allclose(expected, fresh, atol=1e-3)

    save_adapter(adapted, tmp_path / "adapter", facts)
    loaded = load_adapter(build(), tmp_path / "adapter", facts)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load_adapter(build(), tmp_path / "adapter")), expected)

    merged, difference = merge_adapter(loaded)
    assert 0 <= difference < 1e-4
    assert merged_difference(expected, logits(merged)) < 1e-4
    assert list(merged.state_dict()) == list(build().state_dict())
    merged.save_pretrained(tmp_path / "merged")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(plain), logits(merged))
    tied = build().config.tie_word_embeddings
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("kind", OTHERS)
def test_other_types(kind, tmp_path):
    build = MODELS["llama"]
    model, facts = build(), base_facts(build())
    adapted, base = adapted_and_trained(model, AdapterSection(type=kind, **OTHERS[kind]))
    assert all(torch.equal(p, before) for _, p, before in base.values())
    save_adapter(adapted, tmp_path, facts)
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(adapted))
    expected = logits(adapted)
    merged, difference = merge_adapter(adapted)
    limit = 1e-3 if kind == "randlora" else 1e-4  # its weights grow to hundreds of times the base's
    assert difference < limit
    assert merged_difference(expected, logits(merged)) < limit


def test_what_a_merge_changes_is_rounding(build, section):
    adapted, _ = adapted_and_trained(build().double(), section)
    assert all(p.dtype == torch.float64 for p in adapted.parameters())
    assert merge_adapter(adapted)[1] < 1e-12


def test_goes_into_all_linear_layers_but_the_head(build):
    model = build()
    head = model.get_output_embeddings()
    linear = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head}
    described = describe_adapter(add_adapter(model, AdapterSection(**LORA)))
    assert set(described.target_modules) == linear
    assert (described.type, described.new_row_parameters) == ("LORA", 0)
    assert described.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert described.base_parameters == sum(p.numel() for p in build().parameters())
    assert f"{described.parameters:,} parameters" in str(described)


def test_given_targets_and_peft_own_for_what_is_no_linear_layer():
    described = describe_adapter(add_adapter(MODELS["llama"](), AdapterSection(**LORA, target_modules=["q_proj"])))
    assert described.target_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    pattern = r".*layers\.1\.mlp\..*_proj"
    described = describe_adapter(add_adapter(MODELS["llama"](), AdapterSection(**LORA, target_modules=pattern)))
    assert len(described.target_modules) == 3
    described = describe_adapter(add_adapter(MODELS["gpt2"](), AdapterSection(type="ln_tuning")))
    assert "transformer.ln_f" in described.target_modules


def test_conv1d_without_a_warning(recwarn, capsys):
    config = add_adapter(MODELS["gpt2"](), AdapterSection(**LORA)).peft_config["default"]
    assert config.fan_in_fan_out is True
    assert add_adapter(MODELS["llama"](), AdapterSection(**LORA)).peft_config["default"].fan_in_fan_out is False
    assert not recwarn.list
    assert not capsys.readouterr().out


def test_embeddings_and_head_of_an_untied_model(tmp_path):
    build = MODELS["llama"]
    for values in ({"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, {"modules_to_save": ["lm_head", "norm"]}):
        facts = base_facts(build())
        adapted, base = adapted_and_trained(build(), AdapterSection(**LORA, **values))
        assert all(torch.equal(p, before) for _, p, before in base.values())
        expected = logits(adapted)
        save_adapter(adapted, tmp_path, facts)
        loaded = load_adapter(build(), tmp_path)
        assert torch.equal(logits(loaded), expected)
        merged, _ = merge_adapter(loaded)
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_same_seed_same_adapter():
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(add_adapter(MODELS["gpt2"](), AdapterSection(**LORA)).state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_training_goes_on_after_loading(tmp_path):
    build = MODELS["gpt2"]
    facts = base_facts(build())
    adapted, _ = adapted_and_trained(build(), AdapterSection(**LORA))
    save_adapter(adapted, tmp_path, facts)
    loaded = load_adapter(build(), tmp_path, trainable=True)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names == [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in load_adapter(build(), tmp_path).parameters())
    for each in (adapted, loaded):
        train(each)
    assert torch.equal(logits(loaded), logits(adapted))


def test_sixteen_bits(tmp_path):
    build = lambda: MODELS["llama"]().to(torch.bfloat16)  # noqa: E731
    facts = base_facts(build())
    adapted, base = adapted_and_trained(build(), AdapterSection(**LORA))
    assert all(torch.equal(p, before) for _, p, before in base.values())
    save_adapter(adapted, tmp_path, facts)
    loaded = load_adapter(build(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    assert merge_adapter(loaded)[1] < 0.1


# ---- with new tokens


def extended(build, **values):
    """Return a model with new tokens, its facts before, the ids of the tokens, and the rows that there are now."""
    model = build()
    facts = base_facts(model)
    tokenizer = make_tokenizer()
    words = VocabularySection(tokens=["tensor gradient", "checkpointing"], special_tokens=["<|x|>"], **values)
    extension = extend_tokenizer(tokenizer, words)
    size = max(row.id for row in extension.rows) + 1
    resize_and_initialise(model, extension, size, words.initialize, words.pad_to_multiple_of, 0)
    return model, facts, sorted(row.id for row in extension.rows), size


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_new_tokens(build, kind, tmp_path):
    model, facts, ids, size = extended(build)
    batch = torch.tensor([[1, 2, *ids[:3], 5, 6]])
    adapted, base = adapted_and_trained(model, AdapterSection(**KINDS[kind]), ids, size)
    described = describe_adapter(adapted)
    assert new_row_ids(adapted) == range(ids[0], ids[-1] + 1)
    assert described.new_row_parameters == sum(p.numel() for n, p in adapted.named_parameters() if is_new_rows(n))
    for name, weight, before in base.values():
        embeds = weight.shape[0] == len(model.get_input_embeddings().weight) and weight.dim() == 2
        changed = (weight != before).any(1).nonzero().flatten().tolist() if embeds else not torch.equal(weight, before)
        assert changed == (ids if embeds else False), name
    expected = logits(adapted, batch)

    save_adapter(adapted, tmp_path / "adapter", facts)
    loaded = load_adapter(build(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    again = load_adapter(build(), tmp_path / "adapter", trainable=True)
    assert new_row_ids(again) == new_row_ids(adapted)
    for each in (again, adapted):
        train(each, size, steps=3)
    assert torch.equal(logits(again, batch), logits(adapted, batch))

    merged, difference = merge_adapter(loaded)
    assert difference < 1e-5
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch), logits(merged, batch))


def test_a_merged_model_with_new_tokens_from_memory(build, tmp_path):
    """Without being loaded in between: the rows' parts are still in it."""
    model, _, ids, size = extended(build)
    adapted, _ = adapted_and_trained(model, AdapterSection(**LORA), ids, size)
    expected = logits(adapted)
    merged, _ = merge_adapter(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_new_tokens_whose_rows_stay_as_they_began(build, tmp_path):
    """Of the tokens that fit into spare rows of the base nobody but the caller knows."""
    model, facts, ids, size = extended(build)
    adapted, _ = adapted_and_trained(model, AdapterSection(**LORA), rows=size)
    save_adapter(adapted, tmp_path, facts, added_ids=ids)
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(adapted))


def test_new_tokens_in_spare_rows(tmp_path):
    build = lambda: MODELS["llama"](vocab_size=384)  # noqa: E731
    model, facts, ids, size = extended(build)
    assert facts.rows == 384 == len(model.get_input_embeddings().weight)
    adapted, _ = adapted_and_trained(model, AdapterSection(**LORA), ids, size)
    save_adapter(adapted, tmp_path, facts)
    loaded = load_adapter(build(), tmp_path)
    assert torch.equal(logits(loaded, torch.tensor([ids])), logits(adapted, torch.tensor([ids])))


# ---- mistakes


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("gpt2", {"target_modules": ["c_attnn"]}, r"target_modules: `c_attnn` matches.*did you mean `c_attn`"),
        ("llama", {"target_modules": ["q_proj", "c_attn"]}, r"`c_attn` matches no module.*Its layers: .*q_proj"),
        ("llama", {"target_modules": "q_proj"}, r"`q_proj` matches no module.*q_proj"),
        ("llama", {"target_modules": "(q"}, r"`\(q` is no regular expression"),
        ("llama", {"target_modules": []}, r"peft refuses.*the model's layers: .*q_proj"),
        ("llama", {"exclude_modules": ["q_prj"]}, r"exclude_modules: `q_prj`.*did you mean `q_proj`"),
        ("llama", {"modules_to_save": ["head"]}, r"modules_to_save: `head`.*did you mean `lm_head`"),
        ("llama", {"rank_pattern": {"zz": 2}}, r"rank_pattern keys did not match.*zz"),
        ("llama", {"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: found the number 0; expected a rank from 1"),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "found 2; expected a block from 0"),
        ("llama", {"target_modules": ["mlp"]}, "peft refuses.*LlamaMLP"),
        ("gpt2", {"target_modules": ["wte"]}, r"`transformer\.wte` holds the matrix that embeddings and head share"),
        ("gpt2", {"target_modules": ["lm_head"]}, r"`lm_head` holds the matrix that"),
        ("llama-tied", {"target_modules": ".*(embed_tokens|q_proj)"}, r"`model\.embed_tokens` holds the matrix that"),
        ("llama-tied", {"modules_to_save": ["lm_head"]}, r"`lm_head` holds the matrix that"),
        ("gpt2", {"modules_to_save": ["transformer"]}, "peft refuses.*modules that are marked to be saved"),
        ("llama", {"init_lora_weights": "pissa"}, r"change the base model's own weights.*layers\.\{0–1\}"),
        ("gpt2", {"init_lora_weights": "olora"}, r"change the base model's own weights"),
        ("gpt2", {"type": "oft", "r": None}, "peft refuses these settings for GPT2LMHeadModel.*Conv1D"),
        ("gpt2", {"type": "osf", "r": None}, "`osf` has no weights to train"),
        ("gpt2", {"r": 0}, r"adapter\.r: .*from 1"),
        ("gpt2", {"type": "beft", "r": None}, "specify `target_modules`.*the model's layers: c_attn"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit_the_model(kind, values, message):
    with pytest.raises(UserError, match=message) as error:
        add_adapter(MODELS[kind](), AdapterSection(**{**LORA, **values}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_whole_embeddings_and_single_rows(name):
    model, _, ids, _ = extended(MODELS["llama"])
    with pytest.raises(UserError, match=f"modules_to_save: in `.*{name}` whole embeddings or the whole head train"):
        add_adapter(model, AdapterSection(**LORA, target_modules=["q_proj"], modules_to_save=[name]), ids)


def test_adapter_in_an_adapter():
    adapted = add_adapter(MODELS["gpt2"](), AdapterSection(**LORA))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(RuntimeError, match="has an adapter already"):
            add_adapter(model, AdapterSection(**LORA))


@pytest.fixture
def saved(tmp_path):
    model = MODELS["llama"]()
    facts = base_facts(model, ModelSection(name_or_path="org/name", revision="abc"))
    save_adapter(add_adapter(model, AdapterSection(**LORA)), tmp_path / "adapter", facts)
    return tmp_path / "adapter"


def test_another_base(saved):
    other = MODELS["llama"]()
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    with pytest.raises(UserError, match=r"another base model, org/name at abc: expected weights with the fingerprint"):
        load_adapter(other, saved)
    for model, message in (
        (MODELS["gpt2"](), "expected model_type llama, found gpt2"),
        (MODELS["llama"](vocab_size=384), "expected rows of embeddings: 320, found 384"),
        (MODELS["llama"]().to(torch.bfloat16), "expected weights in float32, found bfloat16"),
        (MODELS["llama"](num_hidden_layers=3), "fingerprint"),
        (MODELS["llama-tied"](), "fingerprint"),
    ):
        with pytest.raises(UserError, match=message):
            load_adapter(model, saved)


def test_what_is_recorded(saved):
    record = json.loads((saved / "base.json").read_text())
    assert (record["name"], record["revision"], record["model_type"]) == ("org/name", "abc", "llama")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("org/name", "abc", 4)
    assert record["fingerprint"] == base_facts(copy.deepcopy(MODELS["llama"]())).fingerprint
    assert set(record["files"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_damaged_adapters(saved):
    weights, record = saved / "adapter_model.safetensors", saved / "base.json"
    content, text = weights.read_bytes(), record.read_text()
    for damage, message in (
        (lambda: weights.write_bytes(content[:-4]), "damaged"),
        (weights.unlink, "adapter_model.safetensors is missing"),
        (lambda: record.write_text("{"), "damaged"),
        (lambda: record.write_text("[]"), "damaged"),
        (lambda: record.write_text('{"name": "x"}'), "damaged"),
        (record.unlink, "base.json is missing"),
    ):
        weights.write_bytes(content)
        record.write_text(text)
        damage()
        with pytest.raises(UserError, match=message):
            load_adapter(MODELS["llama"](), saved)


def test_nothing_to_merge():
    with pytest.raises(UserError, match="LlamaForCausalLM is a plain model"):
        merge_adapter(MODELS["llama"]())
    adapted = add_adapter(MODELS["llama"](), AdapterSection(**LORA))
    adapted.merge_adapter()
    with pytest.raises(UserError, match="merged already"):
        merge_adapter(adapted)


def test_types_that_cannot_be_merged():
    adapted = add_adapter(MODELS["llama"](), AdapterSection(type="lily", r=4))
    with pytest.raises(UserError, match="cannot merge an adapter of type lily"):
        merge_adapter(adapted)
    adapted = add_adapter(MODELS["llama"](), AdapterSection(**LORA, lora_bias=True))
    with pytest.raises(UserError, match=r"cannot merge an adapter of type lora.*no bias"):
        merge_adapter(adapted)


def test_a_wrong_merge_is_found(monkeypatch):
    adapted, _ = adapted_and_trained(MODELS["llama"](), AdapterSection(**LORA))
    monkeypatch.setattr(type(adapted.base_model), "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(RuntimeError, match="other logits"):
        merge_adapter(adapted)


def test_a_merge_without_a_small_adapter_is_found(monkeypatch):
    """What an adapter that has hardly learned does is less than rounding to 16 bits; that it is missing shows yet."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        adapted = add_adapter(MODELS["llama"]().to(dtype), AdapterSection(**LORA))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=1e-3)
        whole = copy.deepcopy(adapted)
        assert merge_adapter(whole)[1] < 2e-5
        monkeypatch.setattr(type(adapted.base_model), "merge_and_unload", lambda self, safe_merge: self.unload())
        with pytest.raises(RuntimeError, match="where the adapter moves them"):
            merge_adapter(adapted)
        monkeypatch.undo()


def test_default_targets_in_some_blocks():
    for name in ("gpt2", "llama"):
        model = add_adapter(MODELS[name](), AdapterSection(**LORA, layers_to_transform=[1])).get_base_model()
        own = adapter_names(model)
        assert own
        assert all(".1." in parameter for parameter in own)


def test_experts():
    config = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 32, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **config, **sizes))
    total = model.num_parameters()
    description = describe_adapter(add_adapter(model, AdapterSection(**LORA)))
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj"} <= {
        *description.target_modules
    }
    assert description.base_parameters == total


def test_own_biases_that_train_are_told_apart():
    model = MODELS["gpt2"]()
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    total = model.num_parameters()
    description = describe_adapter(add_adapter(model, AdapterSection(**LORA, bias="all")))
    assert (description.own_parameters, description.base_parameters) == (biases, total)
    assert f"{biases:,} of the base model's own" in str(description)


def test_merged_difference_is_relative():
    before = torch.tensor([1.0, -4.0])
    assert merged_difference(before, before) == 0.0
    assert merged_difference(before, torch.tensor([1.0, -3.0])) == 0.25

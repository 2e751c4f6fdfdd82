"""Parts are found in the structure of each architecture; what cannot be told or is not there is refused by name."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
)

from kit.errors import UserError
from kit.model.new_rows import is_new_rows, train_new_rows
from kit.model.parts import (
    bias_names,
    block_parameters,
    find_parts,
    match_pattern,
    norm_names,
    select,
    tied_names,
    transformer_blocks,
)

VOCAB = 64
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
KEY_VALUE = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "gpt_neox": SIZES,
    "llama": {**SIZES, **KEY_VALUE},
    "qwen2": {**SIZES, **KEY_VALUE},
    "qwen3": {**SIZES, **KEY_VALUE},
    "mistral": {**SIZES, **KEY_VALUE},
    "gemma2": {**SIZES, **KEY_VALUE},
    "gemma3_text": {**SIZES, **KEY_VALUE},
    "smollm3": {**SIZES, **KEY_VALUE},
    "phi": SIZES,
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2},
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 8},
    "deberta-v2": {**SIZES, "relative_attention": True, "norm_rel_ebd": "layer_norm", "position_buckets": 4},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 32},
    "modernbert": {**SIZES, **SPECIAL},
}
HEADS = {"lm": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM, "class": AutoModelForSequenceClassification}
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "modernbert")
BUILDS = [(a, "mlm" if a in ENCODERS else "lm") for a in CONFIGS] + [(a, "class") for a in CONFIGS]
# What each architecture calls its parts, below its base model.
FINAL_NORMS = {
    "gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm", "opt": "decoder.final_layer_norm",
    "bloom": "ln_f", "modernbert": "final_norm", **dict.fromkeys(ENCODERS[:-1]),
}  # fmt: skip
POSITIONS = {
    "gpt2": ["wpe"],
    "opt": ["decoder.embed_positions"],
    **{encoder: ["embeddings.position_embeddings"] for encoder in ENCODERS},
    "deberta-v2": ["embeddings.position_embeddings", "encoder.rel_embeddings"],
    "modernbert": [],
}


def make(architecture, head="lm", **config):
    torch.manual_seed(0)
    values = {"vocab_size": VOCAB, **CONFIGS[architecture], **config}
    return HEADS[head].from_config(AutoConfig.for_model(architecture, **values))


@pytest.fixture(scope="module", params=BUILDS, ids="-".join)
def built(request):
    architecture, head = request.param
    return architecture, head, make(architecture, head)


def names(model):
    return [name for name, _ in model.named_parameters()]


def below(model, *paths):
    """Return the parameters of modules of the base model."""
    inside = {id(p) for path in paths for p in model.base_model.get_submodule(path).parameters()}
    return tuple(name for name, p in model.named_parameters() if id(p) in inside)


# ---- written out


LLAMA_BLOCK = """self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight
    mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight input_layernorm.weight
    post_attention_layernorm.weight""".split()


def test_gpt2():
    model = make("gpt2")
    found = find_parts(model)
    assert found["embeddings"] == found["head"] == ("transformer.wte.weight",)
    assert tied_names(model) == {"lm_head.weight": "transformer.wte.weight"}
    assert found["position_embeddings"] == ("transformer.wpe.weight",)
    assert found["final_norm"] == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert found["other"] == found["new_tokens"] == ()
    assert block_parameters(model)[1] == tuple(
        f"transformer.h.1.{name}.{kind}"
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    )
    untied = make("gpt2", tie_word_embeddings=False)
    assert find_parts(untied)["head"] == ("lm_head.weight",)
    assert tied_names(untied) == {}
    assert find_parts(make("gpt2", "class"))["head"] == ("score.weight",)


def test_llama():
    model = make("llama")
    found = find_parts(model)
    assert found["embeddings"] == ("model.embed_tokens.weight",)
    assert found["head"] == ("lm_head.weight",)
    assert found["final_norm"] == ("model.norm.weight",)
    assert found["position_embeddings"] == found["biases"] == found["other"] == ()
    assert found["norms"] == (
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight",
        "model.layers.2.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight",
        "model.norm.weight",
    )  # fmt: skip
    expected = {f"model.layers.{n}.{name}" for n in range(3) for name in LLAMA_BLOCK}
    assert {name for block in block_parameters(model) for name in block} == expected


def test_bert():
    model = make("bert", "mlm")
    found = find_parts(model)
    assert found["embeddings"] == (
        "bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias",
    )  # fmt: skip
    assert found["position_embeddings"] == ("bert.embeddings.position_embeddings.weight",)
    assert found["final_norm"] == found["other"] == ()
    assert found["head"] == (
        "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
    )  # fmt: skip
    assert tied_names(model) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert find_parts(make("bert", "class"))["head"] == (
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    )  # fmt: skip


# ---- every architecture


def test_every_parameter_has_a_place(built):
    _, _, model = built
    found = find_parts(model)
    places = [*found["embeddings"], *found["position_embeddings"], *found["final_norm"], *found["head"]]
    places += [name for block in block_parameters(model) for name in block] + list(found["other"])
    assert set(places) == set(names(model))
    # What is in two places is tied.
    assert {name for name in places if places.count(name) > 1} <= set(tied_names(model).values())
    for part in found.values():
        assert list(part) == [name for name in names(model) if name in part]


def test_parts_of_each_architecture(built):
    architecture, head, model = built
    found = find_parts(model)
    final_norm = FINAL_NORMS.get(architecture, "norm")
    assert found["final_norm"] == (below(model, final_norm) if final_norm else ())
    assert found["position_embeddings"] == below(model, *POSITIONS.get(architecture, []))
    first_name = {id(p): name for name, p in model.named_parameters()}
    assert first_name[id(model.get_input_embeddings().weight)] in found["embeddings"]
    if head != "class":
        assert first_name[id(model.get_output_embeddings().weight)] in found["head"]
    outside = {name for name in names(model) if not name.startswith(f"{model.base_model_prefix}.")}
    assert outside <= set(found["head"])
    inside = set(found["head"]) - outside
    assert all("pooler" in name for name in inside - set(found["embeddings"]))
    assert inside & set(found["embeddings"]) == inside & set(tied_names(model).values())


def test_blocks(built):
    _, _, model = built
    blocks = block_parameters(model)
    assert len(blocks) == len(transformer_blocks(model)) == 3
    for number, block in enumerate(blocks):
        assert block
        assert all(f".{number}." in name for name in block)
    assert select(model, {"first_blocks": 2, "last_blocks": 1}, "k") == {
        "first_blocks: 2": blocks[0] + blocks[1],
        "last_blocks: 1": blocks[2],
    }


def test_biases_and_norms(built):
    _, _, model = built
    assert set(bias_names(model)) == {name for name in names(model) if name.rpartition(".")[2] == "bias"}
    called = re.compile(r"norm|ln_|LayerNorm", re.IGNORECASE)
    assert set(norm_names(model)) == {name for name in names(model) if called.search(name)}


@pytest.mark.parametrize(
    ("architecture", "head", "expected"),
    [
        ("opt", "lm", ["decoder.project_out", "decoder.project_in"]),
        ("deberta-v2", "mlm", ["encoder.LayerNorm"]),  # of the table of relative positions
        ("electra", "mlm", []),
        ("bloom", "lm", []),
        ("modernbert", "class", []),
    ],
)
def test_other_parameters(architecture, head, expected):
    model = make(architecture, head)
    assert find_parts(model)["other"] == below(model, *expected)


@pytest.mark.parametrize(
    ("architecture", "head", "expected"),
    [
        ("modernbert", "mlm", ["embeddings"]),
        ("bloom", "lm", ["word_embeddings", "word_embeddings_layernorm"]),
        ("electra", "mlm", ["embeddings.word_embeddings", "embeddings.token_type_embeddings", "embeddings.LayerNorm",
                            "embeddings_project"]),
    ],
)  # fmt: skip
def test_nothing_before_the_first_block_is_left_of_embeddings(architecture, head, expected):
    model = make(architecture, head)
    assert find_parts(model)["embeddings"] == below(model, *expected)


def test_a_base_model_alone():
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", vocab_size=VOCAB, **CONFIGS["gpt2"]))
    found = find_parts(model)
    assert found["embeddings"] == ("wte.weight",)
    assert found["final_norm"] == ("ln_f.weight", "ln_f.bias")
    assert found["head"] == found["other"] == ()
    with pytest.raises(UserError, match=r"k.head: GPT2Model has none"):
        select(model, {"head": True}, "k")


def test_a_tied_matrix_whose_first_name_is_the_heads():
    model = make("xlm-roberta", "mlm")
    assert tied_names(model)["roberta.embeddings.word_embeddings.weight"] == "lm_head.decoder.weight"
    found = find_parts(model)
    assert "lm_head.decoder.weight" in found["embeddings"]
    assert "lm_head.decoder.weight" in found["head"]


def test_parameters_that_blocks_share():
    model = make("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    shared = "model.layers.0.mlp.up_proj.weight"
    blocks = block_parameters(model)
    assert [shared in block for block in blocks] == [True, False, True]
    assert tied_names(model)["model.layers.2.mlp.up_proj.weight"] == shared


@pytest.mark.parametrize(("architecture", "head"), [("gpt2", "lm"), ("llama", "lm"), ("bert", "mlm")])
def test_new_rows_are_in_no_other_part(architecture, head):
    model = make(architecture, head)
    before = find_parts(model)
    train_new_rows(model, range(60, 64))
    found = find_parts(model)
    assert found == {**before, "new_tokens": tuple(name for name in names(model) if is_new_rows(name))}
    assert found["new_tokens"]
    assert select(model, {"new_tokens": True}, "k") == {"new_tokens": found["new_tokens"]}
    assert not any(is_new_rows(name) for name in match_pattern(model, ".*", "k"))
    with pytest.raises(UserError, match="matches no parameter"):
        match_pattern(model, r".*\.new_rows", "k")


# ---- selection


def test_select():
    model = make("gpt2")
    section = {
        "embeddings": True, "position_embeddings": False, "final_norm": True, "head": True, "biases": False,
        "norms": False, "first_blocks": None, "last_blocks": 1, "patterns": (r".*\.c_attn\.bias",),
    }  # fmt: skip
    selected = select(model, section, "freezing.trainable")
    assert list(selected) == ["embeddings", "final_norm", "head", "last_blocks: 1", r"pattern .*\.c_attn\.bias"]
    assert selected["head"] == selected["embeddings"] == ("transformer.wte.weight",)
    assert selected[r"pattern .*\.c_attn\.bias"] == tuple(f"transformer.h.{n}.attn.c_attn.bias" for n in range(3))
    assert select(model, {}, "freezing.trainable") == {}


def test_a_pattern_knows_both_names_of_a_tied_matrix():
    model = make("gpt2")
    assert match_pattern(model, r"lm_head\.weight", "k") == ("transformer.wte.weight",)
    assert match_pattern(model, r"transformer\.wte\.weight", "k") == ("transformer.wte.weight",)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"position_embeddings": True}, r"^k.position_embeddings: LlamaForCausalLM has none; it has embeddings, "
                                        r"final_norm, head, norms, 3 blocks$"),
        ({"biases": True}, r"^k.biases: LlamaForCausalLM has none; it has embeddings"),
        ({"new_tokens": True}, r"^k.new_tokens: LlamaForCausalLM has none; it has embeddings"),
        ({"first_blocks": 4}, r"^k.first_blocks: found 4; expected 1 to 3"),
        ({"last_blocks": 0}, r"^k.last_blocks: found 0; expected 1 to 3"),
        ({"patterns": ["lm_haed.weight"]}, r'^k.patterns: "lm_haed.weight" matches .*nearest .* `lm_head.weight`$'),
        ({"patterns": [r".*\.q_pro\.weight"]}, r"nearest name is `model.layers.0.self_attn.q_proj.weight`$"),
        ({"patterns": ["model[.]layers[.]2[.]mlp[.]up[.]weight"]}, r"name is `model.layers.2.mlp.up_proj.weight`$"),
        ({"patterns": ["layers.1"]}, r"piece of `model.layers.1.self_attn.q_proj.weight`, but the whole name"),
        ({"patterns": ["nonsense!"]}, r"the nearest name is `\S+`$"),
        ({"patterns": [""]}, r"matches no parameter"),
        ({"patterns": ["layers.(1"]}, r'^k.patterns: "layers.\(1" is no reg.*; expected .*`model\[.\]emb'),
        ({"norms": True, "patterns": [".*bias"]}, r"matches no parameter of LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_refused(section, message):
    with pytest.raises(UserError, match=message):
        select(make("llama"), section, "k")


def test_bert_has_no_final_norm():
    with pytest.raises(UserError, match=r"k.final_norm: BertForMaskedLM has none; it has .*position_embeddings, head"):
        select(make("bert", "mlm"), {"final_norm": True}, "k")


def test_a_field_that_is_no_part():
    with pytest.raises(ValueError, match="parts of a model: heads; expected"):
        select(make("llama"), {"heads": True}, "k")


# ---- architectures whose parts cannot be told


def t5():
    return AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


@pytest.mark.parametrize("section", [{"embeddings": True}, {"final_norm": True}, {"head": True}, {"last_blocks": 1}])
def test_an_encoder_with_a_decoder(section):
    with pytest.raises(
        UserError, match=r"found encoder.block, decoder.block\. .* shared \(1,024\), encoder \("
    ) as info:
        select(t5(), section, "freezing.trainable")
    assert str(info.value).startswith("freezing.trainable")
    assert "T5ForConditionalGeneration does not tell" in str(info.value)


def test_what_needs_no_structure_works_with_every_architecture():
    model = t5()
    selected = select(model, {"norms": True, "patterns": [r"lm_head\.weight", r"decoder\.block\.1\..*"]}, "k")
    assert "encoder.final_layer_norm.weight" in selected["norms"]
    assert select(model, {"patterns": ["shared.weight"]}, "k") == {"pattern shared.weight": ("shared.weight",)}
    with pytest.raises(UserError, match=r"k.biases: T5ForConditionalGeneration has none; it has norms$"):
        select(model, {"biases": True}, "k")


def test_blocks_in_no_list_and_experts_in_one():
    model = make("gpt2")
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(UserError, match=r"one of 3 modules, found none\. .*transformer.wte \(1,024\), transformer.wpe"):
        transformer_blocks(model)
    model = make("llama")
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    assert transformer_blocks(model) is model.model.layers
    model.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])  # outside of the base model
    assert transformer_blocks(model) is model.model.layers
    assert {"heads.0.weight", "lm_head.weight"} <= set(find_parts(model)["head"])


def test_without_token_embeddings():
    model = make("llama")
    model.get_input_embeddings = lambda: None
    with pytest.raises(UserError, match="k: LlamaForCausalLM does not tell which module embeds its tokens"):
        find_parts(model, "k")

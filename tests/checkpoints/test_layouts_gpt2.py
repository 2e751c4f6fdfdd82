"""The layouts of GPT-2, each against Hugging Face's model and, where there is one, against the code that it is of."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.conversion import from_hf, to_hf
from kit.checkpoints.layout import SAME, TRANSPOSED, Turn, joined
from kit.checkpoints.layouts import guide, llms_from_scratch, nanogpt, openai_tf
from kit.checkpoints.reading import read_checkpoint
from kit.errors import UserError
from tests.checkpoints.gpt2_models import (
    VOCABULARY,
    BookModel,
    NanoGPT,
    checkpoint_of,
    converted,
    lazy,
    logits_of,
    logits_of_tensors,
    make_model,
    random_ids,
    tensors_of,
)

LAYOUTS = [guide, nanogpt, llms_from_scratch, openai_tf]
ONLY_TIED = [nanogpt, openai_tf]
MODELS = {
    "one block, one head": {"n_layer": 1, "n_embd": 8, "n_head": 1},
    "two heads": {"n_layer": 2, "n_embd": 16, "n_head": 2},
    "four heads, square embeddings": {"n_layer": 3, "n_embd": 24, "n_head": 4, "vocab_size": 24, "n_positions": 24},
    "no biases": {"biases": False},
    "a head of its own": {"tied": False},
    "neither biases nor a tied head": {"biases": False, "tied": False},
}
CASES = [
    pytest.param(layout, sizes, id=f"{layout.NAME}, {name}")
    for layout in LAYOUTS
    for name, sizes in MODELS.items()
    if sizes.get("tied", True) or layout not in ONLY_TIED
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.NAME)


def reference(layout, tensors, settings, ids):
    with torch.no_grad():
        return layout.reference_logits(lambda name: tensors[name].float(), settings, ids)


# ---- both ways, and the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "sizes"), CASES)
def test_a_model_comes_back_bit_for_bit_with_its_configuration(layout, sizes, dtype):
    model = make_model(**sizes, dtype=dtype)
    own, settings = converted(model, layout)
    back, config, _, _ = to_hf(checkpoint_of(own, settings), layout, {})
    before = tensors_of(model)
    assert back.keys() == before.keys()
    for name, tensor in before.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].read().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    same = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner", "tie_word_embeddings")
    for name in (*same, "activation_function", "layer_norm_epsilon"):
        assert getattr(config, name) == getattr(model.config, name), name


@pytest.mark.parametrize(("layout", "sizes"), CASES)
def test_the_reference_gives_the_logits_of_hugging_faces_model(layout, sizes):
    model = make_model(**sizes)
    own, settings = converted(model, layout)
    read, _ = layout.read_settings(checkpoint_of(own, settings), {})
    ids = random_ids(sizes.get("vocab_size", VOCABULARY))
    expected = logits_of(model, ids)
    assert expected.abs().max() > 0.2  # else closeness says nothing
    torch.testing.assert_close(reference(layout, own, read, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layout", "sizes"), CASES)
def test_no_parameter_is_lost_or_invented(layout, sizes):
    model = make_model(**sizes)
    own, settings = converted(model, layout)
    absent = 0
    if layout is nanogpt and not settings["model_args"]["bias"]:
        absent = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    if layout is llms_from_scratch and not settings["config"]["qkv_bias"]:
        absent = sum(p.numel() for name, p in model.named_parameters() if name.endswith("c_attn.bias"))
    twice = model.lm_head.weight.numel() if model.config.tie_word_embeddings and layout.KEEPS_TIED_HEAD else 0
    assert sum(t.numel() for t in own.values()) == model.num_parameters() - absent + twice


# Shapes of one block of width 4, two heads, 7 tokens, 5 positions. Linear layers are (out, in).
NAMES = {
    "guide": {
        "tok_emb.weight": (7, 4),
        "pos_emb.weight": (5, 4),
        "blocks.0.ln_1.weight": (4,),
        "blocks.0.ln_1.bias": (4,),
        "blocks.0.attn.c_attn.weight": (12, 4),
        "blocks.0.attn.c_attn.bias": (12,),
        "blocks.0.attn.c_proj.weight": (4, 4),
        "blocks.0.attn.c_proj.bias": (4,),
        "blocks.0.ln_2.weight": (4,),
        "blocks.0.ln_2.bias": (4,),
        "blocks.0.mlp.fc1.weight": (16, 4),
        "blocks.0.mlp.fc1.bias": (16,),
        "blocks.0.mlp.fc2.weight": (4, 16),
        "blocks.0.mlp.fc2.bias": (4,),
        "ln_f.weight": (4,),
        "ln_f.bias": (4,),
        "lm_head.weight": (7, 4),
    },
    "nanogpt": {
        "transformer.wte.weight": (7, 4),
        "transformer.wpe.weight": (5, 4),
        "transformer.h.0.ln_1.weight": (4,),
        "transformer.h.0.ln_1.bias": (4,),
        "transformer.h.0.attn.c_attn.weight": (12, 4),
        "transformer.h.0.attn.c_attn.bias": (12,),
        "transformer.h.0.attn.c_proj.weight": (4, 4),
        "transformer.h.0.attn.c_proj.bias": (4,),
        "transformer.h.0.ln_2.weight": (4,),
        "transformer.h.0.ln_2.bias": (4,),
        "transformer.h.0.mlp.c_fc.weight": (16, 4),
        "transformer.h.0.mlp.c_fc.bias": (16,),
        "transformer.h.0.mlp.c_proj.weight": (4, 16),
        "transformer.h.0.mlp.c_proj.bias": (4,),
        "transformer.ln_f.weight": (4,),
        "transformer.ln_f.bias": (4,),
        "lm_head.weight": (7, 4),
    },
    "llms-from-scratch": {
        "tok_emb.weight": (7, 4),
        "pos_emb.weight": (5, 4),
        "trf_blocks.0.att.W_query.weight": (4, 4),
        "trf_blocks.0.att.W_query.bias": (4,),
        "trf_blocks.0.att.W_key.weight": (4, 4),
        "trf_blocks.0.att.W_key.bias": (4,),
        "trf_blocks.0.att.W_value.weight": (4, 4),
        "trf_blocks.0.att.W_value.bias": (4,),
        "trf_blocks.0.att.out_proj.weight": (4, 4),
        "trf_blocks.0.att.out_proj.bias": (4,),
        "trf_blocks.0.ff.layers.0.weight": (16, 4),
        "trf_blocks.0.ff.layers.0.bias": (16,),
        "trf_blocks.0.ff.layers.2.weight": (4, 16),
        "trf_blocks.0.ff.layers.2.bias": (4,),
        "trf_blocks.0.norm1.scale": (4,),
        "trf_blocks.0.norm1.shift": (4,),
        "trf_blocks.0.norm2.scale": (4,),
        "trf_blocks.0.norm2.shift": (4,),
        "final_norm.scale": (4,),
        "final_norm.shift": (4,),
        "out_head.weight": (7, 4),
    },
    "openai-tf": {
        "model/wte": (7, 4),
        "model/wpe": (5, 4),
        "model/h0/ln_1/g": (4,),
        "model/h0/ln_1/b": (4,),
        "model/h0/attn/c_attn/w": (1, 4, 12),
        "model/h0/attn/c_attn/b": (12,),
        "model/h0/attn/c_proj/w": (1, 4, 4),
        "model/h0/attn/c_proj/b": (4,),
        "model/h0/ln_2/g": (4,),
        "model/h0/ln_2/b": (4,),
        "model/h0/mlp/c_fc/w": (1, 4, 16),
        "model/h0/mlp/c_fc/b": (16,),
        "model/h0/mlp/c_proj/w": (1, 16, 4),
        "model/h0/mlp/c_proj/b": (4,),
        "model/ln_f/g": (4,),
        "model/ln_f/b": (4,),
    },
}


@each_layout
def test_names_and_shapes_are_those_of_the_other_code(layout):
    own, _ = converted(make_model(1, 4, 2, vocab_size=7, n_positions=5), layout)
    assert {name: tuple(t.shape) for name, t in own.items()} == NAMES[layout.NAME]


def test_what_the_files_say_beside_their_tensors():
    model = make_model(1, 4, 2, vocab_size=7, n_positions=5)
    without = make_model(1, 4, 2, vocab_size=7, n_positions=5, biases=False)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 4, "vocab_size": 7, "block_size": 5, "dropout": 0.0}
    kit = {"activation_function": "gelu_new"}
    assert converted(model, nanogpt)[1] == {"model_args": {**sizes, "bias": True}, "kit": kit}
    assert converted(without, nanogpt)[1] == {"model_args": {**sizes, "bias": False}, "kit": kit}
    book = {"vocab_size": 7, "context_length": 5, "emb_dim": 4, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
    assert converted(model, llms_from_scratch)[1] == {"config": {**book, "qkv_bias": True}}
    assert converted(without, llms_from_scratch)[1] == {"config": {**book, "qkv_bias": False}}
    hparams = {"n_vocab": 7, "n_ctx": 5, "n_embd": 4, "n_head": 2, "n_layer": 1}
    assert converted(model, openai_tf)[1] == {"settings": hparams}


def test_biases_that_are_all_zero_are_left_out_unless_the_switch_is_given():
    model = make_model(biases=False)
    own, _ = converted(model, nanogpt)
    assert not any(name.endswith("bias") for name in own)
    own, settings = converted(model, nanogpt, bias=True)
    assert settings["model_args"]["bias"]
    assert sum(name.endswith("bias") for name in own) == 2 * 6 + 1
    own, _ = converted(model, llms_from_scratch)
    assert not any("W_" in name and name.endswith("bias") for name in own)
    assert "trf_blocks.0.att.out_proj.bias" in own


# ---- the code that the layouts are of


@pytest.mark.parametrize("biases", [True, False])
def test_nanogpts_own_class_loads_the_tensors_and_gives_the_same_logits(biases):
    model = make_model(3, 24, 4, biases=biases, activation_function="gelu", std=0.4)
    own, settings = converted(model, nanogpt)
    theirs = NanoGPT(**settings["model_args"])
    theirs.load_state_dict(own, strict=True)
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids), logits_of(model, ids), atol=1e-5, rtol=0)


def test_a_model_trained_by_nanogpts_class_is_read_with_the_exact_gelu_and_its_mask_left_out():
    torch.manual_seed(0)
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 23, "bias": False}
    theirs = NanoGPT(**arguments, dropout=0.0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    tensors = {**theirs.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    checkpoint = checkpoint_of(tensors, {"model_args": {**arguments, "dropout": 0.1}})
    hf, config, _, report = to_hf(checkpoint, nanogpt, {})
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(logits_of_tensors(hf, config, ids), theirs(ids), atol=1e-5, rtol=0)
    assert report.buffers == ["transformer.h.0.attn.bias"]
    assert len(report.zeros) == 2 * 6 + 1
    assert config.activation_function == "gelu"
    assert any("activation_function: gelu, as in nanoGPT's own code" in note for note in report.notes)


def test_writing_for_nanogpt_tells_that_its_code_computes_another_gelu():
    assert "exact GELU" in nanogpt.target_notes(make_model().config)[0]
    assert nanogpt.target_notes(make_model(activation_function="gelu").config) == []


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_books_own_class_loads_the_tensors_and_gives_the_same_logits(biases, tied):
    model = make_model(3, 24, 4, biases=biases, tied=tied)
    own, settings = converted(model, llms_from_scratch)
    theirs = BookModel(settings["config"])
    masks = dict(theirs.named_buffers())
    theirs.load_state_dict(own | masks, strict=True)
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids), logits_of(model, ids), atol=1e-5, rtol=0)
    back, _, _, report = to_hf(checkpoint_of(theirs.state_dict(), settings), llms_from_scratch, {})
    assert report.buffers == [f"trf_blocks.{n}.att.mask" for n in range(3)]
    assert all(torch.equal(back[name].read(), tensor) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("biases", [True, False])
def test_the_books_faster_variant_is_read_too(biases):
    model = make_model(2, 16, 2, biases=biases)
    own, settings = converted(model, llms_from_scratch)
    fast = {}
    for name, tensor in own.items():
        if "norm" in name:
            name = name.replace(".scale", ".weight").replace(".shift", ".bias")
        if "W_query" in name:
            parts = [own[name.replace("W_query", part)] for part in ("W_query", "W_key", "W_value")]
            name, tensor = name.replace("W_query", "qkv"), torch.cat(parts)
        elif "W_" in name:
            continue
        fast[name.replace("out_proj", "proj")] = tensor
    checkpoint = llms_from_scratch.normalized(checkpoint_of(fast, settings))
    assert "GPTModelFast" in checkpoint.notes[0]
    back, _, _, _ = to_hf(checkpoint, llms_from_scratch, {})
    assert all(torch.equal(back[name].read(), tensor) for name, tensor in tensors_of(model).items())


@each_layout
def test_names_of_no_other_spelling_are_left_as_they_are(layout):
    for other in (llms_from_scratch, openai_tf):
        checkpoint = checkpoint_of(converted(make_model(), layout)[0])
        assert other.normalized(checkpoint) is checkpoint


def params_of(model):
    """Return OpenAI's dictionary as gpt_download.py makes it from the files, worked out from Hugging Face's model."""
    state = {name: tensor.numpy() for name, tensor in tensors_of(model).items()}

    def norm(name):
        return {"g": state[f"{name}.weight"], "b": state[f"{name}.bias"]}

    def layer(name):
        return {"w": state[f"{name}.weight"], "b": state[f"{name}.bias"]}

    blocks = [
        {
            "ln_1": norm(f"{h}.ln_1"),
            "attn": {"c_attn": layer(f"{h}.attn.c_attn"), "c_proj": layer(f"{h}.attn.c_proj")},
            "ln_2": norm(f"{h}.ln_2"),
            "mlp": {"c_fc": layer(f"{h}.mlp.c_fc"), "c_proj": layer(f"{h}.mlp.c_proj")},
        }
        for h in (f"transformer.h.{n}" for n in range(model.config.n_layer))
    ]
    outside = {"wte": state["transformer.wte.weight"], "wpe": state["transformer.wpe.weight"]}
    return {"blocks": blocks, **outside, **norm("transformer.ln_f")}


def test_the_dictionary_of_settings_and_params_is_read_and_written(tmp_path):
    model = make_model(2, 16, 4)
    settings = {"n_vocab": 23, "n_ctx": 12, "n_embd": 16, "n_head": 4, "n_layer": 2}
    torch.save({"settings": settings, "params": params_of(model)}, tmp_path / "guide.pt")  # arrays of numpy
    checkpoint = openai_tf.normalized(read_checkpoint(tmp_path / "guide.pt"))
    back, _, read, _ = to_hf(checkpoint, openai_tf, {})
    assert back.keys() == tensors_of(model).keys()
    assert all(torch.equal(back[name].read(), tensor) for name, tensor in tensors_of(model).items())
    ids = random_ids()
    with torch.no_grad():
        logits = openai_tf.reference_logits(lambda name: checkpoint.tensors[name].read(), read, ids)
    torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-5, rtol=0)

    own, stated, _ = from_hf(lazy(tensors_of(model)), model.config, openai_tf, {})
    torch.save(openai_tf.nested(own, stated), tmp_path / "gpt2.pt")
    written = torch.load(tmp_path / "gpt2.pt", weights_only=True)
    assert written["settings"] == settings
    expected = params_of(model)
    assert written["params"].keys() == expected.keys()
    for block, other in zip(written["params"]["blocks"], expected["blocks"], strict=True):
        torch.testing.assert_close(block, _as_tensors(other), rtol=0, atol=0)
    # As guide 4 splits it, with numpy.
    query, _, _ = np.split(written["params"]["blocks"][1]["attn"]["c_attn"]["w"], 3, axis=-1)
    assert torch.equal(query, model.transformer.h[1].attn.c_attn.weight[:, :16])


def _as_tensors(value):
    return {k: _as_tensors(v) for k, v in value.items()} if isinstance(value, dict) else torch.from_numpy(value)


# ---- faults of a table are seen in the logits, or named


def with_line(layout, hf, change):
    """Return a layout with one line of its table changed; removed where the change returns None."""
    table = [(change(line) if line.hf == hf else line) for line in layout.TABLE]
    changed = {name: getattr(layout, name) for name in dir(layout) if not name.startswith("__")}
    return SimpleNamespace(**{**changed, "TABLE": tuple(line for line in table if line)})


def turned(line):
    """Transpose what a line has not transposed, or the other way."""
    if line.turn in (SAME, TRANSPOSED):
        return replace(line, turn=SAME if line.turn is TRANSPOSED else TRANSPOSED)
    turn = line.turn
    return replace(line, turn=Turn("wrong", lambda own, config: turn.to_hf(own, config).mT, turn.to_own))


def query_and_key_swapped(line):
    if len(line.own) == 3:
        return replace(line, own=(line.own[1], line.own[0], line.own[2]))

    def to_hf(own, config):
        query, key, value = line.turn.to_hf(own, config).chunk(3, dim=-1)
        return torch.cat((key, query, value), dim=-1)

    return replace(line, turn=Turn("wrong", to_hf, line.turn.to_own))


FAULTS = {
    "a square matrix transposed": ("transformer.h.{n}.attn.c_proj.weight", turned),
    "query and key swapped": ("transformer.h.{n}.attn.c_attn.weight", query_and_key_swapped),
    "biases of query and key swapped": ("transformer.h.{n}.attn.c_attn.bias", query_and_key_swapped),
}


@pytest.mark.parametrize("fault", FAULTS)
@each_layout
def test_a_fault_that_shapes_do_not_show_changes_the_logits(layout, fault):
    model = make_model(2, 16, 2)
    own, settings = converted(model, layout)
    checkpoint = checkpoint_of(own, settings)
    wrong, config, read, _ = to_hf(checkpoint, with_line(layout, *FAULTS[fault]), {})
    right, _, _, _ = to_hf(checkpoint, layout, {})
    ids = random_ids()
    expected = reference(layout, own, read, ids)
    assert (logits_of_tensors(wrong, config, ids) - expected).abs().max() > 1e-3
    assert (logits_of_tensors(right, config, ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("hf", ["attn.c_proj.bias", "attn.c_attn.bias", "ln_2.bias"])
@each_layout
def test_a_bias_that_a_table_forgets_is_named_both_ways(layout, hf):
    hf = f"transformer.h.{{n}}.{hf}"
    line = next(line for line in layout.TABLE if line.hf == hf)
    # A layout that still has the switch on which the bias hangs.
    switch = line.switch and replace(line, hf="transformer.ln_f.bias", own=("stray",))
    forgetful = with_line(layout, hf, lambda line: switch)
    model = make_model(2, 16, 2)
    own, settings = converted(model, layout)
    with pytest.raises(UserError, match="not in the layout: ") as caught:
        to_hf(checkpoint_of(own, settings), forgetful, {})
    for name in line.own:
        assert all(part in str(caught.value) for part in name.split("{n}"))
    with pytest.raises(UserError, match=re.escape(f"not in the layout: {hf.replace('{n}', '{0–1}')}")):
        from_hf(lazy(tensors_of(model)), model.config, forgetful, {})


@pytest.mark.parametrize("hf", ["mlp.c_fc.bias", "attn.c_attn.bias", "ln_2.bias"])
@each_layout
def test_a_bias_that_is_lost_on_the_way_changes_the_logits(layout, hf):
    names = next(line.own for line in layout.TABLE if line.hf == f"transformer.h.{{n}}.{hf}")
    model = make_model(2, 16, 2)
    own, settings = converted(model, layout)
    read, _ = layout.read_settings(checkpoint_of(own, settings), {})
    for name in (name.replace("{n}", "1") for name in names):
        own[name] = torch.zeros_like(own[name])
    ids = random_ids()
    assert (reference(layout, own, read, ids) - logits_of(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["layer_norm_epsilon", "activation_function"])
@each_layout
def test_epsilon_and_activation_are_computed_as_the_settings_say(layout, kind):
    model = make_model(std=0.6)
    own, settings = converted(model, layout)
    other = {"layer_norm_epsilon": 1e-1, "activation_function": "gelu"}
    read, _ = layout.read_settings(checkpoint_of(own, settings), {kind: other[kind]})
    changed = make_model(std=0.6, **{kind: other[kind]})
    ids = random_ids()
    assert (logits_of(changed, ids) - logits_of(model, ids)).abs().max() > 2e-4  # GELU has two kinds, hardly apart
    torch.testing.assert_close(reference(layout, own, read, ids), logits_of(changed, ids), atol=1e-5, rtol=0)


# ---- what does not fit is named


@each_layout
def test_all_that_is_missing_extra_or_mis_shaped_is_named_at_once(layout):
    own, settings = converted(make_model(2, 16, 2), layout)
    lost = [name for name in own if ("1" in name and "c_proj" in name) or "fc2" in name or "out_proj" in name]
    spoilt = next(name for name in own if own[name].dim() == 1)
    for name in lost:
        del own[name]
    own |= {"stray": torch.ones(2), "blocks.0.other.weight": torch.ones(2), spoilt: torch.ones(3)}
    with pytest.raises(UserError) as caught:
        to_hf(checkpoint_of(own, settings), layout, {})
    message = str(caught.value)
    assert lost
    for part in ("missing: ", "not in the layout: ", "stray", "blocks.0.other.weight", spoilt, "(3,)", "(16,)"):
        assert part in message
    for name in lost:
        assert name in message or name.replace(".0.", ".{0–1}.").replace(".1.", ".{0–1}.") in message


@each_layout
def test_a_file_without_embeddings_names_them_and_what_else_it_lacks(layout):
    own, settings = converted(make_model(2, 16, 2), layout)
    names = list(own)
    for name in names[:2] + [names[4]]:
        del own[name]
    with pytest.raises(UserError) as caught:
        to_hf(checkpoint_of(own, settings), layout, {})
    assert all(name in str(caught.value) for name in names[:2])
    switched = layout is not guide and names[4].endswith("bias")
    assert switched or names[4] in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (nanogpt, "transformer.ln_f.bias"),
        (nanogpt, "transformer.h.1.mlp.c_fc.bias"),
        (llms_from_scratch, "trf_blocks.1.att.W_key.bias"),
        (llms_from_scratch, "trf_blocks.0.att.out_proj.bias"),
        (guide, "ln_f.bias"),
        (openai_tf, "model/h1/ln_2/b"),
    ],
)
@pytest.mark.parametrize("stated", [True, False], ids=["with settings", "bare"])
def test_a_single_bias_that_is_absent_is_missing_not_a_variant_without(layout, name, stated):
    own, settings = converted(make_model(2, 16, 2), layout)
    del own[name]
    with pytest.raises(UserError, match=f"missing: `?{name}"):
        to_hf(checkpoint_of(own, settings if stated else {}), layout, {} if stated else {"n_head": 2})


def test_all_biases_of_query_key_and_value_of_one_block_absent_are_missing():
    own, settings = converted(make_model(2, 16, 2), llms_from_scratch)
    own = {name: t for name, t in own.items() if not (name.startswith("trf_blocks.1.att.W_") and name.endswith("bias"))}
    with pytest.raises(UserError, match=r"W_query\.bias"):
        to_hf(checkpoint_of(own, settings), llms_from_scratch, {})


@pytest.mark.parametrize(
    ("layout", "key", "change", "said"),
    [
        (nanogpt, "model_args", {"n_layer": 3}, "the file says n_layer 3, its tensors 2"),
        (nanogpt, "model_args", {"block_size": 64}, "the file says block_size 64, its tensors 12"),
        (nanogpt, "model_args", {"vocab_size": 50304}, "the file says vocab_size 50304, its tensors 23"),
        (nanogpt, "model_args", {"n_embd": 32}, "the file says n_embd 32, its tensors 16"),
        (nanogpt, "model_args", {"bias": False}, "the file says bias False, its tensors True"),
        (nanogpt, "model_args", {"n_head": 3}, "n_head 3; expected a number that divides 16"),
        (nanogpt, "model_args", {"n_head": 0}, "n_head 0; expected a number"),
        (nanogpt, "model_args", {"n_head": "2"}, "n_head 2; expected a number"),
        (nanogpt, "kit", {"activation_function": "relu"}, "activation_function `relu`; expected one of gelu_new"),
        (llms_from_scratch, "config", {"emb_dim": 768}, "the file says emb_dim 768, its tensors 16"),
        (llms_from_scratch, "config", {"qkv_bias": False}, "the file says qkv_bias False, its tensors True"),
        (openai_tf, "settings", {"n_ctx": 1024}, "the file says n_ctx 1024, its tensors 12"),
        (guide, "config", {"tie_word_embeddings": False}, "the file says tie_word_embeddings False, its tensors True"),
    ],
)
def test_settings_that_disagree_with_the_tensors_are_named_with_both(layout, key, change, said):
    own, settings = converted(make_model(2, 16, 2), layout)
    settings[key] = {**settings[key], **change}
    with pytest.raises(UserError, match=r"model\.pt: ") as caught:
        to_hf(checkpoint_of(own, settings), layout, {})
    assert said in str(caught.value)


def test_all_settings_that_disagree_are_told_together():
    own, settings = converted(make_model(2, 16, 2), nanogpt)
    settings["model_args"] |= {"n_layer": 5, "bias": False}
    with pytest.raises(UserError, match=r"n_layer 5, its tensors 2.*--set says n_embd 8.*"):
        to_hf(checkpoint_of(own, settings), nanogpt, {"n_embd": 8})


@each_layout
def test_nonsense_in_place_of_settings_is_refused(layout):
    own, settings = converted(make_model(), layout)
    with pytest.raises(UserError, match="is list; expected a dictionary"):
        to_hf(checkpoint_of(own, {next(iter(settings)): [1]}), layout, {})
    with pytest.raises(UserError, match=r"--set n_heads: GPT-2 has no such setting; did you mean `n_head`\?"):
        to_hf(checkpoint_of(own), layout, {"n_heads": 2})
    with pytest.raises(UserError, match=r"no tensor tells the number of heads, and 16 .*--set n_head="):
        to_hf(checkpoint_of(own), layout, {})
    _, config, _, _ = to_hf(checkpoint_of(own), layout, {"n_head": 2})
    assert config.n_head == 2
    name = next(iter(own))
    with pytest.raises(UserError, match=r"has the shape \(3,\); expected a matrix"):
        to_hf(checkpoint_of({**own, name: torch.ones(3)}), layout, {"n_head": 2})


@pytest.mark.parametrize(
    ("change", "layouts", "said"),
    [
        ({"layer_norm_epsilon": 1e-6}, LAYOUTS, "layer_norm_epsilon 1e-06"),
        ({"activation_function": "relu"}, LAYOUTS, "activation_function relu"),
        ({"activation_function": "gelu"}, [llms_from_scratch, openai_tf], "activation_function gelu"),
        ({"n_inner": 32}, [nanogpt, llms_from_scratch, openai_tf], "n_inner 32"),
        ({"scale_attn_by_inverse_layer_idx": True}, LAYOUTS, "scale_attn_by_inverse_layer_idx True"),
        ({"scale_attn_weights": False}, LAYOUTS, "scale_attn_weights False"),
        ({"tied": False}, ONLY_TIED, "a head of its own"),
    ],
)
def test_a_model_that_a_layout_has_no_place_for_is_refused(change, layouts, said):
    model = make_model(**change)
    for layout in layouts:
        with pytest.raises(UserError, match=f"the layout {layout.NAME} has no place for {said}"):
            converted(model, layout)


@pytest.mark.parametrize("n_inner", [8, 16, 40])
def test_guides_blocks_may_have_any_width_inside_square_matrices_too(n_inner):
    model = make_model(2, 16, 2, n_inner=n_inner, activation_function="gelu")
    own, settings = converted(model, guide)
    back, config, read, _ = to_hf(checkpoint_of(own, settings), guide, {})
    assert config.n_inner == n_inner
    assert all(torch.equal(back[name].read(), tensor) for name, tensor in tensors_of(model).items())
    ids = random_ids()
    torch.testing.assert_close(reference(guide, own, read, ids), logits_of(model, ids), atol=1e-5, rtol=0)


def test_a_transposed_matrix_that_is_not_square_is_told_as_that():
    own, settings = converted(make_model(2, 16, 2), guide)
    own = {name: t.mT if t.dim() == 2 and "blocks" in name else t for name, t in own.items()}
    with pytest.raises(UserError, match=r"makes .*, which is turned; expected"):
        to_hf(checkpoint_of(own, settings), guide, {})


def test_a_head_that_is_absent_is_the_embeddings_and_told():
    model = make_model()
    own, settings = converted(model, guide)
    del own["lm_head.weight"]
    back, config, _, report = to_hf(checkpoint_of(own, settings), guide, {})
    assert config.tie_word_embeddings
    assert report.notes == ["`lm_head.weight`: there is none, so it is the embeddings"]
    assert back.keys() == tensors_of(model).keys()


def test_a_head_that_differs_in_one_number_is_not_tied():
    own, settings = converted(make_model(), llms_from_scratch)
    own["out_head.weight"] = own["out_head.weight"].clone()
    own["out_head.weight"][22, 15] += 1e-6
    back, config, _, _ = to_hf(checkpoint_of(own, settings), llms_from_scratch, {})
    assert not config.tie_word_embeddings
    assert torch.equal(back["lm_head.weight"].read(), own["out_head.weight"])


# ---- GPT-2's sizes, without its weights


def _never():
    raise AssertionError("read")


def _empty(layout, width, blocks, rows=50257):
    """Return a checkpoint of shapes alone: reading any of its tensors fails."""
    sizes = {4: width, 12: 3 * width, 16: 4 * width, 7: rows, 5: 1024, 1: 1}
    tensors = {}
    for name, shape in NAMES[layout.NAME].items():
        shape = tuple(sizes[size] for size in shape)
        inside = "0" in name.replace("layers.0", "")
        for block in range(blocks if inside else 1):
            numbered = re.sub(r"(h|h\.|blocks\.)0(?=[./])", rf"\g<1>{block}", name)
            tensors[numbered] = LazyTensor(shape, torch.float32, _never)
    tensors = {name: t for name, t in tensors.items() if name not in ("lm_head.weight", "out_head.weight")}
    return Checkpoint(tensors=tensors, path="model.pt", format="shapes")


@pytest.mark.parametrize(
    ("width", "blocks", "heads", "parameters"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
)
@each_layout
def test_the_sizes_of_gpt2_are_known_by_their_width_and_no_tensor_is_read_for_it(
    layout, width, blocks, heads, parameters
):
    settings, notes = layout.read_settings(_empty(layout, width, blocks), {})
    assert (settings["n_layer"], settings["n_head"], settings["n_positions"]) == (blocks, heads, 1024)
    assert f"n_head: {heads}, as GPT-2 of width {width:,} has" in notes
    config = layout.make_config(settings)
    assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
    if width == 768:
        tensors, _, _, _ = to_hf(_empty(layout, width, blocks), layout, {})
        assert sum(torch.Size(t.shape).numel() for t in tensors.values()) == parameters


@pytest.mark.parametrize(("rows", "told"), [(50304, True), (50257, False), (60000, False)])
def test_a_padded_vocabulary_is_kept_and_told(rows, told):
    settings, notes = nanogpt.read_settings(_empty(nanogpt, 768, 1, rows), {})
    assert settings["vocab_size"] == rows
    assert any("--vocab-size 50257 cuts off" in note for note in notes) == told


def test_joined_parts_come_apart_again():
    parts = [torch.arange(4.0).reshape(2, 2) + 10 * n for n in range(3)]
    for turn in (joined(3), joined(3, transposed=True)):
        whole = turn.to_hf(parts, None)
        assert whole.shape == (2, 6)
        assert all(torch.equal(one, other) for one, other in zip(turn.to_own(whole, None), parts, strict=True))

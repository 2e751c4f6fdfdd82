"""What can be wrong with an adapter, with the base model that it belongs to, and with merging the two."""

import json
import shutil
from functools import partial
from importlib import util
from pathlib import Path

from kit.model import quantization
from tests.material import make_model
from tests.troubleshooting.lab import case

GROUP, MERGING = "Adapters", "Merging"
LORA = {"type": "lora", "r": 4}
WORD = {"vocabulary": {"tokens": ["kinase"]}}
FRESH = {"name_or_path": None, "from_config": {"model_type": "gpt2", "n_layer": 1}, "tokenizer": "./model"}


def adapter(lab, **section):
    """Write the recipe of a LoRA with further keys."""
    return lab.recipe(adapter=LORA | section)


def trained(lab):
    """Train an adapter; return the folder it is in."""
    assert lab.kit(*adapter(lab))[0] == 0
    return Path("run/model")


# ---- the section


@case(GROUP, "a text for an adapter", 'recipe.yaml:19: adapter: found the text "lora"', "a mapping", "`type`")
def text_for_adapter(lab):
    return lab.recipe(adapter="lora")


@case(GROUP, "an adapter without a type", "adapter.type: required, but missing")
def no_type(lab):
    return lab.recipe(adapter={"r": 8})


@case(GROUP, "a misspelt type", "adapter.type: peft has no type `lorra`", "did you mean `lora`?")
def misspelt_type(lab):
    return adapter(lab, type="lorra")


@case(GROUP, "a type that the kit does not take", "adapter: `type: prefix_tuning` is not taken:", "packed", "merge")
def refused_type(lab):
    return adapter(lab, type="prefix_tuning")


@case(GROUP, "a type that peft has not for this model's layers", "peft refuses", "GPT2LMHeadModel", "Conv1D", "Linear")
def type_for_other_layers(lab):
    return adapter(lab, type="hra")


@case(GROUP, "a misspelt key of an adapter", "adapter.lora_alhpa: unknown key of peft's LoraConfig", "`lora_alpha`?")
def misspelt_adapter_key(lab):
    return adapter(lab, lora_alhpa=16)


@case(GROUP, "a key of another type", "adapter.r: unknown key of peft's IA3Config; valid:", "feedforward_modules")
def key_of_another_type(lab):
    return adapter(lab, type="ia3")


@case(GROUP, "an override with a misspelt key of an adapter", "adapter.rr: unknown key", "did you mean `r`?")
def misspelt_adapter_override(lab):
    return [*adapter(lab), "adapter.rr=3"]


@case(GROUP, "a key that follows from others", "the kit does not take `task_type`: it follows from `task`")
def refused_key(lab):
    return adapter(lab, task_type="CAUSAL_LM")


@case(
    GROUP, "an initialisation that looks at data", "adapter.init_lora_weights: `eva`", "training data", "leave the key"
)
def initialised_from_data(lab):
    return adapter(lab, init_lora_weights="eva")


@case(
    GROUP,
    "an initialisation that changes the base model",
    "adapter: these settings change the base model's own weights (transformer.h.{0–1}.attn.c_attn.weight",
    "leave out `init_lora_weights`",
)
def initialised_in_the_base(lab):
    return adapter(lab, init_lora_weights="pissa")


# ---- values


@case(GROUP, "a rank of 0", "adapter.r: found the number 0; expected a rank from 1 to 65,536")
def rank_zero(lab):
    return adapter(lab, r=0)


@case(GROUP, "the name of a kind of LoRA as a type", "adapter.type: peft has no type `dora`", "`use_dora: true`")
def kind_as_type(lab):
    return adapter(lab, type="dora")


@case(GROUP, "an initialisation that there is not", 'init_lora_weights: found the text "banana"', "`orthogonal`")
def no_initialisation(lab):
    return adapter(lab, init_lora_weights="banana")


@case(GROUP, "ranks for what is no regular expression", "adapter.rank_pattern: `(` is no regular expression")
def broken_rank_pattern(lab):
    return adapter(lab, rank_pattern={"(": 3})


@case(GROUP, "a scale of 0 for some layers", "adapter.alpha_pattern.c_attn: found the number 0; expected a number gr")
def scale_of_nothing(lab):
    return adapter(lab, alpha_pattern={"c_attn": 0})


@case(GROUP, "a number for settings", "adapter.runtime_config: found the number 3; expected a mapping")
def number_for_settings(lab):
    return adapter(lab, runtime_config=3)


@case(GROUP, "a name for a regular expression", "adapter.target_modules: `c_attn` matches no module", "`[c_attn]`")
def name_as_expression(lab):
    return adapter(lab, target_modules="c_attn")


@case(GROUP, "a target that no adapter goes into", "adapter: peft refuses", "GPT2Attention is not supported", "c_attn")
def whole_attention(lab):
    return adapter(lab, target_modules=["attn"])


@case(GROUP, "a rank in quotes", 'adapter.r: found the text "8"; expected an integer')
def rank_as_text(lab):
    return adapter(lab, r="8")


@case(GROUP, "a dropout above 1", "adapter.lora_dropout: found the number 1.5; expected", "less than 1")
def large_dropout(lab):
    return adapter(lab, lora_dropout=1.5)


@case(GROUP, "a text for true or false", 'adapter.use_dora: found the text "yes"; expected true or false')
def text_for_boolean(lab):
    return adapter(lab, use_dora="yes")


@case(GROUP, "biases that peft does not know", 'adapter.bias: found the text "some"; expected one of `none`, `all`')
def unknown_bias(lab):
    return adapter(lab, bias="some")


@case(GROUP, "keys of an adapter that contradict each other", "adapter: peft refuses", "lora_bias=True", "DoRA")
def contradicting_keys(lab):
    return adapter(lab, use_dora=True, lora_bias=True)


# ---- the model's layers


@case(GROUP, "a misspelt target", "adapter.target_modules: `c_atn` matches no module", "did you mean `c_attn`?")
def misspelt_target(lab):
    return adapter(lab, target_modules=["c_proj", "c_atn"])


@case(GROUP, "targets of another model", "adapter.target_modules: `dense` matches no module", "c_attn, c_fc, c_proj")
def targets_of_another_model(lab):
    return adapter(lab, target_modules=["query_key_value", "dense"])


@case(
    GROUP, "a target pattern that is no regular expression", "adapter.target_modules: `h.(1` is no regular expression"
)
def broken_target_pattern(lab):
    return adapter(lab, target_modules="h.(1")


@case(GROUP, "targets that are all excluded", "adapter: peft refuses", "All modules were excluded", "c_attn, c_fc")
def all_excluded(lab):
    return adapter(lab, exclude_modules=".*")


@case(GROUP, "a module to save that is not there", "adapter.modules_to_save: `norm` matches no module", "ln_f")
def nothing_to_save(lab):
    return adapter(lab, modules_to_save=["norm"])


@case(GROUP, "a rank for layers that are no targets", "adapter:", "rank_pattern", "q_proj")
def rank_of_nothing(lab):
    return adapter(lab, rank_pattern={"q_proj": 8})


@case(GROUP, "a layer beyond the model's last", "adapter.layers_to_transform: found 7; expected a block from 0 to 1")
def layer_beyond(lab):
    return adapter(lab, layers_to_transform=[0, 7])


@case(GROUP, "a tied matrix as a target", "adapter: `lm_head` holds the matrix that embeddings and head share")
def tied_target(lab):
    return adapter(lab, target_modules=["c_attn", "lm_head"])


# ---- beside other sections


@case(GROUP, "an adapter for a fresh model", "adapter", "needs a pretrained model (`model.name_or_path`)", "random")
def adapter_of_fresh_model(lab):
    return lab.recipe(adapter=LORA, model=FRESH)


@case(GROUP, "an adapter beside gradual unfreezing", "freezing.schedule: does not go with `adapter`", "new_tokens")
def adapter_and_schedule(lab):
    return lab.recipe(adapter=LORA, freezing={"schedule": [{"trainable": {"head": True}}]})


@case(GROUP, "an adapter beside a layer decay", "freezing.layer_decay: does not go with `adapter`")
def adapter_and_layer_decay(lab):
    return lab.recipe(adapter=LORA, freezing={"layer_decay": 0.9})


@case(
    GROUP, "an adapter beside blocks that train", "trainable.last_blocks: does not go with `adapter`", "modules_to_save"
)
def adapter_and_blocks(lab):
    return lab.recipe(adapter=LORA, freezing={"trainable": {"last_blocks": 1}})


@case(GROUP, "an adapter beside new tokens that stay frozen", "adapter", "would never learn", "new_tokens: true")
def adapter_and_frozen_tokens(lab):
    return lab.recipe(adapter=LORA, **WORD)


@case(GROUP, "4-bit weights without an adapter", "recipe.yaml:4: model.load_in_4bit: such weights cannot train")
def quantised_without_adapter(lab):
    return lab.recipe(model={"load_in_4bit": True})


@case(GROUP, "4-bit weights of a fresh model", "`load_in_4bit` goes with `name_or_path`")
def quantised_fresh_model(lab):
    return lab.recipe(adapter=LORA, model={"load_in_4bit": True, **FRESH})


@case(GROUP, "4-bit weights on a machine without a GPU", "model.load_in_4bit:", "a CUDA device", "bitsandbytes")
def quantised_without_device(lab):
    found = util.find_spec
    lab.monkeypatch.setattr(quantization, "_has_device", lambda: False)
    without = {"bitsandbytes": lambda *rest: None}
    lab.monkeypatch.setattr(util, "find_spec", lambda name, *rest: without.get(name, partial(found, name))(*rest))
    return lab.recipe(adapter=LORA, model={"load_in_4bit": True})


@case(GROUP, "training that starts from an adapter", "`./adapter` holds an adapter, not a whole model", "`kit merge`")
def adapter_as_model(lab):
    trained(lab).rename("adapter")
    shutil.rmtree("run")
    return lab.recipe(adapter=LORA, model={"name_or_path": "./adapter"})


@case(GROUP, "a finished run, and another rank since", "run: holds a run of another recipe", "adapter.r: 4 -> 8")
def rank_changed_after_a_run(lab):
    trained(lab)
    return adapter(lab, r=8)


# ---- merging


@case(
    MERGING, "a run that does not exist", "rnu: no such folder; expected a run directory, or a folder with an adapter"
)
def missing_run(lab):
    return ["merge", "rnu"]


@case(MERGING, "a run without an adapter", "run/model: nothing to merge")
def plain_run(lab):
    assert lab.kit(*lab.recipe())[0] == 0
    return ["merge", "run"]


@case(MERGING, "a run that has not ended", "run: the run has no model/ yet; it is written when training ends")
def unfinished_run(lab):
    shutil.rmtree(trained(lab))
    return ["merge", "run"]


@case(MERGING, "a run that is merged already", "run/merged is there already", "--output")
def merged_twice(lab):
    trained(lab)
    assert lab.kit("merge", "run")[0] == 0
    return ["merge", "run"]


@case(MERGING, "a model that is merged already", "run/merged: nothing to merge", "merged already")
def merged_model(lab):
    trained(lab)
    assert lab.kit("merge", "run")[0] == 0
    return ["merge", "run/merged", "--output", "again"]


@case(MERGING, "an adapter that peft alone wrote", "theirs: no adapter of the kit: base.json is missing", "PeftModel")
def adapter_of_peft(lab):
    lab.write("theirs/adapter_config.json", json.dumps({"peft_type": "LORA", "r": 8}))
    return ["merge", "theirs", "--output", "whole"]


@case(MERGING, "an adapter that is cut off", "run/model: the adapter is damaged", "another file")
def damaged_adapter(lab):
    path = trained(lab) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["merge", "run"]


@case(MERGING, "a file of an adapter that is missing", "run/model:", "adapter_model.safetensors is missing")
def missing_adapter_weights(lab):
    (trained(lab) / "adapter_model.safetensors").unlink()
    return ["merge", "run"]


@case(MERGING, "an adapter with another scale since", "run/model: the adapter is damaged: adapter_config.json is ano")
def edited_adapter(lab):
    path = trained(lab) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    return ["merge", "run"]


@case(MERGING, "a record of an adapter that was changed", "run/model: the adapter is damaged: base.json was changed")
def edited_record(lab):
    path = trained(lab) / "base.json"
    path.write_text(path.read_text().replace('"float32"', '"banana"'))
    return ["merge", "run"]


@case(MERGING, "a record of an adapter that is no JSON", "run/model: the adapter is damaged", "base.json")
def broken_record(lab):
    (trained(lab) / "base.json").write_text("{")
    return ["merge", "run"]


@case(MERGING, "a base model whose weights have changed", "another base model, ./model: expected weights", ", found ")
def changed_base(lab):
    trained(lab)
    make_model(seed=1).save_pretrained("model")
    return ["merge", "run"]


@case(MERGING, "a base model of another kind", "another base model, ./model: expected model_type gpt2, found llama")
def base_of_another_kind(lab):
    trained(lab)
    make_model("llama").save_pretrained("model")
    return ["merge", "run"]


@case(MERGING, "a base model that is gone", "run/model: the base model that this adapter belongs to cannot be used")
def missing_base(lab):
    trained(lab)
    shutil.rmtree("model")
    return ["merge", "run"]


@case(MERGING, "a folder to write that is there", "store is there already; remove it, or write to another folder")
def folder_is_there(lab):
    trained(lab)
    return ["merge", "run", "--output", "store"]


@case(MERGING, "a folder to write in one that is not there", "--output: the folder that `models/whole` would be in")
def folder_in_nothing(lab):
    trained(lab)
    return ["merge", "run", "--output", "models/whole"]


@case(MERGING, "an adapter in no run, and no folder to write", "--output: the folder to write the plain model to")
def no_folder_to_write(lab):
    return ["merge", str(trained(lab))]


@case(MERGING, "an adapter that peft cannot merge", "merge: peft cannot merge an adapter of type lora", "no bias")
def cannot_merge(lab):
    make_model("llama").save_pretrained("model")
    assert lab.kit(*adapter(lab, lora_bias=True))[0] == 0
    return ["merge", "run"]

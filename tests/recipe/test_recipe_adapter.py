"""The `adapter` section: peft's own keys, checked by name, type and range; and what the kit does not take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from kit.errors import UserError
from kit.recipe.adapter import REFUSED_KEYS, REFUSED_TYPES, AdapterSection, check_adapter


def config(**values):
    return check_adapter(AdapterSection(**values))


def test_keys_are_those_of_the_type():
    found = config(type="LoRA", r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj"], use_rslora=True)
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 16, 0.1, True)
    assert found.target_modules == {"q_proj"}
    assert (found.peft_type, found.task_type, found.inference_mode) == ("LORA", "CAUSAL_LM", False)
    assert type(config(type="ia3")).__name__ == "IA3Config"
    assert type(config(type="Lokr", alpha=4)).__name__ == "LoKrConfig"


def test_null_takes_a_key_back():
    assert config(type="lora", r=None, lora_dropout=None) == config(type="lora")


def test_values_of_nested_types():
    found = config(type="lora", rank_pattern={"c_attn": 2}, velora_config={"num_groups": 4}, init_lora_weights=False)
    assert found.rank_pattern == {"c_attn": 2}
    assert found.velora_config.num_groups == 4
    assert found.init_lora_weights is False
    assert config(type="lora", init_lora_weights="pissa_niter_4").init_lora_weights == "pissa_niter_4"


def test_every_type_of_peft_is_taken_or_refused_with_a_reason():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(REFUSED_TYPES) <= names
    for name in names - set(REFUSED_TYPES):
        assert config(type=name.lower()).peft_type == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "lorra"}, r"adapter\.type: .*`lorra`; did you mean `lora`\?"),
        ({"type": "xyz"}, r"adapter\.type: .*valid: .*ia3.*lora"),
        ({"type": "lora", "lora_alhpa": 8}, r"adapter\.lora_alhpa: unknown key.*did you mean `lora_alpha`\?"),
        ({"type": "lora", "rank": 8}, r"adapter\.rank: unknown key.*valid: .*\br\b"),
        ({"type": "ia3", "r": 8}, r"adapter\.r: unknown key of peft's IA3Config"),
        ({"type": "lora", "r": 0}, r"adapter\.r: found the number 0; expected a rank from 1"),
        ({"type": "lora", "r": -4}, r"adapter\.r: .*from 1"),
        ({"type": "lora", "r": 4.5}, r"adapter\.r: found the number 4\.5; expected an integer"),
        ({"type": "lora", "r": "8"}, r'adapter\.r: found the text "8"; expected an integer'),
        ({"type": "lora", "r": True}, r"adapter\.r: found the boolean true; expected an integer"),
        ({"type": "lora", "lora_alpha": 0}, r"adapter\.lora_alpha: .*greater than 0"),
        ({"type": "lora", "lora_dropout": 1.0}, r"adapter\.lora_dropout: .*less than 1"),
        ({"type": "lora", "lora_dropout": float("nan")}, r"adapter\.lora_dropout: "),
        ({"type": "lora", "use_dora": "yes"}, r"adapter\.use_dora: .*true or false"),
        ({"type": "lora", "bias": "some"}, r"adapter\.bias: .*`none`, `all`, `lora_only`"),
        ({"type": "lora", "target_modules": 3}, r"adapter\.target_modules: .*a list"),
        ({"type": "lora", "target_modules": [3]}, r"adapter\.target_modules: "),
        ({"type": "lora", "init_lora_weights": "good"}, r"adapter\.init_lora_weights: .*gaussian"),
        ({"type": "lora", "init_lora_weights": "eva"}, r"adapter\.init_lora_weights: .*training data"),
        ({"type": "lora", "velora_config": {"groups": 1}}, r"velora_config\.groups: .*you.*`num_groups`"),
        ({"type": "lora", "velora_config": {"num_groups": 0}}, r"velora_config: `num_groups` should be"),
        ({"type": "lora", "velora_config": {"num_groups": "a"}}, r"velora_config\.num_groups: .*integer"),
        ({"type": "lora", "velora_config": 3}, r"velora_config: found the number 3; expected a mapping"),
        ({"type": "lora", "target_modules": "x.*", "layers_to_transform": [1]}, r"adapter: peft refuses .*layers_to"),
        ({"type": " lora"}, r"adapter\.type: .*did you mean `lora`\?"),
        ({"type": "lora", "r": [8]}, r"adapter\.r: found a list; expected an integer"),
        ({"type": "lora", "lora_alpha": float("inf")}, r"adapter\.lora_alpha: "),
        ({"type": "lora", "lora_dropout": "0.1"}, r'adapter\.lora_dropout: found the text "0\.1"; expected a number'),
        ({"type": "lora", "bias": False}, r"adapter\.bias: found the boolean false; expected one of `none`"),
        ({"type": "lora", "rank_pattern": []}, r"adapter\.rank_pattern: found a list; expected a mapping"),
        ({"type": "lora", "modules_to_save": "lm_head"}, r"adapter\.modules_to_save: .*expected a list"),
        ({"type": "lora", "layers_to_transform": "all"}, r"layers_to_transform: .*(list|integer) or an? "),
        ({"type": "lora", "layers_pattern": "h"}, r"adapter: peft refuses .*`layers_to_transform` must also"),
        ({"type": "lora", "use_bdlora": True}, r"adapter\.use_bdlora: found the boolean true; expected a mapping"),
        ({"type": "lora", "velora_config": {"banana": 1}}, r"velora_config\.banana: unknown key .*valid: num_groups"),
        ({"type": "vera", "d_initial": float("nan")}, r"adapter\.d_initial: .*a finite number"),
        ({"type": "boft", "boft_block_size": 0}, r"adapter: peft refuses .*must be non-zero"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(values, message):
    with pytest.raises(UserError, match=message) as error:
        config(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_keys_that_the_kit_decides(name):
    with pytest.raises(ValidationError, match=f"the kit does not take `{name}`: "):
        AdapterSection(type="lora", **{name: 1})
    AdapterSection(type="lora", **{name: None})


@pytest.mark.parametrize("name", REFUSED_TYPES)
def test_types_that_the_kit_does_not_take(name):
    with pytest.raises(ValidationError, match="is not taken: "):
        AdapterSection(type=name.lower())


def test_refused_keys_are_keys_of_peft():
    """A name that peft drops would be refused for nothing."""
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {field.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in dataclasses.fields(kind)}
    assert set(REFUSED_KEYS) <= known


def test_what_needs_more_than_a_forward_pass_is_known():
    """A type that has to be told of each step, or adds to the loss, would train something else without a word."""
    import peft

    calls = re.compile(r"def (update_and_allocate|get_variational_loss|_get_\w*loss)\b")
    folder = Path(peft.__file__).parent / "tuners"
    found = {path.relative_to(folder).parts[0] for path in folder.rglob("*.py") if calls.search(path.read_text())}
    assert found == {"adalora", "adamss", "lora"}  # refused by type, by `use_asa`, by `monteclora_config`


@pytest.mark.parametrize("values", [{}, {"type": ""}, {"type": 3}])
def test_a_type_is_needed(values):
    with pytest.raises(ValidationError, match="type"):
        AdapterSection(**values)


def test_loading_a_section_imports_nothing_heavy():
    code = "import sys, kit.recipe.adapter as a\na.AdapterSection(type='lora', r=8)\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft"} & set(modules)

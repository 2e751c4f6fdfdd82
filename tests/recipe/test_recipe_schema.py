"""The JSON Schema that editors use, and its committed copy."""

import json
from pathlib import Path

import pytest
import transformers

from kit.recipe.schema import recipe_schema, schema_text
from kit.recipe.tasks import RECIPES

COMMITTED = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the committed copy is that of transformers 5.23.0")
def test_the_committed_copy_is_fresh():
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), f"write schema_text() to {COMMITTED}"


def test_the_text_is_the_schema():
    assert json.loads(schema_text()) == recipe_schema()
    assert schema_text() == schema_text()


def test_training_has_the_names_types_and_descriptions_of_the_installed_arguments():
    training = recipe_schema()["properties"]["training"]
    assert training["additionalProperties"] is False
    properties = training["properties"]
    assert properties["learning_rate"]["type"] == ["number", "null"]
    assert properties["learning_rate"]["default"] == 5e-5
    assert "learning rate" in properties["learning_rate"]["description"]
    assert properties["bf16"]["type"] == ["boolean", "null"]
    assert "cosine" in properties["lr_scheduler_type"]["enum"]
    assert properties["include_num_input_tokens_seen"]["anyOf"] == [
        {"enum": ["all", "non_padding", "no", None]},
        {"type": "boolean"},
    ]
    assert {"gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs"} <= set(properties)
    assert not {"output_dir", "hub_token", "warmup_ratio"} & set(properties)


def test_a_file_that_extends_another_needs_no_key():
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["extends"]["type"] == "string"
    assert schema["additionalProperties"] is False
    of_tasks = schema.pop("allOf")
    assert '"required"' not in json.dumps([schema, *(each["then"] for each in of_tasks)])


def test_a_file_that_names_its_task_has_the_sections_of_that_task():
    of_tasks = {each["if"]["properties"]["task"]["const"]: each["then"] for each in recipe_schema()["allOf"]}
    assert set(of_tasks) == set(RECIPES)
    sections = {task: then["properties"]["data"]["$ref"].rpartition("/")[2] for task, then in of_tasks.items()}
    assert sections == {"causal-lm": "DataSection", "sequence-classification": "LabeledDataSection"}


def test_every_key_is_described():
    schema = recipe_schema()
    sections = {name: definition["properties"] for name, definition in schema["$defs"].items()}
    sections |= {"": schema["properties"], "training": schema["properties"]["training"]["properties"]}
    for section, properties in sections.items():
        for name, key in properties.items():
            referred = schema["$defs"].get(key.get("$ref", "").rpartition("/")[2], {})
            assert key.get("description") or referred.get("description"), f"{section}.{name}"


def test_every_reference_leads_somewhere():
    schema = recipe_schema()
    text = json.dumps(schema)
    references = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert references
    assert references <= set(schema["$defs"])

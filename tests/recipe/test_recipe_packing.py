"""How rows are packed, and the kernels that packed rows alone go through."""

import pytest

from kit.recipe.loading import dump_recipe, load_recipe


@pytest.mark.parametrize(("written", "read"), [("true", True), ("no", False), ("best-fit", "best-fit")])
def test_packing_is_one_of_three(write, written, read):
    recipe = load_recipe(write(), [f"data.packing={written}"])
    assert recipe.data.packing is read or recipe.data.packing == read == "best-fit"
    assert load_recipe(write(dump_recipe(recipe), "dump.yaml", whole=True)) == recipe


@pytest.mark.parametrize("wrong", ["best_fit", "bestfit", "Best-Fit"])
def test_a_misspelt_way_of_packing_is_answered_with_the_right_one(message, wrong):
    text = message(overrides=[f"data.packing={wrong}"])
    assert f'data.packing: found the text "{wrong}"; expected true or false or ' in text
    assert text.endswith("did you mean `best-fit`?")
    assert "\n" not in text


def test_packing_is_no_number(message):
    assert "data.packing: found the number 1; expected true or false or " in message(overrides=["data.packing=1"])


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_kernels_of_packed_rows_go_with_packed_rows(write, message, kernel):
    overrides = [f"model.attn_implementation={kernel}"]
    assert load_recipe(write(), overrides).model.attn_implementation == kernel
    assert load_recipe(write(), [*overrides, "data.packing=best-fit"]).model.attn_implementation == kernel
    text = message(overrides=[*overrides, "data.packing=false"])
    assert f"model.attn_implementation: `{kernel}` is for packed rows" in text


def test_a_misspelt_kernel_is_answered_with_the_nearest(message):
    assert "did you mean `flash_attention_2`" in message(overrides=["model.attn_implementation=flash_attention2"])

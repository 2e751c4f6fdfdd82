"""`kit recipes`: listed, printed, and copied so that the copy works where it lies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.errors import UserError
from kit.recipe import shipped
from kit.recipe.loading import dump_recipe, load_recipe
from kit.recipe.shipped import copy_recipe, find_recipe, list_recipes, shipped_recipes, show_recipes

ROOT = Path(__file__).parents[2]
NAMES = [recipe.name for recipe in shipped_recipes()]


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        show_recipes(*arguments)
    return str(error.value)


def test_every_recipe_is_listed_with_its_purpose_and_needs():
    assert (
        sorted(p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in ROOT.glob("recipes/*/*.yaml"))
        == NAMES
    )
    listing = " ".join(list_recipes().split())
    for recipe in shipped_recipes():
        assert recipe.purpose.endswith(".")
        assert recipe.needs
        for part in (recipe.name, recipe.purpose, recipe.needs):
            assert " ".join(part.split()) in listing


def test_a_header_is_read_over_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "recipes_folder", lambda: tmp_path)
    lines = [
        "# schema",
        "# What it",
        "# does.",
        "#",
        "# Needs:    a file,",
        "#           and another.",
        "# Launch:   now",
        "x: 1",
    ]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    [recipe] = shipped_recipes()
    assert (recipe.purpose, recipe.needs) == ("What it does.", "a file, and another.")


def test_a_copy_names_its_own_run(tmp_path):
    show_recipes("text/lm_gpt2_lora", str(tmp_path / "mine.yaml"))
    text = (tmp_path / "mine.yaml").read_text()
    assert "kit merge runs/mine " in text
    assert "runs/lm_gpt2_lora" not in text


@pytest.mark.parametrize(
    "name", ["text/lm_gpt2_full", "lm_gpt2_full", "lm_gpt2_full.yaml", "recipes/text/lm_gpt2_full.yaml"]
)
def test_one_recipe_is_printed_as_it_is(name):
    assert show_recipes(name, None) == (ROOT / "recipes/text/lm_gpt2_full.yaml").read_text()


def test_unknown_names_are_refused_with_the_nearest():
    assert "did you mean `lm_gpt2_full`?" in refusal("lm_gpt2_ful", None)
    assert "did you mean `text/lm_gpt2_full`?" in refusal("txt/lm_gpt2_full", None)
    assert "no such recipe" in refusal("", None)
    assert "no such recipe" in refusal("../../kit", None)
    assert "which recipe?" in refusal(None, "mine.yaml")


def test_a_stem_that_several_recipes_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "recipes_folder", lambda: tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("# schema\n# X.\nx: 1\n")
    assert "several recipes have this name: a/same, b/same" in refusal("same", None)
    assert find_recipe("b/same").path == tmp_path / "b/same.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same_recipe_and_finds_schema_and_bases(name, tmp_path):
    files = copy_recipe(find_recipe(name), str(tmp_path / "experiments" / "mine.yaml"))
    assert sorted(files) == sorted((tmp_path / "experiments").iterdir())
    assert dump_recipe(load_recipe(files[0])) == dump_recipe(load_recipe(find_recipe(name).path))
    for file in files:
        text = file.read_text()
        target = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
        assert (file.parent / target).resolve() == ROOT / "recipes/recipe.schema.json"
        assert f"kit train {file.name}" in text or "make train" not in find_recipe(name).path.read_text()
        assert "ARGS=" not in text


def test_a_copy_says_what_was_written_and_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = show_recipes("lm_distilgpt2_full", "mine.yaml")
    assert printed.splitlines() == [
        "wrote mine.yaml and what it extends: lm_gpt2_full.yaml",
        "needs: train.txt and valid.txt in the working directory, one text per line, at least 1 MB.",
        "next:  kit check mine.yaml",
    ]
    (tmp_path / "a folder").mkdir()
    assert "next:  kit check 'a folder/lm_qwen3_full.yaml'" in show_recipes("lm_qwen3_full", "a folder")


def test_recipes_that_extend_one_base_are_copied_beside_each_other_from_anywhere(tmp_path, monkeypatch):
    show_recipes("lm_distilgpt2_full", f"{tmp_path}/")
    monkeypatch.chdir(tmp_path)
    show_recipes("lm_gpt2-xl_checkpointing", "xl.yaml")
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    assert "mine.yaml: exists" in refusal("lm_gpt2_full", str(tmp_path / "mine.yaml"))
    (tmp_path / "lm_gpt2_full.yaml").write_text("mine")
    assert "is not the one that text/lm_distilgpt2_full extends" in refusal("lm_distilgpt2_full", f"{tmp_path}/x.yaml")
    assert "choose another" in refusal("lm_distilgpt2_full", f"{tmp_path}/new/lm_gpt2_full.yaml")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "mine.yaml": "mine",
        "lm_gpt2_full.yaml": "mine",
    }


@pytest.mark.parametrize("destination", ["", "no_such_folder", "recipe.txt", "mine.yaml/x.yaml", "mine.yaml/"])
def test_a_destination_that_is_no_place_for_a_recipe_is_refused(destination, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("mine")
    assert "--copy: " in refusal("lm_gpt2_full", destination)
    assert os.listdir(tmp_path) == ["mine.yaml"]


def test_a_build_holds_the_recipes(tmp_path):
    """An installed kit has no checkout around it: the build has to take the recipes into the package."""
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "-e",
        str(tmp_path),
        "build_py",
        "-d",
        str(tmp_path / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code = "import kit.recipe.shipped as s; print(s.recipes_folder(), *(r.name for r in s.shipped_recipes()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == [str(tmp_path / "lib/kit/recipes"), *NAMES], found.stderr
    assert (tmp_path / "lib/kit/recipes/recipe.schema.json").is_file()

"""Fixtures for recipes."""

from textwrap import dedent

import pytest

from kit.errors import UserError
from kit.recipe.loading import load_recipe

MINIMAL = """\
task: causal-lm
model: {name_or_path: gpt2}
data:
  train: [{path: a.txt}]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into an empty working directory; its lines follow those of MINIMAL unless `whole`."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text="", name="r.yaml", whole=False):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(("" if whole else MINIMAL) + dedent(text), encoding="utf-8")
        return name

    return write_recipe


@pytest.fixture
def message(write):
    """Return the message that a recipe, or overrides of the minimal one, are refused with."""

    def refused(text="", overrides=(), whole=False):
        with pytest.raises(UserError) as error:
            load_recipe(write(text, whole=whole), overrides)
        return str(error.value)

    return refused

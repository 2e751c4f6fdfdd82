"""What can be told of a recipe's freezing before its model is there."""

from types import SimpleNamespace

import pytest

from kit.errors import UserError
from kit.model.freezing import check_blocks, check_new_tokens, count_parameters
from kit.model.new_rows import train_new_rows
from kit.recipe.freezing import FreezingSection
from tests.material import make_model


def section(**trainable):
    return FreezingSection(trainable=trainable)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"trainable": {"last_blocks": 3}}, "freezing.trainable.last_blocks"),
        ({"frozen": {"first_blocks": 3}}, "freezing.frozen.first_blocks"),
        (
            {"schedule": [{"trainable": {"head": True}}, {"step": 2, "trainable": {"last_blocks": 3}}]},
            "freezing.schedule.1.trainable.last_blocks",
        ),
        ({"groups": [{"parts": {"last_blocks": 3}, "learning_rate": 1.0}]}, "freezing.groups.0.parts.last_blocks"),
    ],
)
def test_more_blocks_than_there_are(values, key):
    with pytest.raises(UserError, match=f"{key}: found 3; expected at most 2"):
        check_blocks(FreezingSection(**values), make_model().config)
    check_blocks(None, make_model().config)
    check_blocks(section(last_blocks=2), make_model().config)


def test_no_new_tokens():
    check_new_tokens(None, 0)
    check_new_tokens(section(new_tokens=True), 1)
    with pytest.raises(UserError, match=r"new_tokens: all tokens .* already.*embeddings: true"):
        check_new_tokens(section(new_tokens=True), 0)


def test_rows_of_a_matrix_are_counted_once():
    model = make_model()
    total = model.num_parameters()
    model.requires_grad_(False)
    train_new_rows(model, [310, 311])
    assert count_parameters(model) == (total, 2 * 32)


def recipe(**sections):
    return SimpleNamespace(**{"freezing": None, "adapter": None, **sections})

"""What blocks and branches do for the loss, against models that lack them."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kit.evaluation.block_effects import block_effects, difference, row_nats
from tests.material import make_model
from tests.model.models import MODELS

ROWS = [[5, 9, 200, 31, 7, 7], [12, 40], [3], [250, 251, 252, 253]]


def model_of(architecture, **config):
    """A model whose blocks all matter."""
    model = make_model(architecture, **config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def nats_alone(model, row, context=0):
    ids = torch.tensor([[context, *row]])
    return F.cross_entropy(model(ids, use_cache=False).logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()


@torch.no_grad()
def test_the_nats_of_a_row_do_not_depend_on_the_rows_beside_it():
    model = model_of("llama")
    np.testing.assert_allclose(
        row_nats(model, ROWS, 0), [nats_alone(model, row) for row in ROWS], rtol=1e-5
    )  # fmt: skip


def test_a_difference_is_per_token_with_its_error_over_rows():
    rows = [[1] * 2, [1] * 2, [1] * 4]
    plain = np.zeros(3)
    mean, errors = difference(np.array([2.0, 4.0, 6.0]), plain, rows)
    assert mean == pytest.approx(12 / 8)
    # residuals of 1.5 a token: -1, 1, 0
    assert errors == pytest.approx(1.5 / (2**0.5 / 8))
    assert difference(plain, plain, rows) == (0.0, 0.0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_leaving_out_a_block_gives_the_loss_of_a_model_without_it(architecture):
    model = model_of(architecture)
    blocks = model.transformer.h if architecture == "gpt2" else model.base_model.layers
    effects = {effect.name: effect.nats for effect in block_effects(model, blocks, ROWS, 0)}
    plain = sum(nats_alone(model, row) for row in ROWS)
    for number in range(2):
        without = copy.deepcopy(model)
        kept = without.transformer.h if architecture == "gpt2" else without.base_model.layers
        del kept[number]
        without.config.num_hidden_layers = 1
        expected = (sum(nats_alone(without, row) for row in ROWS) - plain) / sum(map(len, ROWS))
        assert effects[str(number)] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


@torch.no_grad()
def test_leaving_out_a_branch_gives_the_loss_of_one_that_writes_nothing():
    model = model_of("gpt2")
    effects = {effect.name: effect.nats for effect in block_effects(model, model.transformer.h, ROWS, 0)}
    assert list(effects) == ["0", "0 attn", "0 mlp", "1", "1 attn", "1 mlp"]
    plain = sum(nats_alone(model, row) for row in ROWS)
    for name in ("attn", "mlp"):
        without = copy.deepcopy(model)
        projection = getattr(without.transformer.h[1], name).c_proj
        projection.weight.zero_()
        projection.bias.zero_()
        expected = (sum(nats_alone(without, row) for row in ROWS) - plain) / sum(map(len, ROWS))
        assert effects[f"1 {name}"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


def test_blocks_that_add_the_residual_within_their_branches_are_left_out_whole_alone():
    bert = MODELS["bert"]()
    found = block_effects(bert, bert.bert.encoder.layer, ROWS, 0)
    assert [effect.name for effect in found] == ["0", "1"]


def test_the_model_is_afterwards_as_it_was():
    model = model_of("llama").train()
    before = row_nats(model, ROWS, 0)
    block_effects(model, model.model.layers, ROWS, 0)
    assert model.training
    assert np.array_equal(row_nats(model, ROWS, 0), before)
    assert not any(module._forward_hooks for module in model.modules())

"""Batches of rows, and the mode and precision that a model is measured in."""

import numpy as np
import pytest
import torch

from kit.evaluation.inference import batches_of, inference, score_in_batches


def test_batches_hold_as_many_rows_as_fit():
    lengths = np.array([10, 6, 5, 5, 2, 2, 2, 2])
    assert [batch.tolist() for batch in batches_of(lengths, 12)] == [[0], [1, 2], [3, 4], [5, 6, 7]]
    assert [len(batch) for batch in batches_of(lengths, 1)] == [1] * 8
    assert batches_of(np.array([], dtype=int), 12) == []


def test_scores_come_back_in_the_order_of_the_rows():
    lengths = np.array([3, 9, 1, 9, 4])
    found = score_in_batches(
        torch.nn.Linear(1, 1), lengths, 2, lambda rows: torch.tensor([[row, lengths[row]] for row in rows]), 12, "x"
    )
    assert found.tolist() == [[0, 3], [1, 9], [2, 1], [3, 9], [4, 4]]
    assert found.dtype == np.float64


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_forward_are_given_back_after_a_mistake(training):
    model = torch.nn.Linear(2, 2).train(training)
    plain = model.forward
    model._original_forward = plain
    model.forward = rounding = lambda x: plain(x).bfloat16()
    with pytest.raises(KeyError):
        _look_and_fail(model)
    assert model.training is training
    assert model.forward is rounding


def test_nothing_is_measured_in_tf32_and_training_goes_on_in_it():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with inference(torch.nn.Linear(2, 2)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def _look_and_fail(model):
    with inference(model):
        assert not model.training
        assert model(torch.ones(1, 2)).dtype == torch.float32
        raise KeyError

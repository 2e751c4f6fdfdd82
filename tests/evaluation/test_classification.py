"""Logits of every row, whatever the batches and the number of processes."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from kit.errors import UserError
from kit.evaluation.classification import predict_logits, probabilities
from tests.evaluation.rows import Rows, classifier, collate, in_two_processes

LENGTHS = [3, 17, 1, 9, 9, 40, 2, 2, 5, 30, 11]


@torch.no_grad()
def one_by_one(model, rows):
    model.eval()
    return np.array([model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in rows.ids])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("max_positions", [1, 40, 100, 10_000])
def test_logits_are_those_of_each_row_alone(architecture, max_positions):
    model, rows = classifier(architecture), Rows(LENGTHS)
    expected = one_by_one(model, rows)
    found = predict_logits(model.train(), rows, collate, max_positions)
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected, axis=0).min() > 0.05  # rows differ, so that a wrong order would show
    assert model.training


def test_no_batch_has_more_positions_than_asked_for():
    sizes = []

    def spy(rows):
        sizes.append((len(rows), max(len(row["input_ids"]) for row in rows)))
        return collate(rows)

    predict_logits(classifier(), Rows(LENGTHS), spy, 35)
    assert sizes[0] == (1, 40)  # longer than a batch may be, and still measured
    assert all(number * longest <= 35 for number, longest in sizes[1:])
    assert sum(number for number, _ in sizes) == len(LENGTHS)
    assert sizes == sorted(sizes, key=lambda size: -size[1])


def test_an_adapter_and_float64_weights():
    model = get_peft_model(
        classifier().double(), LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    )
    rows = Rows(LENGTHS)
    assert predict_logits(model, rows, collate, 60) == pytest.approx(one_by_one(model, rows), abs=1e-12)


def test_two_processes_give_the_bits_of_one(tmp_path):
    alone = _logits()
    for found in in_two_processes(_logits, tmp_path):
        assert (found == alone).all()


def test_two_processes_poll_equally_often_even_with_one_batch(tmp_path):
    assert [found.tolist() for found in in_two_processes(_polls, tmp_path)] == [[1], [1]]


def _logits():
    return predict_logits(classifier(), Rows(LENGTHS), collate, 40)


def _polls():
    calls = []
    predict_logits(classifier(), Rows([4, 4]), collate, 1000, poll=lambda: calls.append(1))
    return np.array([len(calls)])


def test_poll_may_end_it_and_the_mode_comes_back():
    model = classifier().train()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_logits(model, Rows(LENGTHS), collate, 40, poll=stop)
    assert model.training


def test_no_rows():
    assert predict_logits(classifier(), Rows([]), collate, 40).shape == (0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_a_users_error(value):
    model = classifier()
    model.score.weight.data[1, 0] = value
    with pytest.raises(UserError, match=r"validation: the model gives 11 of 11 rows logits that are not finite"):
        predict_logits(model, Rows(LENGTHS), collate, 40, name="validation")


def test_probabilities():
    logits = np.array([[0.0, np.log(3.0)], [800.0, -800.0]])
    assert probabilities(logits, multi=False) == pytest.approx(np.array([[0.25, 0.75], [1, 0]]))
    assert probabilities(logits, multi=True) == pytest.approx(np.array([[0.5, 0.75], [1, 0]]))
    assert probabilities(np.float32(logits), multi=False).dtype == np.float64

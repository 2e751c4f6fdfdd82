"""The scorecard holds before, after and the difference of each set, and prints whatever there is."""

import json

import pytest

from kit.evaluation.scorecard import make_scorecard, print_figures, print_scorecard
from kit.run import train

OLD = {
    "bits_per_byte": 2.0, "nats_per_token": 4.0, "perplexity": 54.6, "token_accuracy": 0.25, "eos_nats": 1.5,
    "tokens": 100, "bytes": 400, "documents": 7,
}  # fmt: skip
NEW = {**OLD, "bits_per_byte": 1.5, "nats_per_token": 3.0, "perplexity": 20.1, "token_accuracy": 0.5, "eos_nats": 2.0}


def test_difference_is_after_less_before():
    card = make_scorecard("causal-lm", {"domain": OLD, "general": NEW}, {"general": OLD, "domain": NEW})
    assert card["task"] == "causal-lm"
    assert list(card["sets"]) == ["domain", "general"]
    domain = card["sets"]["domain"]
    assert (domain["before"], domain["after"]) == (OLD, NEW)
    assert domain["delta"] == pytest.approx(
        {"bits_per_byte": -0.5, "nats_per_token": -1.0, "perplexity": -34.5, "token_accuracy": 0.25, "eos_nats": 0.5}
    )
    assert card["sets"]["general"]["delta"]["bits_per_byte"] == 0.5


def test_sizes_have_no_difference():
    delta = make_scorecard("causal-lm", {"domain": OLD}, {"domain": NEW})["sets"]["domain"]["delta"]
    assert not delta.keys() & {"tokens", "bytes", "documents"}


def test_figures_per_token_are_not_compared_across_vocabularies(capsys):
    fewer = {**NEW, "tokens": 90}
    untrained = {**fewer, "bits_per_byte": 1.8}
    card = make_scorecard("causal-lm", {"domain": OLD}, {"domain": fewer}, {"domain": untrained})
    assert card["sets"]["domain"]["delta"] == {"bits_per_byte": -0.5}
    assert card["sets"]["domain"]["untrained"] == untrained
    print_scorecard(card)
    out = capsys.readouterr().out
    assert "new tokens, untrained" in out
    assert "1.8000" in out
    assert out.count("other tokens") == 2


def test_what_it_prints(capsys):
    print_scorecard(make_scorecard("causal-lm", {"domain": OLD}, {"domain": NEW}))
    out = capsys.readouterr().out
    for figure in ("domain", "2.0000", "1.5000", "-0.5000", "-25.0%", "54.60", "20.10", "25.0%", "50.0%"):
        assert figure in out
    print_figures("Before training", {"domain": OLD})
    out = capsys.readouterr().out
    for figure in ("Before training", "2.0000", "4.0000", "1.500", "100", "400"):
        assert figure in out


def test_without_a_set(capsys):
    print_scorecard(make_scorecard("causal-lm", {}, {}))
    print_figures("Before training", {})
    assert "Scorecard" not in capsys.readouterr().out  # a table without a row


def test_a_model_that_has_nothing_left_to_learn(capsys):
    perfect = {**OLD, "bits_per_byte": 0.0, "nats_per_token": 0.0, "perplexity": 1.0}
    print_scorecard(make_scorecard("causal-lm", {"domain": perfect}, {"domain": perfect}))
    assert "0.0000" in capsys.readouterr().out


def test_a_model_that_went_to_pieces(capsys):
    ruined = {**OLD, "perplexity": float("inf"), "nats_per_token": float("nan"), "bits_per_byte": float("nan")}
    print_scorecard(make_scorecard("causal-lm", {"domain": OLD}, {"domain": ruined}))
    assert "inf" in capsys.readouterr().out


def test_run_without_evaluation_sets(write_recipe, tmp_path):
    train(str(write_recipe(data={"validation": None})), [])
    assert json.loads((tmp_path / "run/scorecard.json").read_text()) == {"task": "causal-lm", "sets": {}}

"""Runs of classifiers, through the commands: what is chosen by what, measured when, saved, and can be used alone."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from kit.check import check
from kit.errors import UserError
from kit.evaluation.classification import probabilities
from kit.merge import merge
from kit.run import evaluate, prepare, train
from tests.classifiers import labeled_rows, multi_rows, read, save_base, write_recipe, write_rows
from tests.harness import run_kit
from tests.history import read_history
from tests.material import documents
from tests.offline_wandb import read_runs

BASELINES = ("majority", "tfidf_logreg", "zero_shot")
EXAMPLES = ["tensor kit tensor kit kit", "loss epoch loss loss"]
TRAINING = {"max_steps": 6, "learning_rate": 3e-2}
LAST_BLOCK = {"trainable": {"last_blocks": 1, "final_norm": True, "head": True}}
UNCHOSEN = {"eval_strategy": "no", "load_best_model_at_end": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function that gives the folder of a tiny language model."""
    made = {}

    def folder(architecture="gpt2"):
        if architecture not in made:
            made[architecture] = save_base(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return folder


@pytest.fixture
def go(base, tmp_path):
    """A function that trains on `labeled_rows`, in this process, and gives the run directory."""
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))

    def run(name="run", architecture="gpt2", rows=rows, **sections):
        train(str(write_recipe(tmp_path / f"{name}.yaml", base(architecture), rows, **sections)), [])
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """The directory of a run with everything: a test of its own, baselines, examples, freezing, W&B."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.csv", labeled_rows(60))
    test = write_rows(folder / "test.csv", labeled_rows(20, seed=9))
    recipe = write_recipe(
        folder / "run.yaml", base(), rows,
        data={"test": [{"path": str(test)}], "split": {"validation": 0.3}},
        training=TRAINING | {"learning_rate": 0.1},
        freezing=LAST_BLOCK,
        evaluation={"baselines": BASELINES, "examples": EXAMPLES, "train_sample": 10},
        tracking={"wandb": {"mode": "offline"}},
    )  # fmt: skip
    train(str(recipe), [])
    return folder / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def after(run):
    """The figures of the trained model in a run's scorecard."""
    return {name: card["after"] for name, card in read(run / "scorecard.json")["sets"].items()}


def measured(run):
    """The figures that `kit evaluate` finds."""
    evaluate(str(run), [], None, str(run.parent / "figures.json"))
    return read(run.parent / "figures.json")["sets"]


def weights(run):
    return load_file(run / "model/model.safetensors")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- what a run leaves


def test_the_scorecard_holds_all_that_is_compared(finished):
    sets = read(finished / "scorecard.json")["sets"]
    assert list(sets) == ["validation", "train_sample", "test"]
    assert sets["train_sample"]["after"]["rows"] == 10
    for name, card in sets.items():
        assert {"after", "intervals", "per_class", "confusion"} <= card.keys()
        # The untrained head is not measured on the test: only the model that was chosen is.
        assert ({"before", "delta"} <= card.keys()) == (name != "test")
        assert card.get("before") != card["after"]
        for figure, change in card.get("delta", {}).items():
            assert change == card["after"][figure] - card["before"][figure]
        confusion = np.array(card["confusion"])
        assert confusion.sum() == card["after"]["rows"]
        assert np.trace(confusion) / confusion.sum() == pytest.approx(card["after"]["accuracy"])
        assert [card["per_class"][label]["support"] for label in ("ham", "spam")] == confusion.sum(axis=1).tolist()
        low, high = card["intervals"]["accuracy"]
        assert low <= card["after"]["accuracy"] <= high
        assert set(card.get("baselines", ())) == (set() if name == "train_sample" else set(BASELINES))
    assert sets["test"]["after"]["rows"] == 20
    most = np.array(sets["test"]["confusion"]).sum(axis=1)[1]  # `spam` trains most
    assert sets["test"]["baselines"]["majority"]["accuracy"] == pytest.approx(most / 20)
    found, tfidf = sets["test"]["against_tfidf"]["accuracy"], sets["test"]["baselines"]["tfidf_logreg"]["accuracy"]
    assert found["difference"] == pytest.approx(sets["test"]["after"]["accuracy"] - tfidf)


def test_the_saved_model_works_in_a_pipeline_alone(finished):
    """It gives the labels, and the probabilities, that the kit's own figures came from."""
    classify = pipeline("text-classification", str(finished / "model"))
    rows = labeled_rows(20, seed=9)
    found = classify([text for _, text in rows], batch_size=7)
    right = sum(answer["label"] == label for answer, (label, _) in zip(found, rows, strict=True))
    card = read(finished / "scorecard.json")["sets"]["test"]
    assert right / len(rows) == card["after"]["accuracy"]
    assert 0 < right < len(rows)
    predictions = lines(finished / "predictions.jsonl")
    assert [row["set"] for row in predictions] == ["validation"] * (len(predictions) - 20) + ["test"] * 20
    assert [row["predicted"] for row in predictions[-20:]] == [answer["label"] for answer in found]
    mistakes = lines(finished / "mistakes.jsonl")
    confusion = np.array(read(finished / "scorecard.json")["sets"]["validation"]["confusion"])
    assert len(mistakes) == confusion.sum() - np.trace(confusion) > 0
    file = (finished.parent / "rows.csv").read_text().splitlines()
    for row in mistakes:
        answer = classify(row["text"])[0]
        assert answer["label"] == row["predicted"] != row["label"]
        assert answer["score"] == pytest.approx(row["probability"], abs=1e-5)
        assert row["text"] in file[int(row["where"].split(":")[1]) - 1]
    assert [row["probability"] for row in mistakes] == sorted((row["probability"] for row in mistakes), reverse=True)
    samples = read(finished / "samples.json")
    assert [each["prompt"] for each in samples] == EXAMPLES
    for each in samples:
        answer = classify(each["prompt"])[0]
        assert each["after"] == [f"{answer['label']} ({answer['score']:.3f})"] != each["before"]


def test_no_row_is_lost(finished):
    train_part, *others = read(finished / "ledger.json")
    assert [part["part"] for part in others] == ["validation", "train_sample", "test"]
    assert train_part["sources"][0]["read"] == 60 == train_part["rows"] + train_part["split_off"]["validation"]
    assert others[0]["rows"] == train_part["split_off"]["validation"] == 18


def test_only_what_is_named_trains(finished, base):
    before, now = load_file(base() / "model.safetensors"), weights(finished)
    still = {name for name in before if torch.equal(before[name], now[name])}
    assert still == {n for n in before if n.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0."))}
    assert set(now) - set(before) == {"score.weight"}
    trained = {row["part"] for row in read(finished / "freezing.json") if row["learning_rate"] is not None}
    assert trained == {"block 1", "final norm", "head"}


def test_the_summary_of_w_and_b_is_the_scorecard(finished):
    [run] = read_runs(finished).values()
    sets = read(finished / "scorecard.json")["sets"]
    card, before = sets["test"], sets["validation"]["before"]
    assert run.summary["scorecard/test/after/accuracy"] == card["after"]["accuracy"]
    assert run.summary["scorecard/validation/before/f1_macro"] == before["f1_macro"]
    assert (
        run.summary["scorecard/test/baselines/tfidf_logreg/accuracy"] == card["baselines"]["tfidf_logreg"]["accuracy"]
    )
    assert not any("_test_" in key for entry in run.history for key in entry)


def test_finished_is_finished(finished, tmp_path, capsys):
    kept = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    train(str(finished.with_suffix(".yaml")), [])
    assert "is finished: nothing to do" in capsys.readouterr().out
    prepare(str(finished.with_suffix(".yaml")), [])
    assert run_kit(["status", finished.with_suffix(".yaml")], output=tmp_path / "said.txt") == [0]
    assert "done" in (tmp_path / "said.txt").read_text()
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == kept
    with pytest.raises(UserError, match="nothing to merge"):
        merge(str(finished), None)


def test_evaluate_finds_the_figures_of_the_scorecard(finished):
    assert measured(finished) == after(finished)


# ---- validation chooses, the test is touched once


def test_the_test_is_no_part_of_training(finished):
    logged = [key for entry in lines(finished / "metrics.jsonl") for key in entry]
    assert "eval_validation_f1_macro" in logged
    assert not [key for key in logged if "test" in key]
    state = read(finished / "checkpoints/checkpoint-6/trainer_state.json")
    chosen = {
        entry["step"]: entry["eval_validation_f1_macro"]
        for entry in lines(finished / "metrics.jsonl")
        if "eval_validation_f1_macro" in entry
    }
    assert state["best_metric"] == max(chosen.values()) == after(finished)["validation"]["f1_macro"]
    assert state["best_global_step"] == min(step for step, value in chosen.items() if value == state["best_metric"])


def test_labels_of_the_test_change_its_figures_alone(go, tmp_path):
    rows = labeled_rows(20, seed=9)
    flipped = [("ham" if label == "spam" else "spam", text) for label, text in rows]
    for name, of_test in {"one": rows, "other": flipped}.items():
        test = write_rows(tmp_path / f"{name}.csv", of_test)
        go(name, data={"test": [{"path": str(test)}]}, training=TRAINING)
    one, other = tmp_path / "one", tmp_path / "other"
    assert_equal(weights(one), weights(other))
    assert read_history(one) == read_history(other)
    cards = [read(run / "scorecard.json")["sets"] for run in (one, other)]
    accuracies = [card.pop("test")["after"]["accuracy"] for card in cards]
    assert accuracies[0] == pytest.approx(1 - accuracies[1])
    assert cards[0] == cards[1]


def test_a_label_that_only_the_test_has_is_refused(go, tmp_path):
    test = write_rows(tmp_path / "test.csv", [("ham", "kit kit"), ("spam", "loss"), ("eggs", "batch")])
    with pytest.raises(UserError, match=r"test\.csv:4: label `eggs` does not occur in the training rows"):
        go(data={"test": [{"path": str(test)}]})
    assert not (tmp_path / "run/scorecard.json").exists()


def test_no_text_is_on_two_sides(go, tmp_path, monkeypatch):
    """Each text stands there three times; half of the test's texts are in the training file too."""
    from kit import run

    rows = labeled_rows(30)
    test = write_rows(tmp_path / "test.csv", rows[:5] + labeled_rows(5, seed=9))
    kept, original = [], run.prepare_run
    monkeypatch.setattr(run, "prepare_run", lambda *args: kept.append(original(*args)) or kept[0])
    go(rows=write_rows(tmp_path / "thrice.csv", rows * 3), data={"test": [{"path": str(test)}]})
    corpus = kept[0].corpus
    texts = {name: set(part.texts) for name, part in {"train": corpus.train, **corpus.sets}.items()}
    assert len(texts["test"]) == 10
    assert not texts["train"] & (texts["test"] | texts["validation"])
    assert texts["train_sample"] <= texts["train"]
    assert len(corpus.rows) == 3 * len(texts["train"])
    dropped = read(tmp_path / "run/ledger.json")[0]["dropped"]
    assert 0 < dropped["also in test"]["rows"] <= 15


# ---- after training, fitted on validation


def predict(folder, rows, multi=False):
    """Return the probabilities of texts, each by itself, by the saved model alone: float64 (rows, classes)."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double().numpy() for text in rows]
    return probabilities(np.array(logits), multi)


def test_the_temperature_is_a_part_of_the_saved_model(go, tmp_path):
    """It makes the labels of validation likelier, and changes no prediction."""
    validation = write_rows(tmp_path / "validation.csv", labeled_rows(20, seed=4))
    data = {"validation": [{"path": str(validation)}], "split": {"test": 0}}
    for name, scaling in (("plain", False), ("scaled", True)):
        go(name, data=data, training=TRAINING, evaluation={"temperature_scaling": scaling, "baselines": []})
    plain, scaled = (after(tmp_path / name)["validation"] for name in ("plain", "scaled"))
    assert scaled["nll"] < plain["nll"]
    assert scaled["accuracy"] == plain["accuracy"]
    settings = read(tmp_path / "scaled/model/config.json")["kit_classifier"]
    heads = [weights(tmp_path / name)["score.weight"] for name in ("plain", "scaled")]
    torch.testing.assert_close(heads[0] / settings["temperature"], heads[1])
    texts, labels = [text for _, text in labeled_rows(20, seed=4)], [label for label, _ in labeled_rows(20, seed=4)]
    likely = predict(tmp_path / "scaled/model", texts)
    of_label = likely[np.arange(20), [["ham", "spam"].index(label) for label in labels]]
    assert -np.log(of_label).mean() == pytest.approx(scaled["nll"], abs=1e-6)
    assert measured(tmp_path / "scaled") == after(tmp_path / "scaled")


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}])
def test_thresholds_of_several_labels_are_saved(go, tmp_path, capsys, adapter):
    """Validation's micro figures are those of the saved thresholds; `kit evaluate` finds them in the model."""
    rows = write_rows(tmp_path / "multi.csv", multi_rows(60))
    validation = write_rows(tmp_path / "validation.csv", multi_rows(20, seed=4))
    source = {"label_separator": "|"}
    data = {"train": [{"path": str(rows), **source}], "validation": [{"path": str(validation), **source}]}
    sections = {"adapter": adapter} if adapter else {}
    run = go(data=data, training=TRAINING, evaluation={"temperature_scaling": True, "baselines": BASELINES}, **sections)
    assert "thresholds tuned on validation" in capsys.readouterr().out
    assert measured(run) == after(run)
    card = read(run / "scorecard.json")["sets"]["validation"]
    assert set(card["baselines"]) == {"majority", "tfidf_logreg"}
    if adapter:
        merge(str(run), None)
    model = run / ("merged" if adapter else "model")
    config = read(model / "config.json")
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["eggs", "ham", "spam"]
    thresholds = config["kit_classifier"]["thresholds"]
    assert any(value != 0.5 for value in thresholds.values())
    likely = predict(model, [text for _, text in multi_rows(20, seed=4)], multi=True)
    given = np.array([[name in labels.split("|") for name in thresholds] for labels, _ in multi_rows(20, seed=4)])
    decided = likely > np.array(list(thresholds.values()))
    assert card["after"]["hamming_loss"] == pytest.approx((decided != given).mean())
    for number, name in enumerate(thresholds):
        both = (decided & given)[:, number].sum()
        f1 = 2 * both / (decided[:, number].sum() + given[:, number].sum())
        assert card["per_class"][name]["f1"] == pytest.approx(f1)
        at_half = likely[:, number] > 0.5
        assert f1 >= 2 * (at_half & given[:, number]).sum() / (at_half.sum() + given[:, number].sum())
    # The pipeline alone knows names and probabilities.
    [answer] = pipeline("text-classification", str(model), top_k=None)([multi_rows(20, seed=4)[0][1]])
    scores = {each["label"]: each["score"] for each in answer}
    assert [scores[name] for name in thresholds] == pytest.approx(likely[0].tolist(), abs=1e-5)


def test_thresholds_are_those_of_the_last_training(go, tmp_path, capsys):
    """A classifier of several labels trained further, without validation, or for other labels."""
    rows = write_rows(tmp_path / "multi.csv", multi_rows(40))
    data = {"train": [{"path": str(rows), "label_separator": "|"}], "max_length": 20}
    first = go("first", data=data, evaluation={"baselines": []})
    assert read(first / "model/config.json")["kit_classifier"].keys() >= {"thresholds"}
    further = {"model": {"name_or_path": str(first / "model")}, "evaluation": {"baselines": []}, "training": UNCHOSEN}
    alone = {"data": data | {"max_length": 30, "split": {"validation": 0}}}
    settings = read(go("second", **further, **alone) / "model/config.json")["kit_classifier"]
    assert "thresholds" not in settings
    assert settings["max_length"] == 30
    assert "every threshold 0.5" in capsys.readouterr().out
    others = [(labels.replace("ham", "bacon"), text) for labels, text in multi_rows(40)]
    data = {"train": [{"path": str(write_rows(tmp_path / "others.csv", others)), "label_separator": "|"}]}
    third = go("third", **further, data=data)
    assert read(third / "model/config.json")["kit_classifier"]["thresholds"].keys() == {"bacon", "eggs", "spam"}
    assert measured(third) == after(third)


# ---- less than everything


def test_nothing_chooses_without_validation(go, tmp_path, capsys):
    bare = {"train_sample": 0, "baselines": [], "mistakes": 0}
    run = go(data={"split": {"validation": 0, "test": 0.3}}, training=UNCHOSEN, evaluation=bare)
    out = capsys.readouterr().out
    assert "warning: there are no validation rows, so nothing chooses the model" in " ".join(out.split())
    card = read(run / "scorecard.json")["sets"]
    assert list(card) == ["test"]
    assert not card["test"].get("baselines")
    assert not (run / "mistakes.jsonl").exists()
    stops = {"output_dir": str(tmp_path / "refused"), "early_stopping": {"patience": 1}}
    for sections in ({}, {"training": UNCHOSEN | {"eval_strategy": "steps"}, "run": stops}):
        with pytest.raises(UserError, match="there is no validation to choose the best model by"):
            go("refused", data={"split": {"validation": 0}}, **sections)


def test_nothing_at_all_is_measured(go, capsys):
    run = go(
        data={"split": {"validation": 0, "test": 0}}, training=UNCHOSEN,
        evaluation={"train_sample": 0, "baselines": [], "temperature_scaling": True},
    )  # fmt: skip
    assert read(run / "scorecard.json")["sets"] == {}
    assert "the temperature stays 1" in capsys.readouterr().out
    assert (run / "model/model.safetensors").is_file()


# ---- before training


def test_probe_and_prepare_leave_nothing_but_what_the_run_finds(base, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))
    recipe = str(write_recipe(tmp_path / "run.yaml", base(), rows, freezing=LAST_BLOCK))
    check(recipe, [], probe=True)
    out = capsys.readouterr().out
    assert "probe: 2 steps" in out
    assert "the model gives the same logits" in out
    assert re.search(r"activations +│ +[\d.]+ [KMG]iB", out)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "store").glob(".probe-*"))
    prepare(recipe, [])
    assert not (tmp_path / "run/scorecard.json").exists()

    def stored():  # but for rows of the frozen-prefix cache, which each process keeps in a file of its own
        files = {path.relative_to(tmp_path / "store") for path in (tmp_path / "store").rglob("*") if path.is_file()}
        return {path for path in files if path.parts[0] != "prefix"}

    store = stored()
    train(recipe, [])
    assert stored() == store
    assert read(tmp_path / "run/scorecard.json")["sets"].keys() == {"validation", "train_sample", "test"}


# ---- from an adapted causal LM


def test_an_adapted_language_model_becomes_a_classifier(go, base, tmp_path):
    """Corpus → language model with new tokens → classifier: it has all of them, and what is frozen keeps every bit."""
    import yaml

    (tmp_path / "corpus.txt").write_text("\n\n\n".join(documents(30, seed=1)))
    data = {
        "train": [{"path": str(tmp_path / "corpus.txt"), "separator": "\n\n\n"}], "block_size": 32,
        "validation": {"fraction": 0.1}, "store_dir": str(tmp_path / "store"),
    }  # fmt: skip
    tokens = {"special_tokens": ["<|x|>"], "tokens": ["vocabulary", "scheduler"]}
    lm = {
        "task": "causal-lm", "model": {"name_or_path": str(base())}, "data": data, "vocabulary": tokens,
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False},
        "run": {"output_dir": str(tmp_path / "lm")},
    }  # fmt: skip
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump(lm))
    train(str(tmp_path / "lm.yaml"), [])
    rows = [(label, f"<|x|> {text} vocabulary") for label, text in labeled_rows(40)]
    run = go(
        rows=write_rows(tmp_path / "chain.csv", rows), model={"name_or_path": str(tmp_path / "lm/model")},
        freezing=LAST_BLOCK, evaluation={"baselines": ["zero_shot"]},
    )  # fmt: skip
    adapted, now = load_file(tmp_path / "lm/model/model.safetensors"), weights(run)
    assert len(adapted["transformer.wte.weight"]) > len(
        load_file(base() / "model.safetensors")["transformer.wte.weight"]
    )
    changed = {name for name in adapted if not torch.equal(adapted[name], now[name])}
    assert changed == {name for name in adapted if name.startswith(("transformer.h.1.", "transformer.ln_f."))}
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "lm/model").get_vocab()
    assert len(tokenizer("<|x|> vocabulary scheduler")["input_ids"]) <= 4
    sets = read(run / "scorecard.json")["sets"]
    assert set(sets["test"]["baselines"]) == {"zero_shot"}
    assert pipeline("text-classification", str(run / "model"))("<|x|> loss")[0]["label"] in ("ham", "spam")


# ---- encoders, pairs


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "modernbert"])
def test_encoders_run(go, architecture, capsys):
    run = go(architecture=architecture, evaluation={"baselines": BASELINES})
    assert "zero-shot: not asked, since" in " ".join(capsys.readouterr().out.split())
    card = read(run / "scorecard.json")["sets"]["test"]
    assert set(card["baselines"]) == {"majority", "tfidf_logreg"}
    assert measured(run) == after(run)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == {0: "ham", 1: "spam"}
    classify = pipeline("text-classification", str(run / "model"))
    one, two = classify(["loss epoch", "tensor " * 20], batch_size=2)
    assert classify("loss epoch")[0]["score"] == pytest.approx(one["score"], abs=1e-5)
    assert {one["label"], two["label"]} <= {"ham", "spam"}


def test_the_types_of_a_pair_reach_the_model(base, go, tmp_path, monkeypatch):
    """What was measured is what the saved model says of the pair, with types; without them it says something else."""
    from transformers import BertForSequenceClassification

    seen, original = [], BertForSequenceClassification.forward

    def forward(self, *args, **kwargs):
        seen.append((self.training, kwargs.get("token_type_ids")))
        return original(self, *args, **kwargs)

    rows = [(label, text, " ".join(text.split()[::-1])) for label, text in labeled_rows(40)]
    columns = ("label", "text", "hypothesis")
    path = write_rows(tmp_path / "pairs.csv", rows, columns)
    test = write_rows(tmp_path / "test.csv", rows[:0] + [(a, f"{b} kit", c) for a, b, c in rows[:10]], columns)
    pair = {"text_pair_column": "hypothesis"}
    data = {"train": [{"path": str(path), **pair}], "test": [{"path": str(test), **pair}]}
    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    run = go(architecture="bert", data=data, training=TRAINING, evaluation={"baselines": ["tfidf_logreg"]})
    for training in (True, False):
        types = [types for was_training, types in seen if was_training == training and types is not None]
        assert types
        assert all(set(each.unique().tolist()) == {0, 1} for each in types)
    classify = pipeline("text-classification", str(run / "model"))
    pairs = [{"text": f"{b} kit", "text_pair": c} for _, b, c in rows[:10]]
    found = classify(pairs, truncation=True)
    right = sum(answer["label"] == row[0] for answer, row in zip(found, rows[:10], strict=True))
    assert right / 10 == after(run)["test"]["accuracy"]
    assert measured(run) == after(run)


# ---- two processes


@pytest.mark.parametrize("by_length", [False, True])
def test_two_processes_equal_one(base, tmp_path, by_length):
    """Of the same global batches, with what is measured before and the untrained model asked for labels."""
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(50))
    sections = {
        "data": {"balance": "class-weights"}, "model": {"name_or_path": str(base()), "dtype": "float64"},
        "evaluation": {"baselines": BASELINES, "examples": EXAMPLES, "temperature_scaling": True},
    }  # fmt: skip
    if by_length:
        sections["data"] = {"group_by_length": True, "max_tokens_per_batch": 60}
        sections["evaluation"] = {"baselines": ["majority"]}
    for name, processes in (("one", 1), ("two", 2)):
        training = {**TRAINING, "per_device_train_batch_size": 4 // processes}
        if by_length:  # a batch of one process is as long as one of two
            training |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // processes}
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name / "run.yaml", None, rows, training=training, **sections)
        assert run_kit(["train", recipe], processes, timeout=60) == [0] * processes
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    wanted = weights(one)
    for name, tensor in weights(two).items():
        assert tensor.dtype == torch.float64
        # The bias of keys has no gradient but rounding, which Adam makes as large as others.
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-8)
    cards = [read(run / "scorecard.json")["sets"] for run in (one, two)]
    for name, card in cards[0].items():
        assert cards[1][name].get("baselines") == card.get("baselines")
        assert cards[1][name].get("before") == card.get("before")
        assert cards[1][name]["confusion"] == card["confusion"]
        assert cards[1][name]["after"] == pytest.approx(card["after"], rel=1e-7)

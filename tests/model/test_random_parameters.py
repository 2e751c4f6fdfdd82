"""What begins at random has to train, whatever else is frozen."""

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from kit.errors import UserError
from kit.model.freezing import check_random_parameters
from kit.recipe.freezing import FreezingSection
from tests.classifiers import ENCODERS


@pytest.fixture(scope="module")
def bert():
    config = AutoConfig.for_model("bert", **ENCODERS["bert"], vocab_size=50, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


NEW = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")


@pytest.mark.parametrize(
    "section",
    [
        None,
        {"layer_decay": 0.9},
        {"trainable": {"head": True}},
        {"trainable": {"patterns": ["classifier.weight", ".*pooler.*"]}},  # a bias begins at 0
        {"frozen": {"embeddings": True, "biases": True}},
        {"schedule": [{"trainable": {"last_blocks": 1}}, {"step": 3, "trainable": {"head": True}}]},
        {"schedule": [{"trainable": {"last_blocks": 1}}, {"step": 3, "trainable": "all"}]},
    ],
)
def test_a_new_head_that_trains_at_some_time(bert, section):
    check_random_parameters(section and FreezingSection.model_validate(section), bert, NEW)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"trainable": {"last_blocks": 1}},
            "pooler.dense.weight begins.* add `head: true` to `freezing.trainable`",
        ),
        ({"trainable": {"patterns": ["classifier.*"]}}, "bert.pooler.dense.weight begins at random"),
        ({"frozen": {"patterns": ["classifier.*"]}}, "classifier.weight begins.* leave it out of `freezing.frozen`"),
        (
            {"schedule": [{"trainable": {"norms": True}}, {"step": 3, "trainable": {"last_blocks": 1}}]},
            "`freezing.schedule.0.trainable`",
        ),
    ],
)
def test_a_new_head_that_would_never_train(bert, section, says):
    section = FreezingSection.model_validate(section)
    with pytest.raises(UserError, match=f"^freezing: .*{says}"):
        check_random_parameters(section, bert, NEW)
    check_random_parameters(section, bert, ())  # of a head that is kept it may be meant

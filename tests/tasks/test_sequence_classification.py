"""The gradient of a classifier's optimizer step is that of one big batch on one process, to 1e-9 in float64.

As in `tests/training/test_gradients.py`, each run makes an epoch of two steps of plain SGD, with learning rate 0 in the
first and 1 in the second, which has fewer rows than a global batch: of two processes one has none. The change of the
weights is compared with a gradient that the test works out itself, each text alone and without padding.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kit.run import train
from tests.classifiers import labeled_rows, multi_rows, save_base, write_recipe, write_rows
from tests.harness import run_kit

NAMES = ("eggs", "ham", "spam")
TOLERANCE = 1e-9
GLOBAL_BATCH, NUM_ROWS = 8, 11
# Processes, rows per process, accumulation.
SETTINGS = {"8x1": (1, 8, 1), "4x2": (1, 4, 2), "1x8": (1, 1, 8), "2p 4x1": (2, 4, 1), "2p 2x2": (2, 2, 2)}
WEIGHTS = {"eggs": 0.5, "ham": 3.0, "spam": 1.25}
SMOOTHING = 0.125


def rows_of(multi):
    return multi_rows(NUM_ROWS, seed=3) if multi else labeled_rows(NUM_ROWS, seed=3, names=NAMES, noise=0.4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function that gives the folder of a tiny classifier without dropout."""
    made = {}

    def base(architecture, multi):
        if (architecture, multi) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture, multi] = save_base(folder, architecture, NAMES, multi)
        return made[architecture, multi]

    return base


@pytest.fixture(scope="module")
def gradient(tmp_path_factory, bases):
    """A function that gives the gradient of the second step of `kit train`: name → tensor."""

    def run(architecture, multi, weighted, setting, change=None):
        folder = tmp_path_factory.mktemp("gradient")
        processes, batch, accumulation = SETTINGS[setting]
        training = {
            "num_train_epochs": 1, "per_device_train_batch_size": batch, "bf16": False,
            "gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 1.0,
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "max_grad_norm": 0.0,
            "label_smoothing_factor": SMOOTHING if weighted else 0.0, "max_steps": None, "eval_strategy": "no",
            "load_best_model_at_end": False, "save_strategy": "no",
        }  # fmt: skip
        source = {"path": str(write_rows(folder / "rows.csv", rows_of(multi)))}
        data = {"train": [source | ({"label_separator": "|"} if multi else {})], "store_dir": str(folder / "store")}
        data["split"] = {"validation": 0, "test": 0}
        if weighted:
            data["balance"] = {"method": "class-weights", "weights": WEIGHTS}
        model = {"name_or_path": str(bases(architecture, multi)), "dtype": "float64"}
        evaluation = {"train_sample": 0, "baselines": []}
        recipe = write_recipe(
            folder / "run.yaml", None, None, model=model, data=data, training=training, evaluation=evaluation
        )
        if processes == 1 and change is None:
            train(str(recipe), [])
        else:
            assert run_kit(["train", recipe], processes, change=change) == [0] * processes
        before = AutoModelForSequenceClassification.from_pretrained(bases(architecture, multi), dtype=torch.float64)
        after = load_file(folder / "run/model/model.safetensors")
        return {name: tensor.data - after[name] for name, tensor in before.named_parameters()}

    return run


@pytest.fixture(scope="module")
def expected(bases):
    """A function that gives the gradient of sum of weighted losses / sum of weights over the second step's rows."""
    known = {}

    def work_out(architecture, multi, weighted):
        key = (architecture, multi, weighted)
        if key not in known:
            model = AutoModelForSequenceClassification.from_pretrained(bases(architecture, multi), dtype=torch.float64)
            tokenizer = AutoTokenizer.from_pretrained(bases(architecture, multi))
            order = np.random.default_rng([42, 0]).permutation(NUM_ROWS)[GLOBAL_BATCH:]
            rows = [rows_of(multi)[index] for index in order]
            losses, weights = zip(
                *(weighted_loss(model, tokenizer, *row, multi, weighted) for row in rows), strict=True
            )
            (sum(losses) / sum(weights)).backward()
            known[key] = {name: tensor.grad for name, tensor in model.named_parameters()}
        return known[key]

    return work_out


def weighted_loss(model, tokenizer, label, text, multi, weighted):
    """Return weight × loss, and the weight, of one text by itself."""
    logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    s = SMOOTHING if weighted else 0.0
    if multi:
        has = torch.tensor([float(name in label.split("|")) for name in NAMES], dtype=torch.float64)
        # A class weight counts where the row has the label.
        of_class = torch.tensor([WEIGHTS[name] if weighted else 1.0 for name in NAMES], dtype=torch.float64)
        weights = torch.where(has.bool(), of_class, 1.0)
        p, target = torch.sigmoid(logits), has * (1 - s) + 0.5 * s
        loss = -(target * p.log() + (1 - target) * (1 - p).log())
        return (weights * loss).sum() / len(NAMES), weights.sum() / len(NAMES)
    weight = WEIGHTS[label] if weighted else 1.0
    log_p = torch.log(torch.softmax(logits, 0))
    return -weight * ((1 - s) * log_p[NAMES.index(label)] + s * log_p.mean()), torch.tensor(weight)


def largest_error(found, wanted):
    """Return the largest error over all tensors, relative to the largest gradient, and require that all are there."""
    assert found.keys() == wanted.keys()
    scale = max(tensor.abs().max() for tensor in wanted.values())
    return max(((found[name] - wanted[name]).abs().max() / scale).item() for name in wanted)


# Without weights nothing differs between processes and rows but the number of rows.
CASES = [
    (architecture, multi, weighted, setting)
    for architecture in ("gpt2", "llama", "bert")
    for multi in (False, True)
    for weighted in (False, True)
    for setting in (SETTINGS if weighted or (architecture, multi) == ("gpt2", False) else ("4x2",))
]


@pytest.mark.parametrize(("architecture", "multi", "weighted", "setting"), CASES)
def test_gradient_is_that_of_one_big_batch(gradient, expected, architecture, multi, weighted, setting):
    """`weighted` is with class weights and label smoothing."""
    found = gradient(architecture, multi, weighted, setting)
    assert largest_error(found, expected(architecture, multi, weighted)) < TOLERANCE


def test_the_rows_of_the_last_step_can_tell():
    """They are of several classes, and of different length: else weights and padding would change nothing."""
    order = np.random.default_rng([42, 0]).permutation(NUM_ROWS)[GLOBAL_BATCH:]
    for multi in (False, True):
        rows = [rows_of(multi)[index] for index in order]
        assert len(Counter(label for label, _ in rows)) > 1
        assert len({len(text.split()) for _, text in rows}) > 1


# ---- mutations: each breaks the kit in a well-known way; the tests above must turn red


def _divide_by_the_micro_batch():
    from kit.tasks import sequence_classification
    from kit.training.trainer import KitTrainer

    original = KitTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mine = sequence_classification.loss_weight(inputs).clamp(min=1) * self.current_gradient_accumulation_steps
        return original(self, model, inputs, return_outputs, mine * self.args.world_size)

    KitTrainer.compute_loss = compute_loss


def _count_rows():
    from kit.tasks import sequence_classification

    sequence_classification.loss_weight = lambda batch: torch.tensor(float(len(batch["labels"])))


def _count_a_process_without_rows():
    from kit.data.labeled_examples import LabeledRows

    original = LabeledRows.__getitem__
    LabeledRows.__getitem__ = lambda self, index: original(self, max(index, 0))


MUTATIONS = [
    (_divide_by_the_micro_batch, "1x8"),
    (_divide_by_the_micro_batch, "2p 2x2"),
    (_count_rows, "8x1"),
    (_count_a_process_without_rows, "2p 4x1"),
]


@pytest.mark.parametrize(("mutation", "setting"), MUTATIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_mutations_turn_the_comparison_red(gradient, expected, mutation, setting):
    error = largest_error(gradient("gpt2", False, True, setting, mutation), expected("gpt2", False, True))
    assert error > 1e3 * TOLERANCE

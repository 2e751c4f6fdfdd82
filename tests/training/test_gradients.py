"""The gradient of an optimizer step is that of one big batch on one process, to 1e-9 in float64.

Each run makes an epoch of two steps of plain SGD, with learning rate 0 in the first one and 1 in the second, which has
fewer rows than a global batch: so the change of the weights is the gradient of a step that is ragged at the end. It is
compared with one that the test works out itself, a document at a time. The mutations at the end break the kit in the
ways that other tools are broken in, and assert that the comparison notices.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.data.packing import lay_out
from tests.harness import run_kit
from tests.material import documents

DOCUMENTS = documents(10, seed=5, longest=35)
BLOCK_SIZE = 40
TOLERANCE = 1e-9

# Processes, rows per process, accumulation: 16 rows at a time. The corpus has 18 packed rows, or 26 single ones.
GLOBAL_BATCH = 16
SETTINGS = {"16x1": (1, 16, 1), "4x4": (1, 4, 4), "1x16": (1, 1, 16), "2p 4x2": (2, 4, 2), "2p 2x4": (2, 2, 4)}


@pytest.fixture(scope="module")
def gradient(tmp_path_factory, tiny_models):
    """A function that gives the gradient of the second step of `kit train`: name → tensor."""

    def run(architecture, packing, setting, change=None):
        import yaml

        folder = tmp_path_factory.mktemp("gradient")
        (folder / "corpus.txt").write_text("\n\n\n".join(DOCUMENTS))
        processes, batch, accumulation = SETTINGS[setting]
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(tiny_models(architecture)), "dtype": "float64"},
            "data": {
                "train": [{"path": str(folder / "corpus.txt"), "separator": "\n\n\n"}],
                "block_size": BLOCK_SIZE,
                "packing": packing,
                "store_dir": str(folder / "store"),
            },
            "training": {
                "num_train_epochs": 1, "per_device_train_batch_size": batch, "bf16": False,
                "gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 1.0,
                "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "max_grad_norm": 0.0,
            },
            "run": {"output_dir": str(folder / "run")},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert run_kit(["train", folder / "recipe.yaml"], processes, change=change) == [0] * processes
        before = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float64)
        after = load_file(folder / "run/model/model.safetensors")
        return {name: tensor.data - after[name] for name, tensor in before.named_parameters() if name in after}

    return run


@pytest.fixture(scope="module")
def expected(tiny_models):
    """A function that gives the gradient of the mean loss over the targets of the second step, worked out by itself."""
    known = {}

    def work_out(architecture, packing):
        if (architecture, packing) not in known:
            model = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float64)
            tokenizer = AutoTokenizer.from_pretrained(tiny_models(architecture))
            pieces = fitted_documents(tokenizer) if packing == "best-fit" else cut_documents(tokenizer)
            row_of = [block if packing else index for index, (block, _) in enumerate(pieces)]
            order = np.random.default_rng([42, 0]).permutation(max(row_of) + 1)
            chosen = [chain for row, (_, chain) in zip(row_of, pieces, strict=True) if row in order[GLOBAL_BATCH:]]
            assert 0 < len(order) - GLOBAL_BATCH < GLOBAL_BATCH
            total = sum(len(chain) - 1 for chain in chosen)
            for chain in chosen:
                logits = model(chain[None, :-1], use_cache=False).logits[0]
                (F.cross_entropy(logits, chain[1:], reduction="sum") / total).backward()
            known[architecture, packing] = {name: tensor.grad for name, tensor in model.named_parameters()}
        return known[architecture, packing]

    return work_out


def cut_documents(tokenizer):
    """Return (block, tokens) of each piece: blocks cut the corpus every BLOCK_SIZE targets.

    What follows a cut sees the last token before it.
    """
    eos, pieces, position = tokenizer.eos_token_id, [], 0
    for text in DOCUMENTS:
        chain = torch.tensor([eos, *tokenizer(text)["input_ids"], eos])
        end = position + len(chain) - 1
        cuts = [position, *(p for p in range(0, end, BLOCK_SIZE) if p > position), end]
        for first, last in pairwise(cuts):
            pieces.append((first // BLOCK_SIZE, chain[first - position : last - position + 1]))
        position = end
    return pieces


def fitted_documents(tokenizer):
    """Return (block, tokens) of each piece of the kit's best-fit layout; a piece begins with the token before it."""
    eos = tokenizer.eos_token_id
    ids = [[*tokenizer(text)["input_ids"], eos] for text in DOCUMENTS]
    layout = lay_out(np.array([len(each) for each in ids]), BLOCK_SIZE, "best-fit")
    starts = np.cumsum([0, *(len(each) for each in ids)])
    block_of = np.repeat(np.arange(len(layout.blocks) - 1), np.diff(layout.blocks))
    pieces = []
    for block, (begin, end) in zip(block_of.tolist(), layout.pieces.tolist(), strict=True):
        document = int(np.searchsorted(starts, begin, side="right")) - 1
        chain, first = [eos, *ids[document]], begin - int(starts[document])
        pieces.append((block, torch.tensor(chain[first : first + end - begin + 1])))
    return pieces


def largest_error(found, wanted):
    """Return the largest relative error over all tensors, and require that all are there."""
    assert found.keys() == wanted.keys()
    scale = max(tensor.abs().max() for tensor in wanted.values())
    return max(((found[name] - wanted[name]).abs().max() / scale).item() for name in wanted)


CASES = [("gpt2", True), ("gpt2", False), ("llama", True)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("architecture", "packing"), CASES)
def test_gradient_is_that_of_one_big_batch(gradient, expected, architecture, packing, setting):
    error = largest_error(gradient(architecture, packing, setting), expected(architecture, packing))
    assert error < TOLERANCE


# ---- the same with each way to do less work


def _in_chunks_of_seven():
    from kit.model import chunked_loss

    chunked_loss._CHUNK_BYTES = 7 * 4 * 320


def _with_whole_logits():
    from kit.model import chunked_loss
    from kit.tasks import causal_lm

    def give_losses(model):
        chunked_loss.give_losses(model)
        chunked_loss.compute_whole_logits(model)

    causal_lm.give_losses = give_losses


@pytest.mark.parametrize("setting", ["16x1", "4x4", "2p 2x4"])
@pytest.mark.parametrize("change", [_in_chunks_of_seven, _with_whole_logits])
@pytest.mark.parametrize(("architecture", "packing"), CASES)
def test_in_chunks_or_with_whole_logits(gradient, expected, architecture, packing, change, setting):
    error = largest_error(gradient(architecture, packing, setting, change), expected(architecture, packing))
    assert error < TOLERANCE


@pytest.mark.parametrize("setting", ["16x1", "4x4", "2p 4x2"])
def test_packed_by_best_fit(gradient, expected, setting):
    assert largest_error(gradient("gpt2", "best-fit", setting), expected("gpt2", "best-fit")) < TOLERANCE


# ---- mutations: each breaks the kit in a well-known way; the tests above must turn red


def _divide_by_the_micro_batch():
    from kit.tasks import causal_lm
    from kit.training.trainer import KitTrainer

    original = KitTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mine = (
            causal_lm.loss_weight(inputs).clamp(min=1) * self.current_gradient_accumulation_steps * self.args.world_size
        )
        return original(self, model, inputs, return_outputs, mine)

    KitTrainer.compute_loss = compute_loss


def _divide_by_padded_tokens():
    from kit.tasks import causal_lm

    causal_lm.loss_weight = lambda batch: torch.tensor(batch["shift_labels"].numel())


def _pass_a_mask_of_ones():
    from kit.data.blocks import CollateRows

    original = CollateRows.__call__

    def collate(self, rows):
        batch = original(self, rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    CollateRows.__call__ = collate


def _repeat_a_row():
    from kit.data.sampling import EpochBatches

    original = EpochBatches.__iter__

    def repeat(self):
        for batch in original(self):
            full = [0 if index == -1 else index for index in batch]
            yield (full * self.batch_size)[: self.batch_size]

    EpochBatches.__iter__ = repeat


MUTATIONS = [
    (_divide_by_the_micro_batch, False, "4x4"),
    (_divide_by_the_micro_batch, False, "2p 4x2"),
    (_divide_by_padded_tokens, False, "4x4"),
    (_pass_a_mask_of_ones, True, "16x1"),
    (_repeat_a_row, False, "2p 4x2"),
    (_repeat_a_row, False, "4x4"),
]


@pytest.mark.parametrize(("mutation", "packing", "setting"), MUTATIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_mutations_turn_the_comparison_red(gradient, expected, mutation, packing, setting):
    error = largest_error(gradient("gpt2", packing, setting, mutation), expected("gpt2", packing))
    assert error > 1e3 * TOLERANCE

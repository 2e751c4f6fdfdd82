"""Tiny classifiers and rows for them; two processes that agree on something."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.harness import _context
from tests.material import ARCHITECTURES

BERT = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
PAD = 1


def classifier(architecture="gpt2", classes=3, **config):
    """Return a tiny classifier whose logits depend on the text; dropout is on in training mode."""
    values = {**(BERT if architecture == "bert" else ARCHITECTURES[architecture]), "vocab_size": 320}
    values |= {"num_labels": classes, "pad_token_id": PAD, "initializer_range": 0.3, **config}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(architecture, **values))


class Rows:
    """Rows of random tokens; each knows its number as its label."""

    def __init__(self, lengths, seed=0):
        """Draw rows of the given lengths."""
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.ids = [rng.integers(2, 320, size=length).tolist() for length in lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "label": index}


def collate(rows):
    """Pad on the right, as the kit's collator may; what no model takes stands beside."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": labels, "weights": labels.double()}


def in_two_processes(function, folder):
    """Call `function`, of a module, in two processes of one group; return what each returned, arrays."""
    children = [_context.Process(target=_child, args=(function, rank, str(folder))) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return [np.load(Path(folder) / f"{rank}.npy") for rank in range(2)]


def _child(function, rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    np.save(Path(folder) / f"{rank}.npy", function())
    dist.destroy_process_group()

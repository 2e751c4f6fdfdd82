"""The proof of a conversion: what was read and what was written give the same logits, by two separate computations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import LazyTensor
from kit.checkpoints.layout import Layout, Settings, expand
from kit.checkpoints.layouts import huggingface

TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller; float32
_SEED = 0
_LONGEST = 1024  # positions; GPT-2's learned ones are all among them

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Proof:
    """What a comparison of two checkpoints found.

    Attributes:
        difference: the largest absolute difference of two logits.
        largest: the largest absolute logit.
        positions: logits were computed of so many tokens.
    """

    difference: float
    largest: float
    positions: int

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; not so where a logit is no number."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)


def compare(source: Logits, target: Logits, config: PreTrainedConfig, vocab_size: int) -> Proof:
    """Return how far the logits of two checkpoints differ on a fixed batch.

    Args:
        source: computes logits of token ids.
        target: does so in its own way.
        config: of the model; its positions are not exceeded.
        vocab_size: rows that both have; ids and logits beyond are left out.
    """
    time = min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
    ids = torch.randint(vocab_size, (1, time), generator=torch.Generator().manual_seed(_SEED))
    ids[0, 0], ids[0, -1] = 0, vocab_size - 1
    with torch.no_grad():
        one, other = (logits(ids)[..., :vocab_size].float() for logits in (source, target))
    return Proof((one - other).abs().max().item(), one.abs().max().item(), ids.numel())


def reference(
    layout: Layout, tensors: Mapping[str, LazyTensor], settings: Settings, config: PreTrainedConfig
) -> Logits:
    """Return what computes a layout's logits from its own tensors, by arithmetic that knows nothing of its table.

    A tensor that is allowed to be missing is zeros, as in the conversion.
    """
    shapes = huggingface.expected_shapes(config)
    places = {
        name: (line, hf, at)
        for line, hf, own in expand(layout.TABLE, settings["n_layer"])
        for at, name in enumerate(own)
    }

    def read(name: str) -> Tensor:
        if name in tensors:
            return tensors[name].read().float()
        line, hf, at = places[name]
        if line.head and config.tie_word_embeddings:
            hf = huggingface.embeddings_name(config)
            embeddings = next(own[0] for _, other, own in expand(layout.TABLE, 0) if other == hf)
            return tensors[embeddings].read().float()
        return line.turn.to_own(torch.zeros(shapes[hf]), config)[at]

    return lambda ids: layout.reference_logits(read, settings, ids)

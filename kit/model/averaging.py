"""Averages of the weights of a base model and of one that was fine-tuned from it.

Wortsman et al. 2022, Robust fine-tuning of zero-shot models, https://arxiv.org/abs/2109.01903
"""

import re
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.errors import UserError

# What says nothing of how weights are used in evaluation, or is compared in another way.
_NOT_COMPARED = {
    "architectures", "auto_map", "bos_token_id", "decoder_start_token_id", "dtype", "eos_token_id", "id2label",
    "initializer_range", "kit_classifier", "label2id", "pad_token_id", "sep_token_id", "task_specific_params",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
_DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_rate")


def new_token_ids(base: PreTrainedTokenizerBase, tuned: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens that the tuned model's tokenizer has and the base's has not.

    Raises:
        UserError: an id stands for another token in the one than in the other: neither comes from the other.
    """
    of_base = {number: token for token, number in base.get_vocab().items()}
    of_tuned = {number: token for token, number in tuned.get_vocab().items()}
    for number in sorted(of_base.keys() & of_tuned.keys()):
        if of_base[number] != of_tuned[number]:
            raise UserError(
                f"BASE and TUNED have different tokenizers: token {number:,} is `{of_base[number]}` in BASE and "
                f"`{of_tuned[number]}` in TUNED; expected TUNED to be fine-tuned from BASE, tokens at most added"
            )
    return sorted(of_tuned.keys() - of_base.keys())


def check_alike(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    """Check that two models compute alike and differ in their weights' values alone, but for rows of added tokens.

    Raises:
        UserError: they do not; the message names the first setting or tensor that differs.
    """
    expected = "expected TUNED to be fine-tuned from BASE"
    if type(base) is not type(tuned):
        raise UserError(f"BASE is a {type(base).__name__} and TUNED a {type(tuned).__name__}; {expected}")
    for name, tied in (("BASE", base), ("TUNED", tuned)):
        other = tuned if tied is base else base
        if are_tied(tied) and not are_tied(other):
            raise UserError(
                f"input and output embeddings are one matrix in {name} and two in the other model "
                f"(`tie_word_embeddings`): an average would be neither; load {name} with `tie_word_embeddings: false`, "
                f"save it with both matrices, and average that"
            )
    ours, theirs = tensors(base), tensors(tuned)
    grows = _names_of_rows(tuned)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        shapes = [list(of[name].shape) if name in of else None for of in (ours, theirs)]
        extended = name in grows and None not in shapes and shapes[0][1:] == shapes[1][1:] and shapes[0] < shapes[1]
        if shapes[0] != shapes[1] and not extended:
            said = [f"of shape {shape}" if shape is not None else "absent" for shape in shapes]
            raise UserError(f"the tensor `{name}` is {said[0]} in BASE and {said[1]} in TUNED; {expected}")
    ours, theirs = base.config.to_dict(), tuned.config.to_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        compared = key not in _NOT_COMPARED and not key.startswith("_") and not _DROPOUT.search(key)
        if compared and ours.get(key) != theirs.get(key):
            raise UserError(
                f"config.{key}: found {ours.get(key)} in BASE and {theirs.get(key)} in TUNED, which so compute "
                f"different things of the same weights; {expected}"
            )


def are_tied(model: PreTrainedModel) -> bool:
    """Tell whether input and output embeddings are one matrix."""
    outputs = model.get_output_embeddings()
    return outputs is not None and outputs.weight is model.get_input_embeddings().weight


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters of a model, tied ones once, and the buffers that are saved with it."""
    every = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    return {name: tensor.detach() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


class WeightAverage:
    """(1 - α) · base + α · tuned, written into the tuned model; that model and two more copies are in memory.

    Attributes:
        model: the tuned model; `set` replaces its weights.
        new_rows: how many rows of the embeddings have no counterpart in the base, and are the tuned model's at every α.
    """

    def __init__(self, base: PreTrainedModel, tuned: PreTrainedModel, new_ids: list[int]) -> None:
        """Copy what is going to be overwritten.

        Args:
            base: its weights are used where they are; it must not change.
            tuned: alike but for rows of added tokens (`check_alike`).
            new_ids: tokens that the base does not know; some models have rows to spare, so that theirs are not all new.
        """
        self.model = tuned
        self._base, self._grows = tensors(base), _names_of_rows(tuned)
        self._tuned = {name: tensor.to("cpu", copy=True) for name, tensor in tensors(tuned).items()}
        rows = [len(model.get_input_embeddings().weight) for model in (base, tuned)]
        new = {*new_ids, *range(rows[0], rows[1])}
        self.new_rows = len(new)
        self._common = torch.tensor([row for row in range(rows[1]) if row not in new]) if new else None

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Give the model the weights of α, averaged in float32 (float64 where either is), in its own type."""
        for name, target in tensors(self.model).items():
            base, tuned = self._base[name].cpu(), self._tuned[name]
            if not tuned.is_floating_point():
                continue  # counts and masks, which nothing trains
            if self._common is not None and name in self._grows:
                value = tuned.clone()
                value[self._common] = _average(base[self._common], tuned[self._common], alpha)
            else:
                value = _average(base, tuned, alpha)
            target.copy_(value)


def _average(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return (1 - alpha) · base + alpha · tuned in the tuned tensor's type."""
    if alpha in (0, 1):  # the very bits: 0 · inf is no number, and -0.0 + 0.0 is 0.0
        return (tuned if alpha else base).to(tuned.dtype)
    precision = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return ((1 - alpha) * base.to(precision) + alpha * tuned.to(precision)).to(tuned.dtype)


def _names_of_rows(model: PreTrainedModel) -> set[str]:
    """Return the tensors that have a row for each token."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    ids = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}

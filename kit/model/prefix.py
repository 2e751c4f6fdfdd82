"""The frozen bottom of a model, embeddings and first blocks: what comes out of it taken down, and put in its place."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import xxhash
from transformers import PreTrainedModel

from kit.errors import UserError, is_out_of_memory
from kit.model.new_rows import is_new_rows
from kit.model.parts import adapter_names, block_parameters, find_parts, transformer_blocks


def prefix_depth(model: PreTrainedModel, trainable: Collection[str]) -> tuple[int, str]:
    """Return below how many of the first blocks, these included, nothing trains; where none, why.

    Args:
        model: the model.
        trainable: the names of the parameters that train.
    """
    try:
        parts, blocks = find_parts(model), block_parameters(model)
    except UserError:
        return 0, f"{type(model).__name__} does not tell which of its modules are its blocks"
    trains = [set(block) & set(trainable) for block in blocks]
    depth = next((number for number, names in enumerate(trains) if names), len(blocks))
    below = set(parts["embeddings"]) | set(parts["position_embeddings"])
    above = ({*parts["head"], *parts["final_norm"]} - below).union(*map(set, blocks[depth:]))
    lowest = sorted(set(trainable) - above)
    if any(is_new_rows(name) for name in lowest):
        return 0, "the rows of new tokens train, which are in the embeddings"
    if lowest:
        tied = " (the head's too: both are one matrix)" if lowest[0] in parts["head"] else ""
        return 0, f"{lowest[0]} trains{tied}, below all blocks"
    if depth == 0:
        what = "the adapter is" if trains[0] & set(adapter_names(model)) else "something trains"
        return 0, f"{what} in the first block already"
    return depth, ""


class Prefix:
    """The embeddings and the first blocks of a model, with what comes out of the last of these.

    The blocks stay where they are: embeddings and masks, which later blocks need too, are worked out as always, the
    names of the parameters do not change, and what saves or wraps the model notices nothing. What is put in is the
    output of the last block of the prefix, not the input of the next one: under activation checkpointing hooks on that
    run again in the backward pass (transformers 5.17).

    Attributes:
        model: the model, which may be wrapped elsewhere.
        depth: number of blocks.
        dtype: of the hidden states, once `check` has seen some.
        width: of the hidden states.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        """Take the first `depth` blocks, at least 1."""
        self.model, self.depth = model, depth
        self.blocks = list(transformer_blocks(model)[:depth])
        self.dtype, self.width = torch.float32, 0
        self._returns: int | None = None  # how many values blocks return, where that is a tuple

    @contextmanager
    def captured(self) -> Iterator[list[torch.Tensor]]:
        """Collect the hidden states that leave the prefix: (rows, positions, width) for each call of the model."""
        found: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: torch.Tensor | tuple) -> None:
            found.append((output[0] if isinstance(output, tuple) else output).detach())

        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def replaced(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let the blocks of the prefix compute nothing and give out `hidden`."""
        output = hidden if self._returns is None else (hidden, *[None] * (self._returns - 1))
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(patch.object(block, "forward", lambda *args, **kwargs: output))
            yield

    @torch.no_grad()
    def check(self, forward: Callable[[Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any]) -> str | None:
        """Try the prefix out, with the modules in the modes that they train in; return why it cannot be passed over.

        Args:
            forward: sends a batch through the model; returns its logits.
            batch: a small one, of two different rows or more.
        """
        name, was_training = type(self.model).__name__, self.model.training
        device = self.model.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return self._try_out(forward, batch, name)
        except Exception as error:  # each architecture fails in its own way
            if is_out_of_memory(error):
                raise
            return f"{name} does not run without these blocks ({type(error).__name__}: {' '.join(str(error).split())})"
        finally:
            self.model.train(was_training)

    def _try_out(
        self, forward: Callable[[Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any], name: str
    ) -> str | None:
        outputs: list[object] = []
        handle = self.blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model.train()
            forward(batch)
            self.model.eval()
            logits = forward(batch)
        finally:
            handle.remove()
        if len(outputs) != 2:
            return f"{name} goes through a block more than once"
        training, evaluating = (each if isinstance(each, tuple) else (each,) for each in outputs)
        if any(each is not None for each in evaluating[1:]):
            return f"the blocks of {name} pass on more than hidden states"
        if not isinstance(evaluating[0], torch.Tensor) or evaluating[0].shape[:-1] != batch["input_ids"].shape:
            return f"the blocks of {name} do not pass on a vector for each position of a row"
        if not torch.equal(training[0], evaluating[0]):
            return "dropout below what trains stays on, so that it gives something else each time"
        self._returns = len(evaluating) if isinstance(outputs[1], tuple) else None
        self.dtype, self.width = evaluating[0].dtype, evaluating[0].shape[-1]
        # What the first blocks may have left for later ones in some other way is now of other rows.
        forward({k: value.flip(0) if isinstance(value, torch.Tensor) else value for k, value in batch.items()})
        with self.replaced(evaluating[0]):
            if not torch.equal(forward(batch), logits):
                return f"the later blocks of {name} need more of the first ones than hidden states"
        return None

    def key(self) -> str:
        """Return a hash of all weights and buffers that are not above the prefix, by their names."""
        parts, blocks = find_parts(self.model), transformer_blocks(self.model)
        below = set(parts["embeddings"]) | set(parts["position_embeddings"])
        above = {*parts["head"], *parts["final_norm"]} - below
        inside = {id(t) for block in blocks[self.depth :] for t in (*block.parameters(), *block.buffers())}
        digest = xxhash.xxh3_128()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name not in above and id(tensor) not in inside:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

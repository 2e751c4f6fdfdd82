"""What each block of a causal LM, and each branch of a block, does for the loss of some text: it must not do harm."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kit.evaluation.inference import inference


@dataclass(frozen=True)
class Effect:
    """What leaving out a part of a model does to the loss.

    Attributes:
        name: of the part: the number of its block and, of a branch, its name in the block.
        nats: by how much the loss rises without it, in nats per token; negative where the part does harm.
        errors: the same in standard errors, over the rows of the text.
    """

    name: str
    nats: float
    errors: float


@torch.no_grad()
def row_nats(model: nn.Module, rows: Sequence[Sequence[int]], context_token_id: int) -> np.ndarray:
    """Return the sum of -ln p over the tokens of each row, in one batch, each row after one context token.

    Returns:
        float64 (rows,).
    """
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), context_token_id)
    targets = torch.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        input_ids[number, 1 : len(row)] = torch.tensor(row[:-1], dtype=torch.long)
        targets[number, : len(row)] = torch.tensor(row)
    with inference(model):
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return nll.view(targets.shape).double().sum(1).numpy()


def difference(changed: np.ndarray, plain: np.ndarray, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return by how many nats per token one loss is above another, and the same in standard errors over the rows."""
    lengths = np.array([len(row) for row in rows])
    mean = (changed - plain).sum() / lengths.sum()
    error = np.sqrt((((changed - plain) - mean * lengths) ** 2).sum()) / lengths.sum()
    return float(mean), float(mean / error) if error > 0 else 0.0


def block_effects(
    model: nn.Module, blocks: Sequence[nn.Module], rows: Sequence[Sequence[int]], context_token_id: int
) -> list[Effect]:
    """Measure the loss without each block, and without each branch (attention, MLP) where blocks are sums of branches.

    A trained block helps, as training would else have made it smaller; one whose weights are out of order does harm.
    What replaces a block is the identity, what replaces a branch is zero.
    """
    plain = row_nats(model, rows, context_token_id)
    found = []
    branched = _are_sums(model, blocks, rows[:1], context_token_id)
    for number, block in enumerate(blocks):
        with _identity(block):
            found.append(Effect(str(number), *difference(row_nats(model, rows, context_token_id), plain, rows)))
        for name, branch in _branches(block).items() if branched else ():
            with _zero(branch):
                without = row_nats(model, rows, context_token_id)
            found.append(Effect(f"{number} {name}", *difference(without, plain, rows)))
    return found


def _branches(block: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a block that hold matrices."""
    return {n: m for n, m in block.named_children() if any(p.dim() > 1 for p in m.parameters())}


def _are_sums(model: nn.Module, blocks: Sequence[nn.Module], rows: Sequence[Sequence[int]], context: int) -> bool:
    """Tell whether blocks do nothing once their branches give zero; BERT's and BLOOM's add the residual within."""
    same = []

    def compare(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        same.append(torch.equal(given, output[0] if isinstance(output, tuple) else output))

    with ExitStack() as stack:
        for block in blocks:
            for branch in _branches(block).values():
                stack.enter_context(_zero(branch))
            stack.callback(block.register_forward_hook(compare, with_kwargs=True).remove)
        row_nats(model, rows, context)
    return all(same)


@contextmanager
def _identity(block: nn.Module) -> Iterator[None]:
    # Blocks give a tensor, or a tuple that begins with it: a hook keeps to whichever it is.
    def give_input(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = block.register_forward_hook(give_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _zero(branch: nn.Module) -> Iterator[None]:
    def give_zero(module: nn.Module, args: tuple, output: object) -> object:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = branch.register_forward_hook(give_zero)
    try:
        yield
    finally:
        handle.remove()

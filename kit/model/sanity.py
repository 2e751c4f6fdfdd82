"""What the values of stored tensors tell without a forward pass: NaN, constants, matrices in no order."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_MOST = 512  # rows and columns of a matrix that are looked at
_SHUFFLES = 8
_LEAST = 16  # rows and columns below which a spectrum says nothing
_CLEAR, _NOISE = 20.0, 4.0  # standard errors
_SHARE = 0.1


@dataclass(frozen=True)
class TensorFacts:
    """What the values of a tensor tell.

    Attributes:
        name: as stored.
        dim: number of its dimensions.
        bad: values that are NaN or infinite.
        constant: the one value that it has throughout, or None.
        order: by how much the squares of its singular values are more unequal than those of the same entries shuffled
            (0: not at all, 1: twice), or None for vectors and very small matrices.
        errors: the same in standard deviations between shuffles.
    """

    name: str
    dim: int
    bad: int
    constant: float | None
    order: float | None = None
    errors: float = 0.0


def examine(name: str, tensor: torch.Tensor) -> TensorFacts:
    """Return what the values of a tensor tell; of a large matrix, a drawn part of rows and columns is measured."""
    finite = tensor.isfinite()
    bad = int(tensor.numel() - finite.sum())
    flat = tensor.flatten()
    constant = float(flat[0]) if tensor.numel() > 1 and not bad and bool((flat == flat[0]).all()) else None
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else None
    if matrix is None or bad or constant is not None or min(matrix.shape) < _LEAST:
        return TensorFacts(name, tensor.dim(), bad, constant)
    return TensorFacts(name, tensor.dim(), bad, constant, *_order(matrix))


def _order(matrix: torch.Tensor) -> tuple[float, float]:
    """Return how far a matrix is from its own entries in random order, as `TensorFacts` has it.

    The singular values of random entries follow Marchenko and Pastur's law; those of trained matrices stand out of it
    (Martin and Mahoney, https://arxiv.org/abs/1810.01075). What is compared, the sum of their fourth powers over the
    square of the sum of their squares, needs no decomposition.
    """
    generator = torch.Generator().manual_seed(0)
    for dim, size in enumerate(matrix.shape):
        if size > _MOST:
            matrix = matrix.index_select(dim, torch.randperm(size, generator=generator)[:_MOST])
    matrix = matrix.float() / matrix.float().abs().max()

    def inequality(m: torch.Tensor) -> float:
        gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
        return float((gram.double() ** 2).sum() / gram.double().trace() ** 2)

    flat = matrix.flatten()
    drawn = [flat[torch.randperm(flat.numel(), generator=generator)].view_as(matrix) for _ in range(_SHUFFLES)]
    shuffled = torch.tensor([inequality(each) for each in drawn], dtype=torch.float64)
    order = inequality(matrix) / shuffled.mean() - 1
    # Eight shuffles may lie closer together than they should by chance.
    error = max(float(shuffled.std() / shuffled.mean()), 1e-3)
    return float(order), float(order / error)


@dataclass(frozen=True)
class Order:
    """Which blocks and matrices look as if their entries had been shuffled, or had never been trained.

    Attributes:
        trained: whether the matrices of any block stand out clearly.
        blocks: that do not, although others do, with their median.
        matrices: that do not in a block that does, although those of the same name in other blocks do.
        least: the smallest median over the matrices of a block, and the largest.
    """

    trained: bool
    blocks: list[str]
    matrices: list[str]
    least: float
    largest: float


def compare_blocks(facts: Iterable[TensorFacts]) -> Order | None:
    """Compare the matrices of each block with those of the others; None where there are not two blocks of matrices."""
    by_block: dict[str, dict[str, TensorFacts]] = {}
    for each in facts:
        if each.order is not None and (found := re.fullmatch(r"(.*?\.\d+)\.(.+)", each.name)):
            by_block.setdefault(found[1], {})[found[2]] = each
    if len(by_block) < 2:
        return None
    medians = {block: _median(f.order for f in own.values()) for block, own in by_block.items()}
    # Of independent z-scores, the sum over the root of their number is one again.
    scores = {block: sum(f.errors for f in own.values()) / len(own) ** 0.5 for block, own in by_block.items()}
    clear = [block for block in by_block if scores[block] > _CLEAR and medians[block] > _SHARE]
    shuffled = [block for block in by_block if clear and scores[block] < _NOISE]
    matrices = []
    for block, own in by_block.items():
        for name, fact in own.items() if block not in shuffled else ():
            others = [other[name] for at, other in by_block.items() if at != block and name in other]
            if (
                len(others) > 1
                and fact.errors < _NOISE
                and _median(other.errors for other in others) > _CLEAR
                and fact.order < _SHARE * _median(other.order for other in others)
            ):
                matrices.append(fact.name)
    return Order(bool(clear), shuffled, matrices, min(medians.values()), max(medians.values()))


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(sorted(values), dtype=torch.float64).median())

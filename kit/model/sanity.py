"""What the values of stored tensors tell without a forward pass: NaN, constants, matrices in no order."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

_MOST = 512  # rows and columns of a matrix that are looked at
_SHUFFLES = 8
_LEAST = 16  # rows and columns below which a spectrum says nothing
_CLEAR, _NOISE = 20.0, 4.0  # standard errors
_SHARE = 0.1
# The list of blocks, the number of one, and a module and its tensor in it: a head's list of layers has no such module.
_IN_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+\..+)")
# Correlations of neighbours, and standard errors of one between random profiles.
_ALIKE, _VERY_ALIKE, _BY_CHANCE = 0.4, 0.7, 3.5
_REACH = 2  # blocks on either side
_FEWEST_PROFILES = 4


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
        profiles: by dimension, the size of its values at each index: float32 (size,), without their mean, of length 1.
    """

    name: str
    dim: int
    bad: int
    constant: float | None
    order: float | None = None
    errors: float = 0.0
    profiles: tuple[torch.Tensor, ...] = field(default=(), compare=False)


def examine(name: str, tensor: torch.Tensor) -> TensorFacts:
    """Return what the values of a tensor tell; of a large matrix, a drawn part of rows and columns is measured."""
    finite = tensor.isfinite()
    bad = int(tensor.numel() - finite.sum())
    flat = tensor.flatten()
    constant = float(flat[0]) if tensor.numel() > 1 and not bad and bool((flat == flat[0]).all()) else None
    # A matrix of one row is a vector, such as the embeddings of one token type.
    facts = TensorFacts(name, 1 if tensor.shape[:1] == (1,) else tensor.dim(), bad, constant)
    if bad or constant is not None or not tensor.dim():
        return facts
    if tensor.dim() <= 2:
        facts = replace(facts, profiles=_profiles(tensor))
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return facts if min(matrix.shape) < _LEAST or tensor.dim() < 2 else _with_order(facts, matrix)


def _with_order(facts: TensorFacts, matrix: torch.Tensor) -> TensorFacts:
    order, errors = _order(matrix)
    return replace(facts, order=order, errors=errors)


def _profiles(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values = tensor.float()
    sizes = [values] if values.dim() == 1 else [values.pow(2).mean(1).sqrt(), values.pow(2).mean(0).sqrt()]
    centred = [each - each.mean() for each in sizes]
    return tuple(each / each.norm().clamp_min(1e-30) for each in centred)


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
        if each.order is not None and (found := _IN_BLOCK.fullmatch(each.name)):
            by_block.setdefault(f"{found[1]}.{found[2]}", {})[found[3]] = each
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


@dataclass(frozen=True)
class Alignment:
    """How many of a block's tensors are sized, channel by channel, as in neither neighbour.

    Attributes:
        block: its name.
        strange: such tensors.
        certain: those of them that all other blocks, the first and the last too, are very much alike in.
        judged: tensors that in other blocks are sized as in a neighbour.
    """

    block: str
    strange: list[str]
    certain: list[str]
    judged: int


def compare_neighbours(facts: Iterable[TensorFacts]) -> list[Alignment]:
    """Compare how large the values of each channel are in a block and in those before and after it.

    All blocks read and write one stream of channels, some of which are large and some small throughout: tensors whose
    rows or columns were reordered no longer know which. The first and the last block differ in sound models too, and
    are not judged.
    """
    lists: dict[str, dict[str, dict[int, TensorFacts]]] = {}
    for each in facts:
        if each.profiles and (found := _IN_BLOCK.fullmatch(each.name)):
            lists.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = each
    alignments: dict[str, Alignment] = {}
    for prefix, tensors in lists.items():
        for blocks in tensors.values():
            for axis in range(max(len(fact.profiles) for fact in blocks.values())):
                _align(prefix, blocks, axis, alignments)
    return [each for each in alignments.values() if each.judged >= _FEWEST_PROFILES]


def _align(prefix: str, blocks: dict[int, TensorFacts], axis: int, found: dict[str, Alignment]) -> None:
    """Enter what one dimension of one tensor tells of each block."""
    profiles = {number: fact.profiles[axis] for number, fact in blocks.items()}
    if len({len(profile) for profile in profiles.values()}) > 1 or len(profiles) < 4:
        return
    # The next but one too: with the nearest alone, a damaged block would take the first's only likeness from its other
    # neighbour.
    near = {
        number: max(float(profile @ profiles[other]) for other in profiles if 0 < abs(other - number) <= _REACH)
        for number, profile in profiles.items()
    }
    numbers = sorted(near)
    for number in numbers[1:-1]:
        others = [near[other] for other in numbers[1:] if other != number]
        strange = near[number] * len(profiles[number]) ** 0.5 < _BY_CHANCE
        certain = strange and min(*others, near[numbers[0]]) > _VERY_ALIKE
        if _median(others) > _ALIKE:
            block = found.setdefault(f"{prefix}.{number}", Alignment(f"{prefix}.{number}", [], [], 0))
            name = [blocks[number].name]
            found[block.block] = Alignment(
                block.block,
                block.strange + (name if strange else []),
                block.certain + (name if certain else []),
                block.judged + 1,
            )


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(sorted(values), dtype=torch.float64).median())

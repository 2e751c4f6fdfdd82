"""A layout: the table of its tensors' names and turns beside Hugging Face's, which runs both ways.

A layout is a module of `kit.checkpoints.layouts` with the names that `Layout` lists. A turn is the table's, never
guessed from a shape: a square matrix has the same shape when it is transposed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor

Settings = dict[str, Any]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Turn:
    """How tensors of a layout make one of Hugging Face's, and how that makes them again, bit for bit.

    Attributes:
        name: for people.
        to_hf: takes as many tensors as the line of the table has names, and the configuration.
        to_own: the inverse; returns as many.
    """

    name: str
    to_hf: Callable[[list[Tensor], PreTrainedConfig], Tensor]
    to_own: Callable[[Tensor, PreTrainedConfig], list[Tensor]]


SAME = Turn("same", lambda own, config: own[0], lambda hf, config: [hf])
# Linear holds (out, in), GPT-2's Conv1D (in, out).
TRANSPOSED = Turn("transposed", lambda own, config: own[0].mT, lambda hf, config: [hf.mT])


def joined(parts: int, transposed: bool = False) -> Turn:
    """Return a turn that lays several tensors side by side along their outputs: query, key and value."""
    name = f"{parts} joined" + (", transposed" if transposed else "")

    def to_hf(own: list[Tensor], config: PreTrainedConfig) -> Tensor:
        return torch.cat([each.mT for each in own], dim=-1) if transposed else torch.cat(own, dim=-1)

    def to_own(hf: Tensor, config: PreTrainedConfig) -> list[Tensor]:
        return [each.mT if transposed else each for each in hf.chunk(parts, dim=-1)]

    return Turn(name, to_hf, to_own)


@dataclass(frozen=True)
class Line:
    """One line of a layout's table; `{n}` stands for the number of a block.

    Attributes:
        hf: Hugging Face's name.
        own: the layout's name, or names.
        turn: from one to the other.
        switch: a setting of the layout: where it is false, the layout has no such tensor, and Hugging Face's holds
            zeros: a bias.
        head: this is the output head, which Hugging Face keeps only where it is not tied to the embeddings.
    """

    hf: str
    own: tuple[str, ...]
    turn: Turn = SAME
    switch: str | None = None
    head: bool = False


class Layout(Protocol):
    """What a module of `kit.checkpoints.layouts` has.

    Attributes:
        NAME: as `--from` and `--to` take it.
        ABOUT: one sentence: whose it is, and what is special.
        MODEL_TYPE: Hugging Face's name of the architecture.
        TABLE: every tensor that has weights.
        BUFFERS: patterns of the layout's own names, matched in full, that hold a mask or a constant, not a weight.
        KEEPS_TIED_HEAD: whether a tied head is stored a second time under its own name.
        OPTIONS, normalized, target_notes: where it has them: settings of how its file is written; another spelling of
            its names; what somebody should know who gets such a file.
        SUFFIXES: what is written: `.pt`, `.safetensors`, `.bin`, or "" for a folder; the first is the usual one.
    """

    NAME: str
    ABOUT: str
    MODEL_TYPE: str
    TABLE: tuple[Line, ...]
    BUFFERS: tuple[str, ...]
    KEEPS_TIED_HEAD: bool
    SUFFIXES: tuple[str, ...]

    @staticmethod
    def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
        """Return what the architecture is, in Hugging Face's names and the layout's switches, and notes on choices.

        Deduced from the tensors, and checked against what the file says and what is given.

        Raises:
            UserError: they disagree, a shape fits no size, or something cannot be known and is not given.
        """

    @staticmethod
    def make_config(settings: Settings) -> PreTrainedConfig:
        """Return Hugging Face's configuration."""

    @staticmethod
    def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
        """Return what a file of this layout says beside its tensors, under its own names.

        Raises:
            UserError: the layout cannot hold such a model.
        """

    @staticmethod
    def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
        """Return the logits that the layout's own code would give, in plain PyTorch: float32 (batch, time, vocabulary).

        Args:
            read: returns a tensor of the layout by its own name, in float32.
            settings: what `read_settings` returned.
            input_ids: int64 (batch, time).
        """


def names_of(line: Line, block: int | None = None) -> tuple[str, tuple[str, ...]]:
    """Return a line's names, Hugging Face's and the layout's own, with the number of a block."""
    if block is None:
        return line.hf, line.own
    number = str(block)
    return line.hf.replace("{n}", number), tuple(name.replace("{n}", number) for name in line.own)


def in_blocks(line: Line) -> bool:
    """Tell whether each block has such tensors."""
    return "{n}" in line.hf


def expand(table: tuple[Line, ...], blocks: int) -> list[tuple[Line, str, tuple[str, ...]]]:
    """Return the table for so many blocks: each line with its names, embeddings first and head last as in the table."""
    expanded = []
    inside = [line for line in table if in_blocks(line)]
    done = False
    for line in table:
        if not in_blocks(line):
            expanded.append((line, *names_of(line)))
        elif not done:
            done = True
            expanded += [(each, *names_of(each, block)) for block in range(blocks) for each in inside]
    return expanded


def count_blocks(names: Mapping[str, LazyTensor], table: tuple[Line, ...]) -> int:
    """Return how many blocks the names of a checkpoint number; 0 where it has none of this layout."""
    templates = {name for line in table if in_blocks(line) for name in line.own}
    numbers = [-1]
    # A number beyond that is no block's, and the tensor with it one that the layout does not have.
    most = len(names)
    for template in templates:
        pattern = re.compile(re.escape(template).replace(r"\{n\}", r"(\d+)"))
        numbers += [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(number for number in numbers if number < most) + 1


def is_buffer(layout: Layout, name: str) -> bool:
    """Tell whether a name is a mask's or a constant's."""
    return any(re.fullmatch(pattern, name) for pattern in layout.BUFFERS)


def matches(layout: Layout, names: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """Return how many of a checkpoint's names the layout knows, and how many it does not."""
    known = {own for _, _, owns in expand(layout.TABLE, count_blocks(names, layout.TABLE)) for own in owns}
    found = sum(name in known for name in names)
    return found, sum(name not in known and not is_buffer(layout, name) for name in names)

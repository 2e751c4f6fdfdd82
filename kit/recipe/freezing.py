"""The recipe's `freezing` section: which parameters train, when, and at which rate."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from kit.recipe.section import Section, Text, sequence, text_or_mapping

OF_THE_CACHE = ("cache", "cache_gib")


class Parts(Section):
    """Parts of the model, found from its own structure; what several of them name counts once."""

    embeddings: bool = False
    """What turns token ids into vectors, positions apart; with tied embeddings the head's matrix too."""
    position_embeddings: bool = False
    """Learned positions, as GPT-2 and BERT have them."""
    first_blocks: int | None = Field(default=None, ge=1)
    """So many blocks, counted from the input."""
    last_blocks: int | None = Field(default=None, ge=1)
    """So many blocks, counted from the output."""
    final_norm: bool = False
    """The normalisation behind the last block."""
    head: bool = False
    """What turns the last block's output into logits; with tied embeddings their matrix too."""
    biases: bool = False
    """All biases, wherever they are."""
    norms: bool = False
    """The parameters of all normalisations, wherever they are."""
    patterns: sequence(Text) = ()
    """Regular expressions, each of which matches whole names of parameters, such as `transformer[.]h[.]0[.]attn[.].*`;
    `kit inspect` lists the names."""

    def named(self) -> set[str]:
        """Return the keys that name a part."""
        return {name for name in type(self).model_fields if getattr(self, name)}


class TrainableParts(Parts):
    """Parts of the model that train; the others are frozen."""

    new_tokens: bool = False
    """The rows of tokens that `vocabulary` adds, in the input and output embeddings; the old rows keep every bit."""


class PhaseSection(Section):
    """A phase of gradual unfreezing: what trains from here on, beside all that trained before."""

    epoch: float | None = Field(default=None, gt=0)
    """It begins after so many epochs."""
    step: int | None = Field(default=None, ge=1)
    """It begins after so many optimizer steps."""
    fraction: float | None = Field(default=None, gt=0, lt=1)
    """It begins after this share of the run's steps."""
    trainable: Annotated[
        Annotated[Literal["all"], Tag("text")] | Annotated[TrainableParts, Tag("mapping")],
        Discriminator(text_or_mapping),
    ]
    """The parts that begin to train, or `all`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate of what begins to train climbs to the run's."""

    @property
    def start(self) -> tuple[str, float] | None:
        """How its start is given, and where it is."""
        return next(((n, v) for n in ("epoch", "step", "fraction") if (v := getattr(self, n)) is not None), None)

    @model_validator(mode="after")
    def _one_start(self) -> "PhaseSection":
        if sum(getattr(self, name) is not None for name in ("epoch", "step", "fraction")) > 1:
            raise ValueError("a phase begins at one of `epoch`, `step` and `fraction`")
        if isinstance(self.trainable, Parts) and not self.trainable.named():
            raise ValueError("`trainable` names no part")
        return self


class GroupSection(Section):
    """Parts that train at a rate or with a weight decay of their own."""

    parts: TrainableParts
    """The parts."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Their peak learning rate, in the place of `training.learning_rate`."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Their weight decay, in the place of `training.weight_decay`."""

    @model_validator(mode="after")
    def _something(self) -> "GroupSection":
        if not self.parts.named():
            raise ValueError("`parts` names no part")
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("a group has a `learning_rate` or a `weight_decay` of its own")
        return self


def _on_or_off(value: Any) -> Any:
    """Return the word that YAML has read as a boolean."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class FreezingSection(Section):
    """Which parameters train, when, and at which rate; without this section all of them."""

    trainable: TrainableParts | None = None
    """The parts that train; all else is frozen."""
    frozen: Parts | None = None
    """The parts that are frozen; all else trains. Beside it `trainable` may only hold `new_tokens`."""
    schedule: sequence(PhaseSection) = ()
    """Gradual unfreezing, in the place of `trainable` and `frozen`: what trains from the start, then from each later
    phase on."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor of the learning rate for each step from the head downward: the last block trains at the rate times this,
    the one below at the rate times its square, the embeddings lowest (Clark et al. 2020, ELECTRA)."""
    groups: sequence(GroupSection) = ()
    """Parts with a learning rate or weight decay of their own; of two that set the same the later one counts."""
    cache: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    """Whether what comes out of the frozen embeddings and first blocks is computed once for each row and kept on the
    disk: `auto` where that is possible and rows are read again, `on` or an error, `off`."""
    cache_gib: float = Field(default=20.0, gt=0)
    """Most room that such caches take in `data.store_dir` together, in GiB; those used longest ago go first. A new one
    takes at most half of what is free on the disk."""

    @property
    def all_trainable(self) -> list[TrainableParts | str]:
        """The parts of `trainable` and of each phase, which may be `all`."""
        return [*([self.trainable] if self.trainable else []), *(phase.trainable for phase in self.schedule)]

    def named_parts(self) -> list[tuple[str, Parts]]:
        """Return all parts that the section names, with their keys in it."""
        named = [("trainable", self.trainable), ("frozen", self.frozen)]
        named += [(f"schedule.{number}.trainable", phase.trainable) for number, phase in enumerate(self.schedule)]
        named += [(f"groups.{number}.parts", group.parts) for number, group in enumerate(self.groups)]
        return [(key, parts) for key, parts in named if isinstance(parts, Parts)]

    @property
    def new_tokens(self) -> bool:
        """Whether the rows of added tokens train alone."""
        return any(parts != "all" and parts.new_tokens for parts in self.all_trainable)

    @property
    def may_train_embeddings(self) -> bool:
        """Whether the embeddings may train as a whole; which names a pattern matches only the model tells."""
        if self.frozen is not None:
            return not self.frozen.embeddings
        listed = self.all_trainable
        return not listed or any(p == "all" or p.embeddings or p.head or p.patterns for p in listed)

    @model_validator(mode="after")
    def _one_way(self) -> "FreezingSection":
        for name in ("trainable", "frozen"):
            parts = getattr(self, name)
            if parts is not None and not parts.named():
                raise ValueError(f"`{name}` names no part")
        if self.frozen is not None and self.trainable is not None:
            others = [key for key in Parts.model_fields if getattr(self.trainable, key)]
            if others:
                raise ValueError(
                    f"beside `frozen`, all else trains: `trainable.{others[0]}` says nothing; only "
                    f"`trainable.new_tokens` goes with it"
                )
        if self.schedule and (self.trainable is not None or self.frozen is not None):
            raise ValueError("`schedule` says what trains in each phase: `trainable` and `frozen` do not go with it")
        said = [getattr(self, name) for name in type(self).model_fields if name not in OF_THE_CACHE]
        if not any(value not in (None, ()) for value in said):
            raise ValueError(
                "`freezing` says nothing: give `trainable`, `frozen`, `schedule`, `layer_decay` or `groups`"
            )
        return self

    @model_validator(mode="after")
    def _rows_or_matrix(self) -> "FreezingSection":
        parts = self.all_trainable
        whole = any(p == "all" or p.embeddings or p.head for p in parts)
        whole = whole or (self.frozen is not None and not (self.frozen.embeddings or self.frozen.patterns))
        if self.new_tokens and whole:
            raise ValueError(
                "`new_tokens` trains rows of matrices that are frozen but for them; where `embeddings`, `head` or all "
                "trains, the rows train with it: leave out `new_tokens`"
            )
        return self

    @model_validator(mode="after")
    def _phases_begin(self) -> "FreezingSection":
        for number, phase in enumerate(self.schedule):
            if (phase.start is None) != (number == 0):
                raise ValueError(
                    "the first phase begins with the run: leave out its `epoch`, `step` or `fraction`"
                    if number == 0
                    else f"phase {number + 1} of `schedule` does not say when it begins: `epoch`, `step` or `fraction`"
                )
        if len({phase.start[0] for phase in self.schedule[1:]}) > 1:
            raise ValueError(
                "the phases of `schedule` begin at `epoch`, `step` or `fraction`: the same for all of them"
            )
        starts = [phase.start[1] for phase in self.schedule[1:]]
        if starts != sorted(set(starts)):
            raise ValueError(f"the phases of `schedule` begin at {starts}: expected each later than the one before")
        if "all" in [phase.trainable for phase in self.schedule[:-1]]:
            raise ValueError("only the last phase of `schedule` can train all: those after it would add nothing")
        return self

"""The recipe's `freezing` section: which parameters train."""

from pydantic import Field, model_validator

from kit.recipe.section import Section


class TrainableParts(Section):
    """Parts of the model that train; the others are frozen."""

    new_tokens: bool = False
    """The rows of tokens that `vocabulary` adds, in the input and output embeddings; the old rows keep every bit."""
    embeddings: bool = False
    """Input and output embeddings, whole: those of the new tokens too."""
    last_blocks: int | None = Field(default=None, ge=1)
    """So many blocks, counted from the output."""

    @property
    def trains_new_tokens(self) -> bool:
        """Whether the rows of added tokens train, alone or with all others."""
        return self.new_tokens or self.embeddings


class FreezingSection(Section):
    """Which parameters train; without this section all of them."""

    trainable: TrainableParts
    """The parts that train; all else is frozen."""

    @model_validator(mode="after")
    def _something(self) -> "FreezingSection":
        if not (self.trainable.trains_new_tokens or self.trainable.last_blocks):
            raise ValueError("`trainable` names no part: everything would be frozen")
        if self.trainable.new_tokens and self.trainable.embeddings:
            raise ValueError("`embeddings: true` trains the rows of new tokens too: leave out one of the two")
        return self

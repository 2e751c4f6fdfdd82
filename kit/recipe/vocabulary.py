"""The recipe's `vocabulary` section: tokens that the tokenizer is to have, and what their embeddings begin as."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kit.recipe.section import Section, Text, list_or_mapping, sequence, text_or_mapping

Initialization = Literal["subword-mean", "mean", "mean-covariance", "zeros", "random"]


class AddedToken(Section):
    """A token to add, with what its embedding begins as."""

    token: Text
    """The token."""
    description: Text | None = None
    """A phrase that says what it means: its embedding begins as the mean over the phrase's tokens."""


class TokensFile(Section):
    """Tokens in a file, such as `kit vocabulary mine` writes: one a line, in UTF-8; `#` begins a comment."""

    from_file: Text
    """The file, relative to the working directory."""


_Token = Annotated[Annotated[Text, Tag("text")] | Annotated[AddedToken, Tag("mapping")], Discriminator(text_or_mapping)]


class VocabularySection(Section):
    """Tokens that are added to the tokenizer, and what their rows of the embeddings begin as."""

    special_tokens: sequence(_Token) = ()
    """Tokens with a role of their own: never split, and left out of decoded text on request."""
    tokens: Annotated[
        Annotated[sequence(_Token), Tag("list")] | Annotated[TokensFile, Tag("mapping")],
        Discriminator(list_or_mapping),
    ] = ()
    """Words of the domain that are to be one token each: a list, or a file."""
    initialize: Initialization = "subword-mean"
    """What a new row begins as: the mean of the rows of the pieces that the old tokenizer made of the token (special
    tokens: of their description, else of all rows); the mean of all rows; a sample of their distribution; zeros; or the
    model's own random initialisation."""
    pad_to_multiple_of: int | None = Field(default=64, ge=1)
    """Rows of the embeddings are a multiple of this, as fast matrix products want it; a matrix never shrinks."""

    @model_validator(mode="after")
    def _something(self) -> "VocabularySection":
        if not self.special_tokens and not self.tokens:
            raise ValueError("a vocabulary adds at least one of `special_tokens` and `tokens`")
        return self

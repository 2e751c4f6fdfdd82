"""The recipe's `vocabulary` section: tokens that the tokenizer is to have, and what their embeddings begin as."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kit.recipe.section import Section, Text, list_or_mapping, sequence, text_or_mapping

Initialization = Literal["subword-mean", "mean", "mean-covariance", "zeros", "random"]


class AddedToken(Section):
    """A token to add, with what its embedding begins as."""

    content: Text
    """The token itself, under its name in `tokenizers.AddedToken`."""
    description: Text | None = None
    """A phrase that says what it means: its embedding begins as the mean over the phrase's tokens."""


class TokensFile(Section):
    """Tokens in a file, such as `kit vocabulary mine` writes: one a line, in UTF-8; `#` begins a comment."""

    from_file: Text
    """The file, relative to the working directory."""


_Token = Annotated[Annotated[Text, Tag("text")] | Annotated[AddedToken, Tag("mapping")], Discriminator(text_or_mapping)]


class TemplateFile(Section):
    """A chat template in a file."""

    from_file: Text
    """The file, in Jinja as `apply_chat_template` reads it, relative to the working directory."""


class Roles(Section):
    """Tokens with a role: each one of `special_tokens`, or in the tokenizer already."""

    bos_token: Text | None = None
    """What stands before a document."""
    eos_token: Text | None = None
    """What ends a document."""
    pad_token: Text | None = None
    """What fills up rows."""
    system: Text | None = None
    """What opens a message of the role `system` in a chat."""
    user: Text | None = None
    """What opens a message of the role `user` in a chat."""
    assistant: Text | None = None
    """What opens a message of the role `assistant` in a chat, and asks for one."""

    @model_validator(mode="after")
    def _both_speakers(self) -> "Roles":
        if (self.user is None) != (self.assistant is None) or (self.system and not self.user):
            raise ValueError("a chat has both `user` and `assistant`")
        return self

    @model_validator(mode="after")
    def _own_tokens(self) -> "Roles":
        # BOS, EOS and padding may be one token, as they are GPT-2's.
        first = {self.bos_token: "bos_token", self.eos_token: "eos_token", self.pad_token: "pad_token"}
        for role in ("system", "user", "assistant"):
            token = getattr(self, role)
            if token is not None and token in first:
                raise ValueError(f"`{first[token]}` and `{role}` are the same token, `{token}`")
            first[token] = role
        return self


class VocabularySection(Section):
    """Tokens that are added to the tokenizer, and what their rows of the embeddings begin as."""

    special_tokens: sequence(_Token) = ()
    """Tokens with a role of their own: never split, and left out of decoded text on request."""
    tokens: Annotated[
        Annotated[sequence(_Token), Tag("list")] | Annotated[TokensFile, Tag("mapping")],
        Discriminator(list_or_mapping),
    ] = ()
    """Words of the domain that are to be one token each: a list, or a file."""
    roles: Roles = Roles()
    """Which tokens begin, end and pad texts, and which open the messages of a chat."""
    chat_template: (
        Annotated[
            Annotated[Text, Tag("text")] | Annotated[TemplateFile, Tag("mapping")], Discriminator(text_or_mapping)
        ]
        | None
    ) = None
    """How `apply_chat_template` writes a chat, in Jinja or `{from_file: …}`; by default, where `roles` names `user` and
    `assistant`, the token that stands before each document, then each message as its role's token, its text and, after
    an assistant's, EOS."""
    initialize: Initialization = "subword-mean"
    """What a new row begins as: the mean of the rows of the pieces that the old tokenizer made of the token (special
    tokens: of their description, else of all rows); the mean of all rows; a sample of their distribution; zeros; or the
    model's own random initialisation."""
    pad_to_multiple_of: int = Field(default=64, ge=1, le=65_536)
    """Rows of embeddings that grow become a multiple of this, as fast matrix products want it; 1 for none to spare."""

    @model_validator(mode="after")
    def _something(self) -> "VocabularySection":
        if not (self.special_tokens or self.tokens or self.roles.written() or self.chat_template):
            raise ValueError("a vocabulary adds `special_tokens` or `tokens`, or names `roles` or a `chat_template`")
        return self

"""Roles of tokens: which begin, end and pad texts, which open the messages of a chat, and the chat template."""

import json
import traceback
from pathlib import Path
from string import Formatter

from transformers import PreTrainedTokenizerBase

from kit.console import say, warn
from kit.errors import UserError, did_you_mean, suggest
from kit.model.tokenizer import choose_special_tokens, special_tokens
from kit.recipe.vocabulary import Roles, TemplateFile, VocabularySection

_OWN = ("bos_token", "eos_token", "pad_token")  # registered as the tokenizer's; the others stand in the chat template
_SPEAKERS = ("system", "user", "assistant")
# No whitespace is written: the text is that of a data template such as "<|user|>{question}<|assistant|>{answer}", with
# what the kit puts before a document and after it.
# `generation` marks what `return_assistant_tokens_mask` finds: an answer with its end, both of which are learned.
_TEMPLATE = """\
{%- set role_tokens = {ROLES} -%}
{%- if tools -%}
    {{- raise_exception("this chat template has no place for tools") -}}
{%- endif -%}
{{- {BEGIN} -}}
{%- for message in messages -%}
    {%- if message["role"] not in role_tokens -%}
        {{- raise_exception("this chat template has no token for the role `" ~ message["role"] ~ "`; it has one for "
                            ~ role_tokens | join(", ")) -}}
    {%- endif -%}
    {%- if message["content"] is not string -%}
        {{- raise_exception("this chat template takes messages whose `content` is text") -}}
    {%- endif -%}
    {{- role_tokens[message["role"]] -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}{{- message["content"] ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message["content"] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- role_tokens["assistant"] -}}
{%- endif -%}
"""


def apply_roles(tokenizer: PreTrainedTokenizerBase, section: VocabularySection) -> None:
    """Give tokens of a tokenizer the roles of a section, and the tokenizer its chat template, in place.

    BOS, EOS and padding are registered as the tokenizer's own, under their ids, and what ends documents is chosen anew.
    The chat template is the section's; where there is none and `roles` names speakers, it is written from them. Either
    takes the place of the tokenizer's own.

    Args:
        tokenizer: with the tokens that the section adds (`extend_tokenizer`).
        section: the recipe's `vocabulary` section.

    Raises:
        UserError: a role's token is not in the tokenizer, not special, would be split in a text or has two roles; or
            the chat template cannot be read, does not compile, fails on a chat, or leaves out a text or a role's token.
    """
    roles = section.roles
    _check_tokens(tokenizer, roles)
    _register(tokenizer, roles)
    for speaker in _SPEAKERS:
        token = getattr(roles, speaker)
        if own := [name for name in _OWN if token and token == getattr(tokenizer, name)]:
            raise UserError(
                f"vocabulary.roles.{speaker}: `{token}` is the tokenizer's {own[0]}; expected a token that opens these "
                f"messages and does nothing else"
            )
    before = tokenizer.chat_template
    if section.chat_template:
        where, tokenizer.chat_template = _read_template(section.chat_template)
        _check_template(tokenizer, roles, where)
    elif roles.user:
        tokenizer.chat_template = _write_template(tokenizer, roles)
    if before and before != tokenizer.chat_template:
        say("chat template: the recipe's, in the place of the tokenizer's own")


def compare_with_chat(tokenizer: PreTrainedTokenizerBase, roles: Roles, template: str) -> None:
    """Warn where a data template writes a question and its answer otherwise than the chat template does.

    Compared are templates of two columns with the user's and the assistant's token, such as
    "<|user|>{question}<|assistant|>{answer}"; one that writes a system message too is left alone.

    Args:
        tokenizer: after `apply_roles`.
        roles: the section's.
        template: `template` of a source.
    """
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    names = [name for _, name in parts if name is not None]
    written = "".join(literal + (f"{{{name}}}" if name is not None else "") for literal, name in parts)
    speakers = [roles.user, roles.assistant]
    if not (roles.user and tokenizer.chat_template and len(names) == 2 and all(token in written for token in speakers)):
        return
    between = written.partition(f"{{{names[0]}}}")[2].partition(f"{{{names[1]}}}")[0]
    if (roles.system and roles.system in written) or not any(token in between for token in speakers):
        return  # a third message, or both columns in one
    chat = [{"role": role, "content": f"{{{name}}}"} for role, name in zip(_SPEAKERS[1:], names, strict=True)]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # it asks for a system message: there is nothing to compare with
        return
    chosen = special_tokens(tokenizer)
    text = text.removeprefix(chosen.context.token)
    answer, end, rest = text.rpartition(chosen.eos.token)
    if end and not rest.strip():  # many templates write a newline after each message; the last one's is never read
        text = answer
    if text != written:
        warn(
            f"data.train: the template writes {written!r}, the chat template {text!r}: whoever asks the model with "
            f"`apply_chat_template` asks in another form than it learns"
        )


def _check_tokens(tokenizer: PreTrainedTokenizerBase, roles: Roles) -> None:
    """Make sure that each role's token is there, is special and, where it stands in texts, is found in them."""
    vocabulary = tokenizer.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = {token for token in {*added, *tokenizer.all_special_tokens} if token in vocabulary}
    name = tokenizer.name_or_path or type(tokenizer).__name__
    for role in sorted(roles.written()):
        token = getattr(roles, role)
        if token not in vocabulary:
            raise UserError(
                f"vocabulary.roles.{role}: the tokenizer ({name}) has no token `{token}`"
                f", and a new one is declared in `vocabulary.special_tokens`{did_you_mean(token, special)}"
            )
        if token not in special:
            raise UserError(
                f"vocabulary.roles.{role}: `{token}` is an ordinary token of the tokenizer ({name}), which texts may "
                f"hold and decoding would not leave out; declare it in `vocabulary.special_tokens` to make it special"
            )
        # With `split_special_tokens`, or as a word of its own only, it would be read in pieces.
        ids = tokenizer(f"a{token}b", add_special_tokens=False, verbose=False)["input_ids"]
        if role in _SPEAKERS and list(ids).count(vocabulary[token]) != 1:
            raise UserError(f"vocabulary.roles.{role}: the tokenizer ({name}) splits `{token}` where it stands in text")


def _register(tokenizer: PreTrainedTokenizerBase, roles: Roles) -> None:
    """Make BOS, EOS and padding the tokenizer's own, so that loading the saved one alone gives the same."""
    named = {role: token for role in _OWN if (token := getattr(roles, role))}
    if not named:
        return
    replaced = {getattr(tokenizer, role) for role, token in named.items()} - {None, *named.values()}
    for role, token in named.items():
        number = tokenizer.convert_tokens_to_ids(token)
        # As it is registered already: another form of it would change how texts are read around it.
        tokenizer.add_special_tokens({role: tokenizer.added_tokens_decoder.get(number, token)})
    if getattr(tokenizer, "add_bos_token", False) or getattr(tokenizer, "add_eos_token", False):
        tokenizer.update_post_processor()  # as loading will do
    stays = [token for token in tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]) if token in replaced]
    if stays:
        warn(f"the tokenizer goes on adding {', '.join(stays)} to texts of its own accord; the kit's have none of it")
    tokenizer.chosen_special_tokens = choose_special_tokens(tokenizer)


def _write_template(tokenizer: PreTrainedTokenizerBase, roles: Roles) -> str:
    """Return a template that writes a context token, then each message as its role's token and its text, and EOS.

    The context token is the one that the kit puts before each document: without it an answer is asked for at a position
    and in a context that training never had.
    """
    tokens = {speaker: token for speaker in _SPEAKERS if (token := getattr(roles, speaker))}
    context = special_tokens(tokenizer).context.token
    named = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) == context]
    begin = named[0] if named else json.dumps(context, ensure_ascii=False)
    return _TEMPLATE.replace("{BEGIN}", begin).replace("{ROLES}", json.dumps(tokens, ensure_ascii=False))


def _read_template(given: str | TemplateFile) -> tuple[str, str]:
    """Return where a template stands, for messages, and the template."""
    if isinstance(given, str):
        return "vocabulary.chat_template", given
    name = given.from_file
    try:
        path = Path(name).expanduser()
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = suggest(path.name, siblings)
        raise UserError(f"vocabulary.chat_template.from_file: {name}: no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: no UTF-8 ({error.reason}); save the file in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"vocabulary.chat_template.from_file: {name!r} cannot be read: {reason}") from None
    if not text.strip():
        raise UserError(f"vocabulary.chat_template.from_file: {name} is empty")
    # Loading a saved tokenizer reads the file's lines so.
    return name, text.replace("\r\n", "\n")


def _check_template(tokenizer: PreTrainedTokenizerBase, roles: Roles, where: str) -> None:
    """Render a chat with the tokenizer's template, as transformers does it, and look for what has to be in it."""
    speakers = [speaker for speaker in _SPEAKERS if speaker != "system" or roles.system]
    chat = [{"role": speaker, "content": f"This is from the {speaker}."} for speaker in speakers]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can fail in any way that code can
        line = _line_of(error)
        reason = " ".join(str(getattr(error, "message", None) or error).split())
        raise UserError(
            f"{where}{f', line {line}' if line else ''}: the chat template fails on a chat of "
            f"{', '.join(speakers)}: {type(error).__name__}: {reason}"
        ) from error
    for message in chat:
        if message["content"] not in text:
            raise UserError(
                f"{where}: the chat template leaves out the text of the role `{message['role']}`, which is "
                f'`message["content"]` of each of `messages`'
            )
    for speaker in speakers:
        token = getattr(roles, speaker)
        if token and token not in text:
            raise UserError(f"{where}: the chat template does not write `{token}`, which is vocabulary.roles.{speaker}")


def _line_of(error: Exception) -> int | None:
    """Return the line of a template where an error arose: Jinja knows it, or rewrites the traceback to tell it."""
    if getattr(error, "lineno", None):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None

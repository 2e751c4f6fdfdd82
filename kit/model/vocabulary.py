"""Tokens that a recipe adds are put into the tokenizer without losing text.

Added tokens of the `tokenizers` library lose the space before a word or orphan it: byte-level BPE would write " kinase"
as a lone space and the word, a token more and a sequence that the model has not seen. Words therefore go into the model
of a BPE tokenizer, as they stand after a space and as they stand elsewhere, without merges; `ignore_merges` takes a
whole pre-token from the vocabulary, as Llama 3's own tokenizer does. Longer words never match.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from kit.console import say, warn
from kit.errors import UserError
from kit.model.declared_tokens import read_tokens
from kit.recipe.vocabulary import AddedToken, VocabularySection

_SHOWN = 20  # tokens or mistakes in a message
_SPACE = "▁"  # what SentencePiece writes for a space
_USUAL_TYPES = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen3_5"}


@dataclass(frozen=True)
class AddedRow:
    """A row of the embeddings that a declared token got; a word may have two, after a space and elsewhere."""

    token: str  # as the recipe declares it
    id: int
    special: bool
    pieces: tuple[int, ...]  # the old tokenizer's, of `text` or the description; none for a special token without one
    method: str
    text: str  # what the row stands for, with the space if that is part of it


@dataclass(frozen=True)
class Extension:
    """What was added to a tokenizer."""

    rows: tuple[AddedRow, ...]
    existing: tuple[str, ...]  # declared tokens that the vocabulary had already
    old_size: int  # the largest id of the old tokenizer, plus one
    holes: tuple[int, ...] = ()  # ids below it that no token had


@dataclass(frozen=True)
class _Form:
    entry: str  # as it stands in the vocabulary
    text: str
    pieces: tuple[int, ...]
    in_model: bool = True  # else matched before pre-tokenization


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, section: VocabularySection, model_type: str | None = None
) -> Extension:
    """Add the tokens of a section to a tokenizer, in place, so that every text still decodes to itself.

    A word is matched as a whole only. In a BPE tokenizer it gets a row for each form in which it is one pre-token:
    after a space, which then is part of the token, and without one (Qwen's and Llama 3's pre-tokens join punctuation to
    the word that follows, which is not matched). A word that a byte-level pre-tokenizer splits (`IL-6`) is matched
    before it; the space stays a token of its own, since taking it in (`lstrip`) would lose it when decoding. So it is
    with tokenizers other than BPE, and beside a `model_type` whose tokenizer class `AutoTokenizer` forces and builds
    anew from merges (Qwen 2, 3.5). Other such classes (`GPT2Tokenizer`) become a `PreTrainedTokenizerFast`.

    Raises:
        UserError: a token is badly declared (see `read_tokens`), the normaliser changes it, or the tokenizer can
            neither match it nor keep the text around it.
    """
    special, ordinary = read_tokens(section)
    old_vocabulary = tokenizer.get_vocab()
    old_ids = set(old_vocabulary.values())
    old_size = max(old_ids) + 1
    described = {t.content: _encode(tokenizer, t.description) for t in [*special, *ordinary] if t.description}
    words = _Words(tokenizer, model_type)
    planned = {t.content: [] if t.content in old_vocabulary else [_Form(t.content, t.content, ())] for t in special}
    of_words = _forms_of(words, ordinary)
    turned = {t for t, forms in planned.items() if not forms and not _is_special(tokenizer, old_vocabulary[t])}
    if special:
        added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in planned]
        tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    words.add(of_words)
    vocabulary = tokenizer.get_vocab()
    rows = []
    for token, form in ((token, form) for token, forms in [*planned.items(), *of_words.items()] for form in forms):
        method = "mean" if token in planned and section.initialize == "subword-mean" else section.initialize
        method = "description" if token in described else method
        pieces = described.get(token, form.pieces)
        rows.append(AddedRow(token, vocabulary[form.entry], token in planned, pieces, method, form.text))
    ids = {row.id for row in rows}
    if ids & old_ids or len(ids) < len(rows) or (ids and max(ids) - min(ids) >= len(ids)):
        raise UserError(f"vocabulary: the tokenizer ({tokenizer.name_or_path}) has gaps and gives new tokens old ids")
    taken = [*rows, *(AddedRow(token, old_vocabulary[token], True, (), "", token) for token in turned)]
    faults: dict[str, str] = {}
    for row, fault in _faults(tokenizer, words.backend, taken):
        faults.setdefault(row.token, fault)
    _refuse(faults.values())
    _tell_of_spaces(tokenizer, words.backend, rows)
    existing = [token for token, forms in [*planned.items(), *of_words.items()] if not forms]
    if left := [token for token in existing if token not in turned]:
        say(f"vocabulary: in the tokenizer already, and left as they are: {_listing(left)}")
    if turned:
        warn(f"ordinary tokens become special ones, to be cut out of texts before all else: {_listing(sorted(turned))}")
    if len(rows) > len(old_vocabulary) / 2:
        warn(f"the vocabulary grows from {len(old_vocabulary):,} tokens by {len(rows):,}, more than half of it")
    return Extension(tuple(rows), tuple(existing), old_size, tuple(sorted(set(range(old_size)) - old_ids)))


def _forms_of(words: "_Words", ordinary: list[AddedToken]) -> "dict[str, list[_Form]]":
    """Return the forms of all words, or raise what is wrong with any of them: a list is not to be mended one by one."""
    of_words, faults = {}, []
    for token in ordinary:
        try:
            of_words[token.content] = words.forms(token.content)
        except UserError as error:
            faults.append(str(error))
    _refuse(faults)
    return of_words


def _refuse(faults: Iterable[str]) -> None:
    if faults := list(faults):
        more = [f"and {len(faults) - _SHOWN:,} more like them"] if len(faults) > _SHOWN else []
        raise UserError("\n".join([*faults[:_SHOWN], *more]))


def _listing(tokens: list[str]) -> str:
    more = f" and {len(tokens) - _SHOWN:,} more" if len(tokens) > _SHOWN else ""
    return ", ".join(tokens[:_SHOWN]) + more


def _is_special(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    token = tokenizer.added_tokens_decoder.get(number)
    return number in tokenizer.all_special_ids or (token is not None and token.special)


def with_words(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], model_type: str | None = None
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with some words as `extend_tokenizer` adds them, to see what they would save.

    Words that the vocabulary has already, and those that `extend_tokenizer` would refuse, are passed over in silence.
    """
    accepted, refused = list(words), None
    while refused is None or refused:
        extended = copy.deepcopy(tokenizer)
        taker, of_words = _Words(extended, model_type), {}
        for word in accepted:
            with suppress(UserError):
                of_words[word] = taker.forms(word)
        taker.add(of_words)
        vocabulary = extended.get_vocab()
        forms = [(word, form) for word, forms in of_words.items() for form in forms]
        rows = [AddedRow(word, vocabulary[form.entry], False, form.pieces, "", form.text) for word, form in forms]
        # All at once, since each try takes a tokenizer of its own.
        refused = {row.token for row, _ in _faults(extended, taker.backend, rows)}
        accepted = [word for word in of_words if word not in refused]
    return extended


class _Words:
    """How a tokenizer takes whole words, decided before anything is added to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab()
        self.backend, self.state = None, {"model": {"type": None}}
        if tokenizer.is_fast:
            self.state = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
            self.backend = Tokenizer.from_str(json.dumps(self.state))
        model_type = model_type or _USUAL_TYPES.get(type(tokenizer).__name__)
        forced = model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        forced = forced and TOKENIZER_MAPPING_NAMES.get(model_type) not in (None, "TokenizersBackend")
        self.kind = "added" if forced else self._kind()

    def _kind(self) -> str:
        """Return "byte-level", "metaspace" or "added": into the model, likewise behind a split, before everything."""
        model = self.state["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return "added"
        if '"ByteLevel"' in json.dumps(self.state["pre_tokenizer"]):
            # Looking whole pre-tokens up may not wake an old entry that merges never made of its own text.
            asleep = [entry for entry in model["vocab"] if len(self.backend.model.tokenize(entry)) > 1]
            wakes = any(self.pretokens(self.backend.decoder.decode([entry])) == [entry] for entry in asleep)
            return "added" if wakes and not model.get("ignore_merges") else "byte-level"
        return "metaspace" if _SPACE in "".join(self.pretokens("a a")) else "added"

    def normalized(self, text: str) -> str:
        return self.backend.normalizer.normalize_str(text) if self.backend and self.backend.normalizer else text

    def pretokens(self, text: str) -> list[str]:
        text = self.normalized(text)
        pre_tokenizer = self.backend.pre_tokenizer
        return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]

    def forms(self, word: str) -> list[_Form]:
        """Return the forms of a word that are to be added; none if the vocabulary has it."""
        normal = self.normalized(word).replace(_SPACE, " ").strip()
        if normal != word:
            raise UserError(f"vocabulary.tokens: {word!r} would never be found: the normaliser makes {normal!r} of it")
        texts = (f" {word}", word)
        if self.kind == "metaspace":
            entries = [text.replace(" ", _SPACE) for text in texts]
        else:
            pretokens = [self.pretokens(text) for text in texts] if self.backend else [[word]]
            entries = ["".join(pieces) for pieces in pretokens]
            if self.kind == "added" or any(len(pieces) > 1 for pieces in pretokens):
                known = word in self.vocabulary or entries[0] in self.vocabulary
                return [] if known else [_Form(word, word, _encode(self.tokenizer, word), in_model=False)]
        if entries[0] in self.vocabulary:  # the form after a space is the word; the other one is rare
            return []
        forms = {entry: text for entry, text in zip(entries, texts, strict=True) if entry not in self.vocabulary}
        tokenize = self.backend.model.tokenize
        return [_Form(entry, text, tuple(p.id for p in tokenize(entry))) for entry, text in forms.items()]

    def add(self, planned: dict[str, list[_Form]]) -> None:
        """Add the forms of words to the tokenizer, in place."""
        inside = [word for word, forms in planned.items() if forms and forms[0].in_model]
        outside = [word for word, forms in planned.items() if forms and not forms[0].in_model]
        if inside:
            self._add_to_model([form.entry for forms in planned.values() for form in forms], inside)
        if outside:
            # On normalised text where case or accents are the normaliser's business, else on the text as it is.
            options = {"single_word": True, "normalized": self.state["model"]["type"] == "WordPiece"}
            self.tokenizer.add_tokens([tokenizers.AddedToken(entry, **options) for entry in outside])

    def _add_to_model(self, entries: list[str], words: list[str]) -> None:
        tokenizer, backend = self.tokenizer, self.tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        model = state["model"]
        # Added tokens are numbered behind the model's own when a file is loaded, unless the model has them too.
        for token in state["added_tokens"]:
            model["vocab"].setdefault(token["content"], token["id"])
        first = max(tokenizer.get_vocab().values()) + 1
        model["vocab"].update({entry: first + i for i, entry in enumerate(entries)})
        model["ignore_merges"] = True
        if self.kind == "metaspace":
            _isolate(state, words)
        extended = Tokenizer.from_str(json.dumps(state))
        extended.encode_special_tokens = backend.encode_special_tokens
        tokenizer._tokenizer = extended
        if type(tokenizer) is not PreTrainedTokenizerFast:
            # Classes of one architecture build the inside anew from vocabulary and merges, without `ignore_merges`.
            tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
            tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
            tokenizer.__class__ = PreTrainedTokenizerFast


def _isolate(state: dict[str, Any], words: list[str]) -> None:
    """Set words apart, each with the space before it, in a tokenizer whose pre-tokens run across spaces."""
    # Text such as `<0x0A>` right behind a word would be a pre-token of its own, and be taken for the byte's token.
    any_word = _any_of([word.replace(" ", _SPACE) for word in words])
    pattern = rf"{_SPACE}?(?<!\w)(?:{any_word})(?!\w)|<(?=0x[0-9A-F]{{2}}>)"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before = state["pre_tokenizer"]
    steps = [] if before is None else before["pretokenizers"] if before["type"] == "Sequence" else [before]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, split]}


def _any_of(words: list[str]) -> str:
    """Return a pattern for the longest of some words that fits, branching by letters: a list is tried word by word."""
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(words), max(words), strict=False))
    prefix = "".join(letter for letter, _ in shared)
    rests = {word[len(prefix) :] for word in words}
    branches = [_any_of(list(some)) for _, some in groupby(sorted(rests - {""}), key=lambda rest: rest[0])]
    longer = f"(?:{'|'.join(branches)}){'?' if '' in rests else ''}" if branches else ""
    return re.escape(prefix) + longer


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _faults(
    tokenizer: PreTrainedTokenizerBase, old: Tokenizer | None, rows: list[AddedRow]
) -> Iterator[tuple[AddedRow, str]]:
    """Yield each new token that is not found, or with which text is lost that was not before, and what is wrong."""
    if old is None:
        return
    name, decode = tokenizer.name_or_path, tokenizer.backend_tokenizer.decode
    for row in rows:
        token, text = row.token, row.text
        probes = [token] if row.special else [f"a{text} b", text, f"({token}){text}\n{token}"]
        encoded = [_encode(tokenizer, probe) for probe in probes]
        if not any(row.id in ids for ids in encoded):
            yield row, f"vocabulary: the tokenizer ({name}) would never find {token!r} in a text; leave it out"
        for probe, ids in zip(probes, encoded, strict=True):
            kept = row.special or old.decode(old.encode(probe, add_special_tokens=False).ids) == probe
            if kept and (now := decode(list(ids), skip_special_tokens=False)) != probe:
                fault = f"with {token!r} the tokenizer ({name}) would read {probe!r} back as {now!r}; it cannot take"
                yield row, f"vocabulary: {fault} this token whole without losing text"


def _tell_of_spaces(tokenizer: PreTrainedTokenizerBase, old: Tokenizer | None, rows: list[AddedRow]) -> None:
    """Warn where a tokenizer begins anew behind each special token, with the space that it puts before every text."""
    token = next((row.token for row in rows if row.special), None)
    if old is None or token is None or old.decode(old.encode("ab", add_special_tokens=False).ids) != "ab":
        return
    probe = f"a{token}b"
    now = tokenizer.backend_tokenizer.decode(list(_encode(tokenizer, probe)), skip_special_tokens=False)
    if now != probe:
        warn(
            f"the tokenizer ({tokenizer.name_or_path}) puts spaces beside special tokens: {probe!r} is read as {now!r}"
        )

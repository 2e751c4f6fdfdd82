"""Tokens that a recipe adds: read, put into the tokenizer without losing text, and given rows by id.

Added tokens of the `tokenizers` library lose the space before a word or orphan it: byte-level BPE would write " kinase"
as a lone space and the word, a token more and a sequence that the model has not seen. Words therefore go into the model
of a BPE tokenizer, as they stand after a space and as they stand elsewhere, without merges; `ignore_merges` takes a
whole pre-token from the vocabulary, as Llama 3's own tokenizer does. Longer words never match.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from kit.console import say, warn
from kit.errors import UserError
from kit.recipe.vocabulary import AddedToken, Initialization, TokensFile, VocabularySection

_COMMENT = re.compile(r"(^|\s)#.*$")
_SPACE = "▁"  # what SentencePiece writes for a space
# Of transformers' `resize_token_embeddings(mean_resizing=True)`, after https://nlp.stanford.edu/~johnhew/vocab-expansion
_COVARIANCE_SCALE = 1e-9
_USUAL_TYPES = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen3_5"}
_CHUNK = 1 << 22  # tokens
_ROWS = 1 << 13  # of a matrix, in float64 at a time


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
class InitializedRow:
    """What a new row began as, with its Euclidean length in the input embeddings and, if there are any, the output."""

    row: AddedRow
    norms: tuple[float, ...]


@dataclass(frozen=True)
class _Form:
    entry: str  # as it stands in the vocabulary
    text: str
    pieces: tuple[int, ...]
    in_model: bool = True  # else matched before pre-tokenization


def read_tokens(section: VocabularySection) -> tuple[list[AddedToken], list[AddedToken]]:
    """Return the special tokens and the ordinary ones that a recipe's `vocabulary` section declares.

    Raises:
        UserError: the file is missing or no UTF-8; a token is empty, only whitespace, an ordinary word with whitespace
            at its ends, or declared twice.
    """
    special = _listed("special_tokens", section.special_tokens)
    if isinstance(section.tokens, TokensFile):
        ordinary = _read_file(section.tokens.from_file)
    else:
        ordinary = _listed("tokens", section.tokens)
    seen = {}
    for where, declared in [*special, *ordinary]:
        token = declared.token
        if not token.strip():
            raise UserError(f"{where}: found {token!r}; expected a token that is more than whitespace")
        if (where, declared) not in special and token != token.strip():
            raise UserError(f"{where}: found {token!r}; expected a word without whitespace at its ends")
        if token in seen:
            raise UserError(f"{where}: `{token}` is declared already, in {seen[token]}")
        seen[token] = where
    return [token for _, token in special], [token for _, token in ordinary]


def _listed(key: str, tokens: Iterable[str | AddedToken]) -> list[tuple[str, AddedToken]]:
    declared = (AddedToken(token=token) if isinstance(token, str) else token for token in tokens)
    return [(f"vocabulary.{key}[{number}]", token) for number, token in enumerate(declared)]


def _read_file(name: str) -> list[tuple[str, AddedToken]]:
    """Return the tokens of a file with the places where they stand; whitespace around them is none of theirs."""
    path = Path(name).expanduser()
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"vocabulary.tokens.from_file: {name}: {error.strerror}") from None
    tokens = []
    for number, line in enumerate(lines, start=1):
        try:
            text = _COMMENT.sub("", line.decode("utf-8")).strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: no UTF-8 ({error.reason}); save the file in UTF-8") from None
        if text:
            tokens.append((f"{name}:{number}", AddedToken(token=text)))
    if not tokens:
        raise UserError(f"vocabulary.tokens.from_file: {name} holds no tokens")
    return tokens


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
    described = {t.token: _encode(tokenizer, t.description) for t in [*special, *ordinary] if t.description}
    words = _Words(tokenizer, model_type)
    planned = {t.token: [] if t.token in old_vocabulary else [_Form(t.token, t.token, ())] for t in special}
    of_words = {token.token: words.forms(token.token) for token in ordinary}
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
    if {row.id for row in rows} & old_ids or len({row.id for row in rows}) < len(rows):
        raise UserError(f"vocabulary: the tokenizer ({tokenizer.name_or_path}) has gaps and gives new tokens old ids")
    _check_whole(tokenizer, words.backend, rows)
    existing = [token for token, forms in [*planned.items(), *of_words.items()] if not forms]
    if existing:
        say(f"vocabulary: in the tokenizer already, and left as they are: {', '.join(existing)}")
    if len(rows) > len(old_vocabulary) / 2:
        warn(f"the vocabulary grows from {len(old_vocabulary):,} tokens by {len(rows):,}, more than half of it")
    return Extension(tuple(rows), tuple(existing), old_size, tuple(sorted(set(range(old_size)) - old_ids)))


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
    longest_first = sorted((re.escape(word.replace(" ", _SPACE)) for word in words), key=len, reverse=True)
    # Text such as `<0x0A>` right behind a word would be a pre-token of its own, and be taken for the byte's token.
    pattern = rf"{_SPACE}?(?<!\w)(?:{'|'.join(longest_first)})(?!\w)|<(?=0x[0-9A-F]{{2}}>)"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before = state["pre_tokenizer"]
    steps = [] if before is None else before["pretokenizers"] if before["type"] == "Sequence" else [before]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, split]}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_whole(tokenizer: PreTrainedTokenizerBase, old: Tokenizer | None, rows: list[AddedRow]) -> None:
    """Make sure that each new token is found, and that no text is lost that was not lost before."""
    if old is None:
        return
    name, decode = tokenizer.name_or_path, tokenizer.backend_tokenizer.decode
    for row in rows:
        token, text = row.token, row.text
        probes = [token] if row.special else [f"a{text} b", text, f"({token}){text}\n{token}"]
        encoded = [_encode(tokenizer, probe) for probe in probes]
        if not any(row.id in ids for ids in encoded):
            raise UserError(f"vocabulary: the tokenizer ({name}) would never find {token!r} in a text; leave it out")
        for probe, ids in zip(probes, encoded, strict=True):
            kept = row.special or old.decode(old.encode(probe, add_special_tokens=False).ids) == probe
            if kept and (now := decode(list(ids), skip_special_tokens=False)) != probe:
                raise UserError(
                    f"vocabulary: with {row.token!r} the tokenizer ({name}) would read {probe!r} back as {now!r}; it "
                    f"cannot take this token whole without losing text"
                )


def resize_and_initialise(
    model: PreTrainedModel,
    extension: Extension,
    tokenizer_size: int,
    initialize: Initialization,
    pad_to_multiple_of: int | None,
    seed: int,
) -> list[InitializedRow]:
    """Give each added token its row, by id, in the input and output embeddings and the head's bias.

    The matrices grow only where the largest id asks for it, then to a multiple of `pad_to_multiple_of`, and never
    shrink: rows that padding has left are used first. Old rows keep every bit. The seed alone decides what is drawn,
    and the global generators are left as they were.

    `tokenizer_size` is the largest id of the extended tokenizer, plus one. The rows of `extension` know their methods;
    `initialize` decides of rows that grow without a token: zero for `zeros`, else the mean.
    """
    sharing = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    rows_before = model.get_input_embeddings().weight.shape[0]
    needed = max([tokenizer_size, *(row.id + 1 for row in extension.rows)])
    with torch.random.fork_rng(), torch.no_grad():
        if needed > rows_before:
            model.resize_token_embeddings(needed, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
            _unshare(model, sharing)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        old = np.setdiff1d(np.arange(min(extension.old_size, rows_before)), extension.holes)
        spare = set(range(rows_before, inputs.weight.shape[0])) - {row.id for row in extension.rows}
        spare_method = "zeros" if initialize == "zeros" else "mean"
        targets = [(number, spare_method, ()) for number in sorted(spare)]
        targets += [(row.id, row.method, row.pieces) for row in extension.rows]
        parameters = [(inputs, inputs.weight)]
        if outputs is not None and outputs.weight is not inputs.weight:
            parameters.append((outputs, outputs.weight))
        if getattr(outputs, "bias", None) is not None:
            parameters.append((None, outputs.bias))
        for number, (module, parameter) in enumerate(parameters):
            torch.manual_seed(seed + number)
            _fill(model, module, parameter, old, targets)
        model.tie_weights()

    weights = [module.weight.detach() for module in (inputs, outputs) if module is not None]
    return [InitializedRow(r, tuple(float(w[r.id].double().norm()) for w in weights)) for r in extension.rows]


def _unshare(model: nn.Module, before: dict[str, int]) -> None:
    """Undo sharing that resizing began: an untied BERT would save one of its head's two biases, and load zeros."""
    first = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if before[first.setdefault(id(parameter), name)] != before[name]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.detach().clone()))


def _fill(
    model: PreTrainedModel, module: nn.Module | None, parameter: nn.Parameter, old: np.ndarray, targets: list[tuple]
) -> None:
    """Write rows into a matrix (rows × width), or into a bias (rows; no module), each by its (id, method, pieces)."""
    samples = sum(method == "mean-covariance" for _, method, _ in targets)
    mean, noise = _moments(parameter.detach(), torch.from_numpy(old).to(parameter.device), samples)
    count = sum(method == "random" for _, method, _ in targets)
    fresh = torch.zeros(count, *parameter.shape[1:])
    if module is not None and count:
        width = parameter.shape[1]
        new = nn.Embedding(count, width) if isinstance(module, nn.Embedding) else nn.Linear(width, count, bias=False)
        model._init_weights(new)
        fresh = new.weight.detach()
    random_rows, noise_rows = iter(fresh), iter(noise)
    for number, method, pieces in targets:
        if method == "random":
            value = next(random_rows)
        elif method == "zeros":
            value = torch.zeros_like(mean)
        elif method == "mean-covariance":
            value = mean + next(noise_rows)
        elif method in ("subword-mean", "description") and pieces:
            value = parameter.detach()[list(pieces)].double().mean(0)
        else:
            value = mean
        parameter.data[number] = value.to(parameter.device, parameter.dtype)


def _moments(matrix: torch.Tensor, old: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the old rows, and samples of noise with their covariance, scaled, in float64."""
    mean = sum(matrix[ids].double().sum(0) for ids in old.split(_ROWS)) / len(old)
    noise = torch.zeros(samples, *mean.shape, dtype=torch.float64, device=mean.device)
    for ids in old.split(_ROWS) if samples else ():
        # A weighted sum of centred rows has exactly their covariance, however few or dependent they are.
        weights = torch.randn(samples, len(ids), dtype=torch.float64).to(mean.device)
        noise += weights @ (matrix[ids].double() - mean)
    return mean, noise * (_COVARIANCE_SCALE / len(old)) ** 0.5


def audit_occurrences(rows: Iterable[AddedRow], tokens_of_stores: Iterable[np.ndarray]) -> dict[int, int]:
    """Count how often each added id occurs in arrays of token ids, which may be mapped from files; zeros included."""
    ids = sorted(row.id for row in rows)
    if not ids:
        return {}
    counts = np.zeros(ids[-1] - ids[0] + 1, dtype=np.int64)
    for tokens in tokens_of_stores:
        for start in range(0, len(tokens), _CHUNK):
            chunk = np.asarray(tokens[start : start + _CHUNK]).astype(np.int64)
            chunk = chunk[(chunk >= ids[0]) & (chunk <= ids[-1])]
            counts += np.bincount(chunk - ids[0], minlength=len(counts))
    return {number: int(counts[number - ids[0]]) for number in ids}

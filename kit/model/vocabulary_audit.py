"""What became of added tokens: how often each occurs and what it saves, how far its rows moved, what they came near."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.console import say, table, warn
from kit.model.readable import readable_tokens, visible
from kit.model.shards import whole
from kit.model.tokenizer import SpecialTokens, encoder
from kit.model.vocabulary import AddedRow, Extension

TRAINING = "training"
_CHUNK = 1 << 22  # tokens that are counted at a time
_OLD_ROWS = 1 << 13  # of a matrix that are compared at a time, each with
_NEW_ROWS = 1 << 10  # of these
_NEIGHBOURS = 5
_SHOWN = 20  # rows of a table
_NAMED = 10  # tokens in a warning
_WRITTEN = {"context": "stands before each document", "eos": "ends each document", "pad": "fills up rows"}
_COSINE_UNITS = 10**6  # cosines are rounded to them, so that equal old rows tie however a product is summed up
_NO_COSINE, _ID_UNITS = -2.0, 1 << 32


@dataclass(frozen=True)
class TextFigures:
    """The size of a text under the old tokenizer and the extended one."""

    documents: int
    num_bytes: int  # UTF-8
    tokens_before: int  # the EOS of each document included, here and below
    tokens_after: int

    @property
    def saved(self) -> int:
        """Tokens that the extension saves; negative where it costs some."""
        return self.tokens_before - self.tokens_after

    @property
    def share(self) -> float:
        """What is saved, as a share of the tokens before."""
        return self.saved / self.tokens_before if self.tokens_before else 0.0

    @property
    def bytes_per_token_before(self) -> float:
        """UTF-8 bytes per token under the old tokenizer."""
        return self.num_bytes / self.tokens_before if self.tokens_before else 0.0

    @property
    def bytes_per_token_after(self) -> float:
        """UTF-8 bytes per token under the extended tokenizer."""
        return self.num_bytes / self.tokens_after if self.tokens_after else 0.0


# The figures of a text, and the ids of the extended tokenizer that it is made of, without the EOS behind each document.
AuditedText = tuple[TextFigures, Iterable[np.ndarray]]


@dataclass(frozen=True)
class AuditedRow:
    """A new row of the embeddings before training."""

    id: int
    text: str  # what it stands for, readable
    pieces: tuple[str, ...]  # readable: the old tokens that made its text, or its description if it has one
    piece_ids: tuple[int, ...]
    occurrences: dict[str, int]  # by text
    saved_each: int  # tokens that one occurrence saves where it usually stands, see `_saved_each`
    initial_norm: dict[str, float | None]  # by matrix ("input", and "output" if untied), the Euclidean length


@dataclass(frozen=True)
class AuditedToken:
    """A declared token with its rows: one, or two where it has one after a space and one elsewhere."""

    token: str
    special: bool
    method: str
    written_as: tuple[str, ...]  # "context", "eos", "pad", where the kit itself writes this token
    rows: tuple[AuditedRow, ...]

    @property
    def occurrences(self) -> dict[str, int]:
        """Of all rows together, by text."""
        return {name: sum(row.occurrences[name] for row in self.rows) for name in self.rows[0].occurrences}

    @property
    def saved(self) -> dict[str, int]:
        """Tokens that it saves, by text: about, since what stands beside an occurrence may change it."""
        return {n: sum(row.occurrences[n] * row.saved_each for row in self.rows) for n in self.rows[0].occurrences}


@dataclass(frozen=True)
class Audit:
    """What is known of an extension before training."""

    texts: dict[str, TextFigures]  # "training", and "evaluation/…" with the name of each set
    tokens: tuple[AuditedToken, ...]
    existing: tuple[str, ...]  # declared tokens that the tokenizer had already
    rows_before: int  # of the embeddings of the base model
    rows_after: int
    spare: int  # rows that belong to no token
    old_ids: np.ndarray  # of the rows that belonged to a token before, int64 (old tokens,)

    @property
    def never_in_training(self) -> list[str]:
        """Declared tokens that stand nowhere in the training text and that the kit does not write itself."""
        return [token.token for token in self.tokens if not (token.occurrences[TRAINING] or token.written_as)]


@dataclass(frozen=True)
class Neighbour:
    """An old row, and the cosine of its angle with a new one."""

    id: int
    text: str
    cosine: float


@dataclass(frozen=True)
class Movement:
    """Where training took a new row, in each matrix."""

    moved: dict[str, float | None]  # the Euclidean distance from the start; None where it is not finite
    moved_relative: dict[str, float | None]  # in lengths at the start; None also where the row began as zeros
    unmoved: tuple[str, ...]  # matrices in which every element of the row is what it was
    nearest_old_rows: tuple[Neighbour, ...]  # of the input embeddings, by cosine, equal ones by id


def count_occurrences(rows: Iterable[AddedRow], chunks: Iterable[np.ndarray]) -> dict[int, int]:
    """Count how often each added id occurs in arrays of token ids, which may be mapped from files; zeros included."""
    ids = sorted(row.id for row in rows)
    if not ids:
        return {}
    counts = np.zeros(ids[-1] - ids[0] + 1, dtype=np.int64)
    for tokens in chunks:
        for start in range(0, len(tokens), _CHUNK):
            chunk = np.asarray(tokens[start : start + _CHUNK])
            found = chunk[(chunk >= ids[0]) & (chunk <= ids[-1])].astype(np.int64)
            np.add.at(counts, found - ids[0], 1)  # its time goes by what is found: an array may be a short document
    return {number: int(counts[number - ids[0]]) for number in ids}


def initial_rows(model: PreTrainedModel, extension: Extension) -> dict[str, torch.Tensor]:
    """Copy the new rows, "input" and if untied "output", to the CPU before training: (rows in order of id, width)."""
    return _rows(model, sorted(row.id for row in extension.rows))


def audit_before(
    extension: Extension,
    training: AuditedText,
    sets: Mapping[str, AuditedText],
    tokenizer_before: PreTrainedTokenizerBase,
    tokenizer_after: PreTrainedTokenizerBase,
    rows_before: int,
    rows_after: int,
    initial: Mapping[str, torch.Tensor],
    special: SpecialTokens | None = None,
) -> Audit:
    """Count the added tokens in the texts, each of which is read once.

    Args:
        extension: what was added.
        training: the documents that train.
        sets: the documents of each evaluation set.
        tokenizer_before: the tokenizer without what was added.
        tokenizer_after: the tokenizer with it.
        rows_before: rows of the input embeddings of the base model.
        rows_after: rows once they are resized.
        initial: see `initial_rows`.
        special: the tokens that the kit writes around documents, if it does.
    """
    texts = {TRAINING: training} | {f"evaluation/{name}": text for name, text in sets.items()}
    counts = {name: count_occurrences(extension.rows, chunks) for name, (_, chunks) in texts.items()}
    writes = {name: getattr(special, name).id for name in _WRITTEN} if special else {}
    saved = _saved_each(extension.rows, tokenizer_before, tokenizer_after)
    ids = sorted(row.id for row in extension.rows)
    norms = {name: dict(zip(ids, _lengths(weight), strict=True)) for name, weight in initial.items()}
    shown = readable_tokens(tokenizer_before, (piece for row in extension.rows for piece in row.pieces))
    grouped = defaultdict(list)
    for row in extension.rows:
        pieces = tuple(shown[piece] for piece in row.pieces)
        occurrences = {name: counts[name][row.id] for name in texts}
        norm = {name: lengths[row.id] for name, lengths in norms.items()}
        audited = AuditedRow(row.id, visible(row.text), pieces, row.pieces, occurrences, saved[row.id], norm)
        grouped[row.token, row.special, row.method].append(audited)
    tokens = []
    for declared, rows in grouped.items():
        written_as = tuple(role for role, id_ in writes.items() if id_ in {row.id for row in rows})
        tokens.append(AuditedToken(*declared, written_as, tuple(rows)))
    old = np.setdiff1d(np.arange(extension.old_size), extension.holes)
    matrix = (rows_before, rows_after, rows_after - len(old) - len(ids), old[old < rows_before])
    return Audit({name: figures for name, (figures, _) in texts.items()}, tuple(tokens), extension.existing, *matrix)


def print_audit(audit: Audit) -> None:
    """Print what the added tokens save in each text, those that save the most, and those that never occur."""
    for name, f in audit.texts.items():
        say(
            f"{name}: {f.tokens_before:,} tokens become {f.tokens_after:,} ({0.0 - f.share:+.1%}); "
            f"{f.bytes_per_token_before:.2f} bytes per token become {f.bytes_per_token_after:.2f}"
        )
    say(f"embeddings: {audit.rows_before:,} rows become {audit.rows_after:,}, {audit.spare:,} of them without a token")
    if not audit.tokens:
        return
    rows = []
    for token in sorted(audit.tokens, key=lambda token: (-token.saved[TRAINING], -token.occurrences[TRAINING])):
        times = token.occurrences
        made_of = "│".join(token.rows[0].pieces) or "mean"
        if token.method != "subword-mean":
            made_of = f"description: {made_of}" if token.method == "description" else token.method
        ids = ", ".join(str(row.id) for row in token.rows)
        figures = (times[TRAINING], sum(times.values()) - times[TRAINING], token.saved[TRAINING])
        name = visible(token.token, space=" ") + (f" ({', '.join(token.written_as)})" if token.written_as else "")
        rows.append([name, ids, made_of, *(f"{figure:,}" for figure in figures)])
    columns = ["token", "ids", "begins as", "in training text", "in evaluation text", "saves about, in training text"]
    _table("Added tokens", columns, rows)
    roles = {role for token in audit.tokens for role in token.written_as}
    if written := [f"({role}) {does}" for role, does in _WRITTEN.items() if role in roles]:
        say(f"{', '.join(written)}: written by the kit itself, which is not counted here")
    if never := audit.never_in_training:
        warn(
            f"{len(never):,} of {len(audit.tokens):,} added tokens never occur in the training text, so that their "
            f"rows are never trained as inputs: {_named(never)}"
        )


def audit_after(
    audit: Audit, model: PreTrainedModel, initial: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[int, Movement]:
    """Tell by id how far each new row moved in training, and which old rows it lies nearest to.

    Args:
        audit: see `audit_before`.
        model: after training, with adapters merged.
        initial: see `initial_rows`.
        tokenizer: names the old rows; before or after its extension.
    """
    norms = {row.id: row.initial_norm for token in audit.tokens for row in token.rows}
    ids = sorted(norms)
    now = _rows(model, ids)
    steps = {name: now[name].double() - start.double() for name, start in initial.items()}
    far = {name: _lengths(step) for name, step in steps.items()}
    same = {name: (step == 0).all(dim=1).tolist() for name, step in steps.items()}
    nearest = _nearest(whole(model.get_input_embeddings().weight), ids, audit.old_ids)
    shown = readable_tokens(tokenizer, (near for pairs in nearest for near, _ in pairs))
    movements = {}
    for number, id_ in enumerate(ids):
        moved = {name: distances[number] for name, distances in far.items()}
        relative = {n: d / norms[id_][n] if d is not None and norms[id_][n] else None for n, d in moved.items()}
        unmoved = tuple(name for name, rest in same.items() if rest[number])
        neighbours = tuple(Neighbour(near, shown[near], cosine) for near, cosine in nearest[number])
        movements[id_] = Movement(moved, relative, unmoved, neighbours)
    return movements


def print_movement(audit: Audit, movements: Mapping[int, Movement]) -> None:
    """Print how far the most frequent new rows moved and what they came near, and warn of those that did not move."""
    if not movements:
        return
    rows = sorted((row for t in audit.tokens for row in t.rows), key=lambda row: -row.occurrences[TRAINING])
    names = list(rows[0].initial_norm)
    cells = []
    for row in rows:
        m = movements[row.id]
        far = [_distance(m.moved[name], m.moved_relative[name]) for name in names]
        near = "  ".join(f"{old.text} {old.cosine:.2f}" for old in m.nearest_old_rows)
        cells.append([row.text, f"{row.occurrences[TRAINING]:,}", *far, near])
    columns = ["row", "in training text", *(f"moved ({name})" for name in names), "nearest old rows, with cosine"]
    _table("Added rows after training, and how far they are from their start", columns, cells)
    for name in names:
        role = "context" if name == "input" else "eos"  # what ends a document is no input
        writes = {row.id for token in audit.tokens if role in token.written_as for row in token.rows}
        far = _median(m.moved[name] for m in movements.values())
        relative = _median(m.moved_relative[name] for m in movements.values())
        still = [row for row in rows if name in movements[row.id].unmoved]
        # The softmax moves all rows of an output matrix, which a tied one is too: that none stayed says nothing.
        stayed = f", {len(still):,} did not move at all" if still or (name == "input" and len(names) > 1) else ""
        say(
            f"{name} embeddings: the {len(rows):,} new rows moved by {_distance(far, relative)} in the median{stayed} "
            f"(in brackets: share of their length at the start)"
        )
        if seen := [row.text for row in still if row.occurrences[TRAINING] or row.id in writes]:
            warn(
                f"{len(seen):,} new rows of the {name} embeddings are what they were before training, although their "
                f"tokens are in it (were there too few steps, or was the learning rate too small?): {_named(seen)}"
            )
    matrix = "these embeddings, which are the output's too," if len(names) == 1 else "the output embeddings,"
    say(f"every prediction pulls at all rows of {matrix} so that a movement there does not say that a token occurred")


def audit_as_json(audit: Audit, movements: Mapping[int, Movement] | None = None) -> dict[str, Any]:
    """Return what `vocabulary.json` holds, plain and finite: all tokens, with their movement once there is one."""
    derived = ("saved", "share", "bytes_per_token_before", "bytes_per_token_after")
    texts = {name: asdict(f) | {key: getattr(f, key) for key in derived} for name, f in audit.texts.items()}
    tokens = []
    for token in audit.tokens:
        rows = [asdict(row) | (asdict(movements[row.id]) if movements else {}) for row in token.rows]
        totals = {"occurrences": token.occurrences, "saved_about": token.saved}
        tokens.append(asdict(token) | totals | {"rows": rows})
    return {
        "texts": texts,
        "embedding_rows": {"before": audit.rows_before, "after": audit.rows_after, "spare": audit.spare},
        "existing": list(audit.existing),
        "never_in_training": audit.never_in_training,
        "tokens": tokens,
    }


def _named(texts: Sequence[str]) -> str:
    rest = f" and {len(texts) - _NAMED:,} more" if len(texts) > _NAMED else ""
    return ", ".join(visible(text, space=" ") for text in texts[:_NAMED]) + rest


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table(title, columns, rows[:_SHOWN])
    if len(rows) > _SHOWN:
        say(f"and {len(rows) - _SHOWN:,} more; the `vocabulary.json` of a run has all")


def _distance(absolute: float | None, relative: float | None) -> str:
    return " ".join("–" if f is None else form.format(f) for f, form in ((absolute, "{:.4g}"), (relative, "({:.1%})")))


def _saved_each(
    rows: Sequence[AddedRow], before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Return by id the tokens that an occurrence saves: measured, since pieces may be a description's.

    A word with one row stands behind a space, which may become a token of its own; special tokens, and words without
    the space that their other row has, stand at the beginning of a line.
    """
    rows_of = Counter(row.token for row in rows)
    between = ("" if r.text.startswith(" ") else "\n" if r.special or rows_of[r.token] > 1 else " " for r in rows)
    probes = [f"a{apart}{row.text}" for apart, row in zip(between, rows, strict=True)]
    old, new = (encoder(tokenizer)(probes) if probes else [] for tokenizer in (before, after))
    return {row.id: len(o) - len(n) for row, o, n in zip(rows, old, new, strict=True)}


def _rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    untied = outputs is not None and outputs.weight is not inputs
    weights = {"input": whole(inputs)} | ({"output": whole(outputs.weight)} if untied else {})
    return {name: w[list(ids)].to("cpu", torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}


def _nearest(weight: torch.Tensor, ids: Sequence[int], old_ids: np.ndarray) -> list[list[tuple[int, float]]]:
    """Return for each row the ids and cosines of the nearest old ones; none for a row of zeros."""
    dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device

    def directions(some: torch.Tensor) -> torch.Tensor:
        rows = weight[some].to(dtype)
        return rows / rows.norm(dim=1, keepdim=True)  # NaN where there is no direction

    found = []
    for some in torch.tensor(ids, dtype=torch.long, device=device).split(_NEW_ROWS) if ids else ():
        new, best = directions(some), torch.empty(len(some), 0, dtype=torch.long, device=device)
        for old in torch.from_numpy(old_ids).to(device).split(_OLD_ROWS):
            cosines = (new @ directions(old).T).nan_to_num(_NO_COSINE).clamp(max=1)
            # Cosine and id in one integer: the largest are the nearest, and of equal ones the lowest ids.
            keys = (cosines * _COSINE_UNITS).round().long() * _ID_UNITS - old
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(_NEIGHBOURS, best.shape[1])).values
        pairs = [[(-key % _ID_UNITS, -(-key // _ID_UNITS) / _COSINE_UNITS) for key in keys] for keys in best.tolist()]
        found += [[pair for pair in near if pair[1] > _NO_COSINE] for near in pairs]
    return found


def _lengths(rows: torch.Tensor) -> list[float | None]:
    return [length if math.isfinite(length) else None for length in rows.double().norm(dim=1).tolist()]


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return median(known) if known else None

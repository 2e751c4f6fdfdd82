"""Words of the domain that would save the most tokens if the tokenizer had each as one.

A word is a run of letters, digits and underscores with at least one letter (`asyncio`, `__init__`, `utf8`); a hyphen
belongs to it where a digit follows (`COX-2`, but `well-known` is two words). Its case counts, and where it is part of a
longer word it is not that word. Nothing else can be in one, so neither space nor `#`. In scripts that write no space
between words such a run is a phrase, and few of them recur.

What a word saves depends on where it stands, and on how it gets into the tokenizer. A token that `add_tokens` adds is
cut out of the text before all else, so that a space before it, which a byte-level BPE has in the word's first piece,
becomes a token of its own: of the three tokens of ` asyncio` one is saved, not two. Occurrences are therefore counted
by what stands next to the word on both sides, and tokens are counted there with a tokenizer that has the words. Assumed
is that nothing further away changes how a word is cut, which holds wherever the pre-tokenizer separates words, and that
longer words stay as they are: `asyncio` saves more where `asyncio_mode` too is made of it. `measure` encodes anew.
"""

import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

from kit.console import say, table, warn
from kit.data.tokenising import Encode
from kit.errors import UserError
from kit.files import write_text

_LONGEST_WORD = 64  # characters; what is longer (base64, a sequence of bases) is skipped
_BATCH = 1 << 20  # characters that are encoded at once
_PROBES = 10_000  # words that are encoded at once, each with all that stands around it
_CANDIDATES = 3  # times the words that are wanted, whose saving `extend` tells
_FIRST_LINE = "# Words of the training text of "  # begins each file of mined words, and tells it from other files
_FOUND = 100_000  # words between two looks at the memory

_Context = tuple[str, str, str]  # what stands before a word, the word, what stands after it


@dataclass(frozen=True)
class MinedWord:
    """A word, and what it is worth as a token.

    Attributes:
        word: the word, without the space before it.
        occurrences: how often it stands in the texts as a word of its own.
        pieces: tokens that it is made of after a space, which is in the first one; elsewhere it may be of more.
        saved: tokens of the texts that it saves as one token, those that it costs deducted.
    """

    word: str
    occurrences: int
    pieces: int
    saved: int


@dataclass(frozen=True)
class TextTotals:
    """The size of some texts.

    Attributes:
        documents: number of texts.
        num_bytes: their UTF-8 bytes.
        words: what white space separates in them.
        tokens: their tokens, without any EOS.
        most_missed: occurrences that each word may have beyond those that were counted; 0 where counts are exact.
    """

    documents: int
    num_bytes: int
    words: int
    tokens: int
    most_missed: int = 0

    @property
    def fertility(self) -> float:
        """Tokens per word (Rust et al. 2021, https://aclanthology.org/2021.acl-long.243)."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token."""
        return self.num_bytes / self.tokens if self.tokens else 0.0


def mine_words(
    texts: Iterable[str],
    encode: Encode,
    count: int,
    min_occurrences: int = 5,
    *,
    extend: Callable[[list[str]], Encode],
    most_counted: int = 2_000_000,
) -> tuple[list[MinedWord], TextTotals]:
    """Find the words that save the most tokens if each is added as one token.

    The texts are read once, as a stream. Where they hold more different words than memory is to hold, the rarest are
    forgotten now and then; `most_missed` of the totals bounds what any word can lose by it, so that none that occurs
    more often is overlooked.

    Args:
        texts: the texts of the training split.
        encode: texts to token ids, without special tokens of its own accord.
        count: the most words to return.
        min_occurrences: words that occur less often are left out: their embeddings would hardly be trained.
        extend: returns `encode` of the tokenizer with some words, which has to pass over those that it cannot add;
            called once at most, with three times as many words as are wanted. What they save is counted with it.
        most_counted: the most words, each with what stands around it, that are counted at a time: 200 bytes each.

    Returns:
        Words that save at least one token, those that save the most first, equal ones by their letters; and the totals
        of the texts as they are encoded now.
    """
    counts, totals = _count(texts, encode, most_counted)
    # Sorted, so that no tie depends on which text came first.
    of_words = [list(found) for _, found in groupby(sorted(counts, key=_by_word), key=lambda context: context[1])]
    frequent = [
        found
        for found in of_words
        if sum(counts[context] for context in found) >= min_occurrences and any(map(str.isalpha, found[0][1]))
    ]
    # Arithmetic finds the candidates, generously; those that save nothing in the end are left out.
    candidates = {word.word for word in _rank(frequent, counts, _Probes(encode), _CANDIDATES * count)}
    if not candidates:
        return [], totals
    probes = _Probes(encode, extend(sorted(candidates)))
    return _rank([found for found in frequent if found[0][1] in candidates], counts, probes, count), totals


def measure(texts: Iterable[str], encode: Encode) -> TextTotals:
    """Count documents, bytes, words and tokens of some texts."""
    totals = TextTotals(0, 0, 0, 0)
    for batch in _batches(texts):
        totals = _add(totals, batch, encode)
    return totals


def check_target(path: str | Path, overwrite: bool) -> None:
    """Check that mined words can be written to a file, best before they are mined.

    Raises:
        UserError: it exists and mining did not write it, or `overwrite` is not given; it is no file, or its folder is
            missing or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'device'}; expected a file to write words to")
    if path.exists() and not _was_mined(path):
        raise UserError(
            f"{path}: exists already, and mining did not write it; name another file (`--output`): `--overwrite` "
            f"replaces only a file whose first line begins with `{_FIRST_LINE.strip()}`"
        )
    if path.exists() and not overwrite:
        raise UserError(
            f"{path}: exists already, perhaps with words that were chosen by hand; name another file (`--output`), or "
            f"replace it (`--overwrite`)"
        )
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: its folder {'cannot be written' if folder.is_dir() else 'does not exist'} ({folder})")


def _was_mined(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file to write words to") from None


def recipe_line(path: str | Path) -> str:
    """Return the line of YAML with which a recipe uses the words of a file."""
    plain = re.fullmatch(r"[\w./-]*\w\.[a-z]{2,}", str(path), re.ASCII)  # text to YAML, as `123` and `null` are not
    name = str(path) if plain else json.dumps(str(path), ensure_ascii=False)
    return f"vocabulary: {{tokens: {{from_file: {name}}}}}"


def write_mined(
    path: str | Path,
    words: Sequence[MinedWord],
    before: TextTotals,
    after: TextTotals,
    recipe: str,
    header: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the words to a file to be reviewed: one a line, what it is worth behind it as a comment.

    Args:
        path: the file; what a recipe calls `vocabulary.tokens.from_file`.
        words: what was mined.
        before: of the texts that it was mined from.
        after: of the same texts, measured with the tokenizer that has the words.
        recipe: names the recipe whose training text it was.
        header: further lines that say where the words are from, such as the tokenizer.
        overwrite: replace the file where there is one already, and with it what was edited in it.

    Raises:
        UserError: the file cannot be written, see `check_target`.
    """
    check_target(path, overwrite)
    first = f"{_FIRST_LINE.removeprefix('# ')}{recipe} that save the most tokens, each as one token"
    lines = [line for part in (first, *header) for line in part.splitlines()]
    lines += [
        "",
        *_summary(words, before, after),
        "",
        "Delete the lines of words that are not worth a token, then let a recipe use the rest:",
        f"    {recipe_line(path)}",
    ]
    width = min(24, max((len(word.word) for word in words), default=0))
    lines = [f"# {line}".rstrip() for line in lines] + [""]
    for word in words:
        figures = f"{word.occurrences:,} times, {word.pieces:,} tokens after a space, saves {word.saved:,}"
        lines.append(f"{word.word:<{width}}    # {figures}")
    write_text(path, "\n".join(lines).rstrip("\n") + "\n")


def print_mined(words: Sequence[MinedWord], before: TextTotals, after: TextTotals, most: int = 20) -> None:
    """Print the first `most` words, and what all of them save; `after` is measured with them (see `write_mined`)."""
    rows = [[word.word, f"{word.occurrences:,}", f"{word.pieces:,}", f"{word.saved:,}"] for word in words[:most]]
    table("Words that save tokens", ["word", "occurrences", "tokens after a space", "saved"], rows)
    if len(words) > most:
        say(f"and {len(words) - most:,} more")
    if any(word.saved != word.occurrences * (word.pieces - 1) for word in words[:most]):
        say("elsewhere, as at the start of a line or after a bracket, a word may be more tokens, or fewer")
    say()
    for line in _summary(words, before, after):
        say(line)
    if before.most_missed:
        warn(
            f"there were more words than fit into memory: each may occur up to {before.most_missed:,} times more often "
            f"than was counted"
        )


def _summary(words: Sequence[MinedWord], before: TextTotals, after: TextTotals) -> list[str]:
    change = (after.tokens - before.tokens) / before.tokens if before.tokens else 0.0
    figures = [
        ("tokens", f"{before.tokens:,}", f"{after.tokens:,} ({change:+.1%})"),
        ("tokens per word", f"{before.fertility:.3f}", f"{after.fertility:.3f}"),
        ("bytes per token", f"{before.bytes_per_token:.3f}", f"{after.bytes_per_token:.3f}"),
    ]
    width = max(len(old) for _, old, _ in figures)
    added = "this word" if len(words) == 1 else f"these {len(words):,} words"
    size = f"{before.documents:,} documents, {before.num_bytes:,} bytes, {before.words:,} words"
    return [
        f"{size}; as they are, and with {added}:",
        *(f"    {name:<17}{old:>{width}} → {new}" for name, old, new in figures),
    ]


# ---- counting


def _count(texts: Iterable[str], encode: Encode, most_counted: int) -> tuple[Counter[_Context], TextTotals]:
    """Count the words by what stands around them, and the totals of the texts."""
    counts: Counter[_Context] = Counter()
    totals, missed, pattern = TextTotals(0, 0, 0, 0), 0, _words()
    for batch in _batches(texts):
        totals = _add(totals, batch, encode)
        for text in batch:
            found = map(re.Match.groups, pattern.finditer(text))
            while some := list(islice(found, _FOUND)):
                counts.update(some)
                if len(counts) > most_counted:
                    counts, forgotten = _forget_rare(counts, most_counted // 2)
                    missed += forgotten
    return counts, replace(totals, most_missed=missed)


def _forget_rare(counts: Counter[_Context], most: int) -> tuple[Counter[_Context], int]:
    """Keep the most frequent words, `most` contexts of them at most; also return how often the others occurred.

    What a word loses at one time is at most that number. So over all times it loses at most their sum, and a word that
    occurs more often is in the end there (as in lossy counting, Manku & Motwani 2002).
    """
    of_words: Counter[str] = Counter()
    contexts: Counter[str] = Counter()
    for context, number in counts.items():
        of_words[context[1]] += number
        contexts[context[1]] += 1
    contexts_at: Counter[int] = Counter()
    for word, number in of_words.items():
        contexts_at[number] += contexts[word]
    left, forgotten = len(counts), 0
    for number in sorted(contexts_at):
        if left <= most:
            break
        left, forgotten = left - contexts_at[number], number
    return Counter({c: number for c, number in counts.items() if of_words[c[1]] > forgotten}), forgotten


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1  # so that empty texts fill a batch too
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(totals: TextTotals, texts: list[str], encode: Encode) -> TextTotals:
    return replace(
        totals,
        documents=totals.documents + len(texts),
        num_bytes=totals.num_bytes + sum(len(text.encode()) for text in texts),
        words=totals.words + sum(len(text.split()) for text in texts),
        tokens=totals.tokens + sum(map(len, encode(texts))),
    )


@lru_cache(maxsize=1)
def _words() -> re.Pattern[str]:
    """Return what finds words, with what stands before and after each: a character, none at the end of a text.

    Two where `_` is next to them, since tokenizers take runs of punctuation together; and two of white space before it.
    """
    # Vowel signs and accents are no letters to `re`, but cut no word either; nor do the two joiners.
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    runs = groupby(enumerate(marks), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    inside = r"\w\u200c\u200d" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ends)
    letter, other = f"[{inside}]", f"[^{inside}]"
    run = f"{letter}{{1,{_LONGEST_WORD}}}+(?!{letter})"
    before = rf"({other}{{0,2}}(?=_)|\s\s|{other}?)(?<!{letter})"
    return re.compile(rf"{before}({run}(?:-(?=\d){run}){{0,3}})(?=((?<=_){other}{{0,2}}|{other}?))")


def _by_word(context: _Context) -> _Context:
    return context[1], context[0], context[2]


# ---- what a word saves


class _Probes:
    """Numbers of tokens of short texts: words where they stand, and what stands around them."""

    def __init__(self, encode: Encode, extended: Encode | None = None) -> None:
        self._encode = encode
        self._extended = extended
        self._tokens: dict[str, int] = {}
        self._then: dict[str, int] = {}

    def encode_contexts(self, contexts: Iterable[_Context]) -> None:
        """Encode some words where they stand; what was encoded before is forgotten."""
        short, whole = {"a", "a a"}, set()
        for before, word, after in map(_probe, contexts):
            whole.add(before + word + after)
            short |= {before + "a", before + word, f"a {word}"}
        self._tokens = _lengths(self._encode, short | whole)
        if self._extended:
            self._then = _lengths(self._extended, whole)

    def saved(self, context: _Context) -> int:
        """Return the tokens that one occurrence of a word saves as one token; about, without an extended tokenizer."""
        before, word, after = _probe(context)
        if self._extended:
            return self._tokens[before + word + after] - self._then[before + word + after]
        # By comparison with a word of one token there; ` a` may be two where a vocabulary is tiny.
        unit = self._tokens["a a"] - self._tokens["a"] if before.endswith(" ") else self._tokens["a"]
        return self._tokens[before + word] - self._tokens[before + "a"] + unit - 1

    def pieces(self, word: str) -> int:
        """Return the tokens of a word after a space, the space included."""
        return self._tokens[f"a {word}"] - self._tokens["a"]


def _lengths(encode: Encode, texts: Iterable[str]) -> dict[str, int]:
    texts = sorted(texts)
    return dict(zip(texts, map(len, encode(texts)), strict=True))


def _probe(context: _Context) -> _Context:
    # A space alone is not encoded as one between words is, least of all at the start of a text.
    before, word, after = context
    return "a " if before == " " else before, word, " a" if after == " " else after


def _rank(words: list[list[_Context]], counts: Counter[_Context], probes: _Probes, count: int) -> list[MinedWord]:
    """Return the `count` best of some words, each given as its contexts; none that is a token already."""
    best: list[MinedWord] = []
    for first in range(0, len(words), _PROBES):
        batch = words[first : first + _PROBES]
        probes.encode_contexts(context for contexts in batch for context in contexts)
        for contexts in batch:
            word = contexts[0][1]
            saved = sum(counts[context] * probes.saved(context) for context in contexts)
            if saved > 0 and probes.pieces(word) > 1:
                occurrences = sum(counts[context] for context in contexts)
                best.append(MinedWord(word, occurrences, probes.pieces(word), saved))
        best = sorted(best, key=lambda word: (-word.saved, word.word))[:count]
    return best

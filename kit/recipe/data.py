"""The recipe's `data` section: where documents come from, and how they become training rows."""

import codecs
from string import Formatter
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from kit.recipe.section import Section, Text, list_or_mapping, non_empty, sequence


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)  # a codec may be known that is none of text, such as `hex`
    except LookupError:
        raise ValueError(f"no such encoding: `{name}`; Python's names are `utf-8`, `latin-1`, `cp1252`, …") from None
    if codecs.lookup(name).name in ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined"):
        raise ValueError(f"`{name}` is no encoding of files")
    return name


def _valid_delimiter(delimiter: str) -> str:
    if delimiter in '"\r\n':
        raise ValueError(f"{delimiter!r} quotes fields or ends lines; it cannot separate fields too")
    return delimiter


def _valid_template(template: str) -> str:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; a brace that is meant is written twice") from None
    if not any(name for _, name, _, _ in parts):
        raise ValueError("a template names at least one column, such as `{title}`")
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise ValueError("a template holds names of columns alone, such as `{title}`")
    return template


# What an evaluation set can name instead of a source.
DATA_SPLITS = ("train", "validation", "replay")


class Origin(Section):
    """Where text comes from: files, a dataset as the `datasets` library knows it, or a corpus on every machine."""

    path: Text | None = None
    """Files: one or a glob, relative to the working directory; gzip, bzip2, xz and zstd are read as they are."""
    dataset: Text | None = None
    """A dataset: a name on the Hub, which is streamed, or a folder that `load_dataset` or `load_from_disk` takes."""
    config: Text | None = None
    """Of a dataset: its configuration, where it has several."""
    split: Text | None = None
    """Of a dataset: its split; by default `train`."""
    revision: Text | None = None
    """Of a dataset on the Hub: branch, tag or commit."""
    builtin: Literal["python-reference", "docstrings"] | None = None
    """A corpus read from the machine: `python-reference` (language reference and standard library), or
    `docstrings` (of the installed `packages`)."""
    packages: sequence(str) = ()
    """For `docstrings`: the installed packages to read."""
    format: Literal["text", "jsonl", "csv", "tsv", "parquet"] | None = None
    """Format of the files; by default what the suffix says, `text` for any other."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] = "utf-8"
    """Of text, JSONL, CSV and TSV files, under Python's name, such as `latin-1` or `utf-16`."""
    delimiter: Annotated[str, AfterValidator(_valid_delimiter)] | None = Field(default=None, min_length=1, max_length=1)
    """For CSV and TSV: what separates fields; by default a comma or a tab."""
    quoting: bool | None = None
    """For CSV and TSV: whether `"` around a field quotes it; by default in CSV, not in TSV."""
    column_names: sequence(Text) | None = None
    """For CSV and TSV without a header row: the names of the columns. The last column of an unquoted file takes the
    rest of the line, delimiters included."""
    text_column: Text | None = None
    """The column that holds the text; by default `text`, else the only one with text in it."""
    template: Annotated[str, AfterValidator(_valid_template)] | None = None
    """A document made of several columns, such as "{title}\\n\\n{abstract}"; instead of `text_column`."""
    on_bad_text: Literal["error", "skip"] = "error"
    """Where a row's text is null, no text, or holds NUL: end the run, or leave the row out and count it."""
    min_characters: int = Field(default=1, ge=1)
    """Leave out shorter documents, and count them."""
    max_characters: int | None = Field(default=None, ge=1)
    """Leave out longer documents, and count them."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents, chosen by their hash; of a dataset the first ones."""

    # Which keys go with which kind of place; the others go with every kind.
    file_keys: ClassVar = ("format", "encoding", "delimiter", "quoting", "column_names")
    dataset_keys: ClassVar = ("config", "split", "revision")
    column_keys: ClassVar = ("text_column", "template")
    contradicting: ClassVar = (("text_column", "template"),)

    @model_validator(mode="after")
    def _one_kind(self) -> "Origin":
        written = self.written()
        kinds = [kind for kind in ("path", "dataset", "builtin") if kind in written]
        if len(kinds) != 1:
            raise ValueError("a source has exactly one of `path`, `dataset` and `builtin`")
        wrong = {
            "path": self.dataset_keys,
            "dataset": self.file_keys,
            "builtin": (*self.file_keys, *self.dataset_keys, *self.column_keys, "on_bad_text"),
        }[kinds[0]]
        if others := [key for key in wrong if key in written]:
            raise ValueError(f"`{others[0]}` does not go with `{kinds[0]}`")
        if (self.builtin == "docstrings") != bool(self.packages):
            raise ValueError("`packages` goes with `builtin: docstrings`, and `docstrings` needs at least one package")
        for one, other in self.contradicting:
            if {one, other} <= written:
                raise ValueError(f"`{one}` and `{other}` contradict each other: keep one")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError("`max_characters` is less than `min_characters`")
        return self

    @property
    def name(self) -> str:
        """A short name for tables and messages."""
        if self.dataset:
            return " ".join(filter(None, [self.dataset, self.config, self.split]))
        return self.path or (f"{self.builtin}: {', '.join(self.packages)}" if self.packages else self.builtin)


class Source(Origin):
    """One source of documents."""

    sample_by: Literal["document", "paragraph", "line"] = "document"
    """For text: what one document is: a whole file, a paragraph (separated by blank lines), or a line."""
    separator: str | None = Field(default=None, min_length=1)
    """For text: a string that separates documents, such as "\\n\\n\\n"; instead of `sample_by`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Read the first documents only, as many as have together at most this many tokens."""

    file_keys: ClassVar = (*Origin.file_keys, "sample_by", "separator")
    contradicting: ClassVar = (("separator", "sample_by"), *Origin.contradicting)


class TrainSource(Source):
    """A source of training documents, with its share of the training tokens."""

    weight: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training tokens that come from this source; the others divide the rest by their size."""


class ValidationFraction(Section):
    """A share of the training documents, held out by a hash of each document and a seed."""

    fraction: float = Field(gt=0, lt=1)
    """Share of the documents to hold out; adding data later moves no document to the other side."""
    seed: int = 0
    """Another seed holds out other documents."""


class Replay(Section):
    """General text that is trained on beside the domain, against forgetting."""

    sources: non_empty(Source)
    """Where it comes from; several sources share by their size."""
    share: float = Field(gt=0, lt=1)
    """Share of the training tokens, to the nearest block."""


class NearDuplicates(Section):
    """Documents that are almost equal to an earlier one: by MinHash, then by their exact Jaccard similarity."""

    threshold: float = Field(default=0.8, ge=0.5, le=1)
    """Jaccard similarity of the two documents' sets of word n-grams from which the later one is left out."""
    ngram: int = Field(default=5, ge=1)
    """Words per n-gram; words are compared without case and punctuation."""


class EvaluationOverlap(Section):
    """Training documents that share text with an evaluation set, by word n-grams (Brown et al. 2020, appendix C)."""

    ngram: int = Field(default=13, ge=3)
    """Words per n-gram; words are compared without case and punctuation."""
    min_shared: int = Field(default=1, ge=1)
    """Leave a document out from this many distinct shared n-grams on."""


class DataSection(Section):
    """Where documents come from, how they are split, and how they become blocks of tokens."""

    length_key: ClassVar = "block_size"

    train: non_empty(TrainSource)
    """The sources of training documents."""
    validation: (
        Annotated[
            Annotated[non_empty(Source), Tag("list")] | Annotated[ValidationFraction, Tag("mapping")],
            Discriminator(list_or_mapping),
        ]
        | None
    ) = None
    """A fraction of the training documents, or a list of sources."""
    replay: Replay | None = None
    """General text to train on beside the domain."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of a training document whose text occurred before, in any source."""
    near_duplicates: NearDuplicates | None = None
    """Leave out training documents that are almost equal to an earlier one, or to one of an evaluation set; `{}` takes
    the defaults."""
    evaluation_overlap: EvaluationOverlap | None = None
    """Leave out training documents that share n-grams with an evaluation set; `{}` takes the defaults."""
    block_size: int = Field(default=512, ge=8)
    """Label positions per row, in tokens; at most the positions that the model has."""
    packing: bool | Literal["best-fit"] = True
    """Fill every row with several documents, isolated from each other: `true` cuts wherever a row is full, `best-fit`
    cuts what is longer than a row, and little else, for at least 99 % full rows; `false` gives each its own row."""
    max_dropped: float = Field(default=0.01, ge=0, le=1)
    """Share of a source's tokens that may be left out of training, unasked, before the run is refused."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that tokenise large sources; by default one per core."""
    store_dir: Text = "runs/.store"
    """Folder of the token stores, shared by all runs and keyed by content, tokenizer and settings."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> "DataSection":
        weights = [source.weight for source in self.train if source.weight is not None]
        everything = len(weights) == len(self.train)
        total = sum(weights) + (self.replay.share if self.replay else 0)
        if (everything and abs(total - 1) > 1e-6) or (not everything and total >= 1):
            expected = "1, as every source has one" if everything else "less than 1, as some sources have none"
            what = (
                "the weights of `train` and the share of `replay` add" if self.replay else "the weights of `train` add"
            )
            raise ValueError(f"{what} up to {total:g}; expected {expected}")
        return self

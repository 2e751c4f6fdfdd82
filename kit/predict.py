"""`kit predict`: classify every row of a file with a run's model or any other classifier, however long the file is."""

import csv
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from itertools import chain, compress, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from kit.console import progress, quiet_libraries, say, warn
from kit.data import readers
from kit.data.columns import LABEL_COLUMNS, LeftOut, TextOfRow, require_column
from kit.data.labeled_examples import CollateLabeled
from kit.data.sniffing import sniff_dialect
from kit.data.sources import filter_text, format_of_file, open_rows, resolve_files, usable_text
from kit.errors import UserError
from kit.evaluation.classification import predict_logits, probabilities
from kit.evaluation.classification_metrics import decide
from kit.model.classifier import classifier_positions, label_names, load_classifier, needs_positions, saved_thresholds
from kit.model.configuration import CLASSIFIER
from kit.model.loading import check_vocabulary, load_config, stored_kind
from kit.model.sequence_encoding import prepare_for_pipeline, sequence_encoder
from kit.model.tokenizer import load_tokenizer
from kit.recipe.classification import LabeledSource
from kit.recipe.models import ModelSection
from kit.training.run_directory import model_of

PREDICTED, PROBABILITY = "predicted_label", "probability_"
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
_BATCHES_AT_ONCE = 16  # of rows of any length, which are sorted by it
_CHARACTERS_AT_ONCE = 1 << 24
_FIRST_ROWS = 100
_KEPT = {"head": "beginning", "tail": "end", "head+tail": "beginning and end"}
_KEY = re.compile(r"`(format|encoding|delimiter|quoting|column_names|text_column|text_pair_column)(?:: ([^`]*))?`")
Row = dict[str, Any]


def predict(
    model: str,
    file: str,
    *,
    output: str | None = None,
    overwrite: bool = False,
    batch_size: int = 64,
    revision: str | None = None,
    **reading: Any,
) -> None:
    """Write every row of a file with its predicted label and the probability of each.

    Args:
        model: a run directory, a model folder or a Hub model.
        file: what to classify; `-` for standard input.
        output: CSV, TSV or JSON lines, by its suffix; `-` or None for CSV on standard output.
        overwrite: whether a file of that name is replaced.
        batch_size: rows of a batch, all as long as the longest; of shorter rows there are more.
        revision: of a Hub model.
        reading: keys of a recipe's source: `format`, `encoding`, `delimiter`, `quoting`, `column_names`, and
            `text_column` and `text_pair_column` in place of the run's.

    Raises:
        UserError: model, file or output cannot be used.
    """
    quiet_libraries()
    target = None if output in (None, "-") else _check_output(Path(output), Path(file), overwrite)
    try:
        with redirect_stdout(sys.stderr) if target is None else nullcontext(), ExitStack() as stack:
            section, config = _find_model(model, revision)
            settings = getattr(config, "kit_classifier", None) or {}
            path = _spool(stack) if file == "-" else Path(file)
            rows = _Rows(_source(path, file == "-", reading, settings), path, label_names(config))
            sink = stack.enter_context(_opened(target))
            classifier = _Classifier(section, config, settings, batch_size)
            _classify(rows, classifier, _writer(sink, target, rows.columns), batch_size * _BATCHES_AT_ONCE)
    except BrokenPipeError:  # whoever reads standard output has seen enough
        return
    except UserError as error:  # a reader's, which speaks of a recipe's keys and of the file that it was given
        said = re.sub(r"/\S*/standard input", "standard input", str(error))
        raise UserError(_KEY.sub(_as_option, said)) from None
    if target:
        say(f"predictions: {target}")


def _as_option(key: re.Match[str]) -> str:
    """Return a key of a source as the option of the command that stands for it."""
    name, value = key[1].replace("_", "-"), key[2]
    if value in ("true", "false"):
        return f"`--{'' if value == 'true' else 'no-'}{name}`"
    return f"`--{name} {value}`" if value else f"`--{name}`"


def _find_model(model: str, revision: str | None) -> tuple[ModelSection, PreTrainedConfig]:
    model = model_of(model)
    section = ModelSection(name_or_path=model, revision=revision)
    if stored_kind(section) is not CLASSIFIER:
        raise UserError(
            f"{model} is no classifier: `task: sequence-classification` makes one of it; `kit generate` continues "
            f"texts with a causal language model"
        )
    config = load_config(section)
    if config.problem_type == "regression":
        raise UserError(f"{model} gives numbers, not labels (`problem_type: regression`)")
    stored = str(config.dtype).removeprefix("torch.")
    return section.model_copy(update={"dtype": stored if stored in ("bfloat16", "float64") else "float32"}), config


class _Classifier:
    """A model with all that it takes to go from texts to labels, as its training did."""

    def __init__(
        self, section: ModelSection, config: PreTrainedConfig, settings: dict[str, Any], batch_size: int
    ) -> None:
        self.names = label_names(config)
        self.multi = config.problem_type == "multi_label_classification" or len(self.names) == 1
        tokenizer = load_tokenizer(section, Path(), tuple, str)
        check_vocabulary(section, tokenizer)
        limits = [limit for limit in (classifier_positions(config), tokenizer.model_max_length) if limit]
        limit = min((limit for limit in limits if limit < readers.LONGEST_DOCUMENT), default=None)
        self.max_length = settings.get("max_length", limit)
        self.truncation = settings.get("truncation", "tail" if tokenizer.truncation_side == "left" else "head")
        prepare_for_pipeline(tokenizer, self.max_length, self.truncation, config)
        self._encode = sequence_encoder(tokenizer, self.max_length, self.truncation)
        self._collate = CollateLabeled(tokenizer.pad_token_id, positions=needs_positions(config))
        self._thresholds = saved_thresholds(config, self.names)
        self._batch_size = batch_size
        model, new = load_classifier(section, tokenizer, self.names, self.multi, seed=0)
        if new:
            raise UserError(f"{section.name_or_path}: a classifier without its head: {', '.join(new)} is not there")
        self._model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def __call__(self, texts: list[tuple[str, str | None]], name: str) -> tuple[list[Row | None], int]:
        """Return what each text, or pair, gives, None where it has no token; and how many were cut."""
        pairs = [pair for _, pair in texts]
        encoded = self._encode([text for text, _ in texts], None if None in pairs else pairs) if texts else []
        rows = _Encoded({"input_ids": i} | ({} if t is None else {"token_type_ids": t}) for i, t, _ in encoded if i)
        found: list[Row | None] = [None] * len(texts)
        if rows:
            most = self._batch_size * int(rows.lengths.max())
            likely = probabilities(predict_logits(self._model, rows, self._collate, most, name=name), self.multi)
            decided = decide(likely, self.multi, self._thresholds)
            there = [number for number, (ids, _, _) in enumerate(encoded) if ids]
            for number, row, each in zip(there, likely.tolist(), decided.tolist(), strict=True):
                found[number] = self.columns_of(row, each)
        return found, sum(self.max_length is not None and before > self.max_length for *_, before in encoded)

    def columns_of(self, likely: list[float] | None, decided: Any) -> Row:
        """Return the columns that a row gets; without `likely` they are empty."""
        label = None
        if likely:
            label = list(compress(self.names, decided)) if self.multi else self.names[decided]
        # Six digits: what is beyond depends on the rows that are together in a batch.
        shown = [float(f"{each:.6g}") for each in likely] if likely else [None] * len(self.names)
        return dict(zip(_added(self.names), [label, *shown], strict=True))


class _Encoded(list):
    """Encoded rows, as `predict_logits` takes them."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row["input_ids"]) for row in self])


class _Rows:
    """The rows of a file and their texts.

    Attributes:
        columns: of the file, and those that are added.
    """

    def __init__(self, source: LabeledSource, path: Path, names: list[str]) -> None:
        """Open a file, and find out which of its columns are read."""
        self._source, self._pair = source, source.text_pair_column
        found, rows = _open(source, path)
        first = list(islice(rows, _FIRST_ROWS))
        if not first:
            raise UserError(f"{path}: there is no row to classify")
        self._rows = chain(first, rows)
        self.columns = [*found, *_added(names)]
        if twice := [name for name, number in Counter(self.columns).items() if number > 1]:
            raise UserError(f"{path}: there is a column `{twice[0]}` already, which `kit predict` would add; rename it")
        if self._pair:
            require_column(self._pair, "text_pair_column", found, str(path))
        others = [name for name in (*LABEL_COLUMNS, self._pair) if name in found]
        self._text_of_row = TextOfRow(source, found, str(path), others)
        only = [row["text"].split() for _, row in first if list(row) == ["text"] and isinstance(row["text"], str)]
        beginnings = {words[0] for words in only if words}
        if beginnings and beginnings <= set(names):
            warn(f"{path}: each text begins with a label, which is read as a part of it; see --format, --column-names")

    def text_of(self, where: str, row: Row) -> tuple[str, str | None] | None:
        """Return the text of a row, and its second text where it has one; None where they cannot be read."""
        text, pair = self._text_of_row(where, row), None
        text = text if isinstance(text, LeftOut) else filter_text(self._source, where, text)
        if self._pair and not isinstance(text, LeftOut):
            pair = self._text_of_row.text_in(where, row, self._pair)
            pair = pair if isinstance(pair, LeftOut) else usable_text(where, pair, skip=True)
        return None if isinstance(text, LeftOut) or isinstance(pair, LeftOut) else (text, pair)

    def chunks(self, most: int) -> Iterator[list[tuple[str, Row]]]:
        """Yield so many rows at a time, or fewer that are long."""
        chunk, characters = [], 0
        for where, row in self._rows:
            chunk.append((where, row))
            characters += sum(len(value) for value in row.values() if isinstance(value, str))
            if len(chunk) == most or characters > _CHARACTERS_AT_ONCE:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk


def _added(names: list[str]) -> list[str]:
    return [PREDICTED, *(f"{PROBABILITY}{name}" for name in names)]


def _source(path: Path, spooled: bool, reading: dict[str, Any], settings: dict[str, Any]) -> LabeledSource:
    """Return the source that a file is; what is given counts before what the run read."""
    format = reading.get("format") or ("text" if spooled else readers.format_of(path))
    own = ["text_pair_column"] if reading.get("text_column") else ["text_column", "text_pair_column", "template"]
    known = {key: settings.get(key) for key in own if (format, key) != ("text", "text_column")}
    if spooled:
        reading = {**reading, "format": format}
    keys = known | {key: value for key, value in reading.items() if value is not None}
    try:
        source = LabeledSource(path=str(path), on_bad_text="skip", **keys)
    except ValidationError as error:
        [first, *_] = error.errors()
        option = f"--{first['loc'][0].replace('_', '-')}: " if first["loc"] else ""
        raise UserError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None
    if len(set(source.column_names or ())) < len(source.column_names or ()):
        raise UserError(f"--column-names: a name occurs twice in {', '.join(source.column_names)}")
    if not path.is_file():
        resolve_files(source)  # which says what is wrong
        raise UserError(f"{path}: is a pattern; expected one file")
    return source


def _open(source: LabeledSource, path: Path) -> tuple[dict[str, bool], readers.Rows]:
    """Return the columns of a file, with which of them hold text, and its rows."""
    format, encoding = format_of_file(source, path), source.encoding
    if format == "text":
        if source.format is None and readers.holds_json_lines(path, encoding):
            raise UserError(f"{path}: looks like JSON lines, not lines of text; set --format jsonl")
        return {"text": True}, ((where, {"text": line}) for where, line in readers.read_lines(path, encoding))
    columns: dict[str, bool] = {}
    if format == "jsonl":
        for _, row in readers.read_jsonl(path, encoding):  # all of it, as a column may begin anywhere
            columns |= {n: (v is None or isinstance(v, str)) and columns.get(n, True) for n, v in row.items()}
        return columns, readers.read_jsonl(path, encoding)
    dialect = {}
    if format in readers.DEFAULT_DELIMITERS:
        if not (found := sniff_dialect(path, source, format, [source.text_column] if source.text_column else ())):
            return {}, iter(())
        dialect = {"delimiter": found.delimiter, "quoting": found.quoting}
    made, rows = open_rows(source, path, format, lambda found, where: SimpleNamespace(columns=found), **dialect)
    return made.columns if made else {}, rows


def _classify(rows: _Rows, classifier: _Classifier, write: Callable[[Row], None], at_once: int) -> None:
    """Write each row with what the classifier says of it, and tell what there was."""
    done = cut = unread = 0
    first, labels = "", Counter()
    for chunk in progress(rows.chunks(at_once), "classifying", size=len):
        texts = [rows.text_of(where, row) for where, row in chunk]
        name = f"rows {done + 1:,} to {done + len(chunk):,}"
        found, cut_here = classifier([text for text in texts if text], name)
        given = iter(found)
        for (where, row), text in zip(chunk, texts, strict=True):
            added = next(given) if text else None
            if added is None:
                unread, first = unread + 1, first or where
                added = classifier.columns_of(None, None)
            else:
                label = added[PREDICTED]
                labels.update(label if isinstance(label, list) else [label])
            write({**row, **added})
        done, cut = done + len(chunk), cut + cut_here
    say(f"{done:,} rows: {', '.join(f'{labels[name]:,} {name}' for name in classifier.names)}")
    if cut:
        kept = _KEPT[classifier.truncation]
        say(f"{cut:,} texts have more than {classifier.max_length:,} tokens: of these the {kept} was read")
    if unread:
        warn(f"{unread:,} rows have no text that can be read, the first at {first}: they are kept, without a label")


def _writer(file: TextIO, target: Path | None, columns: list[str]) -> Callable[[Row], None]:
    delimiter = _DELIMITERS[target.suffix.lower() if target else ".csv"]
    if delimiter is None:
        return lambda row: print(json.dumps(row, ensure_ascii=False, default=str), file=file)
    writer = csv.writer(file, delimiter=delimiter)  # RFC 4180

    def cell(name: str, value: Any) -> Any:
        if name == PREDICTED and isinstance(value, list):
            return "|".join(value)
        nested = isinstance(value, bool | list | dict)
        return json.dumps(value, ensure_ascii=False, default=str) if nested else value

    writer.writerow(columns)
    return lambda row: writer.writerow([cell(name, row.get(name)) for name in columns])


def _check_output(target: Path, file: Path, overwrite: bool) -> Path:
    if target.suffix.lower() not in _DELIMITERS:
        raise UserError(f"--output: {target} ends in `{target.suffix}`; expected {', '.join(_DELIMITERS)}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--output: the folder that `{target}` would be in does not exist")
    if target.exists() and file.exists() and target.samefile(file):
        raise UserError(f"--output: {target} is the file that is read; name another")
    if target.is_dir() or (target.exists() and not overwrite):
        what = "is a folder" if target.is_dir() else "is there already; --overwrite replaces it"
        raise UserError(f"--output: {target} {what}")
    return target


@contextmanager
def _opened(target: Path | None) -> Iterator[TextIO]:
    """Open what is written: a file that takes its name once it is whole, or standard output."""
    temporary = target and target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    place = temporary or sys.__stdout__.fileno()
    try:
        # Half a surrogate pair is written as `\ud800`, which JSON reads as what it was.
        with open(place, "w", encoding="utf-8", errors="backslashreplace", newline="", closefd=bool(target)) as file:
            yield file
            file.flush()
            if target:
                os.fsync(file.fileno())
        if target:
            os.replace(temporary, target)
    finally:
        if target:
            temporary.unlink(missing_ok=True)


def _spool(stack: ExitStack) -> Path:
    """Write standard input to disk, as what is not known of a file takes a look at it first."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kit-"))) / "standard input"
    with open(path, "wb") as file:
        if sys.stdin is not None:  # it may be closed
            shutil.copyfileobj(sys.stdin.buffer, file)
    return path

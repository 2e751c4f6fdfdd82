"""`kit convert`: a checkpoint from one layout to another, a tensor at a time, proven by its logits."""

import copy
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from kit.checkpoints import proof
from kit.checkpoints.checkpoint import Checkpoint, LazyTensor, computed
from kit.checkpoints.conversion import Report, from_hf, read_hf, to_hf
from kit.checkpoints.layouts import huggingface
from kit.checkpoints.reading import read_checkpoint
from kit.checkpoints.registry import as_files_name_it, find_layout, recognise, settings_of_target, write_layout
from kit.checkpoints.tokenizer_files import save_tokenizer, write_tokenizer, written_beside
from kit.checkpoints.writing import REPORT, check_target, is_folder, write_safetensors
from kit.console import quiet_libraries, say, warn
from kit.errors import UserError
from kit.files import disk_fault, put_in_place, read_json, write_json
from kit.names import fold_names

_WEIGHTS = "model.safetensors"
_SPECIAL = ("bos", "eos", "pad")
_MOST_ROWS_ADDED = 1 << 20


@dataclass(frozen=True)
class _Model:
    """A model on its way.

    Attributes:
        tensors: as Hugging Face has them.
        config: Hugging Face's.
        logits: computed from what was read, by its own layout's arithmetic.
        parameters: what the source holds: a tied head counts once, masks do not.
        report: what was done to read it.
        generation: the file with generation settings beside Hugging Face's model.
    """

    tensors: dict[str, LazyTensor]
    config: PreTrainedConfig
    logits: proof.Logits
    parameters: int
    report: Report
    generation: Path | None = None


def convert(
    source: str,
    target: str,
    *,
    source_layout: str = "auto",
    target_layout: str = "hf",
    given: Sequence[str] = (),
    config: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    allow: Sequence[str] = (),
    verify: bool = True,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint; what is written is whole, and proven, or absent.

    Args:
        source: a file or folder; its format is seen from its content.
        target: a folder for Hugging Face's layout, else a file whose suffix the layout writes, or a folder.
        source_layout: `auto`, or a layout's name.
        target_layout: a layout's name.
        given: settings that no tensor tells, as `name=value`.
        config: a config.json that describes the source, in place of one beside it.
        tokenizer: a folder or file with the tokenizer, in place of one beside the source.
        vocab_size: rows of the embeddings in the target: fewer cut padding off, more are zeros.
        allow: regular expressions of tensors' names that may be missing or too many.
        verify: whether logits are compared.
        overwrite: whether what is there is replaced.

    Raises:
        UserError: the source cannot be read or is of no such layout, tensors do not fit, the target cannot hold the
            model or be written, or the logits differ.
    """
    quiet_libraries()
    into = find_layout(target_layout, "--to")
    place = Path(target)
    _check_suffix(into, place)
    beside = written_beside(into.NAME, place) + ([] if is_folder(place) else [_report_of(place)])
    check_target(Path(source), place, beside, overwrite)
    _check_patterns(allow)
    checkpoint, layout = _open(Path(source), source_layout, config)
    settings, switches = _settings(given, into)
    model = _read(checkpoint, layout, settings, allow)
    _tell(model.report)
    _check_count(model)
    shared_rows = min(_rows(model), vocab_size or _rows(model))
    model = _with_rows(model, vocab_size) if vocab_size else model
    named = Path(tokenizer or source), bool(tokenizer), layout
    facts = {"from": layout.NAME, "to": into.NAME, "source": Path(source).name, "format": checkpoint.format}
    try:
        with _made_beside(place, overwrite) as made:
            facts["tokenizer"] = _convert_tokenizer(into, *named, made, model.config)
            found = _write(model, into, made, switches, allow)
            dropped = sum(model.tensors[name].parameters for name in (*found.zeros, *found.twice))
            outcome = _prove(model, into, made, shared_rows, dropped) if verify else None
            facts |= {"config": model.config.to_diff_dict(), "read": asdict(model.report), "written": asdict(found)}
            write_json(_report_of(made), {**facts, "proof": outcome and asdict(outcome)})
    except OSError as error:
        raise UserError(disk_fault(error) or f"{target}: cannot be written: {error.strerror or error}") from error
    say(f"to: {target}, layout {into.NAME}; what was done is in {_report_of(place)}")


def _open(source: Path, name: str, config: str | None) -> tuple[Checkpoint, ModuleType]:
    """Return a checkpoint and its layout, and say what they are."""
    checkpoint = read_checkpoint(source)
    if config:
        try:
            checkpoint.settings[huggingface.CONFIG] = read_json(config)
        except (OSError, ValueError) as error:
            raise UserError(f"--config {config}: {getattr(error, 'strerror', None) or error}") from None
    layout, why = (find_layout(name, "--from"), "as --from says") if name != "auto" else recognise(checkpoint)
    say(f"from: {checkpoint.path}, {checkpoint.format}; layout {layout.NAME}, {why}")
    return checkpoint, layout


def _check_patterns(allow: Sequence[str]) -> None:
    for pattern in allow:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--allow {pattern}: no regular expression: {error}") from None


def _settings(given: Sequence[str], into: ModuleType) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `name=value` pairs, what they tell of the source and how the target is written.

    A value is JSON, or else a word.
    """
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if name in found:
            raise UserError(f"--set {name}: given twice")
        if not (name and equals and value):
            raise UserError(f"--set {each}: expected name=value, such as n_head=12")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    of_target = settings_of_target(into)
    return ({n: v for n, v in found.items() if n not in of_target}, {n: v for n, v in found.items() if n in of_target})


def _read(checkpoint: Checkpoint, layout: ModuleType, given: Mapping[str, Any], allow: Sequence[str]) -> _Model:
    if layout is huggingface:
        tensors, config, report = read_hf(checkpoint, given, allow)
        logits = partial(huggingface.logits_of_tensors, tensors, config)
    else:
        checkpoint = as_files_name_it(checkpoint, layout)
        tensors, config, settings, report = to_hf(checkpoint, layout, given, allow)
        logits = proof.reference(layout, checkpoint.tensors, settings, config)
    beside = checkpoint.path / GENERATION_CONFIG_NAME
    generation = beside if layout is huggingface and beside.is_file() else None
    return _Model(tensors, config, logits, _count(checkpoint, layout, config, report), report, generation)


def _count(checkpoint: Checkpoint, layout: ModuleType, config: PreTrainedConfig, report: Report) -> int:
    """Return the number of a checkpoint's weights; a tied head is none."""
    left_out = {*report.buffers, *report.allowed}
    if config.tie_word_embeddings and layout is huggingface:
        left_out |= huggingface.tied_names(config)
    elif config.tie_word_embeddings:
        left_out |= {name for line in layout.TABLE if line.head for name in line.own}
    tensors = huggingface.rename(checkpoint, config)[0] if layout is huggingface else checkpoint.tensors
    return sum(tensor.parameters for name, tensor in tensors.items() if name not in left_out)


def _check_count(model: _Model) -> None:
    """Make sure that nothing of the source got lost: its weights, and zeros that are told, are the model's.

    Raises:
        RuntimeError: the layout's table does not use all that it names.
    """
    if not model.report.allowed:
        zeros = sum(model.tensors[name].parameters for name in model.report.zeros)
        made = sum(tensor.parameters for tensor in model.tensors.values())
        if model.parameters + zeros != made:
            raise RuntimeError(f"{model.parameters:,} weights of the source and {zeros:,} zeros became {made:,}")


def _tell(report: Report) -> None:
    for note in report.notes:
        say(f"  {note}")
    if report.buffers:
        say(f"  masks and constants, which are no weights: {fold_names(report.buffers)}")
    if report.zeros:
        say(f"  only Hugging Face's side has these, as zeros: {fold_names(report.zeros)}")
    for name, what in report.allowed.items():
        warn(f"--allow: `{name}`: {what}")


# ---- rows of the vocabulary


def _rows(model: _Model) -> int:
    return model.tensors[huggingface.embeddings_name(model.config)].shape[0]


def _with_rows(model: _Model, rows: int) -> _Model:
    """Return the model with so many rows of the vocabulary, of embeddings and head; what is cut or added is told."""
    before = _rows(model)
    if rows > before + _MOST_ROWS_ADDED:
        raise UserError(f"--vocab-size {rows}: found {before:,} rows; expected at most {_MOST_ROWS_ADDED:,} more")
    config = copy.deepcopy(model.config)
    config.vocab_size = rows
    for name in (f"{each}_token_id" for each in _SPECIAL):
        if isinstance(number := getattr(config, name, None), int) and number >= rows:
            warn(f"--vocab-size {rows:,}: {name} {number:,} has no row then, and is taken from the configuration")
            setattr(config, name, None)
    heads = {name for name, shape in huggingface.expected_shapes(config).items() if model.tensors[name].shape != shape}
    tensors = {name: _resized(t, rows) if name in heads else t for name, t in model.tensors.items()}
    what = f"the last {before - rows:,} are cut" if rows < before else f"{rows - before:,} are added, as zeros"
    say(f"  --vocab-size: {before:,} rows of {fold_names(heads)}: {what}")
    return replace(model, tensors=tensors, config=config)


def _resized(tensor: LazyTensor, rows: int) -> LazyTensor:
    def resize(whole: torch.Tensor) -> torch.Tensor:
        more = max(rows - len(whole), 0)
        return torch.cat([whole[:rows], whole.new_zeros(more, *whole.shape[1:])])

    return computed(resize, [tensor])


# ---- writing


def _check_suffix(layout: ModuleType, place: Path) -> None:
    if place.suffix in layout.SUFFIXES or ("" in layout.SUFFIXES and is_folder(place)):
        return
    expected = ", ".join(suffix or "a folder" for suffix in layout.SUFFIXES)
    raise UserError(f"{place}: the layout {layout.NAME} is written to {expected}")


@contextmanager
def _made_beside(place: Path, overwrite: bool) -> Iterator[Path]:
    """Yield where to write, in a temporary folder beside; all that is there takes its place if all goes well."""
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.absolute().parent) as folder:
        made = Path(folder) / place.name
        if is_folder(place):
            made.mkdir()
        try:
            yield made
        except UserError as error:
            raise UserError(str(error).replace(folder + os.sep, f"{place.parent}{os.sep}")) from error
        places = {path: place.with_name(path.name) for path in sorted(made.parent.iterdir())}
        for taken in places.values():
            if taken.exists() and not overwrite:  # since it was looked at
                raise UserError(f"{taken}: exists by now; --overwrite replaces it")
        for path, its_place in places.items():
            put_in_place(path, its_place)


def _report_of(place: Path) -> Path:
    return place / REPORT if is_folder(place) else place.with_name(f"{place.name}.{REPORT}")


def _write(model: _Model, layout: ModuleType, made: Path, given: Mapping[str, Any], allow: Sequence[str]) -> Report:
    tensors = dict(model.tensors)
    if layout is huggingface:
        model.config.architectures = [huggingface.model_class(model.config).__name__]
        model.config.save_pretrained(made)
        special = {f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in _SPECIAL}
        settings = GenerationConfig(**{key: number for key, number in special.items() if number is not None})
        settings.save_pretrained(made)
        if model.generation:  # it may end texts by other ids than the configuration's
            shutil.copyfile(model.generation, made / GENERATION_CONFIG_NAME)
        write_safetensors(made / _WEIGHTS, tensors, {"format": "pt"})
        return Report()
    own, settings, report = from_hf(tensors, model.config, layout, given, allow)
    settings |= {name: given[name] for name in getattr(layout, "OPTIONS", ()) if name in given}
    report.notes += getattr(layout, "target_notes", lambda config: [])(model.config)
    report.notes += write_layout(layout, made, own, settings)
    _tell(report)
    return report


def _prove(model: _Model, into: ModuleType, made: Path, shared_rows: int, dropped: int) -> proof.Proof:
    """Compare the logits of what was read and what was written, and the numbers of their weights.

    Args:
        model: what was read.
        into: the layout that was written.
        made: the file or folder.
        shared_rows: of the vocabulary, that both have.
        dropped: zeros of Hugging Face's that the layout has no place for.

    Raises:
        UserError: they differ.
    """
    written = _read(read_checkpoint(made), into, {}, ())
    logits = partial(huggingface.logits_of_folder, made) if into is huggingface else written.logits
    found = proof.compare(model.logits, logits, model.config, shared_rows)
    size = f"up to {found.largest:.3g}"
    said = f"the logits of {found.positions} positions, {size}, differ by at most {found.difference:.1g}"
    expected = sum(tensor.parameters for tensor in model.tensors.values()) - dropped
    if math.isnan(found.difference):
        bad = [name for name, tensor in model.tensors.items() if not tensor.read().isfinite().all()]
        what = f"NaN or infinity in {fold_names(bad)}" if bad else "logits that are no numbers"
        raise UserError(f"the model has {what}, so that nothing can be compared; --no-verify writes it all the same")
    if not found.holds or written.parameters != expected:
        counts = f"{written.parameters:,} weights were written, {expected:,} expected"
        raise UserError(f"{made.name}: {said}; {counts}: not the same model; nothing was written")
    say(f"proven: {said}; {model.parameters:,} weights read, {written.parameters:,} written")
    return found


# ---- the tokenizer


def _convert_tokenizer(
    into: ModuleType, source: Path, named: bool, layout: ModuleType, made: Path, config: PreTrainedConfig
) -> str | None:
    """Write the tokenizer that is named or lies beside the source, as the target has it; return what became of it.

    Args:
        into: the target's layout.
        source: where it is.
        named: whether it was asked for.
        layout: of the checkpoint.
        made: the file or folder that is being made.
        config: of the model; gets the ids of special tokens, of which the files of other code tell nothing.

    Raises:
        UserError: it is named and is none, or it has more ids than the embeddings have rows.
    """
    with tempfile.TemporaryDirectory(prefix="kit-") as temporary:
        folder = made if into is huggingface else Path(temporary)
        if not save_tokenizer(source, folder, layout.NAME, config.max_position_embeddings):
            if named:
                raise UserError(f"--tokenizer {source}: no tokenizer there")
            warn(f"no tokenizer beside {source}; --tokenizer names where it is")
            return None
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each kind of tokenizer fails in its own way
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: its tokenizer cannot be loaded: {type(error).__name__}: {reason}") from error
        tokens = len(found)
        became = "as Hugging Face has it" if into is huggingface else write_tokenizer(folder, into.NAME, made)
    if tokens > config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {tokens:,} tokens, the embeddings have {config.vocab_size:,} rows: it is "
            f"another model's; --tokenizer names the right one"
        )
    for name in _SPECIAL if layout is not huggingface else ():
        setattr(config, f"{name}_token_id", getattr(found, f"{name}_token_id"))
    spare = config.vocab_size - tokens
    more = f"; {spare:,} rows of the embeddings have no token" if spare else ""
    say(f"tokenizer: {tokens:,} tokens{more}; {became}")
    return became

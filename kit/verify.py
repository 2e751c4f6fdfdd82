"""`kit verify`: guide-book sanity checks of any model, each a row with a figure, a verdict and its reason."""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kit.console import quiet_libraries, say, table
from kit.errors import UserError
from kit.evaluation.block_effects import block_effects, difference, row_nats
from kit.evaluation.language_modeling import evaluate_documents
from kit.evaluation.plain_sentences import PLAIN_SENTENCES
from kit.evaluation.samples import continue_prompts
from kit.model.alignment import check_alignment, check_ids, check_special_ids
from kit.model.architecture import build_architecture
from kit.model.chunked_loss import give_losses
from kit.model.configuration import CAUSAL_LM, CLASSIFIER
from kit.model.file_checks import (
    FAIL,
    FLOATS,
    NONE,
    OK,
    WARN,
    Check,
    check_channels,
    check_dtypes,
    check_files,
    check_head,
    check_order,
    check_values,
    read_value,
)
from kit.model.headers import read_headers
from kit.model.loading import holds_adapter, load_causal_lm, load_config, stored_kind
from kit.model.parts import transformer_blocks
from kit.model.sanity import Order, compare_blocks, compare_neighbours, examine
from kit.model.tokenizer import encoder, load_tokenizer, special_tokens
from kit.recipe.models import ModelSection
from kit.training.run_directory import model_of

_SEED, _PROMPT, _NEW_TOKENS = 42, "Once upon a time", 60
_ROW, _MOST_ROWS = 32, 24  # tokens of a piece of a text, and pieces, for the checks that take many passes
_MOST_WINDOW = 512
_KNOWS_NOTHING = 0.9  # of ln(vocabulary)
_ADVICE = "; for a model that knows other texts, give one with --text"
_ORDER_TELLS = 0.3  # nats per token
_HARM, _HARM_ERRORS = -0.05, 3.0  # nats per token; standard errors
# What a sound model may lose by a block, and by a branch, on text that it was given as known, and on plain sentences,
# which are not its own: a base model of novels, tuned on documentation, does better by 0.11 without an attention.
_BEARABLE = {True: (-0.05, -0.1), False: (-0.3, -0.3)}
_FEWEST_ROWS = 4  # from which on a standard error says something


@dataclass(frozen=True)
class _Loaded:
    """A model ready to compute, and how its tokenizer begins a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    positions: int


class _OneText:
    """A text as the one document that `evaluate_documents` measures."""

    name = "text"

    def __init__(self, ids: list[int], eos: int, num_bytes: int) -> None:
        self._ids = np.array([*ids, eos])
        self.lengths = np.array([len(self._ids)])
        self.num_bytes = num_bytes

    def tokens(self, index: int, start: int, end: int) -> np.ndarray:
        return self._ids[start:end]


def verify(model: str, *, text: str | None, prompt: str | None, revision: str | None, as_json: bool) -> bool:
    """Check a model and print the table of checks, or JSON; True unless one failed.

    Args:
        model: a run directory, a model folder or a name on the Hub.
        text: a UTF-8 file of text that the model should know; the checks of its blocks are then made on it.
        prompt: what the sampled continuation continues.
        revision: branch, tag or commit of a Hub model.
        as_json: print JSON instead of the table.

    Raises:
        UserError: there is no such model or text, its files are damaged or pickled, or it is an adapter.
    """
    quiet_libraries()
    if not model.strip():
        raise UserError("MODEL: found nothing; expected a model folder, a run directory or a name on the Hub")
    if Path(model).is_file():
        raise UserError(f"{model} is a file; expected a model folder, which `kit convert` makes of a checkpoint")
    name = model_of(model)
    section = ModelSection(name_or_path=name, revision=revision)
    if holds_adapter(section):
        raise UserError(f"{model} is an adapter; make a whole model of it with `kit merge`, and verify that")
    given = None if text is None else _read(text)
    # Progress and notices are no JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        checks = _all_checks(section, given, _PROMPT if prompt is None else prompt)
    passed = all(check.verdict != FAIL for check in checks)
    if as_json:
        print(json.dumps({"model": model, "passed": passed, "checks": [asdict(c) for c in checks]}, indent=2))
        return passed
    table(f"Checks of {model}", ["check", "verdict", "figure"], [[c.name, c.verdict, c.figure] for c in checks])
    for check in checks:
        if check.reason:
            say(f"{check.name}: {check.verdict}: {check.reason}")
    counts = Counter(check.verdict for check in checks)
    say(
        f"{'passed' if passed else 'FAILED'}: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    )
    return passed


def _all_checks(section: ModelSection, text: str | None, prompt: str) -> list[Check]:
    config, tensors = load_config(section), read_headers(section.name_or_path, section.revision)
    try:
        architecture = build_architecture(config, tensors)
    except Exception as error:  # each architecture fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{section.name_or_path}: no architecture can be built from its config: {reason}") from error
    known = [t for t in tensors if t.dtype in FLOATS and t.name not in architecture.ignored]
    facts = [examine(t.name, read_value(section, t)) for t in known]
    order = compare_blocks(facts)
    checks = [
        check_files(architecture, tensors),
        check_values(facts),
        check_order(order),
        check_channels(compare_neighbours(facts)),
    ]
    checks += [check_head(section, architecture, tensors), check_dtypes(tensors)]
    try:
        tokenizer = load_tokenizer(section, Path(), lambda: (), lambda: "")
    except UserError as error:
        tokenizer = None
        checks.append(Check("tokenizer", "none", FAIL, f"{error}; nothing can be checked on text"))
    if tokenizer is not None:
        checks += [_vocabulary(config, tokenizer), _padding(section, config, tokenizer)]
    broken = [c.name for c in checks if c.name in ("parameters", "values", "head") and c.verdict == FAIL]
    names = ["loss of plain sentences", "order of tokens", "blocks", "perplexity of the text", "continuation"]
    why = None
    if tokenizer is None:
        why = "there is no tokenizer"
    elif any(check.name == "vocabulary" and check.verdict == FAIL for check in checks):
        why = "the tokenizer does not fit the model"
    elif stored_kind(section) is CLASSIFIER:
        why = "a classifier predicts no tokens"
    elif not CAUSAL_LM.fits(config):
        why = f"`{config.model_type}` is no causal language model"
    elif broken:
        why = f"the weights cannot be relied on: see {', '.join(broken)}"
    if why:
        return [*checks, *(Check(each, "-", NONE, why) for each in names)]
    loaded = _load(section, tokenizer, checks)
    return [*checks, *_on_text(loaded, text, prompt, order)]


def _vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Check:
    text, largest = config.get_text_config(), max(tokenizer.get_vocab().values())
    rows = text.vocab_size
    figure = f"ids to {largest:,}, {rows:,} rows"
    try:
        check_ids(tokenizer, rows, config.name_or_path)
        check_special_ids(text, rows, config.name_or_path)
    except UserError as error:
        return Check("vocabulary", figure, FAIL, str(error))
    spare = rows - largest - 1
    return Check("vocabulary", figure, OK, f"{spare:,} rows are beyond the tokenizer's ids" if spare else "")


def _padding(section: ModelSection, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Check:
    if stored_kind(section) is CLASSIFIER:
        # Decoders find the last token of a row by the configuration's id.
        needed = config.pad_token_id if CAUSAL_LM.fits(config) else tokenizer.pad_token_id
        where = "config" if CAUSAL_LM.fits(config) else "tokenizer"
        if needed is None:
            return Check("pad token", "none", FAIL, f"the {where} names none, so that no batch can be classified")
    elif tokenizer.pad_token_id is None:
        return Check("pad token", "none", WARN, "the tokenizer names none: who batches texts has to choose one")
    return Check("pad token", f"{tokenizer.pad_token}", OK, "")


def _load(section: ModelSection, tokenizer: PreTrainedTokenizerBase, checks: list[Check]) -> _Loaded:
    model = load_causal_lm(section, tokenizer, seed=0)
    try:
        check_alignment(model, tokenizer, block_size=1)
    except UserError as error:
        checks.append(Check("configuration", "-", FAIL, str(error)))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MOST_WINDOW
    return _Loaded(model, tokenizer, special_tokens(tokenizer).context.id, positions)


def _on_text(loaded: _Loaded, text: str | None, prompt: str, order: Order | None) -> Iterator[Check]:
    encode = encoder(loaded.tokenizer)
    most = min(loaded.positions, _MOST_WINDOW)
    plain = [ids[:most] for ids in encode(list(PLAIN_SENTENCES)) if ids]
    rows, what = plain, "plain sentences"
    if text is not None:
        rows, what = _pieces(encode([text])[0], min(_ROW, most)), "the text"
    yield _loss(loaded, plain, "plain sentences", FAIL if text is None else WARN)
    if text is not None:
        yield _loss(loaded, rows, "the text", FAIL)
    if len(rows) < _FEWEST_ROWS:
        why = f"the text has {sum(map(len, rows)):,} tokens; give one with {_FEWEST_ROWS * _ROW:,} or more"
        yield from (Check(name, "-", NONE, why) for name in ("order of tokens", "blocks"))
        yield _perplexity(loaded, text, encode)
        yield _continuation(loaded, prompt)
        return
    ordered, known = _token_order(loaded, rows, what, order is not None and order.trained)
    yield ordered
    yield _blocks(loaded, rows, text is not None, known)
    yield _perplexity(loaded, text, encode)
    yield _continuation(loaded, prompt)


def _pieces(ids: list[int], size: int) -> list[list[int]]:
    """Return pieces of a text from beginning to end, evenly spread where there are more than are looked at."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    step = max(1.0, len(pieces) / _MOST_ROWS)
    return [pieces[int(number * step)] for number in range(min(len(pieces), _MOST_ROWS))]


def _loss(loaded: _Loaded, rows: list[list[int]], what: str, at_worst: str) -> Check:
    loss = row_nats(loaded.model, rows, loaded.context).sum() / sum(map(len, rows))
    nothing = math.log(loaded.model.config.get_text_config().vocab_size)
    figure = f"{loss:.2f} nats per token; ln(vocabulary) {nothing:.2f}"
    if loss < _KNOWS_NOTHING * nothing:
        return Check(f"loss of {what}", figure, OK, "")
    reason = "about what a model has that knows nothing, or above"
    advice = _ADVICE if at_worst == FAIL and what != "the text" else ""
    return Check(f"loss of {what}", figure, at_worst, reason + advice)


def _token_order(loaded: _Loaded, rows: list[list[int]], what: str, trained: bool) -> tuple[Check, bool]:
    """Compare with the same tokens in random order; return the check, and whether the model knows such text."""
    draw = random.Random(_SEED)
    shuffled = [draw.sample(row, len(row)) for row in rows]
    losses = [row_nats(loaded.model, each, loaded.context) for each in (shuffled, rows)]
    rise, errors = difference(*losses, rows)
    figure = f"{rise:+.2f} nats per token when tokens are shuffled ({errors:.0f} standard errors)"
    known = rise >= _ORDER_TELLS and errors > _HARM_ERRORS
    if known:
        return Check("order of tokens", figure, OK, ""), True
    reason = f"the model does as well on the tokens of {what} in random order"
    if trained:
        advice = "" if what == "the text" else _ADVICE
        return Check("order of tokens", figure, FAIL, f"{reason}, though its weights are trained{advice}"), False
    return Check("order of tokens", figure, WARN, f"{reason}, as one hardly trained does"), False


def _blocks(loaded: _Loaded, rows: list[list[int]], given: bool, known: bool) -> Check:
    try:
        blocks = transformer_blocks(loaded.model, "blocks")
    except UserError as error:
        return Check("blocks", "-", NONE, str(error))
    effects = block_effects(loaded.model, blocks, rows, loaded.context)
    worst = min(effects, key=lambda effect: effect.nats)
    what = "the text" if given else "plain sentences"
    figure = f"least use: {worst.name}, {worst.nats:+.2f} nats per token without it, on {what}"
    found = [e for e in effects if e.nats < _HARM and e.errors < -_HARM_ERRORS]
    if not found:
        return Check("blocks", figure, OK, "")
    of_block, of_branch = _BEARABLE[given]
    harmful = [e for e in found if e.nats < (of_branch if " " in e.name else of_block)]
    listed = ", ".join(f"{e.name} ({e.nats:+.2f}, {-e.errors:.0f} standard errors)" for e in (harmful or found)[:8])
    reason = f"the loss falls when these are left out: {listed}"
    verdict = FAIL if known and harmful else WARN
    return Check("blocks", figure, verdict, reason + ("" if given else _ADVICE))


def _perplexity(loaded: _Loaded, text: str | None, encode: Any) -> Check:
    if text is None:
        return Check("perplexity of the text", "-", NONE, "no --text was given")
    ids = encode([text])[0]
    size = min(loaded.positions, _MOST_WINDOW)
    eos = special_tokens(loaded.tokenizer).eos.id
    document = _OneText(ids, eos, len(text.encode()))
    give_losses(loaded.model)
    figures = evaluate_documents(loaded.model, document, size, loaded.context, batch_size=4).figures()
    bits, tokens = figures["bits_per_byte"], figures["tokens"]
    return Check(
        "perplexity of the text", f"{figures['perplexity']:,.2f}; {bits:.3f} bits per byte, {tokens:,} tokens",
        OK if math.isfinite(figures["perplexity"]) else FAIL, f"in windows of {size:,} tokens",
    )  # fmt: skip


def _continuation(loaded: _Loaded, prompt: str) -> Check:
    begun = len(encoder(loaded.tokenizer)([prompt])[0]) + 1
    new = min(_NEW_TOKENS, loaded.positions - begun)
    if new < 1:
        return Check("continuation", "-", NONE, f"the prompt fills the model's {loaded.positions:,} positions")
    [[sample]] = continue_prompts(loaded.model, loaded.tokenizer, [prompt], seed=_SEED, max_new_tokens=new)
    ids = encoder(loaded.tokenizer)([sample])[0][begun - 1 :]
    verdict, reason = (WARN, "one token or a short cycle throughout: ") if _repeats(ids) else (OK, "")
    return Check("continuation", f"{len(ids)} tokens, seed {_SEED}", verdict, f"{reason}{sample!r}")


def _repeats(ids: list[int]) -> bool:
    cycles = (period for period in range(1, 9) if len(ids) >= 4 * period and len(ids) > 8)
    return any(np.mean(np.equal(ids[p:], ids[:-p])) > 0.9 for p in cycles)


def _read(text: str) -> str:
    try:
        found = Path(text).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {text} is not UTF-8 (byte {error.start:,})") from None
    except OSError as error:
        raise UserError(f"--text: {text} cannot be read: {error.strerror}") from None
    if not found.strip():
        raise UserError(f"--text: {text} holds no text")
    return found

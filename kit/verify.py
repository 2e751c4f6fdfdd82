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
from kit.model.architecture import Architecture, build_architecture
from kit.model.configuration import CAUSAL_LM, CLASSIFIER
from kit.model.headers import StoredTensor, read_headers, read_tensor
from kit.model.loading import holds_adapter, load_causal_lm, load_config, stored_kind
from kit.model.parts import transformer_blocks
from kit.model.sanity import Order, TensorFacts, compare_blocks, examine
from kit.model.tokenizer import encoder, load_tokenizer, special_tokens
from kit.names import fold_names
from kit.recipe.models import ModelSection
from kit.training.run_directory import model_of

OK, WARN, FAIL, NONE = "ok", "warn", "FAIL", "not applicable"
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_SEED, _PROMPT, _NEW_TOKENS = 42, "Once upon a time", 60
_ROW, _MOST_ROWS = 32, 24  # tokens of a piece of a text, and pieces, for the checks that take many passes
_MOST_WINDOW = 512
_KNOWS_NOTHING = 0.9  # of ln(vocabulary)
_ORDER_TELLS = 0.3  # nats per token
_HARM, _HARM_ERRORS = -0.05, 3.0  # nats per token; standard errors
# What a sound model may lose by a block, and by a branch, on text that it was given as known, and on plain sentences,
# which are not its own: a base model of novels, tuned on documentation, does better by 0.11 without an attention.
_BEARABLE = {True: (-0.05, -0.1), False: (-0.1, -0.2)}


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, and what to think of it."""

    name: str
    figure: str
    verdict: str
    reason: str


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
    known = [t for t in tensors if t.dtype in _FLOATS and t.name not in architecture.ignored]
    facts = [examine(t.name, _value(section, t)) for t in known]
    order = compare_blocks(facts)
    checks = [_files(architecture, tensors), _values(facts), _order(order), _head(section, architecture, tensors)]
    checks.append(_dtypes(tensors))
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


def _value(section: ModelSection, tensor: StoredTensor) -> Any:
    value = read_tensor(section.name_or_path, section.revision, tensor)
    return value if value.element_size() > 1 else value.float()  # torch knows little of 8-bit floats


def _files(architecture: Architecture, tensors: list[StoredTensor]) -> Check:
    held = {architecture.own_name(t.name) or t.name: t.parameters for t in tensors}
    parameters = dict(architecture.model.named_parameters(remove_duplicate=False))
    stored = sum(number for name, number in held.items() if name in parameters and name not in architecture.tied)
    expected = sum(architecture.parameters().values())
    figure = f"{stored:,} of {expected:,}"
    if not architecture.compared:
        return Check("parameters", figure, NONE, "a quantized model's matrices are packed, and not compared")
    wrong = {
        "missing": fold_names(architecture.missing),
        "unexpected": fold_names(architecture.unused),
        "of another shape": ", ".join(f"{n} ({f}; expected {e})" for n, f, e in architecture.mismatched[:8]),
    }
    reason = "; ".join(f"{what}: {names}" for what, names in wrong.items() if names)
    return Check("parameters", figure, FAIL if reason else OK, reason)


def _values(facts: list[TensorFacts]) -> Check:
    """Judge NaN and constants; a zero bias is a usual beginning, a norm's gain of ones one that all norms share."""
    alike: dict[str, list[TensorFacts]] = {}
    for each in facts:
        alike.setdefault(".".join("*" if p.isdigit() else p for p in each.name.split(".")), []).append(each)
    bad = [f"{f.name} ({f.bad:,} NaN or infinite)" for f in facts if f.bad]
    plain = []
    for each in (f for group in alike.values() for f in group if f.constant is not None):
        if each.dim > 1:
            bad.append(f"{each.name} (a matrix, {each.constant:g} throughout)")
    for group in alike.values():
        gains = [f for f in group if f.constant is not None and f.dim == 1 and not f.name.endswith("bias")]
        told = [f"{f.name} ({f.constant:g} throughout)" for f in gains]
        # Blocks that were trained alike are not constant in one of them alone; and a gain of zero gives nothing on.
        (plain if len(gains) == len(group) and len({f.constant for f in gains}) == 1 else bad).extend(told)
    listed = ", ".join((bad or plain)[:8]) + (f", and {len(bad or plain) - 8} more" if len(bad or plain) > 8 else "")
    verdict = FAIL if bad else WARN if plain else OK
    reason = listed + (": as untrained norms are" if plain and not bad else "")
    return Check("values", f"{len(facts):,} tensors: {len(bad)} bad, {len(plain)} constant", verdict, reason)


def _order(order: Order | None) -> Check:
    name = "order in matrices"
    if order is None:
        return Check(name, "-", NONE, "there are not two blocks of matrices to compare")
    figure = f"{order.least:+.2f} to {order.largest:+.2f} a block"
    if not order.trained:
        reason = "no matrix stands out of its own entries shuffled: weights hardly trained, or all shuffled"
        return Check(name, figure, WARN, reason)
    found = [*(f"{each} (all matrices)" for each in order.blocks), *order.matrices]
    what = "no more order than their own entries shuffled, unlike those of other blocks: "
    return Check(name, figure, FAIL if found else OK, what + ", ".join(found[:8]) if found else "")


def _head(section: ModelSection, architecture: Architecture, tensors: list[StoredTensor]) -> Check:
    embedding, head = architecture.model.get_input_embeddings(), architecture.model.get_output_embeddings()
    held = {architecture.own_name(t.name): t for t in tensors}
    modules = dict(architecture.model.named_modules())
    names = [f"{name}.weight" for name, module in modules.items() if module is embedding or module is head]
    tied = bool(head is not None and set(names) & set(architecture.tied))
    figure = "tied" if tied else "not tied"
    if head is None:
        return Check("head", "-", NONE, "the model has no output embeddings")
    if not set(names) <= set(held) or len(names) < 2:
        return Check("head", figure, OK, "")
    first, second = (_value(section, held[name]) for name in names[:2])
    equal = first.shape == second.shape and bool((first == second).all())
    if tied:
        reason = f"the configuration ties {names[1]} to {names[0]}, and the files hold two different matrices"
        return Check("head", figure, OK if equal else FAIL, "" if equal else reason)
    reason = "the configuration ties nothing, and head and embeddings are equal: `tie_word_embeddings` may be missing"
    return Check("head", figure, WARN if equal else OK, reason if equal else "")


def _dtypes(tensors: list[StoredTensor]) -> Check:
    counts = Counter(t.dtype for t in tensors if t.dtype in _FLOATS)
    figure = ", ".join(f"{number:,} {dtype}" for dtype, number in counts.most_common())
    rare = [t.name for t in tensors if t.dtype in list(counts)[1:]]
    mixed = len(counts) > 1
    return Check("dtypes", figure, WARN if mixed else OK, f"mixed, among others {fold_names(rare)}" if mixed else "")


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
    advice = "; for one that knows other texts, give one with --text" if at_worst == FAIL and what != "the text" else ""
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
        return Check("order of tokens", figure, FAIL, f"{reason}, though its weights are trained"), False
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
    if known and harmful:
        return Check("blocks", figure, FAIL, reason)
    return Check("blocks", figure, WARN, reason + ("" if given else "; --text, with text that it knows, tells more"))


def _perplexity(loaded: _Loaded, text: str | None, encode: Any) -> Check:
    if text is None:
        return Check("perplexity of the text", "-", NONE, "no --text was given")
    ids = encode([text])[0]
    size = min(loaded.positions, _MOST_WINDOW)
    eos = special_tokens(loaded.tokenizer).eos.id
    document = _OneText(ids, eos, len(text.encode()))
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

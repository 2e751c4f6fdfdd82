"""An untrained causal LM as a classifier: how likely each label's words are after a question."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.console import say
from kit.errors import UserError
from kit.evaluation.inference import score_in_batches


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    names: Sequence[str],
    prompt: str | None,
    words: Sequence[str],
    positions: int,
    max_positions: int,
    context_token_id: int,
    name: str = "",
) -> np.ndarray:
    """Return ln p of each label's words after the prompt: float64 (texts, classes), whole on every process.

    Summed over the tokens of the words, which follow a space. A longer label is thus less likely, as it is in a text.
    A text whose prompt and label do not fit loses its end, and is counted. For rows of exactly one label.

    Args:
        model: a causal LM, as it was before its head was replaced.
        tokenizer: its tokenizer.
        texts: to classify; a pair joined to one text.
        names: of the classes.
        prompt: with `{text}` where the text stands; by default a question that lists the labels' words.
        words: what stands for each class, such as its name.
        positions: that the model reads at most: of context token, prompt and words, without their last token.
        max_positions: a batch holds at most so many, padding included, but always one row.
        context_token_id: BOS where the tokenizer has one, else EOS; comes first.
        name: of the texts, for progress and messages.

    Raises:
        UserError: two classes have the same words, or the prompt does not fit even without a text.
    """
    answers, prompt, room = check_question(tokenizer, names, prompt, words, positions)
    fitted = [_fit(tokenizer, prompt, text, room) for text in texts]
    if cut := sum(was_cut for _, was_cut in fitted):
        of = f" of {name}" if name else ""
        say(f"zero-shot: {cut:,} of {len(texts):,} texts{of} were cut to fit {positions:,} positions")
    asked = _share_rows(answers)
    rows = [([context_token_id, *ids], head) for ids, _ in fitted for head in asked]

    def score(indices: Sequence[int]) -> torch.Tensor:
        batch = [rows[index] for index in indices]
        told = [asked[head] for _, head in batch]
        return _log_likelihoods(model, batch, told, answers, context_token_id)

    lengths = np.array([len(before) + len(head) for before, head in rows], dtype=np.int64)
    description = f"asking for labels of {name}" if name else "asking for labels"
    scores = score_in_batches(model, lengths, len(answers), score, max_positions, description)
    return scores.reshape(len(texts), len(asked), len(answers)).sum(axis=1)  # zeros of all rows but one


def _share_rows(answers: Sequence[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return what has to follow the prompt in the rows of a text, and which answers each of these rows tells.

    An answer's last token is predicted, and those before it are read. A row in which more tokens follow, or none for
    an answer of a single token, tells it just as well.
    """
    heads = list(dict.fromkeys(tuple(answer[:-1]) for answer in answers))
    longest = [head for head in heads if not any(head == other[: len(head)] for other in heads if other != head)]
    told: dict[tuple[int, ...], list[int]] = {head: [] for head in longest}
    for index, answer in enumerate(answers):
        head = tuple(answer[:-1])
        told[next(row for row in longest if row[: len(head)] == head)].append(index)
    return told


def check_question(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], prompt: str | None, words: Sequence[str], positions: int
) -> tuple[list[list[int]], str, int]:
    """Return the tokens of each label's words, the prompt, and the positions that it and a text may take.

    Raises:
        UserError: two classes have the same words, or the prompt does not fit even without a text.
    """
    answers = [_encode(tokenizer, _answer(tokenizer, word)) for word in words]
    _check_told_apart(names, words, answers)
    prompt = prompt or _question(words)
    # One position is the context token; the last token of an answer is predicted and takes none.
    room = positions - max(map(len, answers))
    _fit(tokenizer, prompt, "", room)
    return answers, prompt, room


def _log_likelihoods(
    model: PreTrainedModel,
    batch: Sequence[tuple[list[int], Sequence[int]]],
    told: Sequence[Sequence[int]],
    answers: Sequence[list[int]],
    pad: int,
) -> torch.Tensor:
    """Return ln p of the answers that each row tells, and 0 for the others: float64 (rows, answers)."""
    longest = max(len(before) + len(head) for before, head in batch)
    # Right padding needs no attention mask: no position of a causal model sees what follows it.
    input_ids = torch.full((len(batch), longest), pad, dtype=torch.long)
    for row, (before, head) in enumerate(batch):
        input_ids[row, : len(before) + len(head)] = torch.tensor([*before, *head])
    # Logits over a whole vocabulary are large: only those that an answer of some row is read from.
    read = sorted({len(before) - 1 + k for before, head in batch for k in range(len(head) + 1)})
    kept = torch.tensor(read, device=model.device)
    logits = model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=kept).logits
    likelihoods = torch.zeros((len(batch), len(answers)), dtype=torch.float64)
    for row, (before, head) in enumerate(batch):
        first = read.index(len(before) - 1)
        log_p = logits[row, first : first + len(head) + 1].cpu().double().log_softmax(-1)
        for index in told[row]:
            likelihoods[row, index] = log_p[range(len(answers[index])), answers[index]].sum()
    return likelihoods


def _question(words: Sequence[str]) -> str:
    return f"{{text}}\nQuestion: Is the text above {', '.join(words[:-1])} or {words[-1]}?\nAnswer:"


def _answer(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    """Return the word with the space before it, unless the tokenizer puts one there by itself."""
    first = tokenizer.convert_ids_to_tokens(_encode(tokenizer, word)[:1])
    return word if first and first[0].startswith("▁") else " " + word


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _fit(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, room: int) -> tuple[list[int], bool]:
    """Return the tokens of the prompt about a text, at most `room`, and whether the text lost its end for it."""
    was_cut = False
    while True:
        ids = _encode(tokenizer, prompt.replace("{text}", text, 1))
        surplus = len(ids) - room
        if surplus <= 0:
            return ids, was_cut
        if not text:
            raise UserError(
                f"evaluation.zero_shot.prompt: found {len(ids)} tokens without any text, and there is room for {room}: "
                f"shorten it, or leave `zero_shot` out of `evaluation.baselines`"
            )
        of_text = _encode(tokenizer, text)
        kept = tokenizer.decode(of_text[: max(0, len(of_text) - surplus)], clean_up_tokenization_spaces=False)
        # A character that was cut in two decodes to U+FFFD. What a tokenizer cannot decode exactly still gets shorter.
        kept = kept.rstrip("�")
        text, was_cut = (kept if text.startswith(kept) and len(kept) < len(text) else text[:-surplus]), True


def _check_told_apart(names: Sequence[str], words: Sequence[str], answers: Sequence[list[int]]) -> None:
    for index, answer in enumerate(answers):
        if not answer:
            raise UserError(f"evaluation.zero_shot.words.{names[index]}: {words[index]!r} has no tokens")
        if answer in answers[:index]:
            other = names[answers.index(answer)]
            raise UserError(
                f"evaluation.zero_shot.words: `{other}` and `{names[index]}` have the same words, {words[index]!r}: "
                f"give one of them others"
            )

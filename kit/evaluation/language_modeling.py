"""How well a causal LM predicts a set of documents: bits per byte, and what goes with it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from kit.console import progress
from kit.evaluation.inference import batches_of, inference


class Documents(Protocol):
    """Tokenised documents to measure on; see `kit.data.corpus.EvaluationDocuments`."""

    name: str
    num_bytes: int
    lengths: np.ndarray  # tokens of each document, EOS included

    def tokens(self, index: int, start: int, end: int) -> np.ndarray:
        """Return tokens `start` to `end` of one document, whose last token is EOS."""


@dataclass(frozen=True)
class LanguageModelScore:
    """Sums over a set of documents, and the figures that follow from them.

    Attributes:
        nats: sum of -ln p over all document tokens (EOS not among them).
        eos_nats_sum: sum of -ln p over the EOS after each document.
        correct: document tokens whose most probable prediction was right.
        tokens: number of document tokens.
        documents: number of documents.
        num_bytes: UTF-8 bytes of the documents' texts, as they were given to the tokenizer.
    """

    nats: float
    eos_nats_sum: float
    correct: int
    tokens: int
    documents: int
    num_bytes: int

    def figures(self) -> dict[str, float | int]:
        """Return the figures under their names in the scorecard.

        `bits_per_byte` is the only one to compare across vocabularies. `eos_nats` is the mean over documents.
        """
        nats_per_token = self.nats / self.tokens
        return {
            "bits_per_byte": self.nats / math.log(2) / self.num_bytes,
            "nats_per_token": nats_per_token,
            "perplexity": math.exp(nats_per_token) if nats_per_token < 700 else math.inf,
            "token_accuracy": self.correct / self.tokens,
            "eos_nats": self.eos_nats_sum / self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "documents": self.documents,
        }


@torch.no_grad()
def evaluate_documents(
    model: torch.nn.Module,
    documents: Documents,
    block_size: int,
    context_token_id: int,
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> LanguageModelScore:
    """Score every token of every document exactly once.

    A document is preceded by one context token that is never scored, and followed by EOS, which is scored apart. A
    longer one is cut into consecutive windows of at most `block_size` scored tokens, each beginning with the last
    token of the one before as context. Sums are float64, so the result depends neither on batch size nor on padding
    nor on the number of processes. The model computes in the precision of
    its weights, whatever precision training uses.

    Args:
        model: a causal LM that gives losses (`kit.model.chunked_loss`).
        documents: what to score.
        block_size: scored tokens per window, and positions that the model sees at once.
        context_token_id: BOS where the tokenizer has one, else EOS.
        batch_size: a batch holds at most `batch_size × block_size` positions, padding included.
        poll: called between batches, on all processes equally often; may raise to interrupt.

    Returns:
        The sums over all processes.
    """
    windows = _windows(documents.lengths, block_size)
    batches = batches_of(windows[:, 2] - windows[:, 1], batch_size * block_size)
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rounds = [batches[start : start + processes] for start in range(0, len(batches), processes)]
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)  # nats, nats of EOS, correct, tokens
    with inference(model):
        steps = progress(rounds, f"measuring {documents.name}", total=len(windows), size=lambda r: sum(map(len, r)))
        for batch_of_each_rank in steps:
            poll()
            # A process that has run out of batches computes one of the others': where each has a part of the weights,
            # all have to go through the model equally often.
            batch = batch_of_each_rank[min(rank, len(batch_of_each_rank) - 1)]
            scored = _score(model, documents, windows[batch], context_token_id, device)
            if rank < len(batch_of_each_rank):
                sums += scored
    if processes > 1:
        # NCCL reduces what is on the GPU, gloo what is on the CPU; the model's device is right for both.
        on_device = sums.to(device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    nats, eos_nats, correct, tokens = sums.tolist()
    return LanguageModelScore(nats, eos_nats, int(correct), int(tokens), len(documents.lengths), documents.num_bytes)


def _windows(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Return (document, first target, end target) of every window, the longest first: int64 (windows, 3)."""
    per_document = -(-lengths // block_size)
    document = np.repeat(np.arange(len(lengths)), per_document)
    first_of_document = np.repeat(np.cumsum(per_document) - per_document, per_document)
    first = (np.arange(len(document)) - first_of_document) * block_size
    end = np.minimum(first + block_size, lengths[document])
    order = np.argsort(first - end, kind="stable")
    return np.stack([document, first, end], axis=1)[order]


def _score(
    model: torch.nn.Module, documents: Documents, windows: np.ndarray, context_token_id: int, device: torch.device
) -> torch.Tensor:
    """Return nats, nats of EOS, correct and number of tokens over some windows: float64 (4,)."""
    longest = int((windows[:, 2] - windows[:, 1]).max())
    # Right padding needs no attention mask: no position of a causal model sees what follows it.
    input_ids = torch.full((len(windows), longest), context_token_id, dtype=torch.long)
    targets = torch.full((len(windows), longest), -100, dtype=torch.long)
    is_eos = torch.zeros((len(windows), longest), dtype=torch.bool)
    for row, (document, first, end) in enumerate(windows.tolist()):
        tokens = torch.from_numpy(documents.tokens(document, max(0, first - 1), end))
        size = end - first
        targets[row, :size] = tokens[-size:]
        input_ids[row, size - len(tokens) + 1 : size] = tokens[:-1]
        is_eos[row, size - 1] = bool(end == documents.lengths[document])
    losses = model(input_ids=input_ids.to(device), shift_labels=targets.to(device), use_cache=False)
    nll, right = losses.nats.cpu().double(), losses.correct.cpu()
    is_token = targets.ge(0) & ~is_eos
    return torch.stack(
        [nll[is_token].sum(), nll[is_eos].sum(), right[is_token].sum().double(), is_token.sum().double()]
    )

"""The token ledger: what was read, and where every token of it went."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kit.console import say, table, warn
from kit.data.blocks import TrainPart
from kit.data.cleaning import ALSO_EVALUATED, EXACT_DUPLICATE, NEAR_DUPLICATE, NEAR_EVALUATED, OVERLAP, Cleaned, Example
from kit.data.packing import count_cut
from kit.errors import UserError

BEYOND_SHARE = "beyond its share"
# What a recipe asks to leave out, by a share or by a key of its own.
ASKED_FOR = {BEYOND_SHARE, EXACT_DUPLICATE, NEAR_DUPLICATE, NEAR_EVALUATED, OVERLAP}

# A small source with a large share is learned by heart.
_OFTEN = 3


@dataclass
class LedgerRow:
    """One source's account, in tokens: ``read + repeated = trained + context + dropped``, exactly.

    Attributes:
        source: name of the source.
        documents: documents of the training split.
        held_out: documents that the split keeps for evaluation.
        left_out: documents that were not read at all, by cause: their number, and where some of them are.
        read: tokens of the training split's documents, plus one EOS each.
        repeated: tokens read once more because the source's share asks for more than it has.
        trained: label positions of one epoch.
        context: tokens that are only ever context; none, since the kit puts a context token before each document.
        padding: positions of an epoch without a token, in packed rows.
        cut: documents that are spread over several rows.
        dropped: tokens that are never trained on, by cause.
        dropped_documents: documents of the causes that drop whole ones, with examples of them.
        share: share of the epoch's label positions that come from this source.
        wanted_share: what the recipe asks for, as `weight` or as the share of `replay`.
        is_replay: whether the source is one of `data.replay`.
        stopped: `max_tokens` ended the reading before the source did.
    """

    source: str
    documents: int
    held_out: int
    left_out: dict[str, dict[str, Any]]
    read: int
    repeated: int
    trained: int
    context: int
    padding: int
    cut: int
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    share: float = 0.0
    wanted_share: float | None = None
    is_replay: bool = False
    stopped: bool = False

    @property
    def total_dropped(self) -> int:
        """Tokens dropped for any cause."""
        return sum(self.dropped.values())


def account(part: TrainPart, packing: bool | str, cleaned: Cleaned, training: np.ndarray, held_out: int) -> LedgerRow:
    """Return the account of one source.

    Args:
        part: what the source contributes to an epoch.
        packing: whether rows are packed, as `data.packing`.
        cleaned: what was left out of its training split.
        training: int64 (documents,), the whole training split.
        held_out: documents kept for evaluation.
    """
    store = part.store
    trained = part.count_tokens(part.blocks)
    unique = part.count_tokens(np.unique(part.blocks))
    dropped = {cause: store.count_tokens(documents) for cause, documents in cleaned.dropped.items()}
    dropped[BEYOND_SHARE] = part.num_tokens - unique
    row = LedgerRow(
        source=store.name,
        documents=len(training),
        held_out=held_out,
        left_out=store.left_out,
        read=store.count_tokens(training),
        repeated=trained - unique,
        trained=trained,
        context=0,
        padding=len(part.blocks) * part.block_size - trained if packing else 0,
        cut=count_cut(np.diff(part.starts), part.layout),
        dropped={cause: tokens for cause, tokens in dropped.items() if tokens},
        dropped_documents={
            cause: {"documents": len(documents), "examples": cleaned.examples[cause]}
            for cause, documents in cleaned.dropped.items()
        },
        stopped=store.stopped,
    )
    if row.read + row.repeated != row.trained + row.context + row.total_dropped:
        raise AssertionError(f"the token ledger does not add up: {row}")
    return row


def enter_shares(ledger: Sequence[LedgerRow], weights: Sequence[float | None], replay: float | None) -> None:
    """Enter the realised mix beside the one that the recipe asks for; the rows of replay are the last."""
    total = sum(row.trained for row in ledger)
    for index, row in enumerate(ledger):
        row.share = row.trained / total
        row.is_replay = index >= len(weights)
        row.wanted_share = replay if row.is_replay else weights[index]


def check_dropped(ledger: Sequence[LedgerRow], max_dropped: float) -> None:
    """Refuse a run that leaves out more of a source than the recipe allows; what it asks for does not count.

    Raises:
        UserError: a source drops a larger share of its tokens than `max_dropped`.
    """
    for row in ledger:
        by_cause = {cause: tokens for cause, tokens in row.dropped.items() if cause not in ASKED_FOR}
        unasked = sum(by_cause.values())
        if unasked > max_dropped * row.read:
            causes = ", ".join(f"{cause}: {tokens:,}" for cause, tokens in by_cause.items())
            raise UserError(
                f"data source `{row.source}`: {unasked:,} of {row.read:,} tokens ({unasked / row.read:.1%}) would not "
                f"be trained on ({causes}); at most {max_dropped:.1%} may be dropped. Mend the data, or allow it with "
                f"`data.max_dropped: {unasked / row.read + 0.0005:.3f}`"
            )


def print_ledger(ledger: Sequence[LedgerRow]) -> None:
    """Print the ledger as a table, one row a source, and what was left out with an example of each cause."""
    columns = ["source", "documents", "held out", "cut", "read", "trained", "context", "dropped", "padding"]
    repeated, mixed = any(row.repeated for row in ledger), len(ledger) > 1
    if repeated:
        columns.insert(5, "repeated")
    if mixed:
        columns.append("share")
    rows = []
    for row in ledger:
        left_out = "".join(f"\n+ {entry['documents']:,} {cause}" for cause, entry in row.left_out.items())
        left_out += "\nfirst ones only" if row.stopped else ""
        name = f"{row.source} (replay)" if row.is_replay else row.source
        cells = [name, f"{row.documents:,}{left_out}"] + [f"{n:,}" for n in (row.held_out, row.cut, row.read)]
        cells += [f"{row.repeated:,}"] if repeated else []
        causes = "\n+ ".join(f"{tokens:,} {cause}" for cause, tokens in row.dropped.items())
        causes = f"\n= {causes}" if len(row.dropped) > 1 else "".join(f"\n{cause}" for cause in row.dropped)
        padding = f"{row.padding:,}" + (f"\n{row.padding / (row.trained + row.padding):.2%}" if row.padding else "")
        cells += [f"{row.trained:,}", f"{row.context:,}", f"{row.total_dropped:,}{causes}", padding]
        cells += [f"{row.share:.2%}"] if mixed else []
        rows.append(cells)
    table("Token ledger of one epoch", columns, rows)
    shares = [(row.source, row.share, row.wanted_share) for row in ledger if not row.is_replay and row.wanted_share]
    if replay := [row for row in ledger if row.is_replay]:
        shares.append(("replay", sum(row.share for row in replay), replay[0].wanted_share))
    if shares:
        say("shares: " + ", ".join(f"{name} {share:.2%} (asked for {wanted:.2%})" for name, share, wanted in shares))
    for row in ledger:
        for cause, entry in row.left_out.items():
            if entry["examples"]:
                more = ", …" if entry["documents"] > len(entry["examples"]) else ""
                say(f"not read of {row.source}: {entry['documents']:,} {cause}: {', '.join(entry['examples'])}{more}")
        if row.dropped_documents:
            say(f"left out of the {row.documents:,} documents of {row.source}:")
        for cause, entry in row.dropped_documents.items():
            example = entry["examples"][0]
            say(f"  {entry['documents']:,} {cause}, such as `{example['text']}`: {_explanation(cause, example)}")
    for name, share, wanted in shares:
        if not share:
            warn(f"{name}: a share of {wanted:.2%} is less than half a block of so little text: nothing of it trains")
    for row in ledger:
        if row.repeated > _OFTEN * row.read:
            warn(f"{row.source}: its share has it read {row.trained / row.read:.0f} times an epoch")


def _explanation(cause: str, example: Example) -> str:
    """Say what a document that was left out was compared to."""
    if cause == ALSO_EVALUATED:
        return "in " + ", ".join(f"`{name}`" for name in example["sets"])
    if cause == EXACT_DUPLICATE:
        return f"{example['times']:,} times in all"
    if cause in (NEAR_DUPLICATE, NEAR_EVALUATED):
        where = f" in `{example['set']}`" if cause == NEAR_EVALUATED else ""
        return f"{example['similarity']:.2f} like `{example['like']}`{where}"
    return f"{example['shared']:,} n-grams of `{example['set']}`, such as `{example['ngram']}`"


def ledger_as_json(ledger: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    """Return the ledger as it is saved."""
    return [asdict(row) for row in ledger]

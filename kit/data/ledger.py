"""The token ledger: what was read, and where every token of it went."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kit.console import table
from kit.data.blocks import TrainPart
from kit.errors import UserError

BEYOND_WEIGHT = "beyond its weight"
ALSO_EVALUATED = "also in evaluation"


@dataclass
class LedgerRow:
    """One source's account, in tokens: ``read + repeated = trained + context + dropped``, exactly.

    Attributes:
        source: name of the source.
        documents: documents of the training split.
        held_out: documents that the split keeps for evaluation.
        empty: documents without text.
        read: tokens of the training split's documents, plus one EOS each.
        repeated: tokens read once more because the source's weight asks for more than it has.
        trained: label positions of one epoch.
        context: tokens that are only ever context; none, since the kit puts a context token before each document.
        dropped: tokens that are never trained on, by cause.
        padding: positions of an epoch without a token, in packed rows.
    """

    source: str
    documents: int
    held_out: int
    empty: int
    read: int
    repeated: int
    trained: int
    context: int
    padding: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def total_dropped(self) -> int:
        """Tokens dropped for any cause."""
        return sum(self.dropped.values())


def account(part: TrainPart, packing: bool, documents: int, read: int, held_out: int) -> LedgerRow:
    """Return the account of one source.

    Args:
        part: what the source contributes to an epoch.
        packing: whether rows are packed.
        documents: documents of the training split.
        read: tokens of the training split, EOS included; more than the part's where evaluation sets hold the same text.
        held_out: documents kept for evaluation.
    """
    trained = part.count_tokens(part.blocks)
    unique = part.count_tokens(np.unique(part.blocks))
    dropped = {ALSO_EVALUATED: read - part.num_tokens, BEYOND_WEIGHT: part.num_tokens - unique}
    row = LedgerRow(
        source=part.store.name,
        documents=documents,
        held_out=held_out,
        empty=part.store.empty,
        read=read,
        repeated=trained - unique,
        trained=trained,
        context=0,
        padding=len(part.blocks) * part.block_size - trained if packing else 0,
        dropped={cause: tokens for cause, tokens in dropped.items() if tokens},
    )
    if row.read + row.repeated != row.trained + row.context + row.total_dropped:
        raise AssertionError(f"the token ledger does not add up: {row}")
    return row


def check_dropped(ledger: Sequence[LedgerRow], max_dropped: float) -> None:
    """Refuse a run that leaves out more of a source than the recipe allows; a source's weight is such a permission.

    Raises:
        UserError: a source drops a larger share of its tokens than `max_dropped`.
    """
    for row in ledger:
        unasked = row.total_dropped - row.dropped.get(BEYOND_WEIGHT, 0)
        if unasked > max_dropped * row.read:
            causes = ", ".join(f"{cause}: {tokens:,}" for cause, tokens in row.dropped.items())
            raise UserError(
                f"data source `{row.source}`: {unasked:,} of {row.read:,} tokens ({unasked / row.read:.1%}) would not "
                f"be trained on ({causes}); at most {max_dropped:.1%} may be dropped. Mend the data, or allow it with "
                f"`data.max_dropped: {unasked / row.read + 0.0005:.3f}`"
            )


def print_ledger(ledger: Sequence[LedgerRow]) -> None:
    """Print the ledger as a table, one row a source."""
    columns = ["source", "documents", "held out", "read", "trained", "context", "dropped", "padding"]
    if any(row.repeated for row in ledger):
        columns.insert(4, "repeated")
    rows = []
    for row in ledger:
        empty = f"\n{row.empty:,} empty" if row.empty else ""
        cells = [row.source, f"{row.documents:,}{empty}"] + [f"{n:,}" for n in (row.held_out, row.read)]
        cells += [f"{row.repeated:,}"] if "repeated" in columns else []
        causes = "".join(f"\n{cause}" for cause in row.dropped)
        cells += [f"{row.trained:,}", f"{row.context:,}", f"{row.total_dropped:,}{causes}", f"{row.padding:,}"]
        rows.append(cells)
    table("Token ledger of one epoch", columns, rows)


def ledger_as_json(ledger: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    """Return the ledger as it is saved."""
    return [asdict(row) for row in ledger]

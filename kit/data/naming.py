"""Which documents lie in rows of training tokens, and where they were read: for messages about these rows."""

from collections.abc import Sequence
from itertools import islice

from kit.data.blocks import TokenRows
from kit.data.columns import LeftOut
from kit.data.sources import hash_text, located_documents
from kit.data.store import TokenStore
from kit.errors import UserError

_MOST_READ_AGAIN = 1 << 30  # bytes of text


def name_documents(rows: TokenRows, indices: Sequence[int], most: int) -> tuple[list[str], int]:
    """Return a line for each document that lies in some rows, and how many there are.

    Args:
        rows: the rows of an epoch.
        indices: of some of them.
        most: so many documents are named, with file and line where reading their source again finds them.
    """
    found = [(row, store, number) for row in indices for store, of_row in [rows.documents(row)] for number in of_row]
    shown = found[:most]
    stores = {store.key: store for _, store, _ in shown}
    places = {key: _places(store, {n for _, s, n in shown if s.key == key}) for key, store in stores.items()}
    lines = [
        f"row {row}: document {n + 1:,} of `{store.name}`{places[store.key].get(n, '')}" for row, store, n in shown
    ]
    return lines, len(found)


def _places(store: TokenStore, numbers: set[int]) -> dict[int, str]:
    """Return file and line of documents in words, none where finding them takes long or the source has changed."""
    source, end = store.source, max(numbers) + 1
    if source is None or source.dataset or int(store.num_bytes[:end].sum()) > _MOST_READ_AGAIN:
        return {}
    places = {}
    texts = (document for document in located_documents(source) if not isinstance(document, LeftOut))
    try:
        for number, (where, text) in enumerate(islice(texts, end)):
            if number in numbers and hash_text(text) == store.hashes[number]:
                places[number] = f" ({where})"
    except (UserError, OSError):  # what is being told is about something else
        pass
    return places

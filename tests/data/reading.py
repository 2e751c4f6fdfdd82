"""Reading a source in a test: its documents, what of it is left out, and why it is refused."""

import pytest

from kit.data.columns import LeftOut
from kit.data.sources import read_documents
from kit.errors import UserError
from kit.recipe.data import Source


def read(path, **settings):
    """Return everything that a source of files yields."""
    return list(read_documents(Source(path=str(path), **settings)))


def texts(documents):
    """Return the documents that are read."""
    return [document for document in documents if isinstance(document, str)]


def left_out(documents):
    """Return cause and place of those that are not."""
    return [(document.cause, document.where) for document in documents if isinstance(document, LeftOut)]


def refusal(path, **settings):
    """Return the message with which a source of files is refused."""
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return str(caught.value)

"""Fixtures of the data room: token stores of known tokens, and the tiny tokenizer's coding."""

import numpy as np
import pytest

from kit.data.store import TokenStore


@pytest.fixture(scope="session")
def tokenizer():
    from tests.material import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def coding(tokenizer):
    from kit.tasks.causal_lm import token_coding

    return token_coding(tokenizer)


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of text or bytes below the test's folder, and returns its path."""

    def write(content, name="corpus.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def make_store():
    """A function from document lengths to a store in which no token but EOS (0) occurs twice; 1 to 9 are not used."""

    def make(lengths, first_token=10):
        documents, token = [], first_token
        for length in lengths:
            documents.append([*range(token, token + length), 0])
            token += length
        return TokenStore(
            name="made",
            key=f"made {list(lengths)}",
            tokens=np.array([t for d in documents for t in d], dtype=np.uint32),
            offsets=np.cumsum([0] + [len(d) for d in documents]),
            num_bytes=np.array(lengths, dtype=np.int64),
            hashes=np.arange(first_token, first_token + len(documents), dtype=np.uint64),
            left_out={},
        )

    return make

"""Encoders that a worker process can import: each character is the token of its code point."""

import os
import signal
import time
from multiprocessing.connection import Connection


def encode_characters(texts):
    """Encode."""
    return [[ord(character) for character in text] for text in texts]


def encode_elsewhere(texts):
    """Encode, with the number of this process as each document's first token."""
    return [[os.getpid(), *map(ord, text)] for text in texts]


def encode_and_kill(texts):
    """Encode, but where a text is `kill` end this process as the system out of memory does."""
    if "kill" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_characters(texts)


def encode_and_fail(texts):
    """Encode, but where a text is `fail` raise."""
    if "fail" in texts:
        raise ValueError("this cannot be encoded")
    return encode_characters(texts)


def encode_slowly(texts):
    """Encode for a minute, and leave the number of this process in a file."""
    if folder := os.environ.get("WORKERS"):
        with open(os.path.join(folder, str(os.getpid())), "w"):
            pass
    time.sleep(60)
    return encode_characters(texts)


def encode_and_die_while_sending(texts):
    """Encode, but where a text is `kill` end this process once half of a result is in the pipe, whoever else lives."""
    if "kill" in texts:
        send = Connection._send

        def send_half(connection, buffer, *rest):
            if len(buffer) < 10_000:
                return send(connection, buffer, *rest)
            send(connection, bytes(buffer)[: len(buffer) // 2], *rest)
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = send_half
    return encode_characters(texts)

"""Whether the Hub can be reached: asked once, before its client tries for a minute."""

import functools
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, is_offline_mode

from kit.console import warn

_CONNECT_TIMEOUT_S = 5.0


@functools.cache
def why_offline() -> str | None:
    """Return why the Hub is not asked for anything, or None where it is.

    The client tries each file six times before it gives up, a minute for a single model or dataset. One connection
    tells as much.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {"all", "http", "https"}:
        return None  # only the client knows the way
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = f"{endpoint.hostname} cannot be reached: {error.strerror or error}"
        warn(f"{reason}; what is asked of it comes from the cache alone")
        return reason
    return None

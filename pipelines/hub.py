"""Whether the Hub is there, asked once and briefly: its own clients ask for half a minute before they give up."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 5.0  # for an answer


def is_reachable() -> bool:
    """Whether the Hub's machine, or its proxy, takes a connection; no for `HF_HUB_OFFLINE`."""
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme in getproxies():  # which alone can tell
        return True
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While the Hub can not be reached, `datasets` and `huggingface_hub` look into their caches at once."""
    import datasets

    if constants.HF_HUB_OFFLINE or is_reachable():
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def reason_of(error: Exception) -> str:
    """What an error of `datasets` says, in one line; if the Hub was not asked, that."""
    if isinstance(error, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub"
        if not is_reachable():
            return f"it is not in the cache, and {constants.ENDPOINT} can not be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]

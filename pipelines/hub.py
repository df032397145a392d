"""A quick check that the Hub can be reached: its own client retries for half a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from tokenizer.files import PushError, push_folder

__all__ = ["PushError", "is_reachable", "push_folder", "require_reachable"]
TIMEOUT = 5.0  # seconds to wait for an answer


def is_reachable() -> bool:
    """Return whether the Hub accepts a connection; True behind a proxy, False with `HF_HUB_OFFLINE`."""
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme in getproxies():  # only the proxy knows
        return True
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname or "", port), TIMEOUT).close()
    except OSError:
        return False
    return True


def require_reachable(repo_id: str) -> None:
    """Raise `PushError` within seconds if the Hub may not be contacted or cannot be reached."""
    if not is_reachable():
        offline = "HF_HUB_OFFLINE forbids asking the Hub"
        reason = offline if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise PushError(f"{repo_id} cannot be written to: {reason}")

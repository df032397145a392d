"""Whether the Hub is there, asked once and briefly, as its own clients ask for half a minute before they give up; and
writing to it: a repository that holds other things keeps them, and holds our files whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from tokenizer.files.hub import HUB_ID, is_reachable


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While the Hub cannot be reached, `datasets` and `huggingface_hub` look into their caches at once.

    Both read HF_HUB_OFFLINE once, when they are imported, and `load_dataset` has no argument for it: their constants
    are changed meanwhile, which huggingface_hub 1.10 to 2.4 and datasets 4.0 to 5.2 look at in each call.
    """
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


def fetched(repo_id: str, name: str) -> Path | None:
    """A file of a model's repository, in the cache; None where it is not to be had, for whatever reason."""
    from huggingface_hub import hf_hub_download

    if not re.fullmatch(HUB_ID, repo_id):
        return None
    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=not is_reachable()))
    except Exception:  # which loading the whole of it will tell
        return None


def reason_of(error: Exception) -> str:
    """What an error of `datasets` says, in one line; if the Hub was not asked, that."""
    if isinstance(error, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub"
        if not is_reachable():
            return f"it is not in the cache, and {constants.ENDPOINT} cannot be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Writing

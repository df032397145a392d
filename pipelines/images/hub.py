"""Read from the Hub without long waits: its own clients retry for half a minute before they give up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from tokenizer.files import HUB_ID

from ..hub import is_reachable


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """If the Hub cannot be reached, make `datasets` and `huggingface_hub` use their caches at once during the block.
    Changes their constants, as both read HF_HUB_OFFLINE only on import, and `load_dataset` has no argument for it."""
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


def fetch_file(repo_id: str, name: str) -> Path | None:
    """Fetch a file of a model repository and return its path in the cache; None if that fails for any reason."""
    from huggingface_hub import hf_hub_download

    if not re.fullmatch(HUB_ID, repo_id):
        return None
    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=not is_reachable()))
    except Exception:  # loading the whole model will raise the error
        return None


def describe_error(error: BaseException) -> str:
    """Describe an error of `datasets` in one line: its cause, or why the Hub was not asked."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:  # its own text gives no reason
        error = error.__cause__
    if isinstance(error, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub"
        if not is_reachable():
            return f"it is not in the cache, and {constants.ENDPOINT} cannot be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Whether the Hub is there, asked once and briefly, as its own clients ask for half a minute before they give up; and
writing to it: a repository that holds other things keeps them, and holds our files whole."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from tokenizer.errors import one_line

SECONDS = 5.0  # for an answer
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"


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
            return f"it is not in the cache, and {constants.ENDPOINT} can not be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Writing

BUGS = (TypeError, AttributeError, NameError, AssertionError)  # of ours: no word of the Hub's is one


class PushError(OSError):
    """Why something could not be written to the Hub, in one line; its cause is what huggingface_hub raised, if any."""


def refusal(repo_id: str, reason: str) -> PushError:
    """The error to raise for a repository."""
    return PushError(one_line(f"{repo_id} cannot be written to: {reason}"))


def require_reachable(repo_id: str) -> None:
    """Raise `PushError`, within seconds, where the Hub may not be asked or cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        raise refusal(repo_id, "HF_HUB_OFFLINE forbids to ask the Hub")
    if not is_reachable():
        raise refusal(repo_id, f"{constants.ENDPOINT} cannot be reached")


def replace_on_hub(
    folder: Path,
    repo_id: str,
    ours: Callable[[list[str], Callable[[str], str]], Iterable[str]],
    *,
    repo_type: str = "model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str,
) -> Any:
    """Upload the files of `folder` in one commit, which also deletes what an earlier upload of ours left and this one
    has not; the repository is made if there is none. Returns huggingface_hub's `CommitInfo`. Raises `PushError`.

    ours: which files of a repository an upload of ours has put there, from their names and what fetches one of them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    place: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        api.create_repo(**place, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(**place, branch=revision, exist_ok=True)
        place = {**place, "revision": revision}
        there = api.list_repo_files(**place)
        gone = set(ours(there, lambda name: api.hf_hub_download(filename=name, **place))) & set(there) - set(paths)
        # Not `upload_folder`, which cuts what takes long into several commits: between two of them nothing would load.
        operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in sorted(gone)]
        operations += [CommitOperationAdd(name, path) for name, path in paths.items()]
        return api.create_commit(**place, operations=operations, commit_message=commit_message)
    except BUGS:
        raise
    except Exception as error:  # of an HTTP client that is another in each version, and sometimes a KeyError
        raise refusal(repo_id, said(error)) from error


def said(error: Exception) -> str:
    """What an error of huggingface_hub or its HTTP client comes to."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(status, int):
        known = type(error).__module__.startswith("huggingface_hub") and lines
        return lines[0] if known else ": ".join([type(error).__name__, *lines[:1]])
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "an error"
    message = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
    hint = "; `hf auth whoami` says who you are, `hf auth login` changes it" if status in (401, 403, 404) else ""
    return f"{status} {phrase}{f', {message}' if message else ''}{hint}"

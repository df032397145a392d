"""The Hub: whether it can be reached, and uploading a folder in one commit."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from tokenizer.files import one_line

SECONDS = 5.0  # to wait for an answer
BUGS = (TypeError, AttributeError, NameError, AssertionError)  # our own; the Hub never causes one


def is_reachable() -> bool:
    """Whether the Hub's machine accepts a connection; True behind a proxy, False with `HF_HUB_OFFLINE`."""
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme in getproxies():  # only the proxy could tell
        return True
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True


class PushError(OSError):
    """Something could not be written to the Hub; `__cause__` is what huggingface_hub raised, if anything."""


def refusal(repo_id: str, reason: str) -> PushError:
    """The error to raise for a repository."""
    return PushError(one_line(f"{repo_id} cannot be written to: {reason}"))


def require_reachable(repo_id: str) -> None:
    """Raise `PushError` within seconds if the Hub may not be contacted or cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        raise refusal(repo_id, "HF_HUB_OFFLINE forbids asking the Hub")
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
    create_pr: bool = False,
    commit_message: str,
) -> Any:
    """Upload the files of `folder` in one commit, which also deletes files of earlier uploads of ours that `folder`
    does not have; creates the repository if needed. create_pr: as a pull request, which changes nothing until it is
    merged. Returns huggingface_hub's `CommitInfo`. Raises `PushError`.

    ours: takes the names of a repository's files and a function that fetches one; returns those that we uploaded.
    """
    api = HfApi(token=token)
    place: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(**place, space_sdk=sdk, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(**place, branch=revision, exist_ok=True)
        place = {**place, "revision": revision}
        there = api.list_repo_files(**place)
        gone = set(ours(there, lambda name: api.hf_hub_download(filename=name, **place))) & set(there) - set(paths)
        # Not `upload_folder`: it splits long uploads into several commits, between which nothing would load.
        operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in sorted(gone)]
        operations += [CommitOperationAdd(name, path) for name, path in paths.items()]
        return api.create_commit(**place, operations=operations, commit_message=commit_message, create_pr=create_pr)
    except (*BUGS, PushError):
        raise
    except Exception as error:  # the HTTP client differs between versions, and some errors are a KeyError
        raise refusal(repo_id, said(error)) from error


def said(error: Exception) -> str:
    """An error of huggingface_hub or its HTTP client in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(status, int):
        known = type(error).__module__.startswith("huggingface_hub") and lines
        return lines[0] if known else ": ".join([type(error).__name__, *lines[:1]])
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "an error"
    message = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
    hint = "; `hf auth whoami` says who you are, `hf auth login` changes it" if status in (401, 403, 404) else ""
    return f"{status} {phrase}{f', {message}' if message else ''}{hint}"

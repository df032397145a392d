"""The Hub: whether it can be reached, fetching a folder from it, and uploading a folder in one commit."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download

from .errors import PathError, UnreadableError, one_line

SECONDS = 5.0  # to wait for an answer
MOST_NAMES = 1000  # in a folder that are looked at for one that may have been meant
BUGS = (TypeError, AttributeError, NameError, AssertionError)  # our own; the Hub never causes one
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"


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


def resolve_folder(source: str | Path, patterns: list[str], **options: Any) -> Path:
    """`source` as a local folder; a repository id is fetched from the Hub, see `snapshot`. Raises `PathError`."""
    if os.path.isdir(source):  # unlike Path.is_dir, also False for a name that no folder can have
        require_searchable(source)
        return Path(source)
    near = near_folder(Path(source))
    hint = f" (did you mean {near}?)" if near else ""
    if not re.fullmatch(HUB_ID, str(source)):
        raise PathError(
            f"{str(source)[:200]!r} is neither an existing folder{hint} nor a Hub id of the form 'owner/name'"
        )
    told = f"{str(source)!r} is not an existing folder{hint}, and as a Hub id it could not be fetched"
    return snapshot(str(source), patterns, told, **options)


def require_searchable(folder: str | Path) -> None:
    """Raise `UnreadableError` for a folder whose files may not even be looked for."""
    try:
        os.stat(os.path.join(folder, os.curdir))
    except PermissionError as error:
        raise UnreadableError(f"{folder}: {error.strerror}") from error


def near_folder(path: Path) -> Path | None:
    """A folder beside `path` whose name differs from its by a typing error, if there is one."""
    try:
        there = [each.name for each in itertools.islice(path.parent.glob("*"), MOST_NAMES) if each.is_dir()]
    except (OSError, ValueError):  # a name that no folder can have
        return None
    found = difflib.get_close_matches(path.name, there, 1, 0.8)
    return path.parent / found[0] if found else None


def snapshot(repo_id: str, patterns: list[str], told: str, **options: Any) -> Path:
    """The files of a repository that match, in the cache; options: as huggingface_hub's `snapshot_download` takes
    them. Raises `PathError`, which begins with what is `told`."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
    except Exception as error:  # what a server answers makes httpx, json and the client itself raise almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PathError(f"{told}: {reason}") from error

"""Checks of a verb's `out` before it works for hours: it must be free or ours, and not an input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.files import FolderKind, PathError, require_replaceable

from ..files.ownership import Inputs, require_apart
from ..files.writing import check_file, check_results
from .arguments import UserError


def check_out_file(out: Path | str, inputs: Inputs, suffixes: Collection[str] = ()) -> None:
    """Raise `UserError` unless the file `out` can be written; see `writing.atomic_file`. suffixes: the allowed ones;
    empty: all."""
    if suffixes and Path(out).suffix.lower() not in suffixes:
        raise UserError(f"out: {str(out)!r} should end in {', '.join(suffixes)}")
    with told_as_out():
        check_file(out, inputs)


def check_out_results(out: Path | str, names: Iterable[str], inputs: Inputs) -> None:
    """Raise `UserError` unless files of these names can go into the folder `out`; see `writing.results_folder`."""
    with told_as_out():
        check_results(out, names, inputs)


def check_out_folder(out: Path | str, kind: FolderKind | None, inputs: Inputs) -> None:
    """Raise `UserError` unless `out` can become a folder of this kind; see `writing.atomic_folder`."""
    with told_as_out():
        require_apart(Path(out), inputs)
        require_replaceable(Path(out), kind)


@contextmanager
def told_as_out() -> Iterator[None]:
    """Turn a `PathError` of the block into a `UserError` that names the key `out`."""
    try:
        yield
    except PathError as error:
        raise UserError(f"out: {error}") from error


@contextmanager
def writing(key: str, path: Path | str) -> Iterator[None]:
    """Raise `UserError` that names the `key` of the command line if the block cannot write `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written ({error.strerror or error})") from error

"""What a verb is to write, looked at before it works for hours: `out` is free or ours, and none of what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.files.errors import PathError
from tokenizer.files.ownership import Inputs, Kind, require_apart, require_ours
from tokenizer.files.writing import check_file, check_results

from .arguments import UserError


def check_out_file(out: Path | str, inputs: Inputs) -> None:
    """Raise `UserError` unless the file `out` can be written; see `storage.atomic_file`."""
    with told_as_out():
        check_file(out, inputs)


def check_out_results(out: Path | str, names: Iterable[str], inputs: Inputs) -> None:
    """Raise `UserError` unless files of these names can go into the folder `out`; see `storage.results_folder`."""
    with told_as_out():
        check_results(out, names, inputs)


def check_out_folder(out: Path | str, kind: Kind | None, inputs: Inputs) -> None:
    """Raise `UserError` unless `out` can become a folder of this kind; see `storage.atomic_folder`."""
    with told_as_out():
        require_apart(Path(out), inputs)
        require_ours(Path(out), kind)


@contextmanager
def told_as_out() -> Iterator[None]:
    """A refusal names the key of the command line."""
    try:
        yield
    except PathError as error:
        raise UserError(f"out: {error}") from error

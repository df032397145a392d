"""Where shards are: a file, a folder, a pattern, a URL or a Hub id becomes the rows of each split."""

from __future__ import annotations

import glob
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...config import UserError
from ..base import DataConfig, Rows, SplitRows
from ..folders import files_below
from ..hub import offline_if_unreachable, reason_of
from ..reach import check_files, check_folder
from ..sources import is_sheet, open_folder
from ..splits import tell_unused
from ..stamps import size_and_dates, stamp_told
from .reader import shard_rows
from .shard import Shard, attempt

KINDS = (".parquet", ".tar")
PROTOCOLS = ("hf", "http", "https", "s3", "gs", "az")


def open_shards(config: DataConfig) -> SplitRows:
    """The splits of `config.source` by name, from shards that are read where they are, or from a folder of images.

    Raises `UserError` for a source that is missing; opening a split raises it for other files and damaged shards.
    """
    if config.source == "digits":
        raise UserError("data.streaming: the digits are in memory; it is for shards (.parquet, .tar) and folders")
    path = Path(os.path.expanduser(config.source))
    if path.is_dir() and not any(entry.suffix in KINDS and not is_sheet(entry) for entry in files_below(path)):
        return open_folder(path, config)
    found = {split: files for split, files in find_files(config, path).items() if files}
    return {split: partial(open_split, split, files, config) for split, files in found.items()}


def open_split(split: str, files: list[str], config: DataConfig) -> Rows:
    """The rows of a split's shards, which it indexes. Raises `UserError` for files of another kind."""
    kinds = sorted({os.path.splitext(file)[1] for file in files})
    if len(kinds) > 1 or kinds[0] not in KINDS:
        raise UserError(
            f"data.source: the split {split!r} of {config.source} has files of the kind {', '.join(kinds)}; "
            "data.streaming reads .parquet or .tar (not packed), false reads others"
        )
    return shard_rows([shard_at(file) for file in files], config)


def find_files(config: DataConfig, path: Path) -> dict[str, list[str]]:
    """Paths or URLs of each split's shards, sorted by name. Raises `UserError` where there are none."""
    source = config.source
    if "://" in source:
        return {config.split: remote_files(source)}
    if path.is_file():
        return {config.split: [str(path)]}
    if glob.has_magic(source) and not path.exists():
        files = sorted(glob.glob(str(path), recursive=True), key=os.fsencode)
        if not files:
            raise UserError(f"data.source: no file is called like {source}")
        return {config.split: files}
    return resolved(source, path)


def remote_files(source: str) -> list[str]:
    """The files at a URL, which may be a pattern."""
    protocol = urlsplit(source).scheme
    if protocol not in PROTOCOLS or "::" in source:
        raise UserError(f"data.source: {source}: URLs begin with one of {', '.join(PROTOCOLS)}")
    if protocol.startswith("http"):  # which has no patterns
        return [source]
    try:
        files, path = file_system(source)
        path = at_commit(files, path) if protocol == "hf" else path
        found = sorted(files.glob(path)) if glob.has_magic(path) else [path]
    except Exception as error:  # whatever the file system has
        raise UserError(f"data.source: {source} cannot be listed: {reason_of(error)}") from error
    if not found:
        raise UserError(f"data.source: no file is called like {source}")
    return [file if "://" in file else f"{protocol}://{file}" for file in found]


def at_commit(files: Any, path: str) -> str:
    """A path on the Hub at the commit that its branch has now, so that later pushes are not read."""
    from huggingface_hub import HfApi

    place = files.resolve_path(path)
    if not hasattr(place, "repo_id"):  # a bucket, which has no commits
        return path
    api, whole = HfApi(endpoint=files.endpoint, token=files.token), place.unresolve()
    commit = api.repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    repository = whole.removesuffix(place.path_in_repo).rstrip("/").partition("@")[0]
    return f"{repository}@{commit}/{place.path_in_repo}"


def file_system(url: str) -> tuple[Any, str]:
    """The file system that reads a URL, and its name for the file."""
    if url.startswith("http"):
        from .http_files import HttpFiles  # late, as aiohttp takes a while

        return HttpFiles(), url
    import fsspec

    return fsspec.core.url_to_fs(url)


def resolved(source: str, path: Path) -> dict[str, list[str]]:
    """The files of a folder or a Hub id, as `datasets` divides them into splits by their names."""
    import datasets

    try:
        if path.exists():
            check_folder(path)
            builder = datasets.load_dataset_builder(os.path.abspath(path))  # see `sources.tables`
        else:
            with offline_if_unreachable():
                builder = datasets.load_dataset_builder(source)
        check_files(builder, str(path) if path.exists() else source)
    except UserError:
        raise
    except Exception as error:  # see `sources.tables`
        if path.exists():
            raise UserError(f"data.source: {path} cannot be read: {reason_of(error)}") from error
        raise UserError(
            f"data.source={source}: there is no such folder here ({path.absolute()}), and the Hub id '{source}' "
            f"cannot be loaded: {reason_of(error)}"
        ) from error
    given: dict[Any, Any] = getattr(builder.config, "data_files", None) or {}
    if path.is_dir():
        for suffix in KINDS:
            tell_unused(path, suffix, given)
    return {str(split): sorted(map(str, files), key=os.fsencode) for split, files in given.items()}


def shard_at(file: str) -> Shard:
    """A path or URL with the size and stamp that it has now. Raises `UserError`."""
    if "://" not in file:
        facts = attempt(Shard(file, 0), lambda: os.stat(file))
        return Shard(os.path.abspath(file), *size_and_dates(facts))
    files, path = attempt(Shard(file, 0), lambda: file_system(file))
    info = attempt(Shard(path, 0, "", files, file), lambda: files.info(path))
    return Shard(path, int(info["size"]), stamp_told(info, file), files, file)

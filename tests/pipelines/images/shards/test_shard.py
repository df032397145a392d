"""Shards that change while a run reads them: the run ends, and says which shard it was."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from givens.image_files import (
    CHANGED,
    CHANGES,
    KINDS,
    change,
    identities,
    load,
    read_epochs,
    rows_of,
    small_blocks,
    two_files,
    write_shards,
    write_tar,
)

from pipelines.images.shards import places as shard_sources
from pipelines.images.shards import reader as image_shards
from pipelines.images.shards import shard as one_shard
from pipelines.images.stamps import FileChanged


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_ends_the_run(tmp_path, monkeypatch, kind, how):
    """Two epochs of blocks that are not kept, and then none of the other file's images. A changed file is no bad image;
    and a further run has its images."""
    small_blocks(monkeypatch)
    path, other = two_files(tmp_path, kind)
    assert kind == "parquet" or path.stat().st_size == other.stat().st_size
    train = load(path, cache_mb=0, on_error="skip", max_bad_fraction=1.0).train
    assert len(train._rows.blocks) > 5
    read_epochs(train, seed=0)
    change(path, other, how)
    for index in (0, 20, 35):
        with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
            train.pixels([index])
    assert not train.report.problems
    later = load(path, cache_mb=0).train
    expected = later._positions if how == "touched" else 39 - later._positions
    assert identities(later.pixels(range(36))) == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_while_it_is_indexed_ends_the_run(tmp_path, monkeypatch, kind):
    path, other = two_files(tmp_path, kind)
    at_first = shard_sources.shard_at

    def found(file: str) -> Any:
        shard = at_first(file)
        change(path, other, "replaced")
        return shard

    monkeypatch.setattr(shard_sources, "shard_at", found)
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        load(path)
    assert not image_shards.cache_folder().exists()  # no index of one file is kept under the other's stamp


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_rewritten_during_a_read_ends_the_run(tmp_path, monkeypatch, kind):
    """The file is opened, found to be the right one, and then written over."""
    small_blocks(monkeypatch)
    path, other = two_files(tmp_path, kind)
    train = load(path, cache_mb=0).train

    class Rewritten(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            change(path, other, "rewritten")
            return super().read(size)

    monkeypatch.setattr(one_shard.Shard, "open", lambda shard, ahead=0: Rewritten(shard.path))
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        train.pixels([0, 1])


def test_threads_tell_a_changed_shard_among_others(tmp_path, monkeypatch):
    """Many blocks are read at once, of which those of one shard are other ones by now."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(image_shards, "WORKERS", 8)
    write_shards(tmp_path, "tar", rows_of(40), 4)
    train = load(tmp_path, cache_mb=0, on_error="skip").train
    train.pixels(range(36))
    train._rows.read.__self__.cache.clear()
    path = tmp_path / "train-00002-of-00004.tar"
    write_tar(path, rows_of(20)[:10])
    assert identities(train.pixels(range(15))) == train._positions[:15].tolist()
    with pytest.raises(FileChanged, match=f"^{path}: {CHANGED}$"):
        train.pixels(range(36))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_in_an_object_store_ends_the_run(tmp_path, monkeypatch, kind):
    """One that keeps listings and answers from them, as those of `fsspec` do; its ETag is asked after each block."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        cachable, store, pseudo_dirs, listed = False, dict[str, Any](), [""], dict[str, Any]()

        def info(self, path: str, refresh: bool = False, **options: Any) -> dict[str, Any]:
            if refresh or path not in self.listed:
                found = super().info(path)
                self.listed[path] = {**found, "ETag": hashlib.md5(self.cat_file(path)).hexdigest()}
            return self.listed[path]

    small_blocks(monkeypatch)
    store = Store()
    path, other = two_files(tmp_path, kind)
    store.pipe_file(str(path), path.read_bytes())
    monkeypatch.setattr(shard_sources, "file_system", lambda url: (store, str(path)))
    monkeypatch.setattr(shard_sources, "remote_files", lambda url: [url])
    train = load(f"s3://bucket/a.{kind}", cache_mb=0).train
    read_epochs(train, seed=0)
    store.pipe_file(str(path), other.read_bytes())
    with pytest.raises(FileChanged, match=rf"^s3://bucket/a\.{kind}: {CHANGED}$"):
        train.pixels([0])

"""Files are read once, and only regular ones of this folder: links lead nowhere else, and what changes is refused.

Covers: tokenizer/files/opening.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from refusals import refused, tokens_of

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import opening
from tokenizer.files.errors import IntegrityError, PathError
from tokenizer.files.opening import read_bytes, read_json

INDEX, MANIFEST = "model_index.json", "manifest.json"
READ = [INDEX, MANIFEST, "provenance.json", "samples.png", "calibration.json"] + [
    f"{part}/{name}" for part in ("tokenizer", "prior", "background") for name in ("config.json", "model.safetensors")
]

# Links


@pytest.mark.parametrize("name", [*READ, "README.md"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "leads out of the folder" in refused(folder, PathError, folder / name, str(tmp_path)[:40])


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_link_to_a_folder_outside_is_refused(folder, tmp_path, part):
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    assert "leads out" in refused(folder, PathError, folder / part / "config.json")


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, good, tmp_path):
    for name in ("prior/model.safetensors", "samples.png"):
        (folder / name).rename(folder / "moved")
        (folder / name).symlink_to(os.path.relpath(folder / "moved", (folder / name).parent))
        (tmp_path / "latest").symlink_to(folder)
        pipe = ImagePipeline.from_pretrained(tmp_path / "latest")
        assert torch.equal(tokens_of(pipe), tokens_of(ImagePipeline.from_pretrained(good)))
        (tmp_path / "latest").unlink()
        (folder / name).unlink()
        (folder / "moved").rename(folder / name)


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", "nowhere", "itself", "."])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_to_what_is_no_file_are_refused_at_once(folder, name, target):
    path = folder / "prior" / name
    path.unlink()
    path.symlink_to(name if target == "itself" else target)
    assert str(path) in refused(folder / "prior", PathError, load=Prior.from_pretrained)


def as_in_the_cache(folder, cache):
    """The layout of huggingface_hub: links to blobs."""
    repository = cache / "models--me--mosaic"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_links_of_the_cache_are_followed_to_its_blobs_alone(folder, good, tmp_path):
    snapshot = as_in_the_cache(folder, tmp_path)
    assert torch.equal(
        tokens_of(ImagePipeline.from_pretrained(snapshot)), tokens_of(ImagePipeline.from_pretrained(good))
    )
    assert (
        Tokenizer.from_pretrained(snapshot / "tokenizer").grid
        == Tokenizer.from_pretrained(snapshot, subfolder="tokenizer").grid
    )
    other = as_in_the_cache(folder, tmp_path / "other")
    name = "prior/model.safetensors"
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(other / name)  # of another repository, and the same file
    refused(snapshot, PathError, snapshot / name, "leads out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_link_put_there_between_looking_and_opening_is_not_followed(folder, monkeypatch, tmp_path, name, looks):
    """It is looked at three times: whether it is there, when links are resolved, and whether it is a file."""
    path, lstat, seen = folder / "prior" / name, os.lstat, []
    real = os.path.realpath(path)

    def swap(place, **options):
        info = lstat(place, **options)
        if str(place) == real:
            seen.append(place)
            if len(seen) == looks:
                path.rename(tmp_path / "elsewhere")
                path.symlink_to(tmp_path / "elsewhere")
        return info

    monkeypatch.setattr(os, "lstat", swap)
    refused(folder, PathError, path)
    assert path.is_symlink()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/tty", "/dev", "/proc/self/mem", "/nowhere", "a\0b"])
def test_only_regular_files_are_read(opens, path):
    for read in (lambda path: read_bytes(path, 1 << 20), read_json):
        with pytest.raises(PathError):
            read(Path(path))
    assert not [found for found in opens if found.startswith("/dev")], "opening a device may already do something"


# Reading once


def test_every_file_is_opened_once(folder, opens):
    ImagePipeline.from_pretrained(folder)
    names = {Path(name).name for name in READ} | {"README.md"}
    found = Counter(Path(path).name for path in opens if Path(path).name in names)
    assert found == Counter(Path(name).name for name in [*READ, "README.md"])


@pytest.mark.parametrize("name", ["prior/model.safetensors", INDEX, "prior/config.json", "samples.png"])
def test_a_file_that_is_swapped_after_the_manifest_was_read_is_refused(folder, monkeypatch, name):
    descriptor = opening._descriptor

    def swap(path, roots):
        if Path(path) == folder / name:
            data = bytearray((folder / name).read_bytes())
            data[-3] ^= 1
            (folder / name).write_bytes(data)
        return descriptor(path, roots)

    monkeypatch.setattr(opening, "_descriptor", swap)
    assert "sha256 differs" in refused(folder, IntegrityError, folder / name)


def test_a_file_that_grew_after_the_manifest_was_read_is_not_read(folder, monkeypatch):
    descriptor, path = opening._descriptor, folder / "prior" / "model.safetensors"

    def grow(place, roots):
        if Path(place) == path:
            os.truncate(path, 1 << 30)
        return descriptor(place, roots)

    monkeypatch.setattr(opening, "_descriptor", grow)
    assert "the manifest says" in refused(folder, IntegrityError, path, 1 << 30)


@pytest.mark.parametrize(("load", "part"), [(ImagePipeline.from_pretrained, "."), (Prior.from_pretrained, "prior")])
@pytest.mark.parametrize("more", [-4, 4])
def test_a_file_that_shrinks_or_grows_while_it_is_read_is_refused(folder, monkeypatch, load, part, more):
    path, read_into = folder / "prior" / "model.safetensors", opening.ReadOnce.read_into
    size = path.stat().st_size

    def change(self, buffer):
        if self.path == path:
            os.truncate(path, size + more)
        read_into(self, buffer)

    monkeypatch.setattr(opening.ReadOnce, "read_into", change)
    assert str(path) in refused(folder / part, IntegrityError, size, load=load)

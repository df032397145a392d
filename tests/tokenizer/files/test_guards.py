"""What stands between a hostile folder and its reader: the manifest, names, and messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from fuzzing.mutations import CANARIES
from refusals import refused

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    WeightsError,
    one_line,
)
from tokenizer.files.writing import write_json, write_manifest

INDEX, MANIFEST = "model_index.json", "manifest.json"

# The manifest


def test_only_the_very_pipeline_is_loaded_where_its_sha256_is_given(folder):
    right = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert ImagePipeline.from_pretrained(folder, expected_sha256=right).prior
    assert ImagePipeline.from_pretrained(folder, expected_sha256=right.upper()).prior
    config = json.loads((folder / "prior/config.json").read_text())
    write_json(folder / "prior/config.json", {**config, "dropout": 0.5})
    write_manifest(folder)
    assert ImagePipeline.from_pretrained(folder).prior
    refused(folder, IntegrityError, folder / MANIFEST, right, expected_sha256=right)


@pytest.mark.parametrize(
    "entry",
    [
        {"sha256": "0" * 63, "size": 1},
        {"sha256": 3, "size": 1},
        {"sha256": "0" * 64, "size": 1.0},
        {"sha256": "0" * 64, "size": True},
        {"sha256": "0" * 64, "size": 1, "mode": 0},
        None,
        [],
    ],
)
def test_entries_of_another_form(folder, entry):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["README.md"] = entry
    write_json(folder / MANIFEST, manifest)
    assert "README.md" in refused(folder, FormatError, MANIFEST)


@pytest.mark.parametrize("name", ["./README.md", "tokenizer//config.json", "C:README.md", "prior/", "prior"])
def test_files_under_other_names(folder, name):
    shutil.copy(folder / "README.md", folder / "C:README.md")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["README.md"]
    write_json(folder / MANIFEST, manifest)
    assert repr(name) in refused(folder, PathError)


def test_a_large_file_that_is_no_part_of_the_pipeline_is_not_hashed(folder):
    (folder / "large").touch()
    os.truncate(folder / "large", 2 << 30)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["large"] = {"sha256": "0" * 64, "size": 2 << 30}
    write_json(folder / MANIFEST, manifest)
    assert "at most" in refused(folder, LimitError, folder)


def test_weights_have_at_most_the_bytes_that_are_allowed(folder):
    size = max((folder / part / "model.safetensors").stat().st_size for part in ("tokenizer", "prior", "background"))
    assert ImagePipeline.from_pretrained(folder, max_bytes=size).prior
    refused(folder, LimitError, "model.safetensors", size, size - 1, max_bytes=size - 1)


def test_a_sparse_file_costs_nothing(folder):
    path = folder / "prior" / "model.safetensors"
    os.truncate(path, 15 << 30)
    assert str(15 << 30) in refused(folder, IntegrityError, path)
    assert "bytes of tensors" in refused(folder / "prior", WeightsError, path, load=Prior.from_pretrained)


# Names and messages


def test_a_message_is_one_printable_line():
    error = ConfigError("a\x1b[2Jb\nc\u202ed\ud800" + "x" * 5000)
    assert str(error).isprintable() and len(str(error)) <= 900 and str(error).startswith(r"a\x1b[2Jb\nc\u202ed\ud800x")
    assert one_line("grüße, 日本語 🦑") == "grüße, 日本語 🦑"


@pytest.mark.parametrize("label", ["\x1b[31mcat", "a\nb", "\ud800", "\u202etac", "x" * 201])
def test_labels_that_a_terminal_would_obey(folder, label):
    index = json.loads((folder / INDEX).read_text())
    write_json(folder / INDEX, {**index, "labels": [label, "b", "c"]})
    write_manifest(folder)
    assert "labels" in refused(folder, ConfigError, INDEX)


def test_labels_may_be_in_every_script(folder, tmp_path):
    pipe = ImagePipeline.from_pretrained(folder)
    pipe.labels = ["кошка", "犬", "👩\u200d🚀"]
    pipe.save_pretrained(tmp_path / "saved")
    assert ImagePipeline.from_pretrained(tmp_path / "saved").labels == pipe.labels


@pytest.mark.parametrize(
    ("facts", "needle"),
    [
        ({"data": 3}, "data: "),
        ({"data": {"source": ["x"]}}, "data.source"),
        ({"tokenizer": {"evaluation": 3}}, "tokenizer.evaluation"),
        ({"evaluation": {"psnr": [1]}}, "evaluation.psnr"),
        ({"prior": {"steps": 3}}, "prior.steps"),
        ({"prior": {"steps": 3, "minutes": "few"}}, "prior.steps"),
    ],
)
def test_provenance_that_the_card_could_not_show(folder, facts, needle):
    write_json(folder / "provenance.json", facts)
    write_manifest(folder)
    assert needle in refused(folder, FormatError, folder / "provenance.json")


def test_text_among_numbers_of_a_calibration_takes_no_memory(folder):
    """numpy would make room for the longest text in every place: here 10 GB."""
    found = json.loads((folder / "calibration.json").read_text())
    found["scores"]["nll"] = ["x" * 100_000, *[""] * 25_000]
    write_json(folder / "calibration.json", found)
    write_manifest(folder)
    assert "scores.nll" in refused(folder, FormatError, folder / "calibration.json")


def test_files_that_may_hold_code_are_named_in_one_line_and_not_opened(folder, opens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImagePipeline.from_pretrained(folder)
    for name in CANARIES:
        (folder / "prior" / name).write_bytes(b"?")
    (folder / "\x1b[2J.py").write_bytes(b"?")
    write_manifest(folder)  # which lists them
    opens.clear()
    for source, load in ((folder, ImagePipeline.from_pretrained), (folder / "prior", Prior.from_pretrained)):
        with pytest.warns(UserWarning) as caught:
            load(source)
        lines = [str(warning.message) for warning in caught]
        assert len(lines) == 1 and lines[0].isprintable() and "never opened" in lines[0]
    assert f"and {len(CANARIES)} more" in str(lines) or f"and {len(CANARIES) - 1} more" in str(lines)
    assert not {Path(path).name for path in opens} & set(CANARIES)


@pytest.mark.parametrize(
    "error", [RuntimeError("peer closed\nconnection"), KeyError("sha"), UnicodeDecodeError("a", b"", 0, 1, "b")]
)
def test_whatever_a_hub_answers_is_an_error_of_ours(monkeypatch, error):
    """The client passes on what its libraries raise at answers that make no sense."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("tokenizer.files.hub.snapshot_download", fails)
    with pytest.raises(PathError, match="as a Hub id it could not be fetched") as caught:
        Tokenizer.from_pretrained("me/mine")
    assert str(caught.value).isprintable()

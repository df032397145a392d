"""Saving and loading: what is saved is what is loaded, and a folder is replaced whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import files_in
from small_pipelines import LABELS, PARTS, PROVENANCE, every_pair, make_pipeline

from pipelines import ImagePipeline
from tokenizer.files import PathError


def names_in(folder):
    return set(files_in(Path(folder)))


@every_pair
def test_what_is_saved_is_what_is_loaded(tokenizer, prior, tmp_path):
    pipe = make_pipeline(tokenizer, prior, sampler={"top_k": 7})
    pipe.save_pretrained(tmp_path / "pipe")
    assert names_in(tmp_path / "pipe") == {"model_index.json", "manifest.json", "README.md", *PARTS}
    loaded = ImagePipeline.from_pretrained(str(tmp_path / "pipe"))
    assert type(loaded.tokenizer) is type(pipe.tokenizer) and type(loaded.prior) is type(pipe.prior)
    assert loaded.labels == LABELS and loaded.sampler == pipe.sampler and loaded.provenance == {}
    assert not loaded.tokenizer.training and not loaded.prior.training
    one, other = pipe(3, "dog", seed=0, output_type="pt"), loaded(3, "dog", seed=0, output_type="pt")
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index == {
        "_class_name": "ImagePipeline",
        "format_version": 1,
        "tokenizer": tokenizer,
        "prior": prior,
        "labels": LABELS,
        "sampler": pipe.sampler.to_dict(),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_saving_twice_writes_the_same_bytes(tmp_path):
    pipe = make_pipeline()
    pipe.provenance, pipe.sample_grid = PROVENANCE, pipe.sample_picture(4)
    pipe.save_pretrained(tmp_path / "one")
    loaded = ImagePipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two") >= {"provenance.json", "samples.png"}
    for name in names_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_older_pipeline_is_replaced_whole(tmp_path):
    old, new = make_pipeline(), make_pipeline(prior="marginal")
    old.provenance = PROVENANCE
    old.save_pretrained(tmp_path / "pipe", sample_grid=old.sample_picture(4))
    new.save_pretrained(tmp_path / "pipe")
    assert names_in(tmp_path / "pipe") == {"model_index.json", "manifest.json", "README.md", *PARTS}
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").prior.name == "marginal"


def test_failed_save_leaves_the_older_pipeline(tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    before = pipe(2, seed=0).tokens

    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(type(pipe.prior), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        make_pipeline().save_pretrained(tmp_path / "pipe")
    assert torch.equal(ImagePipeline.from_pretrained(tmp_path / "pipe")(2, seed=0).tokens, before)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(PathError, match=name):
            make_pipeline().save_pretrained(tmp_path / name)
    assert names_in(tmp_path) == {"mine/thesis.tex", "file"}
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("labels", [LABELS, []])
def test_push_to_hub_uploads_a_folder_that_loads(labels, monkeypatch):
    calls = []

    def push_folder(folder, repo_id, **options):
        loaded = ImagePipeline.from_pretrained(folder)
        calls.append((repo_id, names_in(folder), loaded(2, seed=0).tokens, options))
        return "a commit"

    monkeypatch.setattr("pipelines.hub.require_reachable", lambda repo_id: None)
    monkeypatch.setattr("pipelines.hub.push_folder", push_folder)
    pipe = make_pipeline(labels=labels)
    pipe.provenance = PROVENANCE
    assert pipe.push_to_hub("me/mosaic", token="hf_secret", private=True, commit_message="first") == "a commit"
    ((repo_id, files, tokens, options),) = calls
    asked = {"token": "hf_secret", "private": True, "commit_message": "first"}
    assert (repo_id, options) == ("me/mosaic", {**asked, "revision": None, "create_pr": False})
    assert files == {"model_index.json", "manifest.json", "README.md", "provenance.json", "samples.png", *PARTS}
    assert torch.equal(tokens, pipe(2, seed=0).tokens)

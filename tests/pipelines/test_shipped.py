"""The pipelines that come with the package: small, complete, and usable without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import needs_digits
from safetensors import safe_open

from pipelines import ImagePipeline, train_prior
from pipelines.__main__ import main as smalti
from pipelines.provenance import tokenizer_folder
from pipelines.saving import SHIPPED, list_shipped, resolve_shipped
from tokenizer.files import PathError

MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def pipe():
    return ImagePipeline.from_pretrained("digits")


@pytest.mark.parametrize("name", list_shipped())
def test_it_is_small_in_bfloat16_and_names_no_local_folder(name):
    folder = SHIPPED / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES
    for part in ("tokenizer", "prior"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            types = {file.get_slice(key).get_dtype() for key in file.keys() if "quantizer" not in key}  # noqa: SIM118
        assert types == {"BF16"}
    assert "## Measured" in (folder / "README.md").read_text()
    assert json.loads((folder / "provenance.json").read_text())["local"] is False


def test_samples_have_the_requested_class(pipe):
    """According to the prior itself: the requested class is the likeliest of the ten for most samples."""
    labels = [k % 10 for k in range(40)]
    tokens = pipe(num_images=40, labels=labels, seed=0, progress=False).tokens
    scores = torch.stack([pipe.prior.log_prob(tokens, torch.full((40,), label)) for label in range(10)])
    assert (scores.argmax(0) == torch.tensor(labels)).float().mean() >= 0.9


def test_it_completes_scores_and_detects_noise(pipe):
    images = pipe(num_images=4, labels=7, seed=1, progress=False).images
    known = np.arange(28)[:, None].repeat(28, 1) < 14
    completed = pipe.complete(images, known, labels=7, seed=2, output_type="np", progress=False)
    whole = pipe.complete(images, known, labels=1, seed=2, output_type="np", progress=False)
    assert (completed.images[:, :14] == whole.images[:, :14]).all() and (completed.images != whole.images).any()
    noise = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    assert pipe.log_prob(images, 7).min() > pipe.log_prob(noise, 7).max()
    assert (pipe.anomaly_score(noise, p_values=True) < 0.01).all()


@needs_digits
def test_held_out_digits_are_normal(pipe):
    """Digits not used in calibration: more than 10 of 60 below p = 0.05 happens once in ten thousand times."""
    from pipelines.images import DataConfig, load_images

    images = load_images(DataConfig(source="digits")).held_out
    p_values = pipe.anomaly_score(images.pixels(np.arange(1, 121, 2)), p_values=True)
    assert (p_values <= 0.05).sum() <= 10


def test_a_local_folder_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_shipped("digits") == SHIPPED / "digits" and resolve_shipped(Path("digits")) == Path("digits")
    Path("digits").mkdir()
    assert resolve_shipped("digits") == "digits"
    with pytest.raises(PathError, match="model_index.json"):
        ImagePipeline.from_pretrained("digits")
    with pytest.raises(PathError, match="'digitz'.* digits, garments, sprites$"):
        ImagePipeline.from_pretrained("digitz")


def test_verbs_take_the_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smalti(["generate", "pipeline=digits", "num_images=2", "out=grid.png"])
    assert Path("grid.png").is_file()
    with pytest.raises(SystemExit):
        smalti(["calibrate", "pipeline=digits"])  # it would write into the package
    assert "pipeline" in capsys.readouterr().err


@needs_digits
def test_its_parts_and_its_data_are_found_by_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smalti(["encode", "tokenizer=digits", "data.limit=40", "out=tokens"])
    assert Path("tokens/meta.json").is_file()
    assert train_prior.defaults({"init": "digits"})["model"]["dim"] == 64  # a prior can start from it


def test_the_tokenizer_is_found_in_a_run_or_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED / "digits", "runs/gpt/pipeline")
    assert tokenizer_folder("runs/gpt") == tokenizer_folder("runs/gpt/pipeline") == "runs/gpt/pipeline/tokenizer"
    assert tokenizer_folder("runs/gpt/pipeline/tokenizer") == "runs/gpt/pipeline/tokenizer"
    assert tokenizer_folder("runs") == "runs"

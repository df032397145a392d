"""The model card: a description with measured figures for people, and a header for the Hub."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from small_pipelines import PROVENANCE, make_pipeline

from pipelines import ImagePipeline
from pipelines.images.origin import shareable
from pipelines.saving import save_again

EVALUATION = {
    "psnr": 22.512345678,
    "num_images": 400,
    "ssim": 0.91,
    "bits_per_token": 3.032,
    "bits_per_dim": 2.25,
    "fid": 12.5,
    "feature_space": "classifier-64",
    "frechet_distance": 4.25,
    "codebook_usage": 0.9,
    "class_agreement": None,
}


def card_of(folder: Any, grid: bool = False, facts: dict[str, Any] | None = None, **pipeline: Any) -> ModelCard:
    """Save a pipeline and read its card with huggingface_hub."""
    pipe = make_pipeline(**pipeline)
    pipe.provenance = facts or {}
    picture = np.zeros((8, 8, 3), np.uint8) if grid else None
    pipe.save_pretrained(folder, sample_grid=picture)
    return ModelCard.load(folder / "README.md")


def rows_in(card: ModelCard) -> dict[str, tuple[str, str]]:
    """Return value and comparison of each figure in the table."""
    rows = re.findall(r"^\| (?!figure|---)(.+?) \| (.+?) \| (.*) \|$", card.text, re.M)
    return {name.partition(" (")[0]: (value, beside.strip()) for name, value, beside in rows}


def results_of(card: ModelCard) -> dict[str, Any]:
    """Return the figures by type, as huggingface_hub reads them."""
    return {each.metric_type: each for each in card.data.eval_results or []}


# For people


def test_the_table_has_all_measured_figures_and_no_others(tmp_path):
    assert rows_in(card_of(tmp_path / "a")) == {} and "Measured" not in card_of(tmp_path / "a").text
    facts = {**PROVENANCE, "prior": {**PROVENANCE["prior"], "images": {"held_out": 70}, "best_step": 12}}
    facts["prior"]["evaluation"] = {"bits_per_token": 3.125, "validation_bits_per_token": 3.0}
    trained = {
        "training of the tokenizer": ("1234 steps, 1.5 minutes", ""),
        "training of the prior": ("5678 steps, 2.5 minutes", "weights of step 12, best on validation images"),
    }
    card = card_of(tmp_path / "b", facts=facts)
    assert rows_in(card) == {
        "PSNR of reconstructions": ("21.75 dB", ""),
        "codebook use": ("87.5%", ""),
        "validation bits per token": ("3.000", ""),
        "bits per token": ("3.125", ""),
        **trained,
    }
    assert "`digits`" in card.text
    found = rows_in(card_of(tmp_path / "c", facts={**facts, "evaluation": EVALUATION}))
    assert found.items() >= {"PSNR of reconstructions": ("22.51 dB", "400 images"), **trained}.items()
    assert len(found) == 10  # class agreement is missing


def test_a_limit_in_minutes_that_cut_training_is_on_the_card(tmp_path):
    cut = {**PROVENANCE["tokenizer"], "steps": 219, "cut": {"minutes": 1.2, "steps": 2800}}
    rows = rows_in(card_of(tmp_path / "cut", facts={**PROVENANCE, "tokenizer": cut}))
    assert rows["training of the tokenizer"] == ("stopped by train.minutes=1.2 after 219 of 2,800 steps", "")
    assert rows["training of the prior"] == ("5678 steps, 2.5 minutes", "")


def test_the_card_describes_the_pipeline_with_code_that_runs(tmp_path):
    pipe, card = make_pipeline(), card_of(tmp_path / "pipe")
    assert "8 x 12 grey" in card.text and "3 classes (cat, dog, eel)" in card.text and "2 x 3 ids of 32" in card.text
    for part in (pipe.tokenizer, pipe.prior):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    names: dict = {}
    exec(code.replace("this folder or Hub id", (tmp_path / "pipe").as_posix()), names)
    assert len(names["images"]) == 4


@pytest.mark.parametrize(
    ("sampler", "shown", "off"),
    [
        ({"guidance_scale": 3.0, "top_p": 0.9}, "`top_p=0.9, guidance_scale=3.0`", True),
        ({}, None, False),
    ],
)
def test_the_card_says_which_sampling_settings_are_saved(tmp_path, sampler, shown, off):
    text = card_of(tmp_path / "pipe", sampler=sampler).text
    assert ("Samples by default" in text) == (shown is not None) and (shown or "") in text
    assert ("`guidance_scale=1` turns it off" in text) == off


def test_a_sample_grid_is_on_the_card_and_is_loaded(tmp_path):
    assert "samples.png" not in card_of(tmp_path / "without").text
    pipe = make_pipeline()
    grid = pipe.sample_picture(6)
    assert grid.dtype == np.uint8 and np.array_equal(grid, pipe.sample_picture(6))
    pipe.save_pretrained(tmp_path / "pipe", sample_grid=grid)
    assert "](samples.png)" in (tmp_path / "pipe" / "README.md").read_text()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pipe" / "samples.png")), grid)
    assert np.array_equal(ImagePipeline.from_pretrained(tmp_path / "pipe").sample_grid, grid)


def test_unknown_figures_are_kept_but_not_shown(tmp_path):
    facts = {**PROVENANCE, "evaluation": {**EVALUATION, "texture_flat": 2.5, "copying_z": 1.0}}
    card_of(tmp_path / "p", facts=facts)
    save_again(ImagePipeline.from_pretrained(tmp_path / "p"), tmp_path / "p")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert "psnr" in results_of(card) and not re.search("texture|copying", card.text)
    assert ImagePipeline.from_pretrained(tmp_path / "p").provenance == facts


@pytest.mark.parametrize(
    ("url", "linked"),
    [
        ("http://wandb.example.org:8080/me/it/runs/7", True),
        ("https://me:key@wandb.ai/me/runs/0a", False),
        ("https://wandb.ai/me/runs/0a?apiKey=secret", False),
        ("https://wandb.ai/a) ![](https://x.y/z", False),
    ],
)
def test_only_plain_addresses_of_runs_are_linked(url, linked, tmp_path):
    facts = {**PROVENANCE, "prior": {**PROVENANCE["prior"], "run_url": url}}
    text = card_of(tmp_path / "p", facts=facts).text
    assert (f"Training runs: [prior]({url})." in text) == linked and ("Training runs" in text) == linked


# For the Hub


@pytest.mark.parametrize("classes", [0, 3])
def test_figures_come_back_as_the_hubs_results(classes, tmp_path):
    facts = {**PROVENANCE, "evaluation": EVALUATION}
    card = card_of(tmp_path / "p", facts=facts, labels=["cat", "dog", "eel"][:classes])
    found = results_of(card)
    names = ("psnr", "ssim", "bits_per_token", "bits_per_dim", "fid", "frechet_distance")
    assert {name: each.metric_value for name, each in found.items()} == pytest.approx(
        {name: EVALUATION[name] for name in names}, rel=1e-5
    )
    assert found["psnr"].task_type == "image-to-image"
    assert found["fid"].task_type == f"{'class-conditional' if classes else 'unconditional'}-image-generation"
    assert all((each.dataset_type, each.dataset_split) == ("digits", "test") for each in found.values())
    assert found["frechet_distance"].metric_name == "Frechet distance [classifier-64], held out"
    written = yaml.safe_load((tmp_path / "p" / "README.md").read_text().split("---")[1])["model-index"]
    again = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert card.data.model_name == "vqvae + gpt" and again == written  # nothing is lost
    assert results_of(card_of(tmp_path / "q")) == {}


def test_a_bound_on_the_likelihood_is_marked(tmp_path):
    facts = {**PROVENANCE, "evaluation": EVALUATION}
    for exact in (True, False):
        card = card_of(tmp_path / str(exact), facts=facts, prior="masked", exact=exact)
        bound, results = "" if exact else "at most ", results_of(card)
        assert rows_in(card)["bits per dim"][0] == f"{bound}2.250" and rows_in(card)["PSNR of reconstructions"]
        assert ("(upper bound)" in results["bits_per_dim"].metric_name) != exact
        assert "(upper bound)" not in results["psnr"].metric_name


@pytest.mark.parametrize(
    ("data", "local", "datasets", "kind"),
    [
        ({"source": "ylecun/mnist"}, False, ["ylecun/mnist"], "ylecun/mnist"),
        ({"source": "/home/me/photos"}, False, None, "imagefolder"),
        ({"source": "my/photos"}, True, None, "imagefolder"),
        ({"source": "https://example.org/a.tar?key=secret"}, False, None, "imagefolder"),
    ],
)
def test_only_data_sets_on_the_hub_are_named(data, local, datasets, kind, tmp_path):
    facts = {**PROVENANCE, "evaluation": EVALUATION, "local": local, "data": data, "tokens": "/home/me/tokens"}
    card = card_of(tmp_path / "p", facts=facts)
    assert card.data.datasets == datasets
    assert {each.dataset_type for each in card.data.eval_results} == {kind}
    assert not re.search("/home|photos|secret", (tmp_path / "p" / "README.md").read_text())
    assert "/home" not in str(shareable(facts))


@pytest.mark.parametrize("classes", [0, 2])
def test_the_header_has_library_task_tags_licence_and_a_picture(classes, tmp_path):
    card = card_of(tmp_path / "p", grid=True, facts={"license": "cc-by-4.0"}, labels=["cat", "dog"][:classes])
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("smalti", "cc-by-4.0")
    assert data.get("pipeline_tag") == (None if classes else "unconditional-image-generation")
    assert {"vqvae", "gpt", "class-conditional" if classes else "unconditional"} <= set(data["tags"])
    (widget,) = data["widget"]
    assert (tmp_path / "p" / widget["output"]["url"]).is_file() and widget["text"]
    for licence in ("my: licence", "a\nb", 3):
        assert card_of(tmp_path / "q", facts={"license": licence}).data.license is None
    assert "widget" not in card_of(tmp_path / "q").data.to_dict()

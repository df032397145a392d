"""The model card: a description with measured figures for people, and a header for the Hub."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from small_pipelines import PROVENANCE, make_pipeline

from pipelines.images.origin import shareable

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
    facts["tokenizer"] = {**PROVENANCE["tokenizer"], "steps": 219, "cut": {"minutes": 1.2, "steps": 2800}}
    trained = {
        "training of the tokenizer": ("stopped by train.minutes=1.2 after 219 of 2,800 steps", ""),
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


def test_the_card_describes_the_pipeline_with_code_that_runs(tmp_path):
    card = card_of(tmp_path / "pipe", sampler={"guidance_scale": 3.0, "top_p": 0.9})
    assert "8 x 12 grey" in card.text and "3 classes (cat, dog, eel)" in card.text and "2 x 3 ids of 32" in card.text
    assert "`top_p=0.9, guidance_scale=3.0`" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    names: dict = {}
    exec(code.replace("this folder or Hub id", (tmp_path / "pipe").as_posix()), names)
    assert len(names["images"]) == 4


def test_only_plain_addresses_of_runs_are_linked(tmp_path):
    for url, linked in (("http://wandb.example.org:80/me/runs/7", True), ("https://me:key@wandb.ai/me/runs/0a", False)):
        facts = {**PROVENANCE, "prior": {**PROVENANCE["prior"], "run_url": url}}
        assert (f"[prior]({url})" in card_of(tmp_path / "p", facts=facts).text) == linked


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
    assert found["fid"].task_type == f"{'class-conditional' if classes else 'unconditional'}-image-generation"
    assert all((each.dataset_type, each.dataset_split) == ("digits", "test") for each in found.values())
    written = yaml.safe_load((tmp_path / "p" / "README.md").read_text().split("---")[1])["model-index"]
    again = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert card.data.model_name == "vqvae + gpt" and again == written  # nothing is lost


def test_a_bound_on_the_likelihood_is_marked(tmp_path):
    facts = {**PROVENANCE, "evaluation": EVALUATION}
    for exact in (True, False):
        card = card_of(tmp_path / str(exact), facts=facts, prior="masked", exact=exact)
        bound, results = "" if exact else "at most ", results_of(card)
        assert rows_in(card)["bits per dim"][0] == f"{bound}2.250"
        assert ("(upper bound)" in results["bits_per_dim"].metric_name) != exact


@pytest.mark.parametrize(
    ("data", "local", "datasets", "kind"),
    [
        ({"source": "ylecun/mnist"}, False, ["ylecun/mnist"], "ylecun/mnist"),
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
    assert "](samples.png)" in card.text
    assert (tmp_path / "p" / widget["output"]["url"]).is_file() and widget["text"]
    assert card_of(tmp_path / "q", facts={"license": "my: licence"}).data.license is None

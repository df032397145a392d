"""The header of a card, as huggingface_hub reads it: licence, data, pictures, and figures that come back as results."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from small_pipelines import PROVENANCE, make_pipeline

EVALUATION = {
    "psnr": 22.512345678,
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
    """The card of a saved pipeline, read by huggingface_hub."""
    pipe = make_pipeline(**pipeline)
    pipe.provenance = facts or {}
    picture = np.zeros((8, 8, 3), np.uint8) if grid else None
    pipe.save_pretrained(folder, sample_grid=picture)
    return ModelCard.load(folder / "README.md")


def results_of(card: ModelCard) -> dict[str, Any]:
    """Figures by their type, as the Hub's library reads them."""
    return {each.metric_type: each for each in card.data.eval_results or []}


@pytest.mark.parametrize("classes", [0, 3])
def test_figures_come_back_as_the_hubs_results(classes: int, tmp_path) -> None:
    facts = {**PROVENANCE, "evaluation": EVALUATION}
    card = card_of(tmp_path / "p", facts=facts, labels=["cat", "dog", "eel"][:classes])
    found = results_of(card)
    expected = {name: EVALUATION[name] for name in ("psnr", "ssim", "bits_per_token", "bits_per_dim", "fid")}
    expected["frechet_distance"] = EVALUATION["frechet_distance"]
    assert {name: each.metric_value for name, each in found.items()} == pytest.approx(expected, rel=1e-5)
    assert found["psnr"].task_type == "image-to-image"
    assert found["fid"].task_type == f"{'class-conditional' if classes else 'unconditional'}-image-generation"
    assert all((each.dataset_type, each.dataset_split) == ("digits", "test") for each in found.values())
    assert found["frechet_distance"].metric_name == "Frechet distance [classifier-64], held out"
    written = yaml.safe_load((tmp_path / "p" / "README.md").read_text().split("---")[1])["model-index"]
    assert card.data.model_name == "vqvae + gpt" and len(written) == 1
    again = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert again == written  # nothing is lost on the way


def test_a_bound_is_called_one_and_no_figure_is_made_up(tmp_path) -> None:
    facts = {**PROVENANCE, "evaluation": EVALUATION}
    names = {name: each.metric_name for name, each in results_of(card_of(tmp_path / "a", facts=facts)).items()}
    assert names["bits_per_dim"] == "bits per dim, held out"
    bounded = results_of(card_of(tmp_path / "b", facts=facts, prior="masked", exact=False))
    assert bounded["bits_per_dim"].metric_name == "bits per dim (upper bound), held out"
    assert bounded["psnr"].metric_name == names["psnr"]
    assert results_of(card_of(tmp_path / "c")) == {} and card_of(tmp_path / "d").data.get("model-index") is None


@pytest.mark.parametrize(
    ("data", "datasets", "kind"),
    [
        ({"source": "ylecun/mnist"}, ["ylecun/mnist"], "ylecun/mnist"),
        ({"source": "digits"}, None, "digits"),
        ({"source": "/home/me/photos"}, None, "imagefolder"),
        ({"source": "my/photos", "local": True}, None, "imagefolder"),
        ({"source": "https://example.org/a.tar?key=secret"}, None, "imagefolder"),
        ({"source": "(not known of imported weights: give data.source)"}, None, "imagefolder"),
    ],
)
def test_data_are_named_where_they_are_on_the_hub_and_no_path_is(data, datasets, kind, tmp_path) -> None:
    facts = {**PROVENANCE, "evaluation": EVALUATION, "local": data.pop("local", False), "data": data}
    card = card_of(tmp_path / "p", facts=facts)
    assert card.data.datasets == datasets
    assert {each.dataset_type for each in card.data.eval_results} == {kind}
    told = (tmp_path / "p" / "README.md").read_text()
    assert not re.search("/home|photos|secret", told)


def test_a_folder_that_is_called_as_a_data_set_is_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ylecun" / "mnist").mkdir(parents=True)
    card = card_of(tmp_path / "p", facts={**PROVENANCE, "data": {"source": "ylecun/mnist"}})
    assert card.data.datasets is None


@pytest.mark.parametrize("classes", [0, 2])
def test_library_task_tags_licence_and_a_picture(classes: int, tmp_path) -> None:
    labels = ["cat", "dog"][:classes]
    card = card_of(tmp_path / "p", grid=True, facts={"license": "cc-by-4.0"}, labels=labels)
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("smalti", "cc-by-4.0")
    assert data.get("pipeline_tag") == (None if classes else "unconditional-image-generation")
    assert {"vqvae", "gpt", "class-conditional" if classes else "unconditional"} <= set(data["tags"])
    (widget,) = data["widget"]
    assert (tmp_path / "p" / widget["output"]["url"]).is_file() and widget["text"]
    plain = card_of(tmp_path / "q").data.to_dict()
    assert "widget" not in plain and "license" not in plain


@pytest.mark.parametrize("licence", ["my: licence", "a\nb", 3, ["x"]])
def test_what_is_no_licence_is_not_written(licence, tmp_path) -> None:
    assert card_of(tmp_path / "p", facts={"license": licence}).data.license is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://wandb.ai/me/smalti/runs/0a1b", True),
        ("http://wandb.example.org:8080/me/it/runs/7", True),
        ("https://me:key@wandb.ai/me/runs/0a", False),
        ("https://wandb.ai/me/runs/0a?apiKey=secret", False),
        ("/home/me/runs/wandb/offline-run-1", False),
        ("javascript:alert(1)", False),
        ("https://wandb.ai/a) ![](https://x.y/z", False),
        (["https://wandb.ai/me/smalti/runs/0a1b"], False),
    ],
)
def test_a_run_is_linked_by_its_address_alone(url, shown, tmp_path) -> None:
    facts = {**PROVENANCE, "prior": {**PROVENANCE["prior"], "run_url": url}}
    text = card_of(tmp_path / "p", facts=facts).text
    assert (f"Training runs: [prior]({url})." in text) == shown and ("Training runs" in text) == shown

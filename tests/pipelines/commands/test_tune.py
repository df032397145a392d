"""`smalti tune`: it only sees validation images, finds the best settings, and stores them; and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from command import fails
from folders import contents
from givens.stripes import write_set
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline, options
from pipelines.__main__ import main
from pipelines.commands import tune
from pipelines.images import DataConfig, load_images
from pipelines.metrics.frechet import frechet_distance
from prior.masked import MaskedOptions
from prior.sampling import SamplingOptions

SETTINGS = ("num_samples=60", "feature_steps=3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images of two classes, 60 of them for validation; and untrained pipelines."""
    root = tmp_path_factory.mktemp("world")
    config = write_set(root / "images", (8, 8), per_class=75).model_copy(update={"validation_fraction": 0.2})
    torch.manual_seed(0)
    for name, parts, classes in (("gpt", ("vqvae", "marginal"), ["kind0", "kind1"]), ("bare", ("pixels", "made"), [])):
        pipe = make_pipeline(*parts, size=(8, 8), labels=classes, sampler={"temperature": 0.9})
        pipe.provenance = {**facts_of(config), "evaluation": {"psnr": 9.0, "recall": 0.5}}
        pipe.save_pretrained(root / name)
    return root


def facts_of(config):
    """The provenance of a pipeline that was trained on these images."""
    return {"data": config.model_dump(mode="json"), "splits": load_images(config, check=False).facts.to_dict()}


class Sealed:
    """Fails when images are accessed."""

    def __getattr__(self, name):
        raise AssertionError(f"held-out images were asked for {name!r}")


def test_settings_are_chosen_on_validation_images_alone_and_stored(world, tmp_path, capsys, monkeypatch):
    """No held-out image is accessed, and the classifier sees training images only."""
    shutil.copytree(world / "gpt", tmp_path / "pipeline")
    before, seen = ImagePipeline.from_pretrained(world / "gpt"), []
    real, train = options.load_images, tune.feature_space
    monkeypatch.setattr(options, "load_images", lambda *given, **how: replace(real(*given, **how), held_out=Sealed()))
    monkeypatch.setattr(tune, "feature_space", lambda *given: seen.append(given) or train(*given))
    main(["tune", f"pipeline={tmp_path}/pipeline", *SETTINGS])
    printed, facts = capsys.readouterr().out, json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    images = load_images(DataConfig(**before.provenance["data"]))
    assert torch.equal(seen[0][0].pixels(range(240)), images.train.pixels(range(240)))
    assert torch.equal(seen[0][1].pixels(range(60)), images.validation.pixels(range(60)))
    assert facts["validation_images"] == facts["num_samples"] == 60

    space = train(*seen[0])
    samples = tune.draw_samples(before, tune.choose_given(before, {}, images.train, 60), 0)
    apart = frechet_distance(samples.rows(space, 60), space(images.validation.batch(range(60))))
    assert facts["frechet_distance_before"] == pytest.approx(apart), "sample k of seed k against validation images"
    best = min(facts["trials"], key=lambda row: row["frechet_distance"])
    assert facts["frechet_distance"] == best["frechet_distance"]
    assert {row["setting"] for row in facts["trials"]} == {"before", "guidance", "temperature", "top-p"}
    assert all(f"{row['frechet_distance']:.3f}" in printed for row in facts["trials"])
    after = ImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert after.sampler == SamplingOptions(**best["options"]) != before.sampler
    assert after.provenance["tuning"] == {name: value for name, value in facts.items() if name != "trials"}
    assert after.provenance["evaluation"] == {"psnr": 9.0}, "figures of other samples are gone"
    assert facts["settings"] in (tmp_path / "pipeline" / "README.md").read_text()
    with Image.open(tmp_path / "tuning" / "tuning.png") as picture:
        assert picture.width > 900


def test_without_classes_there_is_no_guidance_and_without_store_no_change(world, tmp_path):
    shutil.copytree(world / "bare", tmp_path / "pipeline")
    before = contents(tmp_path / "pipeline")
    given = ("data.label_column=null", "store=false", f"out={tmp_path}/found")
    main(["tune", f"pipeline={tmp_path}/pipeline", *SETTINGS, *given])
    facts = json.loads((tmp_path / "found" / "tuning.json").read_text())
    assert before == contents(tmp_path / "pipeline")
    assert facts["feature_space"] == "random-conv-64"
    assert {row["options"]["guidance_scale"] for row in facts["trials"]} == {1.0}


def test_a_mistake_is_one_line_and_writes_nothing(world, capsys):
    before = contents(world)
    line = fails(capsys, "tune", f"pipeline={world}/gpt", "data.validation_fraction=0.02", "feature_steps=0")
    assert "data.validation_fraction: " in line and contents(world) == before


def search_for(peak, own, settings):
    """Search with a measure that is best at `peak`."""

    def measure(options):
        assert options not in measured, "each is measured once"
        measured.append(options)
        pairs = [(vars(options)[name], vars(peak)[name]) for name in vars(peak) if name != "schedule"]
        return sum(abs((mine or 1.0) - (best or 1.0)) for mine, best in pairs)

    measured = []
    return tune.try_settings(measure, own, settings)


OWN = SamplingOptions(1.05, None, 0.9, 1.5, 2.0, 1.5)


@pytest.mark.parametrize(
    ("prior", "own", "peak"),
    [
        ("gpt", OWN, SamplingOptions(guidance_scale=2.5, temperature=0.92)),
        ("gpt", OWN, SamplingOptions(guidance_end=3.0, top_p=0.95)),
        (
            "masked",
            MaskedOptions(steps=4, confidence_temperature=2.0),
            MaskedOptions(steps=2, confidence_temperature=2.0),
        ),
    ],
)
def test_the_search_finds_where_samples_are_best(prior, own, peak):
    """The steps of a masked prior are varied if it has some."""
    trials = search_for(peak, own, tune.list_settings(make_pipeline(prior=prior, sampler=vars(own))))
    assert tune.find_best(trials).options == peak and trials[0].setting == "before"

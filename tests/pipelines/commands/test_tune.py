"""`smalti tune`: it only sees validation images, finds the best settings, and stores them; and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from command import fails
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
    pipe.provenance = facts_of(config.model_copy(update={"validation_fraction": 0.02}))
    pipe.save_pretrained(root / "few")
    return root


def facts_of(config):
    """The provenance of a pipeline that was trained on these images."""
    return {"data": config.model_dump(mode="json"), "splits": load_images(config, check=False).facts.to_dict()}


def copied(world, name, to, **data):
    """A copy of a pipeline, trained with other settings of the images."""
    pipe = ImagePipeline.from_pretrained(world / name)
    pipe.provenance |= facts_of(DataConfig(**{**pipe.provenance["data"], **data}))
    pipe.save_pretrained(to / "pipeline")
    return pipe


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Sealed:
    """Fails when images are accessed."""

    def __getattr__(self, name):
        raise AssertionError(f"held-out images were asked for {name!r}")


def test_settings_are_chosen_on_validation_images_alone_and_stored(world, tmp_path, capsys, monkeypatch):
    """No held-out image is accessed, and the classifier sees training images only."""
    before, seen = copied(world, "gpt", tmp_path), []
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
    assert facts["frechet_distance_before"] == facts["trials"][0]["frechet_distance"]
    assert {row["setting"] for row in facts["trials"]} == {"before", "guidance", "temperature", "top-p"}
    assert all(f"{row['frechet_distance']:.3f}" in printed for row in facts["trials"])
    after = ImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert after.sampler == SamplingOptions(**best["options"]) != before.sampler
    assert after.provenance["tuning"] == {name: value for name, value in facts.items() if name != "trials"}
    assert after.provenance["evaluation"] == {"psnr": 9.0}, "figures of other samples are gone"
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert facts["settings"] in card and f"{facts['frechet_distance']:.4g}" in card
    with Image.open(tmp_path / "tuning" / "tuning.png") as picture:
        assert picture.width > 900


def test_without_classes_there_is_no_guidance_and_without_store_no_change(world, tmp_path):
    copied(world, "bare", tmp_path)
    before = files_in(tmp_path / "pipeline")
    given = ("data.label_column=null", "store=false", f"out={tmp_path}/found")
    main(["tune", f"pipeline={tmp_path}/pipeline", *SETTINGS, *given])
    facts = json.loads((tmp_path / "found" / "tuning.json").read_text())
    assert before == files_in(tmp_path / "pipeline")
    assert facts["feature_space"] == "random-conv-64"
    assert {row["options"]["guidance_scale"] for row in facts["trials"]} == {1.0}


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (("pipeline={world}/gpt", "data.validation_fraction=0.02"), "data.validation_fraction: "),
        (("pipeline={world}/few",), "data: needs at least 30 validation images (got 6)"),
        (("pipeline={world}/gpt", "out={world}/gpt"), "out: "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(world, capsys, wrong, key):
    before = files_in(world)
    given = [option.format(world=world) for option in wrong]
    assert key in fails(capsys, "tune", *given, "feature_steps=0") and files_in(world) == before


def search_for(peak, own, settings):
    """Search with a measure that is best at `peak`."""

    def measure(options):
        assert options not in measured, "each is measured once"
        measured.append(options)
        pairs = [(vars(options)[name], vars(peak)[name]) for name in vars(peak) if name != "schedule"]
        return sum(abs((mine or 1.0) - (best or 1.0)) for mine, best in pairs)

    measured = []
    return tune.try_settings(measure, own, settings)


@pytest.mark.parametrize(
    "peak",
    [SamplingOptions(guidance_scale=2.5, temperature=0.92), SamplingOptions(guidance_end=3.0, top_p=0.95)],
)
def test_the_search_finds_where_samples_are_best(peak):
    pipe = make_pipeline()
    trials = search_for(peak, SamplingOptions(1.05, None, 0.9, 1.5, 2.0, 1.5), tune.list_settings(pipe))
    assert tune.find_best(trials).options == peak and trials[0].setting == "before"
    assert len({trial.options for trial in trials}) < len(trials), "values of before are among those of a setting"


def test_the_steps_of_a_masked_prior_are_varied_if_it_has_some():
    pipe = make_pipeline(prior="masked", sampler={"steps": 4, "confidence_temperature": 2.0})
    trials = search_for(MaskedOptions(steps=2, confidence_temperature=2.0), pipe.sampler, tune.list_settings(pipe))
    best = tune.find_best(trials).options
    assert (best.steps, best.confidence_temperature, best.schedule) == (2, 2.0, "cosine")
    assert "steps" not in tune.list_settings(make_pipeline(prior="masked"))

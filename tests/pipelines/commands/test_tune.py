"""`smalti tune`: which images choose, what it writes and stores, and what it refuses.

Covers: pipelines/metrics/tuning.py, pipelines/metrics/tuning_chart.py.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from givens.striped_sets import write_set
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.commands import tune
from pipelines.images import load_images
from pipelines.metrics.tuning import (
    AGREEMENT_LOST,
    CONSTANTS,
    FINAL_SEED,
    FINAL_TIMES,
    RECALL_KEPT,
    UNITS,
    Scores,
    Search,
    Trial,
    best_of,
    plain,
    told,
)
from pipelines.metrics.tuning_chart import chosen_in, courses_in
from prior.masked import MaskedOptions
from prior.sampling import SamplingOptions

SETTINGS = ("num_images=60", "feature_steps=3", "minutes=5")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images of two classes, of which 60 are for validation; and pipelines for them, untrained."""
    root = tmp_path_factory.mktemp("world")
    config = write_set(root / "images", (8, 8), per_class=75).model_copy(update={"validation_fraction": 0.2})
    torch.manual_seed(0)
    for name, parts, classes in (("gpt", ("vqvae", "marginal"), ["kind0", "kind1"]), ("bare", ("pixels", "made"), [])):
        pipe = make_pipeline(*parts, size=(8, 8), labels=classes, sampler={"temperature": 0.9})
        pipe.provenance = {"data": config.model_dump(mode="json"), "evaluation": {"psnr": 9.0, "recall": 0.5}}
        pipe.save_pretrained(root / name)
    return root


def copied(world, name, to):
    pipe = ImagePipeline.from_pretrained(world / name)
    pipe.save_pretrained(to / "pipeline")
    return pipe


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(["tune", *argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert caught.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# The command


@pytest.fixture
def few(monkeypatch):
    """Shorter lines: one of each kind."""
    shorter = {"CONSTANTS": (1.0, 2.0), "ENDS": {"linear": (2.0,), "power-cosine": (3.0,)}, "TEMPERATURES": (1.1,)}
    for name, values in {**shorter, "TOP_P": (0.95,), "STEPS_BEYOND": 0, "OTHER_STARTS": (), "FINALISTS": 2}.items():
        monkeypatch.setattr(f"pipelines.metrics.tuning.{name}", values)


class Sealed:
    """Images that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"held-out images were asked for {name!r}")


def test_settings_are_chosen_on_validation_images_alone_and_stored(few, world, tmp_path, capsys, monkeypatch):
    """Not one of the held-out images is looked at, and the classifier sees none but training images."""
    before, seen = copied(world, "gpt", tmp_path), []
    real, train = tune.load_images, tune.feature_space
    monkeypatch.setattr(tune, "load_images", lambda config: replace(real(config), held_out=Sealed()))
    monkeypatch.setattr(tune, "feature_space", lambda *given: seen.append(given) or train(*given))
    main(["tune", f"pipeline={tmp_path}/pipeline", *SETTINGS])
    printed, facts = capsys.readouterr().out, json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    images = load_images(tune.DataConfig(**before.provenance["data"]))
    assert len(seen) == 1 and len(seen[0][0]) == len(images.train) == 240
    assert torch.equal(seen[0][0].pixels(range(240)), images.train.pixels(range(240)))
    assert torch.equal(seen[0][1].pixels(range(60)), images.validation.pixels(range(60)))

    final = [row for row in facts["trials"] if row["stage"] == "final"]
    assert {row["num_images"] for row in final} == {120} and {row["seed"] for row in final} == {FINAL_SEED}
    assert {(row["num_images"], row["seed"]) for row in facts["trials"] if row["stage"] != "final"} == {(60, 0)}
    assert facts["chosen"] in [row["settings"] for row in final] and facts["validation_images"] == 60
    assert f"real validation images: {facts['real_class_agreement']:.3f}" in printed
    for row in facts["trials"]:
        assert f"{row['frechet_distance']:.3f}" in printed and f"{row['class_agreement']:.3f}" in printed

    after = ImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert after.sampler.to_dict() == facts["chosen"] and after.provenance["tuning"]["told"] == facts["told"]
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert f"chosen by `smalti tune` on 60 validation images of a local folder of images: {facts['told']}." in card
    assert f"{facts['frechet_distance']:.4g} (with the settings before, temperature 0.9" in card
    assert after.provenance["evaluation"] == (
        {"psnr": 9.0} if after.sampler != before.sampler else {"psnr": 9.0, "recall": 0.5}
    )
    with Image.open(tmp_path / "tuning" / "tuning.png") as picture:
        assert picture.width > 1200 and picture.height > 300


def test_a_pipeline_without_classes_is_tuned_without_guidance_and_left_alone_if_asked(few, world, tmp_path, capsys):
    copied(world, "bare", tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    options = ("data.label_column=null", "store=false", f"out={tmp_path}/found")
    main(["tune", f"pipeline={tmp_path}/pipeline", *SETTINGS, *options])
    facts = json.loads((tmp_path / "found" / "tuning.json").read_text())
    assert facts["real_class_agreement"] is None
    assert before == {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    assert facts["feature_space"] == "random-conv-64" and facts["class_agreement"] is None
    assert {row["settings"]["guidance_scale"] for row in facts["trials"]} == {1.0}
    assert {"reference", "temperature", "top-p", "final"} == {row["stage"] for row in facts["trials"]}
    with Image.open(tmp_path / "found" / "tuning.png") as picture:
        assert picture.width > 900


def trained_with(world, to, **data):
    """A pipeline that was trained with other settings of the images."""
    pipe = ImagePipeline.from_pretrained(world / "gpt")
    pipe.provenance = {"data": {**pipe.provenance["data"], **data}}
    pipe.save_pretrained(to / "pipeline")
    return pipe


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        ({"validation_fraction": None}, ["data.validation_fraction=0.2"]),
        ({"validation_fraction": 0.1}, ["data.validation_fraction=0.2"]),
        ({"validation_fraction": 0.2, "held_out": "test", "held_out_fraction": 0.5}, ["data.validation_fraction=0.9"]),
        ({"split": "other", "held_out": "test", "validation_fraction": 0.0}, ["data.split=other"]),
    ],
)
def test_images_that_were_trained_on_do_not_choose(world, tmp_path, capsys, trained, options):
    if "split" in trained:
        shutil.copytree(world / "images/train", world / "images/other", dirs_exist_ok=True)
        options = [*options, "data.validation_fraction=0.2"]
    trained_with(world, tmp_path, **trained)
    line = fails(capsys, f"pipeline={tmp_path}/pipeline", *SETTINGS, *options)
    assert "data.validation_fraction" in line and "validation images were trained on" in line
    assert not (tmp_path / "tuning").exists()
    shutil.rmtree(world / "images/other", ignore_errors=True)


def test_what_to_do_about_too_few_validation_images_chooses_by_none_that_were_trained_on(world, tmp_path, capsys):
    """Following the advice works, and images of one's own may be divided in any way."""
    pipe = trained_with(world, tmp_path, validation_fraction=0.05)
    line = fails(capsys, f"pipeline={tmp_path}/pipeline", *SETTINGS)
    assert "at least 30 validation images, and there are 15" in line and "train again" in line
    shutil.copytree(world / "images", tmp_path / "mine", dirs_exist_ok=True)
    data = {**pipe.provenance["data"], "source": str(tmp_path / "mine"), "validation_fraction": 0.5}
    config = tune.TuneConfig(pipeline=str(tmp_path / "pipeline"), data=data)
    tune.prepare(config, tmp_path / "out", torch.device("cpu"))
    images, origin = tune.choosing_images(config, pipe, tune.ProcessGroup())
    assert len(images.validation) == 150 and "seen" not in origin


def test_without_validation_images_a_share_of_the_others_is_held_aside_and_it_says_so(world, tmp_path, capsys):
    pipe = trained_with(world, tmp_path, validation_fraction=0.0)
    line = fails(capsys, f"pipeline={tmp_path}/pipeline", *SETTINGS, "store=false")
    assert "choosing needs at least 30 validation images, and there are 15" in line
    config = tune.TuneConfig(pipeline="x", data=pipe.provenance["data"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "LEAST_VALIDATION", 15)
        images, origin = tune.choosing_images(config, pipe, tune.ProcessGroup())
    assert len(images.validation) == 15 and len(images.train) == 285 and "which the pipeline has seen" in origin
    printed = capsys.readouterr().err
    assert "warning: no validation images were kept from training" in printed
    assert "warning: 15 validation images choose only roughly" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("pipeline={world}/nothing",), "is not a folder"),
        (("pipeline={world}/nothing", "store=false"), "nothing"),
        (("pipeline={world}/gpt", "data.image_size=16"), "data.image_size, data.channels"),
        (("pipeline={world}/gpt", "data.validation_fraction=0.02"), "at least 30 validation images, and there are 6"),
        (("pipeline={world}/gpt", "minutes=0.0001"), "minutes: 0.0001 allow for 0 samples of each setting, and 50 are"),
        (("pipeline={world}/gpt", "num_images=3"), "num_images: must be >= 50"),
        (("pipeline={world}/gpt", "out={world}/gpt"), "out: "),
    ],
)
def test_mistakes_cost_a_line(world, capsys, options, message):
    given = [option.format(world=world) for option in options]
    assert message in fails(capsys, *given, "feature_steps=0")


# The search


def judged(score):
    """A judge of a made-up world, in which `score` of a setting gives its distance; what it was asked is kept."""
    asked = []

    def judge(stage, sampler, count, seed):
        asked.append(Trial(stage, sampler, count, seed, Scores(score(sampler, seed), 0.5, 0.9), 1.0))
        return asked[-1]

    return judge, asked


def search_of(score, **options):
    judge, asked = judged(score)
    search = Search(judge, SamplingOptions(guidance_scale=1.25), guided=True, vocab_size=256, num_images=100, **options)
    return search, asked


@pytest.mark.parametrize(
    "peak",
    [
        SamplingOptions(guidance_scale=2.6),
        SamplingOptions(guidance_end=1.6),
        SamplingOptions(guidance_end=9.0),
        SamplingOptions(guidance_end=3.6, guidance_power=1.5),
    ],
)
def test_the_search_finds_where_samples_are_best(peak):
    """Beside the points of the lines that it begins with, and beyond their ends, on both sides."""

    def score(sampler, seed):
        means = [sum(each.scale_by_block([1] * 9)) / 9 for each in (sampler, peak)]
        late = [each.scale_by_block([1] * 9)[-1] for each in (sampler, peak)]
        return 1 + abs(means[0] - means[1]) + abs(late[0] - late[1]) + 3 * abs(sampler.temperature - 0.92)

    search, asked = search_of(score)
    best = search.run()
    assert best.distance <= 1.6 and best.sampler.temperature == 0.92 and best.stage == "final"
    assert best.distance < score(replace(search.own, temperature=1.0), 0) - 0.4
    units = sum(FINAL_TIMES if trial.stage == "final" else 1 for trial in asked)
    assert units <= UNITS and len({trial.sampler for trial in search.trials}) == len(search.trials)


def test_the_curve_has_the_settings_of_before_where_they_are_of_a_course():
    """A pipeline that is tuned again begins with what is a point of a line, and may be the best of it."""
    search, _ = search_of(lambda sampler, seed: 1 + abs(sampler.guidance_scale - 2) + (sampler.guidance_end or 0))
    search.own = SamplingOptions(guidance_scale=2.0)
    best = search.run()
    curves = courses_in(search.trials)
    assert [trial.stage for trial in curves["constant"] if trial.sampler == search.own] == ["reference"]
    assert best.sampler == search.own and chosen_in(curves, best.sampler)[0].sampler == best.sampler
    assert {*CONSTANTS} <= {trial.sampler.guidance_scale for trial in curves["constant"]}
    assert all(
        trial.sampler.top_k is trial.sampler.top_p is None and trial.sampler.temperature == 1
        for c in curves.values()
        for trial in c
    )


def test_luck_with_the_seeds_of_the_search_does_not_choose():
    """A setting that is best with these seeds alone is a finalist, and no more."""
    lucky = SamplingOptions(guidance_scale=4.0)
    search, asked = search_of(lambda sampler, seed: 0.1 if sampler == lucky and seed < FINAL_SEED else 1.0)
    best = search.run()
    finals = [trial for trial in asked if trial.stage == "final"]
    assert best.sampler != lucky or best.distance == 1.0
    assert lucky in [trial.sampler for trial in finals] and {trial.seed for trial in finals} == {FINAL_SEED}
    assert {plain(search.own), search.own} <= {trial.sampler for trial in finals}


def test_the_lowest_distance_is_not_bought_with_recall_or_agreement():
    def trial(distance, recall, agreement):
        return Trial("", SamplingOptions(), 1, 0, Scores(distance, recall, agreement), 0.0)

    narrow, wrong = trial(0.1, 0.8 * RECALL_KEPT - 0.01, 1.0), trial(0.2, 1.0, 0.89)
    good, better = trial(1.0, 0.8 * RECALL_KEPT, 0.95), trial(0.9, 0.7, 0.9)
    assert best_of([narrow, wrong, good, better], 0.8, 0.9) == [better, good]
    assert best_of([narrow, wrong, good, better], 0.8, None) == [wrong, better, good]
    near = trial(0.5, 1.0, 0.95 - AGREEMENT_LOST + 1e-9)
    assert best_of([wrong, near, good], 0.8, 0.97) == [near, good], "real images, that none reaches, ask for too much"
    assert best_of([narrow], 0.8, 0.9) == [narrow], "where none keeps enough recall, it does not count"
    assert best_of([trial(0.2, 1.0, None)], 0.8, None)


def test_guidance_goes_on_until_samples_are_of_their_class():
    """Where the lowest distance is that of plain settings, whose samples are often of another class than asked for."""

    def judge(stage, sampler, count, seed):
        scale = sum(sampler.scale_by_block([1] * 9)) / 9
        return Trial(stage, sampler, count, seed, Scores(scale, 0.5, min(1.0, 0.5 + 0.2 * scale)), 1.0)

    search = Search(judge, SamplingOptions(), guided=True, vocab_size=256, num_images=100, real_agreement=0.9)
    best = search.run()
    assert 0.9 <= best.scores.class_agreement < 0.95 and best.sampler.guides


def test_a_search_that_has_no_more_time_goes_to_the_finals():
    clock = iter(range(100, -1000, -4))
    search, asked = search_of(lambda sampler, seed: 1 / sampler.guidance_scale, left=lambda: float(next(clock)))
    best = search.run()
    assert "time was up" in search.ended and 2 < len(search.trials) < 25 and best.stage == "final"
    assert all(math.isfinite(trial.distance) for trial in asked)


def test_settings_in_words():
    assert told(SamplingOptions()) == told(MaskedOptions(steps=3)) == "plain"
    given = SamplingOptions(0.9, 5, 0.95, 1.0, 3.0, 1.5)
    assert told(given) == "guidance 1 to 3, power 1.5, temperature 0.9, top-k 5, top-p 0.95"
    assert plain(MaskedOptions(0.9, steps=3, guidance_end=2.0)) == MaskedOptions(steps=3)

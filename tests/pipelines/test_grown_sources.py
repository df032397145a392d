"""A source that changes after training: every verb says so, and reports on images that were never trained on.

Covers: pipelines/images/splits.py, pipelines/options.py, pipelines/provenance.py.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command import fails
from givens.images import noise, write_image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.evaluate import EvaluateConfig
from pipelines.images import DataConfig, load_images
from pipelines.images.splits import read_splits
from pipelines.provenance import inherit, read_training_facts
from pipelines.tokens import load_tokens

PIXELS = ("model.kind=pixels", "model.levels=4")
DATA = ("data.image_size=8", "data.held_out_fraction=0.3", "data.validation_fraction=0.3", "data.augment.shift=1")
QUIET = ("track.trackers=[]", "track.wandb=disabled")


def write_picture(folder, name, number):
    """A picture of one of two classes, which is dark or light."""
    label = number % 2
    write_image(folder / f"kind{label}" / name, noise(8, 8, seed=number) // 2 + 100 * label)


def train_tokenizer(root, out="t", *options):
    main(["train_tokenizer", f"data.source={root}/src", *PIXELS, *DATA, *QUIET, f"out={root}/{out}", *options])


def train(root):
    """Train all stages on 160 pictures of two classes."""
    for number in range(160):
        write_picture(root / "src", f"{number:03}.png", number)
    train_tokenizer(root)
    main(["encode", f"tokenizer={root}/t", f"out={root}/tokens"])
    settings = ("model.kind=made", "model.hidden=[8]", "train.steps=2", "train.batch_size=8", *QUIET)
    main(["train_prior", f"tokens={root}/tokens", f"out={root}/p", *settings])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    train(root)
    return root


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy of the pictures and the models, at the same path for the models."""
    shutil.copytree(trained, tmp_path / "w")
    for path in tmp_path.rglob("*.json"):  # the models were trained on the copy
        text = path.read_text()
        if str(trained) in text:
            path.write_text(text.replace(str(trained), str(tmp_path / "w")))
    for folder in ("tokens", "p/pipeline", "t/tokenizer"):
        from tokenizer.files import write_manifest

        if (tmp_path / "w" / folder / "manifest.json").exists():
            write_manifest(tmp_path / "w" / folder)
    return tmp_path / "w"


def grow(root, count=3):
    """Add pictures that sort first."""
    for number in range(count):
        write_picture(root / "src", f"000{number}.png", 1000 + number)


def parts_of(root, facts, data=None):
    """The names in each part for a model with these facts."""
    config = DataConfig.model_validate(facts["data"] if data is None else data)
    splits = load_images(config, inherited=inherit(config, facts))
    return {name: set(part.names(np.arange(len(part)))) for name, part in splits.by_name().items()}


LINE = "src has changed since training: 163 images instead of 160; "


def test_the_division_travels_with_the_models(world):
    facts = [read_splits(world / place / "splits.json") for place in ("t", "t/tokenizer", "tokens", "p/pipeline")]
    assert facts[0] is not None and all(each == facts[0] for each in facts)
    assert facts[0].describe() == "160 images: 64 train, 48 validation, 48 held out"
    pipe = ImagePipeline.from_pretrained(world / "p")
    pipe.save_pretrained(world / "again")
    assert read_splits(world / "again/splits.json") == facts[0]
    assert json.loads((world / "again/provenance.json").read_text())["splits"] == "splits.json"
    assert load_tokens(world / "tokens").source["splits"] == facts[0].to_dict()


def test_every_verb_says_what_changed_and_keeps_to_held_out_images(world, capsys):
    before = parts_of(world, ImagePipeline.from_pretrained(world / "p").provenance)
    grow(world)
    shared = (f"pipeline={world}/p", "overwrite=true", "data.label_column=label")
    verbs = {
        "evaluate": (*shared, "num_images=0", "feature_steps=0"),
        "tune": (*shared, "num_samples=60", "feature_steps=0", "store=false"),
        "probe": (*shared, "num_train=20", "num_test=20"),
        "search": (*shared, f"out={world}/found.png", "num_images=2"),
        "calibrate": (f"pipeline={world}/p", "false_alarms=0.2"),
        "detect": (f"pipeline={world}/p", f"out={world}/detected"),
        "reconstruct": (f"tokenizer={world}/t", f"out={world}/r.png", "num_images=2"),
        "inspect": (f"tokenizer={world}/t", f"out={world}/inspected.png", "num_images=2"),
        "encode": (f"tokenizer={world}/t", f"out={world}/more", "augmentations=1"),
    }
    for verb, options in verbs.items():
        capsys.readouterr()
        main([verb, *options])
        assert LINE in capsys.readouterr().err, verb
    figures = json.loads((world / "p/evaluation/evaluation.json").read_text())
    assert figures["division"].startswith("a local folder of images has changed since training: 163 images instead")
    for place in ("evaluation/evaluation.txt", "pipeline/README.md"):
        assert figures["division"] in (world / "p" / place).read_text()
    pipe = ImagePipeline.from_pretrained(world / "p")
    config = EvaluateConfig(pipeline=str(world / "p"), data=pipe.provenance["data"])
    after = {name: set(part.names(np.arange(len(part)))) for name, part in config.load_images(pipe).by_name().items()}
    new = {f"kind{number % 2}/000{number}.png" for number in range(3)}
    assert all(after[name] - new == before[name] for name in before)
    tokens = load_tokens(world / "more")
    assert len(tokens.splits["train"]) == 2 * len(after["train"]) and len(tokens.splits["test"]) == len(
        after["held_out"]
    )
    scored = (world / "detected/scores.csv").read_text()
    assert not any(name in scored for name in before["train"] | before["validation"])


def test_a_continued_run_keeps_the_division(world, capsys):
    facts = read_training_facts(str(world / "t"))
    before = parts_of(world, facts)
    grow(world)
    train_tokenizer(world, "t", "train.steps=20001")
    assert LINE in capsys.readouterr().err
    after = parts_of(world, read_training_facts(str(world / "t")))
    assert all(after[name] >= part for name, part in before.items())
    train_tokenizer(world, "other", f"init={world}/t")  # so does one that starts from it
    assert read_splits(world / "other/splits.json") == read_splits(world / "t/splits.json")


def test_a_prior_starts_from_one_that_was_trained_on_the_same_images(world, capsys):
    """Tokens of objects hold out images that the prior of images was trained on."""
    main(["encode", f"tokenizer={world}/t", f"out={world}/objects", r"data.group=\d(\d\d)\.png"])
    assert (
        "warning: the tokenizer was trained without data.group, which holds out whole objects"
        in capsys.readouterr().err
    )
    command = ["train_prior", f"init={world}/p", "train.steps=2", "train.batch_size=8", *QUIET]
    text = fails(capsys, *command, f"tokens={world}/objects", f"out={world}/q")
    assert "divided differently" in text and f"smalti encode tokenizer={world}/p" in text
    assert len(text.splitlines()) == 1
    grow(world)
    main(["encode", f"tokenizer={world}/p", f"out={world}/grown"])
    main([*command, f"tokens={world}/grown", f"out={world}/q"])
    assert read_splits(world / "q/pipeline/splits.json").rule == read_splits(world / "t/splits.json").rule


def test_other_fractions_are_refused_with_the_remedy(world, capsys):
    for verb in (
        ["evaluate", f"pipeline={world}/p"],
        ["calibrate", f"pipeline={world}/p"],
        ["encode", f"tokenizer={world}/t", f"out={world}/more"],
        ["reconstruct", f"tokenizer={world}/t", f"out={world}/r.png"],
    ):
        text = fails(capsys, *verb, "data.held_out_fraction=0.1")
        assert "data.held_out_fraction: " in text and "was divided with data.held_out_fraction=0.3" in text
        assert "begin a new run" in text and len(text.splitlines()) == 1


def test_a_missing_file_is_one_line(world, capsys):
    """Without it the images would be divided as in 0.3."""
    (world / "t/tokenizer/splits.json").unlink()
    text = fails(capsys, "reconstruct", f"tokenizer={world}/t", f"out={world}/r.png")
    assert "splits.json: missing; it says which images were held out" in text
    (world / "t/splits.json").unlink()
    text = fails(capsys, "train_tokenizer", f"data.source={world}/src", *PIXELS, *DATA, *QUIET, f"out={world}/t")
    assert "t/splits.json: missing" in text


def without_splits(world):
    """Models as 0.3 wrote them."""
    from tokenizer.files import write_manifest

    for path in world.rglob("splits.json"):
        path.unlink()
        for other in (path.parent / "provenance.json", path.parent / "meta.json"):
            if other.is_file():
                found = json.loads(other.read_text())
                found.pop("splits") if other.name == "provenance.json" else found["source"].pop("splits")
                other.write_text(json.dumps(found))
        if (path.parent / "manifest.json").exists():
            write_manifest(path.parent)


def test_runs_of_0_3_go_on_and_figures_say_what_is_not_known(world, capsys):
    """Their tokens are those of a division by name, so that they show a source which has changed."""
    without_splits(world)
    shared = (f"pipeline={world}/p", "overwrite=true", "num_images=0", "feature_steps=0")
    with pytest.raises(SystemExit):
        main(["evaluate", *shared])
    text = capsys.readouterr().err.splitlines()[-1]
    assert "has changed since it was encoded (other held-out images)" in text and "restore it" in text
    shutil.rmtree(world / "tokens")
    main(["evaluate", *shared])
    assert "divided as in 0.3, by position" in capsys.readouterr().err
    assert "not known" in json.loads((world / "p/evaluation/evaluation.json").read_text())["division"]
    train_tokenizer(world, "t", "train.steps=20001")
    assert not (world / "t/splits.json").exists() and not (world / "t/tokenizer/splits.json").exists()
    main(["encode", f"tokenizer={world}/t", f"out={world}/tokens"])
    assert not (world / "tokens/splits.json").exists()
    main(["train_prior", f"tokens={world}/tokens", "model.kind=made", "train.steps=2", *QUIET, f"out={world}/q"])
    main(["evaluate", f"pipeline={world}/q", *shared[1:]])  # the tokens show that nothing has changed
    assert "division" not in json.loads((world / "q/evaluation/evaluation.json").read_text())
    grow(world, 10)
    with pytest.raises(SystemExit):
        main(["evaluate", f"pipeline={world}/q", *shared[1:]])
    assert "51 held-out images instead of 48" in capsys.readouterr().err

"""Training images are never measured, searched or shown as held-out ones.

Covers: pipelines/images/dataset.py, pipelines/images/unseen.py, pipelines/provenance.py.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from command import fails
from folders import rows_of
from givens.stripes import SIZE, stripes
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.images import DataConfig, load_images
from pipelines.images.splits import SPLITS_KEY, Inherited
from pipelines.provenance import save_tokenizer

OF_PIPELINES = ["evaluate", "calibrate", "detect", "search", "probe", "complete"]
OF_TOKENIZERS = ["reconstruct", "inspect"]


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A calibrated pipeline, a tokenizer, and their images, a tenth of which was held out, by position as in 0.3."""
    root = tmp_path_factory.mktemp("world")
    for number, image in enumerate(stripes(450, seed=25)[:, 0].numpy()):
        path = root / "images" / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    shutil.copytree(root / "images", root / "others")
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.provenance = {"data": {"source": str(root / "images"), "image_size": SIZE, "held_out_fraction": 0.1}}
    pipe.save_pretrained(root / "pipe")
    save_tokenizer(pipe.tokenizer, root / "tokenizer", pipe.provenance)
    main(["calibrate", f"pipeline={root}/pipe", "every=1"])
    return root


def command(world, verb, out):
    model = f"pipeline={world}/pipe" if verb in OF_PIPELINES else f"tokenizer={world}/tokenizer"
    out = out.with_suffix("") if verb == "detect" else out
    return [verb, model, *([] if verb == "calibrate" else [f"out={out}"])]


REFUSED = [(verb, "data.held_out_fraction=0.5") for verb in OF_PIPELINES + OF_TOKENIZERS]


@pytest.mark.parametrize(("verb", "option"), [*REFUSED, ("search", "data.split=train data.held_out_fraction=0.2")])
def test_training_images_are_refused_as_held_out(world, tmp_path, capsys, verb, option):
    if verb == "probe":
        pytest.importorskip("sklearn")
    line = fails(capsys, *command(world, verb, tmp_path / "out.png"), *option.split())
    count = 450 * float(option.rpartition("=")[2])
    assert f"data.held_out_fraction: {count - 45:.0f} of these {count:.0f} " in line
    assert not (tmp_path / "out.png").exists()


def test_other_images_may_be_split_in_any_way(world, tmp_path):
    given = command(world, "reconstruct", out := tmp_path / "out.png")
    main([*given, f"data.source={world}/others", "data.held_out_fraction=0.5"])
    main([*given, "data.held_out_fraction=0.05", "overwrite=true"])  # a part of the held-out images
    assert np.asarray(Image.open(out)).std() > 0


@pytest.mark.parametrize("way", ["folder", "links", "of 0.3"])
def test_detect_skips_files_that_were_trained_on_and_scores_new_ones(world, tmp_path, capsys, way):
    """By the splits of a run, or of 0.3 by position."""
    data = DataConfig(source=str(world / "images"), image_size=SIZE, held_out_fraction=0.1)
    splits = load_images(data, check=False, inherited=Inherited("position") if way == "of 0.3" else None)
    held_out = set(splits.held_out.names(range(len(splits.held_out))))
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    pipe.provenance |= {} if splits.facts is None else {SPLITS_KEY: splits.facts.to_dict()}
    pipe.calibrate(stripes(60, seed=8))  # held-out images are new
    pipe.save_pretrained(tmp_path / "pipe")
    new = tmp_path / "new"
    new.mkdir()
    Image.fromarray(stripes(1, seed=9)[0, 0].numpy()).save(new / "new.png")
    inside = sorted((world / "images").rglob("*.png"))
    if way == "links":
        for number, file in enumerate(inside[:60]):
            (new / f"{number:02d}.png").symlink_to(file)
    chosen = inside[:60] if way == "links" else inside
    expected = [file for file in chosen if str(file.relative_to(world / "images")) in held_out]
    paths = str(new) if way == "links" else f"{new}, {world}/images"
    main(["detect", f"pipeline={tmp_path}/pipe", f"images=[{paths}]", f"out={tmp_path}/found", "num_shown=1"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"scoring {len(expected) + 1} of {len(chosen) + 1} images in ")
    assert f"; 0 were used for calibration, {len(chosen) - len(expected)} in training" in printed.splitlines()[0]
    found = {os.path.realpath(row["file"]) for row in rows_of(tmp_path / "found/scores.csv")}
    assert found == {os.path.realpath(file) for file in (*expected, new / "new.png")}

"""Training images are never measured, searched or shown as held-out ones.

Covers: pipelines/images/dataset.py, pipelines/provenance.py.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from command import fails
from givens.stripes import SIZE, stripes
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.provenance import save_tokenizer

OF_PIPELINES = ["evaluate", "calibrate", "detect", "search", "probe", "complete"]
OF_TOKENIZERS = ["reconstruct", "inspect"]


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A calibrated pipeline, a tokenizer, and their images, a tenth of which was held out."""
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


@pytest.mark.parametrize("verb", OF_PIPELINES + OF_TOKENIZERS)
@pytest.mark.parametrize("option", ["data.held_out_fraction=0.5", "data.split=train data.held_out_fraction=0.2"])
def test_training_images_are_refused_as_held_out(world, tmp_path, capsys, verb, option):
    if verb == "probe":
        pytest.importorskip("sklearn")
    line = fails(capsys, *command(world, verb, tmp_path / "out.png"), *option.split())
    count = 450 * float(option.rpartition("=")[2])
    assert f"data.held_out_fraction: {count - 45:.0f} of these {count:.0f} " in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("verb", ["reconstruct", "search"])
def test_other_images_may_be_split_in_any_way(world, tmp_path, verb):
    out = tmp_path / "out.png"
    main([*command(world, verb, out), f"data.source={world}/others", "data.held_out_fraction=0.5"])
    main([*command(world, verb, out), "data.held_out_fraction=0.05", "overwrite=true"])  # a part of the held-out images
    assert np.asarray(Image.open(out)).std() > 0


def test_a_model_without_provenance_is_not_checked(world, tmp_path):
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    for provenance in ({}, {"data": {"source": "x", "image_size": "no size"}}):
        pipe.provenance = provenance
        pipe.save_pretrained(tmp_path / "pipe")
        given = [f"data.source={world}/images", f"data.image_size={SIZE}", "data.held_out_fraction=0.5"]
        main(["search", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/out.png", "overwrite=true", *given])
        assert (tmp_path / "out.png").exists()

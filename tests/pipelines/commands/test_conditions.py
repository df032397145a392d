"""Verbs that score, complete and compress images read the same keys, and mean what Python means.

Covers: pipelines/commands/complete.py, pipelines/commands/detect.py, pipelines/commands/compress.py.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from command import fails
from folders import rows_of
from givens.images import write_rows
from PIL import Image
from small_pipelines import COLUMNS, as_pil, make_conditioned, pixels_for

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.commands.complete import draw_completions

COUNT = 44


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline; `images`, half of them held out; a table with a row for each; and a picture for each."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    pipe = make_conditioned("blocks", {"age": COLUMNS["age"], "view": COLUMNS["view"]}, any_order=True)
    rows = []
    for number, image in enumerate(as_pil(pixels_for(pipe, COUNT))):
        split = "test" if number % 2 else "train"
        for place, picture in (("images", image), ("outlines", image.resize((24, 16)))):
            (root / place / split).mkdir(parents=True, exist_ok=True)
            picture.save(root / place / split / f"{number}.png")
        rows.append(
            {"file_name": f"{split}/{number}.png", "age": 20 + number, "label": ["cat", "eel"][number % 3 == 0]}
        )
    write_rows(root / "rows.csv", rows[::-1])
    pipe.provenance = {"data": {"source": str(root / "images"), "image_size": [8, 12], "channels": 1}}
    pipe.save_pretrained(root / "pipe")
    return root


@pytest.fixture(scope="module")
def calibrated(world):
    """The pipeline, calibrated with ages, labels and outlines."""
    shutil.copytree(world / "pipe", world / "calibrated")
    main(["calibrate", f"pipeline={world}/calibrated", *given(world), "false_alarms=0.2", "device=cpu"])
    return world / "calibrated"


def given(world):
    return [f"conditions={world}/rows.csv", f"condition.outline={world}/outlines"]


def condition(world, numbers):
    """The condition of images in Python."""
    pictures = [Image.open(next((world / "outlines").glob(f"*/{number}.png"))) for number in numbers]
    labels = [["cat", "eel"][number % 3 == 0] for number in numbers]
    return {"age": [20 + number for number in numbers], "label": labels, "outline": pictures}


def test_completions_are_conditioned(world, tmp_path, capsys):
    files = [world / "images" / "test" / f"{number}.png" for number in (5, 3)]
    argv = ["complete", f"pipeline={world}/pipe", f"images=[{', '.join(map(str, files))}]", "device=cpu", "draws=2"]
    main([*argv, f"out={tmp_path}/a.png", *given(world), "guidance_scale=2", "guidance_on=age"])
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    images, known = [Image.open(file) for file in files], np.arange(8)[:, None] < np.full(12, 4)
    values = condition(world, (5, 3))
    score = float(pipe.conditional_log_prob(images, known, condition=values).mean())
    assert f"{score:.2f} nats" in capsys.readouterr().out
    options = {"draws": 2, "seed": 0, "guidance_scale": 2.0, "guidance_on": ["age"], "output_type": "pt"}
    sampled = pipe.complete(images, known, condition=values, **options).images.cpu()
    expected = draw_completions(pipe.to_images(images).cpu(), sampled, torch.from_numpy(known))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


def test_anomalies_are_scored_given_the_condition_of_each_image(world, calibrated, tmp_path):
    argv = ["detect", f"pipeline={calibrated}", f"out={tmp_path}/found", "method=nll", "num_shown=2", "device=cpu"]
    main([*argv, *given(world)])
    rows = rows_of(tmp_path / "found" / "scores.csv")
    numbers = [int(row["file"].rpartition("/")[2].removesuffix(".png")) for row in rows]
    assert len(numbers) == COUNT // 4
    pipe = ImagePipeline.from_pretrained(calibrated)
    images = [Image.open(world / "images" / "test" / f"{number}.png") for number in numbers]
    expected = pipe.anomaly_score(images, "nll", condition=condition(world, numbers))
    assert np.allclose([float(row["score"]) for row in rows], expected, rtol=1e-5)
    assert not np.allclose(expected, pipe.anomaly_score(images, "nll"), rtol=1e-3)


def test_a_stream_needs_the_same_condition(world, tmp_path, capsys):
    pytest.importorskip("constriction")
    argv = [f"pipeline={world}/pipe", "device=cpu"]
    main(["compress", *argv, f"images={world}/images", f"out={tmp_path}/a.smalti", *given(world)])
    main(["decompress", *argv, f"stream={tmp_path}/a.smalti", f"out={tmp_path}/a", *given(world)])
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    images = [Image.open(world / "images" / "test" / f"{number}.png") for number in (1, 3)]
    again = [Image.open(tmp_path / "a" / "test" / f"{number}.png") for number in (1, 3)]
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(pipe.reconstruct(images), again, strict=True))
    argv = ["decompress", *argv, f"stream={tmp_path}/a.smalti", f"out={tmp_path}/b"]
    for other in ([], ["condition.age=30"], given(world)[:1]):
        assert "condition" in fails(capsys, *argv, *other)
    assert not (tmp_path / "b").exists()

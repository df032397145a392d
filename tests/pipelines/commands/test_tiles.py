"""`smalti calibrate` and `smalti detect` with tiles: images keep their size.

Covers: pipelines/commands/calibrate.py, pipelines/commands/detect.py.
"""

from __future__ import annotations

import csv
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from command import fails
from givens.stripes import SIZE, stripes, uniform
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly import scores
from pipelines.anomaly.scores import anomaly_score
from pipelines.images.grids import BAND


def write(folder, images, sizes=((40, 27), (27, 33))):
    """Write images of these sizes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[:, 0].numpy()):
        height, width = sizes[number % len(sizes)]
        Image.fromarray(image[:height, :width]).save(folder / f"{number:03d}.png")


def with_defects(count, seed):
    images = stripes(count, seed, side=40)
    images[:, 0, 12:22, 9:19] = uniform(count, 10)[:, 0]
    return images


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A pipeline, `bare` and calibrated on tiles, and folders of images of several sizes."""
    root = tmp_path_factory.mktemp("world")
    write(root / "normal/train/a", stripes(4, side=40))
    write(root / "normal/test/a", stripes(76, seed=20, side=40))
    write(root / "new/good", stripes(20, seed=21, side=40))
    write(root / "new/bad", with_defects(10, seed=22))
    write(root / "small", stripes(3, seed=23, side=40), sizes=((40, 27), (40, 15)))
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.provenance = {"data": {"source": str(root / "normal"), "image_size": SIZE}}
    pipe.save_pretrained(root / "bare")
    shutil.copytree(root / "bare", root / "pipe")
    main(["calibrate", f"pipeline={root}/pipe", "tile=true"])
    shutil.copytree(root / "bare", root / "whole")
    main(["calibrate", f"pipeline={root}/whole"])
    return root


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_images_keep_their_size_and_have_the_scores_of_their_tiles(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    assert pipe.calibration.tile == [16, 16] and pipe.calibration.stride == 8 and pipe.calibration.count == 38
    given = [f"images={world}/new", "tile=true", "normal_labels=[good]", "num_shown=3"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", *given])
    assert "AUROC" in capsys.readouterr().out
    rows = rows_of(tmp_path / "found/scores.csv")
    images = [Image.open(row["file"]) for row in rows]
    assert {image.size for image in images} == {(27, 40), (33, 27)}
    np.testing.assert_allclose([float(row["score"]) for row in rows], anomaly_score(pipe, images, stride=8), rtol=1e-3)
    p = anomaly_score(pipe, images, stride=8, p_values=True).numpy()
    np.testing.assert_allclose([float(row["p_value"]) for row in rows], p, rtol=1e-5)
    flagged = np.array([row["flagged"] == "1" for row in rows])
    bad = np.array([row["class"] == "bad" for row in rows])
    assert flagged[bad].mean() > 0.8 and flagged[~bad].mean() < 0.3
    assert [int(row["tiles"]) for row in rows[:2]] == [4 * 3, 3 * 4]
    near = [row for row in rows if row["class"] == "bad"]
    assert np.mean([abs(int(row["top"]) - 9) < 12 and abs(int(row["left"]) - 6) < 12 for row in near]) > 0.8
    width, height = Image.open(tmp_path / "found/sheet.png").size
    side = (width - 2) // 2 - 2  # two panels in each of six rows, of the largest width and height
    assert side % 33 == 0 and height == 6 * (side // 33 * 40 + BAND + 2) + 2


def test_the_default_is_held_out_images_at_their_own_size(world, tmp_path, capsys):
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", "tile=true", "stride=8", "method=nll"])
    assert capsys.readouterr().out.startswith(f"scoring 38 of 76 held-out images of {world}/normal;")
    names = [Path(row["file"]).name for row in rows_of(tmp_path / "found/scores.csv")]
    assert names == [f"{number:03d}.png" for number in range(1, 76, 2)]


def test_few_images_are_in_memory_at_a_time(world, tmp_path, monkeypatch):
    most, alive, real = [0], [], scores.load_image

    def load(*arguments):
        image = real(*arguments)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(image)]
        most[0] = max(most[0], len(alive))
        return image

    monkeypatch.setattr(scores, "load_image", load)
    main(["detect", f"pipeline={world}/pipe", f"images={world}/new", f"out={tmp_path}/found", "tile=true"])
    assert 1 <= most[0] <= 3


def test_a_pipeline_that_was_trained_on_crops_is_calibrated_on_whole_images(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "bare")
    pipe.provenance["data"] |= {"crop": "random", "crops_per_image": 4}
    pipe.save_pretrained(tmp_path / "pipe")
    assert "tile=true" in fails(capsys, "calibrate", f"pipeline={tmp_path}/pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "tile=true"])
    found = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    expected = ImagePipeline.from_pretrained(world / "pipe").calibration
    assert found.to_json() == expected.to_json()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["detect", "stride=8"], "stride: needs tile=true"),
        (["detect", "tile=true", "stride=17"], "stride must be from 1 to 16"),
        (["detect"], "calibrated with tiles of 16 x 16 and stride=8, but now with whole images"),
        (["detect", "tile=true", "stride=4"], "give tile=true stride=8"),
        (["detect", "pipeline={world}/whole", "tile=true"], "calibrated with whole images, but now with tiles"),
        (["detect", "tile=true", "images={world}/small"], "small/001.png: 40 x 15 pixels"),
        (["calibrate", "stride=8"], "stride: needs tile=true"),
        (["calibrate", "tile=true", "stride=40"], "stride must be from 1 to 16"),
        (["calibrate", "tile=true", "data.source={world}/small", "every=1"], "data: "),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(world, capsys, argv, message):
    own = [] if any(part.startswith("pipeline=") for part in argv) else [f"pipeline={world}/pipe"]
    before = (world / "pipe/calibration.json").read_bytes()
    line = fails(capsys, argv[0], *own, *(part.format(world=world) for part in argv[1:]))
    assert message.format(world=world) in line
    assert (world / "pipe/calibration.json").read_bytes() == before

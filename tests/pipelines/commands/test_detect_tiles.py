"""`smalti calibrate` and `smalti detect` with tiles: images keep their size.

Covers: pipelines/commands/calibrate.py, pipelines/commands/detect.py.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from command import fails
from folders import rows_of
from givens.stripes import SIZE, save_images, stripes, uniform
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.scores import anomaly_score
from pipelines.images.grids import BAND
from pipelines.metrics.localization import auroc, per_region_overlap


def write(folder, images, sizes=((40, 27), (27, 33))):
    save_images(folder, images, sizes=sizes)


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


def test_images_keep_their_size_and_have_the_scores_of_their_tiles(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    assert pipe.calibration.tile == [16, 16] and pipe.calibration.stride == 8 and pipe.calibration.count == 38
    given = [f"images={world}/new", "tile=true", "normal_labels=[good]", "num_shown=3"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", *given])
    printed, warned = capsys.readouterr()
    assert "AUROC" in printed
    assert "15 of 30 images have other sizes than those of the calibration, 40 x 27 " in warned  # every second image
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
    side = (width - 2) // 3 - 2  # three panels in each of six rows, of the largest width and height
    assert side % 33 == 0 and height == 6 * (side // 33 * 40 + BAND + 2) + 2


def test_the_area_is_that_above_the_threshold_of_the_map(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    given = [f"images={world}/new/bad", "tile=true", "num_shown=3"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", "method=hidden", *given])
    rows = rows_of(tmp_path / "found/scores.csv")
    images = [Image.open(row["file"]) for row in rows]
    expected = anomaly_score(pipe, images, "hidden", stride=8)
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, rtol=1e-3)
    heats = pipe.anomaly_map(images, method="combined", stride=8)
    limit = pipe.calibration.scores["map"].threshold
    assert [int(row["area"]) for row in rows] == [int((heat > limit).sum()) for heat in heats]
    count = sum(bool((heat > limit).any()) for heat in heats)
    assert count and f"in {count} of 10 images" in capsys.readouterr().out


def test_folds_have_maps_but_flag_no_regions(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "tile=true", "stride=16", "folds=2", "data.limit=40"])
    assert "left out: thresholds of regions (they need folds=1, not folds=2)" in capsys.readouterr().out
    given = [f"images={world}/new", "tile=true", "stride=16", "num_shown=1", "method=hidden"]
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found", *given])
    assert "not flagged: with folds=2, the map has no threshold" in capsys.readouterr().out
    assert "area" not in rows_of(tmp_path / "found/scores.csv")[0]


def test_a_pipeline_that_was_trained_on_crops_is_calibrated_on_whole_images(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "bare")
    pipe.provenance["data"] |= {"crop": "random", "crops_per_image": 4}
    pipe.save_pretrained(tmp_path / "pipe")
    assert "tile=true" in fails(capsys, "calibrate", f"pipeline={tmp_path}/pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "tile=true"])
    found = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    expected = ImagePipeline.from_pretrained(world / "pipe").calibration
    assert found.to_json() == expected.to_json()


def test_a_mistake_is_one_line(world, tmp_path, capsys):
    for argv, message in (
        ([f"pipeline={world}/pipe"], "calibrated with tiles of 16 x 16 and stride=8, but now with whole images"),
        ([f"pipeline={world}/whole", "tile=true"], "calibrated with whole images, but now with tiles"),
        ([f"pipeline={world}/pipe", "tile=true", f"images={world}/small"], "small/001.png: 40 x 15 pixels"),
    ):
        assert message in fails(capsys, "detect", *argv, f"out={tmp_path}/out")  # not the folder of another worker


def test_tiles_are_compared_with_masks_of_the_size_of_each_image(world, tmp_path):
    files = sorted((world / "new").rglob("*.png"))
    (tmp_path / "truth/bad").mkdir(parents=True)
    masks = [np.zeros(Image.open(file).size[::-1], bool) for file in files]
    for file, mask in zip(files, masks, strict=True):
        if file.parent.name == "bad":
            mask[12:22, 9:19] = True
            Image.fromarray(mask).save(tmp_path / f"truth/bad/{file.stem}_mask.png")
    given = ["tile=true", "method=nll", "map=bits", f"ground_truth={tmp_path}/truth"]
    main(["detect", f"pipeline={world}/pipe", f"images={world}/new", f"out={tmp_path}/found", *given])
    (row, _) = rows_of(tmp_path / "found/ground_truth.csv")
    assert (row["images"], row["regions"]) == ("10", "10") and float(row["pixel_auroc"]) > 0.7
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    maps = [found.numpy() for found in pipe.anomaly_map([Image.open(file) for file in files], stride=8)]
    pixels, marked = (np.concatenate([each.ravel() for each in some]) for some in (maps, masks))
    assert float(row["pixel_auroc"]) == pytest.approx(auroc(pixels, marked), abs=2e-4)
    assert float(row["pro"]) == pytest.approx(per_region_overlap(maps, masks), abs=2e-4)

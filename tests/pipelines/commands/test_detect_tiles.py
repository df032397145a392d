"""`smalti calibrate` and `smalti detect` with tiles: images keep their size.

Covers: pipelines/commands/calibrate.py, pipelines/commands/detect.py.
"""

from __future__ import annotations

import csv
import shutil
import weakref

import numpy as np
import pytest
import torch
from command import fails
from givens.stripes import SIZE, stripes, uniform
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.scores import anomaly_score
from pipelines.anomaly.sheets import reduce_map, reduce_mask
from pipelines.images import views
from pipelines.images.grids import BAND
from pipelines.metrics.localization import auroc, per_region_overlap


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
    side = (width - 2) // 3 - 2  # three panels in each of six rows, of the largest width and height
    assert side % 33 == 0 and height == 6 * (side // 33 * 40 + BAND + 2) + 2


def test_sizes_beyond_those_of_the_calibration_are_warned_about(world, tmp_path, capsys):
    assert ImagePipeline.from_pretrained(world / "pipe").calibration.sizes == [40, 27, 40, 27]  # every second image
    given = [f"pipeline={world}/pipe", "tile=true", f"out={tmp_path}/found", "overwrite=true", "num_shown=1"]
    write(tmp_path / "same", stripes(5, seed=3, side=40), sizes=((40, 27),))
    main(["detect", *given, f"images={tmp_path}/same"])
    assert "warning" not in capsys.readouterr().err
    main(["detect", *given, f"images={world}/new"])
    assert "15 of 30 images have other sizes than those of the calibration, 40 x 27 " in capsys.readouterr().err


def test_the_area_is_that_above_the_threshold_of_the_map(world, tmp_path, capsys):
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    given = [f"images={world}/new", "tile=true", "normal_labels=[good]", "num_shown=3"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", "method=hidden", *given])
    rows = rows_of(tmp_path / "found/scores.csv")
    images = [Image.open(row["file"]) for row in rows]
    expected = anomaly_score(pipe, images, "hidden", stride=8)
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, rtol=1e-3)
    heats = pipe.anomaly_map(images, method="combined", stride=8)
    limit = pipe.calibration.scores["map"].threshold
    assert [int(row["area"]) for row in rows] == [int((heat > limit).sum()) for heat in heats]
    count = sum(bool((heat > limit).any()) for heat in heats)
    assert count and f"in {count} of 30 images" in capsys.readouterr().out


def test_folds_have_maps_but_flag_no_regions(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "tile=true", "stride=16", "folds=2", "data.limit=40"])
    assert "left out: thresholds of regions (they need folds=1, not folds=2)" in capsys.readouterr().out
    given = [f"images={world}/new", "tile=true", "stride=16", "num_shown=1", "method=hidden"]
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found", *given])
    assert "not flagged: with folds=2, the map has no threshold" in capsys.readouterr().out
    assert "area" not in rows_of(tmp_path / "found/scores.csv")[0]


def test_few_images_are_in_memory_at_a_time(world, tmp_path, monkeypatch):
    most, alive, real = [0], [], views.read_large

    def load(*arguments):
        image = real(*arguments)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(image)]
        most[0] = max(most[0], len(alive))
        return image

    monkeypatch.setattr(views, "read_large", load)
    main(["detect", f"pipeline={world}/pipe", f"images={world}/new/bad", f"out={tmp_path}/found", "tile=true"])
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
        (["detect", "tile=true", "stride=17"], "stride: must be from 1 to 16"),
        (["detect"], "calibrated with tiles of 16 x 16 and stride=8, but now with whole images"),
        (["detect", "pipeline={world}/whole", "tile=true"], "calibrated with whole images, but now with tiles"),
        (["detect", "tile=true", "images={world}/small"], "small/001.png: 40 x 15 pixels"),
        (["calibrate", "tile=true", "data.source={world}/small", "every=1"], "data: "),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(world, capsys, argv, message):
    own = [] if any(part.startswith("pipeline=") for part in argv) else [f"pipeline={world}/pipe"]
    before = (world / "pipe/calibration.json").read_bytes()
    line = fails(capsys, argv[0], *own, *(part.format(world=world) for part in argv[1:]))
    assert message.format(world=world) in line
    assert (world / "pipe/calibration.json").read_bytes() == before


def test_tiles_are_calibrated_and_compared_with_masks_by_object(trained, tmp_path, capsys):
    """Two views of an object have one score, the highest of all their tiles; maps and masks have the image's size."""
    views = [f"part{number:03d}_{view}.png" for number in range(40) for view in "ab"]
    images = stripes(80, seed=24, side=40)[:, 0].numpy()
    for name, image in zip(views, images, strict=True):
        place = tmp_path / "normal" / ("train" if name < "part004" else "test")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:27]).save(place / name)
    mask = np.zeros((27, 40), np.uint8)
    mask[12:22, 9:19] = 255
    for kind, odd in (("good", stripes(8, seed=25, side=40)), ("noise", with_defects(8, seed=26))):
        (tmp_path / "new" / kind).mkdir(parents=True)
        (tmp_path / "truth" / kind).mkdir(parents=True)
        for number, image in enumerate(odd[:, 0].numpy()):
            Image.fromarray(image[:27]).save(tmp_path / f"new/{kind}/part{kind}{number // 2}_{number % 2}.png")
            Image.fromarray(mask).save(tmp_path / f"truth/{kind}/part{kind}{number // 2}_{number % 2}_mask.png")
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    data = {"source": str(tmp_path / "normal"), "image_size": SIZE, "group": r"part([a-z0-9]+)"}
    pipe.provenance = {"data": data}
    pipe.save_pretrained(tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "tile=true", "stride=16", "every=1", "false_alarms=0.1"])
    pipe = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert (pipe.calibration.objects, pipe.calibration.count, pipe.calibration.stride) == (36, 72, 16)
    owners, scores = (
        np.array([name[4:7] for name in views[8:]]),
        pipe.anomaly_score(list(images[8:, :27]), "nll", stride=16),
    )
    worst = {scores[owners == owner].max().item() for owner in owners}
    held = pipe.calibration.scores["nll"].values
    assert len(held) == 18 and all(min(abs(value - score) for score in worst) < 1e-3 for value in held)
    given = ["tile=true", "stride=16", "method=nll", "map=bits", f"ground_truth={tmp_path}/truth"]
    main(["detect", f"pipeline={tmp_path}/pipe", f"images={tmp_path}/new", f"out={tmp_path}/found", *given])
    printed = capsys.readouterr().out
    assert "without a pixel" not in printed and "of normal objects" in printed
    (row, _) = rows_of(tmp_path / "found/ground_truth.csv")
    assert (row["images"], row["objects"], row["regions"]) == ("8", "4", "8")
    files = [*sorted((tmp_path / "new/good").iterdir()), *sorted((tmp_path / "new/noise").iterdir())]
    maps = [found.numpy() for found in pipe.anomaly_map([Image.open(file) for file in files], stride=16)]
    masks = [np.zeros((27, 40), bool)] * 8 + [mask > 0] * 8
    assert float(row["pixel_auroc"]) == pytest.approx(auroc(np.stack(maps), np.stack(masks)), abs=2e-4)
    assert float(row["pro"]) == pytest.approx(per_region_overlap(maps, masks), abs=2e-4)
    assert float(row["pixel_auroc"]) > 0.7 and Image.open(tmp_path / "found/ground_truth.png").size[0] > 3 * 40


def test_large_maps_and_masks_are_reduced_alike():
    """Squares of pixels: the mean of a map, and any pixel of a mask."""
    heat, mask = torch.arange(1025.0)[:, None].expand(1025, 7), np.zeros((1025, 7), bool)
    mask[4, 6] = True
    small, marked = reduce_map(heat), reduce_mask(mask)
    assert small.shape == marked.shape == (342, 3) and small[1].tolist() == [4, 4, 4] and float(small[-1, 0]) == 1023.5
    assert marked.sum() == 1 and marked[1, 2]
    assert reduce_map(heat[:512]).shape == (512, 7) and np.array_equal(reduce_mask(mask[:512]), mask[:512])

"""`smalti detect ground_truth=`: figures, pictures and refusals; calibration and p-values by object.

Covers: pipelines/anomaly/ground_truth.py.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from command import fails
from folders import rows_of
from givens.stripes import SIZE, planted, save_images, stripes
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.ground_truth import evaluate_defects, read_mask
from pipelines.images.grids import BAND
from pipelines.metrics.localization import auroc, per_region_overlap


def views(first, count, each=2):
    return [f"tile{first + number:03}_view{view}" for number in range(count) for view in range(each)]


MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[4:10, 4:10] = 255
MASKS = torch.from_numpy(MASK).expand(12, 1, SIZE, SIZE)


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A pipeline that is calibrated by object, and a test set with masks: 36 pixels of noise, or nothing odd at all."""
    root = tmp_path_factory.mktemp("world")
    save_images(root / "normal", stripes(440, seed=20), views(0, 220))
    save_images(root / "test/good", stripes(20, seed=21), views(300, 10))
    save_images(root / "test/noise", planted(stripes(12, seed=22)), views(310, 6))
    save_images(root / "test/none", stripes(8, seed=23), views(316, 4))
    save_images(root / "truth/noise", MASKS[:12], [f"{name}_mask" for name in views(310, 6)])
    save_images(root / "truth/none", MASKS[:8], views(316, 4))
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    source = {"source": str(root / "normal"), "image_size": SIZE, "held_out_fraction": 0.4, "group": r"tile(\d+)"}
    pipe.provenance = {"data": source}
    pipe.save_pretrained(root / "pipe")
    main(["calibrate", f"pipeline={root}/pipe"])
    return root


def detect(world, out, *more):
    given = [f"images={world}/test", f"ground_truth={world}/truth", f"out={out}"]
    main(["detect", f"pipeline={world}/pipe", *given, *more])


def test_a_calibration_takes_whole_objects(world, tmp_path, capsys):
    found = ImagePipeline.from_pretrained(world / "pipe").calibration
    assert (found.objects, found.count, len(found.scores["nll"].values)) == (44, 88, 22)
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", "method=nll"])
    printed = capsys.readouterr().out
    assert printed.startswith("scoring 88 of 176 ") and "compared with 22 normal objects" in printed
    objects = [row["object"] for row in rows_of(tmp_path / "found/scores.csv")]
    assert len(set(objects)) == 44 and all(objects.count(name) == 2 for name in objects)


def test_figures_are_those_of_the_maps(world, tmp_path, capsys):
    detect(world, tmp_path / "found", "method=nll", "map=bits", "num_shown=3")
    printed = capsys.readouterr().out
    rows = {row["defect"]: row for row in rows_of(tmp_path / "found/ground_truth.csv")}
    assert list(rows) == ["noise", "none", "all"]
    counts = {name: tuple(int(row[key]) for key in ("images", "objects", "regions")) for name, row in rows.items()}
    assert counts == {"noise": (12, 6, 12), "none": (8, 4, 8), "all": (20, 10, 20)}
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    files = [path for name in ("good", "noise") for path in sorted((world / "test" / name).iterdir())]
    images = np.stack([np.asarray(Image.open(path)) for path in files])
    maps, masks = pipe.anomaly_map(images).numpy(), np.zeros(images.shape, bool)
    masks[20:] = MASK > 0
    scores = pipe.anomaly_score(images, "nll").numpy()
    expected = {"pixel_auroc": auroc(maps, masks), "pro": per_region_overlap(maps, masks)}
    expected["image_auroc"] = auroc(scores, masks.any((1, 2)))
    for key, value in expected.items():
        assert float(rows["noise"][key]) == pytest.approx(value, abs=2e-4)
        assert f"{value:.3f}"[:4] in printed
    assert float(rows["noise"]["low"]) <= expected["image_auroc"] <= float(rows["noise"]["high"])
    assert expected["pixel_auroc"] > 0.1 + float(rows["none"]["pixel_auroc"])
    assert len(json.loads((tmp_path / "found/figures.json").read_text())["defects"]) == 3
    width, height = Image.open(tmp_path / "found/ground_truth.png").size
    side = (width - 2) // 3 - 2  # three panels in each of six rows, with a name above each
    assert side % SIZE == 0 and (width, height) == (3 * (side + 2) + 2, 6 * (side + BAND + 2) + 2)
    assert "of normal objects" in printed


def test_masks_are_cropped_as_images_are(tmp_path):
    """A pixel is defective if more than half of its area is; black is 0, whatever white is."""
    marked = np.random.default_rng(0).integers(2, size=(16, 32), dtype=np.uint8)  # the middle 16 x 16 are seen
    Image.fromarray(marked).save(tmp_path / "mask.png")
    Image.fromarray(255 * marked).save(tmp_path / "image.png")
    found = read_mask(tmp_path / "mask.png", tmp_path / "image.png", (8, 8))
    area = marked[:, 8:24].reshape(8, 2, 8, 2).mean((1, 3))
    assert np.array_equal(found, area > 0.5) and (area == 0.5).any()


def test_an_image_whose_mask_vanished_counts_as_an_image_only():
    chance = np.random.default_rng(0)
    maps, masks = chance.random((12, 8, 8), np.float32), chance.random((12, 8, 8)) < 0.1
    anomalous = np.arange(12) >= 5
    masks[~anomalous], masks[-1], maps[-1] = False, False, 9
    names = ["good"] * 5 + ["odd"] * 7
    given = (chance.random(12), maps, masks, names, anomalous, [str(number) for number in range(12)])
    (odd, both), (fewer, _) = (evaluate_defects(*(part[:count] for part in given)) for count in (12, 11))
    assert (odd["images"], fewer["images"]) == (7, 6) and {**both, "defect": "odd"} == odd
    assert (odd["pixel_auroc"], odd["pro"]) == (fewer["pixel_auroc"], fewer["pro"])
    assert odd["image_auroc"] != fewer["image_auroc"]


def test_mistakes_are_one_line(world, tmp_path, capsys):
    shutil.copytree(world / "truth", tmp_path / "truth")
    mask = tmp_path / "truth/noise/tile312_view1_mask.png"
    given = [f"pipeline={world}/pipe", f"images={world}/test", f"out={tmp_path}/out"]
    for change, message in (
        (lambda: Image.fromarray(MASK[:, :10]).save(mask), "10 x 16 pixels, its image"),
        (mask.unlink, "tile312_view1.png has no mask"),
    ):
        change()
        line = fails(capsys, "detect", *given, f"ground_truth={tmp_path}/truth")
        assert message in line and "ground_truth: " in line and not (tmp_path / "out").exists()
    write_table(tmp_path / "masks.csv", list(list_masks(world))[1:])
    assert "no row with the file_name of" in fails(capsys, "detect", *given, f"ground_truth={tmp_path}/masks.csv")


def list_masks(world):
    """Return the row of each image in a table of masks."""
    for path in sorted((world / "test").rglob("*.png")):
        kind = path.parent.name
        mask = world / "truth" / kind / f"{path.stem}{'_mask' if kind == 'noise' else ''}.png"
        yield str(path.relative_to(world)), "" if kind == "good" else str(mask), kind


def write_table(path, rows):
    path.write_text("file_name,mask,label\n" + "".join(f"{','.join(row)}\n" for row in rows))


def test_a_table_names_masks_as_the_layout_does(world, tmp_path):
    detect(world, tmp_path / "folders", "method=nll")
    write_table(world / "masks.csv", list_masks(world))
    detect(world, tmp_path / "table", "method=nll", f"ground_truth={world}/masks.csv")
    assert rows_of(tmp_path / "table/ground_truth.csv") == rows_of(tmp_path / "folders/ground_truth.csv")

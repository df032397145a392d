"""`smalti detect ground_truth=`: figures, pictures and refusals; calibration and p-values by object.

Covers: pipelines/anomaly/ground_truth.py.
"""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from command import fails
from givens.stripes import SIZE, planted, stripes
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.ground_truth import evaluate_defects, read_mask
from pipelines.images import DataConfig, load_images
from pipelines.images.grids import BAND
from pipelines.metrics.localization import auroc, per_region_overlap


def write(folder, images, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")


def views(first, count, each=2):
    return [f"tile{first + number:03}_view{view}" for number in range(count) for view in range(each)]


MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[4:10, 4:10] = 255


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A pipeline that is calibrated by object, and a test set with masks: 36 pixels of noise, or nothing odd at all."""
    root = tmp_path_factory.mktemp("world")
    write(root / "normal", stripes(440, seed=20)[:, 0].numpy(), views(0, 220))
    write(root / "test/good", stripes(20, seed=21)[:, 0].numpy(), views(300, 10))
    write(root / "test/noise", planted(stripes(12, seed=22))[:, 0].numpy(), views(310, 6))
    write(root / "test/none", stripes(8, seed=23)[:, 0].numpy(), views(316, 4))
    write(root / "truth/noise", [MASK] * 12, [f"{name}_mask" for name in views(310, 6)])
    write(root / "truth/none", [MASK] * 8, views(316, 4))
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    source = {"source": str(root / "normal"), "image_size": SIZE, "held_out_fraction": 0.4, "group": r"tile(\d+)"}
    pipe.provenance = {"data": source}
    pipe.save_pretrained(root / "pipe")
    main(["calibrate", f"pipeline={root}/pipe"])
    return root


def detect(world, out, *more):
    given = [f"images={world}/test", f"ground_truth={world}/truth", f"out={out}"]
    main(["detect", f"pipeline={world}/pipe", *given, *more])


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_calibration_takes_whole_objects(world, tmp_path, capsys):
    found = ImagePipeline.from_pretrained(world / "pipe").calibration
    assert (found.objects, found.count, len(found.scores["nll"].values)) == (44, 88, 22)
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", "method=nll"])
    printed = capsys.readouterr().out
    assert printed.startswith("scoring 88 of 176 ") and "compared with 22 normal objects" in printed
    objects = [row["object"] for row in rows_of(tmp_path / "found/scores.csv")]
    assert len(set(objects)) == 44 and all(objects.count(name) == 2 for name in objects)


def test_objects_may_be_named_by_a_column(world, tmp_path, capsys):
    """The same objects, by a sheet instead of an expression."""
    root = tmp_path / "normal"
    shutil.copytree(world / "normal", root)
    rows = "".join(f"{path.name},{path.name[:7]}\n" for path in sorted(root.iterdir()))
    (root / "metadata.csv").write_text("file_name,thing\n" + rows)
    pipe = ImagePipeline.from_pretrained(world / "pipe")
    pipe.calibration = None
    source = {"source": str(root), "image_size": SIZE, "held_out_fraction": 0.4, "group": "thing"}
    pipe.provenance = {"data": source, "splits": load_images(DataConfig(**source)).facts.to_dict()}
    pipe.save_pretrained(tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe"])
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").calibration.objects == 44
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found", "method=nll"])
    assert "compared with 22 normal objects" in capsys.readouterr().out
    objects = [row["object"] for row in rows_of(tmp_path / "found/scores.csv")]
    assert len(set(objects)) == 44 and all(name.startswith("tile") for name in objects)


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


NAME = "noise/tile312_view1"
MISTAKES = {
    "size": (lambda at: Image.fromarray(MASK[:, :10]).save(at / f"truth/{NAME}_mask.png"), "10 x 16 pixels, its image"),
    "missing": (lambda at: (at / f"truth/{NAME}_mask.png").unlink(), f"{NAME}.png has no mask"),
    "damaged": (lambda at: (at / f"truth/{NAME}_mask.png").write_bytes(b"no image"), NAME),
    "loose": (lambda at: shutil.copy(at / f"test/{NAME}.png", at / "test"), "is in no folder"),
    "no folder": (lambda at: shutil.rmtree(at / "truth"), "no such folder"),
    "no images": (lambda at: None, "needs images=FOLDER"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(world, tmp_path, capsys, case):
    shutil.copytree(world / "test", tmp_path / "test")
    shutil.copytree(world / "truth", tmp_path / "truth")
    change, message = MISTAKES[case]
    change(tmp_path)
    images = "seed=0" if case == "no images" else f"images={tmp_path}/test"
    given = [f"pipeline={world}/pipe", images, f"ground_truth={tmp_path}/truth", f"out={tmp_path}/out"]
    line = fails(capsys, "detect", *given)
    assert message in line and "ground_truth: " in line and not (tmp_path / "out").exists()


def test_other_names_of_good_images_and_masks_that_vanish(world, tmp_path, capsys):
    shutil.copytree(world / "test", tmp_path / "test")
    shutil.copytree(world / "truth", tmp_path / "truth")
    (tmp_path / "test/good").rename(tmp_path / "test/free")
    for path in (tmp_path / "truth/none").iterdir():
        Image.fromarray(0 * MASK).save(path)
    given = [f"images={tmp_path}/test", f"ground_truth={tmp_path}/truth", "normal_labels=[free]", "data.group=null"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/out", *given])
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out/ground_truth.csv")
    assert [row["pro"] == "" for row in rows] == [False, True, False]
    assert "without a pixel in the mask at this size: 8 defective images" in printed


def list_masks(world):
    """Return the row of each image in a table of masks."""
    for path in sorted((world / "test").rglob("*.png")):
        kind = path.parent.name
        mask = world / "truth" / kind / f"{path.stem}{'_mask' if kind == 'noise' else ''}.png"
        yield str(path.relative_to(world)), "" if kind == "good" else str(mask), kind


def write_table(path, rows):
    path.write_text("file_name,mask,label\n" + "".join(f"{','.join(row)}\n" for row in rows))


def test_a_table_names_masks_as_the_layout_does(world, tmp_path):
    """With labels, or without: then each image with a mask is a defect."""
    detect(world, tmp_path / "folders", "method=nll")
    rows = list(list_masks(world))
    write_table(world / "labelled.csv", rows)
    write_table(world / "plain.csv", [(name, mask, "") for name, mask, _ in rows])
    for table in ("labelled", "plain"):
        detect(world, tmp_path / table, "method=nll", f"ground_truth={world}/{table}.csv")
    assert rows_of(tmp_path / "labelled/ground_truth.csv") == rows_of(tmp_path / "folders/ground_truth.csv")
    plain, expected = rows_of(tmp_path / "plain/ground_truth.csv"), rows_of(tmp_path / "folders/ground_truth.csv")[-1]
    assert [row["defect"] for row in plain] == ["defect", "all"] and plain[-1] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "no row with the file_name of"),
        (lambda rows: [(name, "", kind) for name, _, kind in rows], "has no mask"),
        (lambda rows: [(name, mask or rows[-1][1], kind) for name, mask, kind in rows], "has a mask"),
    ],
)
def test_mistakes_in_a_table_of_masks_are_one_line(world, tmp_path, capsys, change, message):
    rows = list(list_masks(world))
    write_table(tmp_path / "masks.csv", change(rows))
    given = [f"images={world}/test", f"ground_truth={tmp_path}/masks.csv", f"out={tmp_path}/found"]
    assert message in fails(capsys, "detect", f"pipeline={world}/pipe", *given)

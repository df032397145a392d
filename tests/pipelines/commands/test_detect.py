"""`smalti calibrate` and `smalti detect`: results and refusals.

Covers: pipelines/commands/calibrate.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from folders import rows_of
from givens.stripes import SIZE, save_images, stripes, uniform
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.conformal import benjamini_hochberg
from pipelines.anomaly.scores import METHODS
from pipelines.images.grids import BAND


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A pipeline, `bare` and calibrated, and folders of images."""
    root = tmp_path_factory.mktemp("world")
    save_images(root / "normal/train/a", stripes(4))
    save_images(root / "normal/test/a", stripes(80, seed=20))
    save_images(root / "fresh", stripes(30, seed=21))
    save_images(root / "noise", uniform(12))
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.provenance = {"data": {"source": str(root / "normal"), "image_size": SIZE}}
    pipe.save_pretrained(root / "bare")
    shutil.copytree(root / "bare", root / "pipe")
    main(["calibrate", f"pipeline={root}/pipe", "background=" + str(root / "bare")])
    return root


def test_calibrating_leaves_the_weights_as_they_are_stored(world, tmp_path):
    ImagePipeline.from_pretrained(world / "bare").save_pretrained(tmp_path / "pipe", variant="fp16")
    files = {path: path.read_bytes() for path in (tmp_path / "pipe").rglob("*.safetensors")}
    main(["calibrate", f"pipeline={tmp_path}/pipe"])
    assert {path: path.read_bytes() for path in (tmp_path / "pipe").rglob("*.safetensors")} == files
    found = ImagePipeline.from_pretrained(tmp_path / "pipe", variant="fp16").calibration
    assert found.count == 40 and set(found.scores) == {*METHODS} - {"hidden", "ratio"}  # it does not hide blocks


def test_detect_tells_classes_apart(world, tmp_path, capsys):
    """Classes are the names of the folders."""
    given = [f"images=[{world}/noise, {world}/fresh]", "normal_labels=[fresh]", "num_shown=3"]
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/found", *given])
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "found" / "scores.csv")
    assert len(rows) == 42 and rows[0]["file"].endswith("noise/000.png")
    assert list(rows[0])[:6] == ["file", "class", "anomalous", "score", "p_value", "flagged"]
    assert {"token_bits", "error", "background_bits"} <= set(rows[0])
    assert [(row["class"], row["anomalous"]) for row in rows] == [("noise", "1")] * 12 + [("fresh", "0")] * 30
    assert all(row["flagged"] == "1" for row in rows[:12]) and sum(row["flagged"] == "1" for row in rows[12:]) < 8
    figures = json.loads((tmp_path / "found" / "figures.json").read_text())
    assert figures["auroc"][0] > 0.99 and figures["prevalence"] == pytest.approx(12 / 42)
    assert "AUROC" in printed
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/fdr", given[0], "fdr=0.3"])
    rows = rows_of(tmp_path / "fdr" / "scores.csv")
    p, flagged = (np.array([float(row[name]) for row in rows]) for name in ("p_value", "flagged"))
    assert flagged.sum() and (flagged == 1).tolist() == benjamini_hochberg(p, 0.3).tolist()
    width, height = Image.open(tmp_path / "found" / "sheet.png").size
    assert (width - 2) // 4 - (height - 2) // 6 == -BAND  # four panels in each of six rows, with a name above each


def test_the_default_is_held_out_images_that_were_not_used_to_calibrate(world, tmp_path, capsys):
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/b", "method=nll"])
    printed = capsys.readouterr().out
    names = [Path(row["file"]).name for row in rows_of(tmp_path / "b" / "scores.csv")]
    assert names == [f"{number:03d}.png" for number in range(1, 80, 2)]  # the others were used to calibrate
    assert printed.startswith(f"scoring 40 of 80 held-out images of {world}/normal;")
    assert "AUROC" not in printed and not (tmp_path / "b" / "figures.json").exists()


def test_images_of_the_calibration_are_skipped_under_any_path(world, tmp_path, capsys):
    again = torch.cat([stripes(80, seed=20)[[0, 2, 4]], stripes(6, seed=24)])
    save_images(tmp_path / "again", again)
    main(["detect", f"pipeline={world}/pipe", f"images={tmp_path}/again", f"out={tmp_path}/found"])
    assert capsys.readouterr().out.startswith(f"scoring 6 of 9 images in {tmp_path}/again;")
    rows = rows_of(tmp_path / "found/scores.csv")
    assert [Path(row["file"]).name for row in rows] == [f"00{number}.png" for number in range(3, 9)]


def test_a_confidence_is_saved_and_reported(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    line = fails(capsys, "calibrate", f"pipeline={tmp_path}/pipe", "confidence=0.9")
    assert line.startswith("error: data: ") and "90 images" in line and "every=1" in line
    main(["calibrate", f"pipeline={tmp_path}/pipe", "confidence=0.9", "false_alarms=0.2"])
    main(["detect", f"pipeline={tmp_path}/pipe", f"images={world}/fresh", f"out={tmp_path}/found"])
    assert capsys.readouterr().out.count("at most 20 % of new normal images exceed it, in 90 % of calibrations\n") == 2
    fitted = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    flagged = [row["flagged"] == "1" for row in rows_of(tmp_path / "found/scores.csv")]
    scores = [float(row["score"]) for row in rows_of(tmp_path / "found/scores.csv")]
    joint = fitted.scores["joint"]
    assert fitted.confidence == 0.9 and flagged == [score > joint.threshold for score in scores]
    assert joint.threshold > np.sort(joint.values)[-2]  # of 20 scores, 3 could be above on average


def test_folds_use_all_images_and_print_what_is_guaranteed(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    verb = f"pipeline={tmp_path}/pipe"
    assert "folds=1 only" in fails(capsys, "calibrate", verb, "folds=5", "confidence=0.9")
    main(["calibrate", verb, "folds=5", "data.limit=60"])  # 30 images: two halves would need 38
    fitted = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    bound, printed = f"guaranteed is at most {100 * fitted.bound:.1f} %", capsys.readouterr().out
    assert f"p-values: about 5 % of new normal images have p <= 0.05; {bound}" in printed
    assert len(fitted.scores["joint"].values) == fitted.count == 30
    given = [verb, f"images=[{world}/noise, {world}/fresh]", f"out={tmp_path}/found"]
    assert "fdr: holds for a calibration with folds=1, this one has folds=5" in fails(
        capsys, "detect", *given, "fdr=0.1"
    )
    main(["detect", *given])
    assert bound in capsys.readouterr().out
    rows = rows_of(tmp_path / "found/scores.csv")
    assert [row["flagged"] == "1" for row in rows] == [float(row["p_value"]) <= 0.05 for row in rows]
    assert all(row["flagged"] == "1" for row in rows[:12])


def test_other_images_of_calibrated_objects_are_not_new(world, tmp_path, capsys):
    """Under any path, with data.group; the same pixels are not new without it, too."""
    images, names = stripes(60, seed=31), [f"part{number:02d}_a" for number in range(60)]
    save_images(tmp_path / "source/train", images[:20], names[:20])
    save_images(tmp_path / "source/test", images[20:], names[20:])
    save_images(tmp_path / "new", stripes(60, seed=32), [name.replace("_a", "_b") for name in names])
    pipe = ImagePipeline.from_pretrained(world / "bare")
    pipe.provenance = {"data": {"source": str(tmp_path / "source"), "image_size": SIZE, "group": r"part(\d+)"}}
    pipe.save_pretrained(tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", "false_alarms=0.1"])
    given = [f"pipeline={tmp_path}/pipe", f"images={tmp_path}/new", f"out={tmp_path}/found", "overwrite=true"]
    main(["detect", *given])
    assert "scoring 40 of 60 images in" in capsys.readouterr().out
    objects = [row["object"] for row in rows_of(tmp_path / "found/scores.csv")]
    assert objects == [f"{number:02d}" for number in (*range(20), *range(21, 60, 2))]
    main(["detect", *given, "data.group=null"])
    assert "scoring 60 of 60 images in" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_changes_nothing(world, tmp_path, capsys):
    make_pipeline(size=(SIZE, SIZE), labels=[]).save_pretrained(tmp_path / "other")
    before = (world / "pipe" / "calibration.json").read_bytes()
    for verb, argv, message in (
        ("detect", [f"pipeline={world}/bare"], "smalti calibrate pipeline="),
        ("detect", [f"images=[{world}/fresh, {world}/noise]", "normal_labels=round"], "'round'"),
        ("calibrate", ["data.limit=12", "every=1"], "false_alarms="),
        ("calibrate", [f"background={tmp_path}/other"], "background/config.json: "),
    ):
        assert message in fails(capsys, verb, f"pipeline={world}/pipe", *argv)
    assert (world / "pipe" / "calibration.json").read_bytes() == before

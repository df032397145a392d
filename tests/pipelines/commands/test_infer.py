"""`smalti infer` and `smalti calibrate column=NAME`: what they write and print; and refusals."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from command import fails
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.inference.scales import INFERENCE


def test_a_calibrated_column_is_inferred_with_sets(two_classes, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(two_classes / "run", run)
    pipeline = f"pipeline={run}/pipeline"
    main(["calibrate", pipeline, "column=label", "every=1"])
    assert "label level=0.9` is right for 90 % of new images" in capsys.readouterr().out.replace("column=", "")
    (fit,) = json.loads((run / "pipeline" / INFERENCE).read_text())["fits"]
    assert fit["column"] == "label" and len(fit["sizes"][0]["denser"]) == 10
    out = {"out": tmp_path / "all.csv", "plot": tmp_path / "plot.png", "evidence": tmp_path / "evidence.png"}
    main(["infer", pipeline, *(f"{key}={path}" for key, path in out.items()), "level=0.8"])
    printed, said = capsys.readouterr()
    assert "20 images x 2 values: 40 densities, about" in said and "20 rows; p(label): uniform" in printed
    rows = list(csv.DictReader(out["out"].open()))
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert [*rows[0]] == ["name", "label", "probability", "others", "entropy", "set_0.8"] and len(rows) == 20
    with Image.open(two_classes / "images" / "test" / rows[3]["name"].removeprefix("test/")) as picture:
        found = pipe.infer(picture, "label")
    assert float(rows[3]["probability"]) == pytest.approx(float(found.probabilities.max()), abs=1e-4)
    assert json.loads(rows[3]["set_0.8"]) == found.conformal(0.8)[0]
    for name in ("plot", "evidence"):
        with Image.open(out[name]) as picture:
            assert picture.width > 100


WRONG = {
    "column=size": "column: unknown column 'size'",
    "level=0.9": "level: the column is not calibrated; run `smalti calibrate column=NAME`",
    "prior=flat": "prior:",
    "groups=true": "groups: it is not known which object an image shows; data.group=PATTERN",
    "condition.label=0": "condition.label: cannot be both inferred and given",
    "out=all.txt": "out:",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_infer_refuses(two_classes, tmp_path, capsys, wrong):
    out = [] if wrong.startswith("out") else [f"out={tmp_path}/all.csv"]
    line = fails(capsys, "infer", f"pipeline={two_classes}/run/pipeline", *out, wrong)
    assert WRONG[wrong] in line and not list(tmp_path.iterdir())


def test_what_calibrate_refuses_of_a_column(two_classes, capsys):
    pipeline = f"pipeline={two_classes}/run/pipeline"
    for given, message in (
        (["column=size"], "column: unknown column 'size'"),
        (["column=label", "given=[label]"], "given: 'label' cannot be both inferred and given"),
        (["column=label", "tile=true"], "tile: is not for column=NAME"),
        (["given=[label]"], "given: needs column=NAME"),
        (["column=label", "every=2"], "column 'label': 10 images have a value; at least 20 are needed"),
    ):
        assert message in fails(capsys, "calibrate", pipeline, *given)

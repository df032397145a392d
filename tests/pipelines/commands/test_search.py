"""`smalti search`: an image itself is found first, answers are paths; and refusals."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from command import fails
from givens.images import write_table
from PIL import Image

from pipelines.__main__ import main


@pytest.mark.parametrize("layer", [[], ["layer=pixels"], ["layer=prior.0", "pool=flatten"]])
def test_search_finds_an_image_itself_first(two_classes, tmp_path, capsys, layer):
    out, query = tmp_path / "near.png", two_classes / "images" / "train" / "above" / "03.png"
    main(["search", f"pipeline={two_classes}/run/pipeline", f"images={query}", f"out={out}", "k=3", *layer])
    assert capsys.readouterr().out.startswith(f"{query}: train/above/03.png (above) 0.000, train/")
    with Image.open(out) as picture:
        pixels = np.asarray(picture)[-58:-2]
    side = (pixels.shape[1] - 2) // 4  # a query and three neighbours, each with a border
    first, second = pixels[:, 2:side], pixels[:, side + 2 : 2 * side]
    assert np.array_equal(first, second) and first.std() > 0


@pytest.mark.parametrize(("source", "name"), [("table.parquet", r"row \d+ of train"), ("sheet", r"\d\d\.png")])
def test_search_answers_with_paths_or_rows(two_classes, tmp_path, capsys, source, name):
    """Rows of a table; files of a folder with metadata.csv."""
    paths = sorted((two_classes / "images/train").rglob("*.png"))[:20]
    write_table(two_classes / "table.parquet", [path.read_bytes() for path in paths], [k % 2 for k in range(20)])
    (two_classes / "sheet").mkdir(exist_ok=True)
    for k, path in enumerate(paths):
        shutil.copy(path, two_classes / f"sheet/{k:02d}.png")
    rows = "".join(f"{k:02d}.png,{'xy'[k % 2]}\n" for k in range(20))
    (two_classes / "sheet/metadata.csv").write_text(f"file_name,label\n{rows}")
    given = ["data.held_out_fraction=0.5", f"data.source={two_classes}/{source}"]
    main(["search", f"pipeline={two_classes}/run/pipeline", f"out={tmp_path}/near.png", "k=2", "images=0", *given])
    line, near = capsys.readouterr().out.splitlines()[0], rf"{name} \(\w+\) \d\.\d+"
    assert re.fullmatch(rf"{name}: {near}, {near}", line.replace("of test:", "of train:")), line


@pytest.mark.parametrize("wrong", ["layer=prior.9", "images=[20]"])
def test_what_search_refuses(two_classes, tmp_path, capsys, wrong):
    line = fails(capsys, "search", f"pipeline={two_classes}/run/pipeline", f"out={tmp_path}/near.png", wrong)
    assert line.startswith(f"error: {wrong.partition('=')[0]}") and not list(tmp_path.iterdir())

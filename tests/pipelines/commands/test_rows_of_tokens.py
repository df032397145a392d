"""Every verb on a tokenizer whose tokens have no place in the image: it does what it can, and says in a line what not.

Covers: tokenizer/titok.py.
"""

from __future__ import annotations

import pytest
from launch import train_prior, train_tokenizer
from one_process import one_process
from PIL import Image

from pipelines.__main__ import main

pytestmark = pytest.mark.usefixtures("one_process")
TITOK = {
    "kind": "titok",
    "factor": 7,
    "registers": 6,
    "keep": "uniform",
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "quantizer": {"kind": "ema", "codes": 16, "dim": 8},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, its tokens, and a calibrated pipeline."""
    root = tmp_path_factory.mktemp("rows")
    with one_process():
        train_tokenizer(root / "stage1", model=TITOK, data__limit=100, train__preview_every=6, train__evaluate_every=6)
        main(["encode", f"tokenizer={root}/stage1/tokenizer", f"out={root}/tokens"])
        train_prior(root / "stage2", root / "tokens", train__preview_every=6, train__evaluate_every=6)
    main(["calibrate", f"pipeline={root}/stage2/pipeline"])
    return root


def test_every_verb_with_images_works(world, tmp_path):
    pipeline = f"pipeline={world}/stage2/pipeline"
    tokenizer = f"tokenizer={world}/stage1/tokenizer"
    main(["reconstruct", tokenizer, f"out={tmp_path}/a.png", "num_images=4"])
    main(["inspect", tokenizer, f"out={tmp_path}/b.png", "num_images=3"])
    main(["evaluate", pipeline, f"out={tmp_path}/evaluation", "num_images=0"])
    main(["detect", pipeline, f"out={tmp_path}/found", "num_shown=2"])
    assert (Image.open(tmp_path / "found" / "sheet.png").width - 2) % 3 == 0  # three columns, without a map
    main(["generate", pipeline, f"out={tmp_path}/c.png", "num_images=4"])
    main(["search", pipeline, f"out={tmp_path}/d.png"])
    (tmp_path / "images").mkdir()
    Image.new("L", (28, 28), 90).save(tmp_path / "images" / "0.png")
    main(["compress", pipeline, f"images={tmp_path}/images", f"out={tmp_path}/e.smalti"])
    main(["decompress", pipeline, f"stream={tmp_path}/e.smalti", f"out={tmp_path}/images_again"])
    assert len(list((tmp_path / "images_again").iterdir())) == 1
    assert all((tmp_path / f"{name}.png").is_file() for name in "abcd")

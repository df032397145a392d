"""A pipeline and images of two classes, for the verbs that compare images by what a prior makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import make_pipeline


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """A folder: `run/pipeline`, with random weights; its data set `images`, bright above or below."""
    root = tmp_path_factory.mktemp("two_classes")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8), labels=[], num_classes=2, sizes={"factor": 2})
    chance = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        for number in range(count):
            pixels = chance.integers(0, 120, (8, 8), dtype=np.uint8)
            pixels[:4] += 130 * (number % 2)
            pixels[4:] += 130 * (1 - number % 2)
            path = root / "images" / split / ("below", "above")[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    pipe.provenance = {"data": {"source": str(root / "images"), "image_size": 8}}
    pipe.save_pretrained(root / "run" / "pipeline")
    return root

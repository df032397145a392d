"""The model card: it shows what was measured, and nothing else.

Covers: pipelines/metrics/report.py.
"""

from __future__ import annotations

import re

import numpy as np
import yaml
from PIL import Image
from small_pipelines import PROVENANCE, make_pipeline

from pipelines import ImagePipeline
from pipelines.metrics.report import report


def card_of(pipe, folder):
    pipe.save_pretrained(folder)
    return (folder / "README.md").read_text()


def figures_in(card):
    rows = re.findall(r"^\| (?!figure|---)(.+?) \| (.+?) \|$", card, re.M)
    return {name: [float(number) for number in re.findall(r"[\d.]+", value)] for name, value in rows}


def test_card_shows_what_was_measured_and_nothing_else(tmp_path):
    pipe = make_pipeline()
    assert figures_in(card_of(pipe, tmp_path / "a")) == {}
    assert "Measured" not in (tmp_path / "a" / "README.md").read_text()
    pipe.provenance = PROVENANCE
    card = card_of(pipe, tmp_path / "b")
    numbers = sorted(number for values in figures_in(card).values() for number in values)
    assert numbers == [0.875, 1.5, 2.5, 3.125, 21.75, 1234, 5678]
    assert "`digits`" in card and "By training" in card
    pipe.provenance = {**PROVENANCE, "evaluation": {"psnr": 22.5, "class_agreement": 0.9375}}
    card = card_of(pipe, tmp_path / "c")
    shown = [number for values in figures_in(card).values() for number in values]
    assert sorted(shown) == [0.9375, 1.5, 2.5, 22.5, 1234, 5678] and "`smalti evaluate`" in card


def test_a_bound_is_called_one(tmp_path):
    for exact in (True, False):
        pipe = make_pipeline(prior="masked", exact=exact)
        pipe.provenance = PROVENANCE
        assert ("| at most 3.125 |" in card_of(pipe, tmp_path / str(exact))) != exact
        figures = dict.fromkeys(
            [
                "psnr",
                "codebook_usage",
                "codebook_perplexity",
                "bits_per_token",
                "unconditional_bits_per_token",
                "marginal_bits_per_token",
                "uniform_bits_per_token",
            ],
            3.5,
        )
        text = report(figures, exact=pipe.prior.exact, vocab_size=9, num_images=9, device="cpu")
        assert ("<= 3.500" in text) != exact


def test_card_says_what_the_pipeline_is(tmp_path):
    pipe = make_pipeline()
    card = card_of(pipe, tmp_path / "pipe")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "smalti" and {"vqvae", "gpt"} <= set(header["tags"])
    assert "8 x 12 grey" in card and "3 classes (cat, dog, eel)" in card and "2 x 3 ids of 32" in card
    for part in (pipe.tokenizer, pipe.prior):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names: dict = {}
    exec(code.replace("this folder or Hub id", (tmp_path / "pipe").as_posix()), names)
    assert len(names["images"]) == 4


def test_sample_grid_is_on_the_card_and_comes_back(tmp_path):
    pipe = make_pipeline()
    assert "samples.png" not in card_of(pipe, tmp_path / "without")
    grid = pipe.sample_picture(6)
    assert grid.dtype == np.uint8 and grid.shape[-1] == 3
    assert np.array_equal(grid, pipe.sample_picture(6))
    pipe.save_pretrained(tmp_path / "pipe", sample_grid=grid)
    assert "](samples.png)" in (tmp_path / "pipe" / "README.md").read_text()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pipe" / "samples.png")), grid)
    assert np.array_equal(ImagePipeline.from_pretrained(tmp_path / "pipe").sample_grid, grid)

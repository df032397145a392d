"""`smalti inspect`: figures and pictures of every kind of tokenizer, and refusals."""

import numpy as np
import pytest
import torch
from command import fails
from PIL import Image
from small import TOKENIZERS, make_tokenizer

from pipelines.__main__ import main
from pipelines.commands import inspect_ as inspect
from pipelines.images import DataConfig, load_images
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.saving import INDEX
from tokenizer.files import write_json
from tokenizer.model import PROVENANCE

COUNT = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Distinct colour gradients of 12x8 pixels."""
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(3 * COUNT):
        corners = Image.fromarray(chance.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((8, 12), Image.Resampling.BILINEAR).save(root / f"{number:02}.png")
    return {"source": str(root), "image_size": [12, 8], "channels": 3, "held_out_fraction": 1 / 3}


@pytest.fixture(scope="module")
def images(data):
    return load_images(DataConfig(**data)).held_out


class Halves:
    """Images cut into the frames of a tokenizer of clips."""

    def __init__(self, images, spec):
        self.images, self.spec = images, spec

    def __len__(self):
        return len(self.images)

    def batch(self, rows):
        return self.images.batch(rows).unflatten(2, (self.spec.frames, -1)).transpose(1, 2)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_page_of_every_tokenizer_has_pictures_and_the_figures_of_reconstruct(name, images, monkeypatch):
    model, pages = make_tokenizer(name).eval(), []
    images = images if model.spec.frames == 1 else Halves(images, model.spec)
    monkeypatch.setattr(inspect, "page", lambda *parts: pages.append(parts))
    uses, errors = inspect.examine(model, images)
    figures, expected = inspect.compute_figures(uses, errors), evaluate_reconstruction(model, images)
    config = inspect.InspectConfig(tokenizer="x", num_images=9)
    inspect.draw_page(model, images, uses, errors, inspect.describe_tokenizer(model, figures), config)
    lossy, has_codes = not model.reversible, model.placed and not model.grid.channels
    ((_, charts, pictures),) = pages
    assert len(charts) == 1 + lossy and len(pictures) == has_codes + bool(model.prefixes) + lossy
    names = ("psnr", "codebook_usage", "codebook_perplexity")
    assert [figures[key] for key in names] == pytest.approx([expected[key] for key in names], rel=1e-4)
    assert errors.shape == (COUNT,) and int(uses.sum()) == COUNT * len(model.grid)
    assert figures["psnr_worst"] <= figures["psnr"] <= figures["psnr_best"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data):
    """A tokenizer, and a pipeline with it, whose provenance names their images."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = make_tokenizer("vqvae").eval()
    for path, inner in (("tokenizer", ""), ("pipeline", "tokenizer")):
        model.save_pretrained(root / path / inner)
        write_json(root / path / PROVENANCE, {"data": data})
    write_json(root / "pipeline" / INDEX, {})
    return root


def test_a_report_is_written(world, tmp_path, capsys):
    main(["inspect", f"tokenizer={world}/pipeline", f"out={tmp_path / 'new' / 'page.png'}", "num_images=3"])
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "new" / "page.png") as picture:
        assert picture.width > 800 and picture.height > 800
    assert f"{COUNT} held-out images" in printed and "PSNR" in printed


def test_a_mistake_is_one_line_and_writes_nothing(world, tmp_path, capsys):
    line = fails(capsys, "inspect", f"tokenizer={world}/tokenizer", f"out={tmp_path}/out.png", "data.channels=1")
    assert "(3, 12, 8)" in line and not list(tmp_path.iterdir())

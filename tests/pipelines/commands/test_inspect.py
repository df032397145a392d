"""`smalti inspect`: figures and pictures of every kind of tokenizer, and refusals."""

import numpy as np
import pytest
import torch
from command import fails
from givens.coded import pipeline_of
from PIL import Image
from small import TOKENIZERS, make_tokenizer, quantizer_of

from pipelines.__main__ import main
from pipelines.commands import inspect_ as inspect
from pipelines.commands.inspect_ import (
    InspectConfig,
    arrange_tiles,
    compute_figures,
    describe_figures,
    draw_page,
    examine,
    mean_patches,
)
from pipelines.images import DataConfig, load_images
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.saving import INDEX
from tokenizer.files import write_json
from tokenizer.losses import psnr
from tokenizer.model import PROVENANCE

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
COUNT = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Distinct colour gradients of 12x8 pixels."""
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(3 * COUNT):
        corners = Image.fromarray(chance.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((8, 12), Image.Resampling.BILINEAR).save(root / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return {"source": str(folder), "image_size": [12, 8], "channels": 3, "held_out_fraction": 1 / 3}


@pytest.fixture(scope="module")
def images(data):
    found = load_images(DataConfig(**data)).held_out
    assert len(found) == COUNT
    return found


@pytest.fixture
def drawn(monkeypatch):
    """Records the charts and pictures of the pages that are drawn."""
    found = []

    def record(lines, charts, pictures):
        found.append(([chart.func.__name__ for chart in charts], pictures))
        return page(lines, charts, pictures)

    page = inspect.page
    monkeypatch.setattr(inspect, "page", record)
    return found


def page_of(model, images, drawn, **more):
    """Return the PSNR of each image, and the names of the charts and the pictures on the page."""
    uses, errors = examine(model, images)
    config = InspectConfig(tokenizer="x", **{"num_images": 9, **more})
    picture = draw_page(model, images, uses, errors, describe_figures(model, compute_figures(uses, errors)), config)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    return errors, *drawn.pop()


@every_tokenizer
def test_every_tokenizer_has_its_charts_and_pictures_and_the_figures_of_reconstruct(name, images, drawn):
    model = make_tokenizer(name).eval()
    _, charts, pictures = page_of(model, images, drawn)
    lossy = not model.reversible
    assert charts == ["draw_usage"] + ["draw_histogram"] * lossy
    kinds = [title.split()[0] for title in pictures]
    expected = (
        ["The"] * (model.placed and not model.grid.channels)
        + ["Originals,"] * bool(model.prefixes)
        + ["Reconstructions"] * lossy
    )
    assert kinds == expected

    uses, errors = examine(model, images)
    figures, expected = compute_figures(uses, errors), evaluate_reconstruction(model, images)
    names = ("psnr", "codebook_usage", "codebook_perplexity")
    assert [figures[key] for key in names] == pytest.approx([expected[key] for key in names], rel=1e-4)
    assert errors.shape == (COUNT,) and int(uses.sum()) == COUNT * len(model.grid)
    assert figures["psnr_worst"] <= figures["psnr"] <= figures["psnr_best"]


@pytest.mark.parametrize(
    "quantizer",
    [{"kind": "ema", "codes": 6, "dim": 4}, {"kind": "rvq", "depth": 2}, quantizer_of("multiscale", 3, 2)],
    ids=lambda one: one["kind"],
)
def test_a_code_is_drawn_as_the_mean_reconstruction_around_it(images, quantizer):
    """For the most used codes of the first level or the finest scale."""
    model = make_tokenizer("vqvae", quantizer=quantizer).eval()
    batch = images.batch(range(COUNT))
    with torch.no_grad():
        codes, patches = mean_patches(model, batch, 4)
        tokens = model.encode(batch)
        decoded = model.decode(tokens)
    tokens = tokens[:, -6:].view(-1, 3, 2) if model.grid.scales else tokens[:, :3]
    counts = tokens.flatten().bincount()
    assert counts[codes].tolist() == counts.sort(descending=True).values[: len(codes)].tolist()
    padded = torch.nn.functional.pad(decoded, (4, 4, 4, 4), mode="replicate")
    for code, mean in zip(codes, patches, strict=True):
        places = (tokens == code).nonzero().tolist()
        crops = [padded[n, :, 4 * row : 4 * row + 12, 4 * column : 4 * column + 12] for n, row, column in places]
        assert torch.allclose(mean, torch.stack(crops).mean(0), atol=1e-5)


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (5, range(5)), (COUNT, [0, 1, 3, 4, 6, 8, 9, 11, 13])])
def test_reconstructions_are_spread_from_the_best_to_the_worst(count, rows, data, drawn, monkeypatch):
    images = load_images(DataConfig(**data, limit=None if count == COUNT else count)).held_out
    model, captions = make_tokenizer("vqvae").eval(), []
    monkeypatch.setattr(
        inspect, "arrange_tiles", lambda pairs, names, columns: captions.append(names) or arrange_tiles(pairs, names, 2)
    )
    found, _, _ = page_of(model, images, drawn)
    with torch.no_grad():
        batch = images.batch(range(len(images)))
        errors = psnr(model.decode(model.encode(batch)), batch).sort(descending=True).values
    assert torch.allclose(found.sort(descending=True).values, errors, atol=1e-3)
    assert captions[1] == [f"{errors[row]:.1f} dB" for row in rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data):
    """A tokenizer, and a pipeline with it, whose provenance names their images; and an empty folder."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = make_tokenizer("vqvae").eval()
    for path, inner in (("tokenizer", ""), ("pipeline", "tokenizer")):
        model.save_pretrained(root / path / inner)
        write_json(root / path / PROVENANCE, {"data": data})
    write_json(root / "pipeline" / INDEX, {})
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize("what", ["tokenizer", "pipeline"])
def test_a_report_is_written(world, what, tmp_path, capsys):
    main(["inspect", f"tokenizer={world / what}", f"out={tmp_path / 'new' / 'page.png'}", "num_images=3"])
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "new" / "page.png") as picture:
        assert picture.width > 800 and picture.height > 800
    assert f"{COUNT} held-out images" in printed and "PSNR" in printed


BAD = [
    (["tokenizer={world}/empty"], "{world}/empty/config.json"),
    (["data.channels=1"], "(3, 12, 8)"),
    (["out={out}.tiff"], "out: "),
    (["num_images=0"], "num_images: "),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(wrong) for wrong, _ in BAD])
def test_a_mistake_is_one_line_and_writes_nothing(world, tmp_path, capsys, wrong, message):
    given = ["inspect", "tokenizer={world}/tokenizer", "out={out}.png", *wrong]
    line = fails(capsys, *[part.format(world=world, out=tmp_path / "out") for part in given])
    assert message.format(world=world) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb, out", [("inspect", "a.png"), ("reconstruct", "a.png"), ("encode", "a"), ("export", "a")]
)
def test_nothing_is_written_into_the_pipeline_of_a_tokenizer(tmp_path, capsys, verb, out):
    """A pipeline folder with foreign files could no longer be replaced."""
    pipeline = tmp_path / "run" / "pipeline"
    pipeline_of("tokens", "marginal").save_pretrained(pipeline)
    before = sorted(pipeline.rglob("*"))
    size = "format=torch" if verb == "export" else "data.image_size=8"
    for named in (pipeline, pipeline / "tokenizer"):
        line = fails(capsys, verb, f"tokenizer={named}", f"out={pipeline / out}", size)
        assert str(pipeline / out) in line and sorted(pipeline.rglob("*")) == before

"""`smalti inspect`: figures and pictures of each kind of tokenizer, and what a user gets wrong."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from command import fails
from givens.coded import pipeline_of
from launch import ROOT, environment
from PIL import Image
from small import TOKENIZERS, make_tokenizer, quantizer_of

from pipelines.__main__ import main, verbs
from pipelines.commands import inspect_ as inspect
from pipelines.commands.inspect_ import InspectConfig, draw_page, examine, figures_of, mean_patches, sentences, tiles
from pipelines.images import DataConfig, load_images
from pipelines.metrics.reconstruction import evaluate_reconstruction, reconstruction_picture
from pipelines.saving import INDEX
from tokenizer.files import write_json
from tokenizer.losses import psnr
from tokenizer.model import PROVENANCE

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
COUNT = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Colour gradients of 12x8 pixels, none like another."""
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
    """The names of charts and the pictures of the pages that are drawn."""
    found = []

    def record(lines, charts, pictures):
        found.append(([chart.func.__name__ for chart in charts], pictures))
        return page(lines, charts, pictures)

    page = inspect.page
    monkeypatch.setattr(inspect, "page", record)
    return found


def page_of(model, images, drawn, **more):
    """The PSNR of each image, and the names of charts and the pictures on the page."""
    uses, errors = examine(model, images)
    config = InspectConfig(tokenizer="x", **{"num_images": 9, **more})
    picture = draw_page(model, images, uses, errors, sentences(model, figures_of(uses, errors)), config)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    return errors, *drawn.pop()


# Figures and pages


@every_tokenizer
def test_every_tokenizer_gets_the_charts_and_pictures_that_make_sense(name, images, drawn):
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


@every_tokenizer
def test_figures_are_those_of_reconstruct(name, images):
    model = make_tokenizer(name).eval()
    uses, errors = examine(model, images)
    figures, expected = figures_of(uses, errors), evaluate_reconstruction(model, images)
    names = ("psnr", "codebook_usage", "codebook_perplexity")
    assert [figures[key] for key in names] == pytest.approx([expected[key] for key in names], rel=1e-4)
    assert errors.shape == (COUNT,) and int(uses.sum()) == COUNT * len(model.grid)
    assert figures["psnr_worst"] <= figures["psnr"] <= figures["psnr_best"]


@pytest.mark.parametrize("name", ["titok", "scales"])
def test_what_first_tokens_decode_to_is_drawn(name, images, drawn):
    """As in the picture of `smalti reconstruct`."""
    model = make_tokenizer("vqvae", quantizer=quantizer_of("multiscale", 3, 2)) if name == "scales" else titok()
    _, _, pictures = page_of(model.eval(), images, drawn)
    assert any(np.array_equal(drawn, reconstruction_picture(model, images, 9)) for drawn in pictures.values())


def titok():
    """One whose first tokens matter."""
    model = make_tokenizer("titok")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("quantizer", [{"kind": "rvq", "depth": 3}, {"kind": "lfq", "bits": 8, "levels": 2}])
def test_each_level_is_counted_by_itself(quantizer, images):
    model = make_tokenizer("vqvae", quantizer=quantizer).eval()
    figures = figures_of(*examine(model, images))
    for level, ids in enumerate(model.encode(images.batch(range(COUNT))).chunk(model.levels, dim=1)):
        used = set(ids.flatten().tolist())
        assert figures["levels"][level]["usage"] == pytest.approx(len(used) / model.grid.vocab_size)


# Codes and reconstructions


@pytest.mark.parametrize(
    "quantizer",
    [{"kind": "ema", "codes": 6, "dim": 4}, {"kind": "rvq", "depth": 2}, quantizer_of("multiscale", 3, 2)],
    ids=lambda one: one["kind"],
)
def test_around_its_places_is_the_mean_of_what_is_decoded_there(images, quantizer):
    """Of the most used codes, of the first level or the finest scale."""
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
        inspect, "tiles", lambda pairs, names, columns: captions.append(names) or tiles(pairs, names, 2)
    )
    found, _, _ = page_of(model, images, drawn)
    with torch.no_grad():
        batch = images.batch(range(len(images)))
        errors = psnr(model.decode(model.encode(batch)), batch).sort(descending=True).values
    assert torch.allclose(found.sort(descending=True).values, errors, atol=1e-3)
    assert captions[1] == [f"{errors[row]:.1f} dB" for row in rows]


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    pixels = torch.rand(2, 1, 4, 6) * 2 - 1
    small, large = tiles(pixels, ["a", "b"], 20), tiles(torch.zeros(3, 3, 40, 900), ["a", "b", "c"], 20)
    cell = small[-2 - 40 : -2, 2:62, 0].reshape(4, 10, 6, 10)
    assert (cell == cell[:, :1, :, :1]).all() and large.shape[1] == 904
    assert np.array_equal(cell[:, 0, :, 0], ((pixels[0, 0] + 1) * 127.5).round().numpy().astype(np.uint8))


# The verb


@pytest.fixture(scope="module")
def world(tmp_path_factory, data):
    """A tokenizer, and a pipeline around it, that say where their images came from; and an empty folder."""
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
    assert f"{COUNT} held-out images" in printed and "PSNR" in printed and "of the codes used" in printed


def test_the_module_is_a_verb_and_does_not_hide_pythons_own():
    """`inspect` is also a module of Python, which torch and pydantic rely on."""
    assert verbs()["inspect"].startswith("Look into a tokenizer")
    command = [sys.executable, "-m", "pipelines", "inspect", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("usage: smalti inspect")
    import inspect as python

    assert python.signature(main) and python is not inspect


BAD = [
    (["tokenizer={world}/nowhere"], "neither an existing folder nor a Hub id"),
    (["tokenizer={world}/empty"], "{world}/empty/config.json: no such file"),
    (["data.channels=1"], "(3, 12, 8)"),
    (["out={out}.tiff"], "should end in .png"),
    (["out={world}/tokenizer/config.json/page.png"], "cannot be written"),
    (["num_images=0"], "num_images: "),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(wrong) for wrong, _ in BAD])
def test_what_is_wrong_is_said_in_a_line(world, tmp_path, capsys, wrong, message):
    given = ["inspect", "tokenizer={world}/tokenizer", "out={out}.png", *wrong]
    line = fails(capsys, *[part.format(world=world, out=tmp_path / "out") for part in given])
    assert message.format(world=world) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb, out", [("inspect", "a.png"), ("reconstruct", "a.png"), ("encode", "a"), ("export", "a")]
)
def test_nothing_is_written_into_the_pipeline_that_a_tokenizer_is_in(tmp_path, capsys, verb, out):
    """`calibrate` and all that replaces it would then refuse it."""
    pipeline = tmp_path / "run" / "pipeline"
    pipeline_of("tokens", "marginal").save_pretrained(pipeline)
    before = sorted(pipeline.rglob("*"))
    size = "format=torch" if verb == "export" else "data.image_size=8"
    for named in (pipeline, pipeline / "tokenizer"):
        line = fails(capsys, verb, f"tokenizer={named}", f"out={pipeline / out}", size)
        assert "lies in" in line and sorted(pipeline.rglob("*")) == before

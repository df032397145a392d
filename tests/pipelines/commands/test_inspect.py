"""`smalti inspect`: the figures, the panels that each tokenizer gets, and what a user gets wrong.

Covers: pipelines/metrics/inspection.py, pipelines/metrics/reconstruction.py.
"""

import json
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
from pipelines.commands.inspect_ import InspectConfig, fitted, report
from pipelines.config.command import parse
from pipelines.images import DataConfig, load_images
from pipelines.metrics import charts, pages
from pipelines.metrics.inspection import PLACES, Surroundings, alone, examine, middle
from pipelines.metrics.reconstruction import drafts, evaluate_reconstruction, reconstruction_picture
from pipelines.provenance import tokenizer_defaults
from pipelines.saving import INDEX
from tokenizer.files import write_json
from tokenizer.losses import psnr
from tokenizer.model import PROVENANCE

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
COUNT = 14
USE, LEVELS, ERRORS = (
    "How often each code is used",
    "Codes used at each level, with perplexity",
    "How well images come back",
)
DISTANCES = "How far apart vectors and codes lie"
DRAFTS = "Reconstructions from the first"
EXAMPLES = [f"{name} reconstructions: original above, PSNR below" for name in ("Best", "Middle", "Worst")]


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
    """Titles of charts and mosaics, and the captions of the latter, as they are drawn."""
    titles, captions = [], {}
    head, mosaic = charts.head, inspect.mosaic

    def chart(axes, title, unit):
        titles.append(title)
        head(axes, title, unit)

    def pictures(title, cells, names, *rest, **more):
        assert len(cells) == len(names) and all(cell.shape[1] > 8 for cell in cells)
        titles.append(title)
        captions[title] = list(names)
        return mosaic(title, cells, names, *rest, **more)

    monkeypatch.setattr(charts, "head", chart)
    monkeypatch.setattr(inspect, "mosaic", pictures)
    return titles, captions


def page_of(model, images, drawn, **more):
    found = examine(model, images, more.get("num_codes", 256))
    picture = report(model, images, found, more.get("num_images", 9), "somewhere")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[1] == inspect.WIDTH + 2 * pages.MARGIN
    return found, *drawn


# Panels


@every_tokenizer
def test_every_tokenizer_gets_the_panels_that_make_sense(name, images, drawn):
    model = make_tokenizer(name).eval()
    found, titles, captions = page_of(model, images, drawn)
    learned = hasattr(model, "quantizer") and hasattr(model.quantizer, "table") and model.levels == 1
    codes = [title for title in titles if title.startswith("Codes") and title != LEVELS]
    first = [title for title in titles if title.startswith(DRAFTS)]
    assert (len(codes), len(first)) == (int(model.placed), int(bool(model.prefixes)))
    expected = [USE, *[LEVELS] * (model.levels > 1), *[DISTANCES] * learned, ERRORS, *codes, *first, *EXAMPLES]
    assert titles == expected
    shown = min(model.grid.vocab_size, int((found.uses[0] > 0).sum()) + 23)
    assert all(len(captions[title]) == shown for title in codes)
    assert all(len(captions[title]) == 3 for title in EXAMPLES)
    assert json.loads(json.dumps(found.figures)) == found.figures


@pytest.mark.parametrize("name", ["titok", "scales"])
def test_what_first_tokens_make_is_measured_and_drawn(name, images, drawn):
    """In the report and in `smalti reconstruct`'s picture, by one notion: the last draft is of all tokens."""
    model = make_tokenizer("vqvae", quantizer=quantizer_of("multiscale", 3, 2)) if name == "scales" else titok()
    found, titles, _ = page_of(model.eval(), images, drawn)
    batch = images.batch(range(COUNT))
    tokens = model.encode(batch)
    by_hand = {
        "scales": lambda: [model.decode_scales(tokens, 1), model.decode_scales(tokens, 2)],
        "titok": lambda: [model.decode(tokens[:, :count]) for count in (1, 2, 4, 5)],
    }[name]()
    made = [decode(tokens) for decode in drafts(model)]
    assert len(made) == len(by_hand) and all(map(torch.equal, made, by_hand))
    assert torch.equal(made[-1], model.decode(tokens)) and not torch.equal(made[0], made[-1])
    told = found.figures["scales" if name == "scales" else "prefixes"]
    assert [one["psnr"] for one in told] == pytest.approx([float(psnr(x, batch).mean()) for x in made], rel=1e-4)
    assert told[-1]["psnr"] == pytest.approx(found.figures["psnr"], rel=1e-4)
    title = "scales: original above, then one scale more in each row"
    if name == "titok":
        title = "tokens: original above, then from 1, 2, 4, 5 in each row"
        assert [one["tokens"] for one in told] == [1, 2, 4, 5]
        (line,) = [line for line in inspect.sentences(found, False) if line.startswith("PSNR of the first")]
        assert line.startswith("PSNR of the first 1, 2, 4, 5 tokens: ") and line.count(",") == 6
    assert f"{DRAFTS} {title}" in titles
    plain = reconstruction_picture(make_tokenizer("vqvae").eval(), images, 4)
    rows = (reconstruction_picture(model, images, 4).shape[0] - 2) / (plain.shape[0] - 2) * 2
    assert rows == 1 + len(made)


def titok():
    """One whose first tokens matter."""
    model = make_tokenizer("titok")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_without_nested_dropout_only_all_tokens_are_decoded(images, drawn):
    model = make_tokenizer("titok", keep=None).eval()
    found, titles, _ = page_of(model, images, drawn)
    assert drafts(model) == [] and "prefixes" not in found.figures
    assert not [title for title in titles if title.startswith((DRAFTS, "Codes"))]


def test_of_a_lossless_tokenizer_no_errors_are_shown(images, drawn):
    model = make_tokenizer("pixels", levels=256)
    found, titles, _ = page_of(model, images, drawn)
    assert titles == [USE, "Codes, decoded one by one, most used first"]
    assert "every image comes back as it was" in inspect.sentences(found, model.reversible)


@pytest.mark.parametrize("kind", ["fsq", "vq", "rvq", "lfq"])
def test_distances_need_one_learned_codebook(kind, images, drawn):
    _, titles, _ = page_of(make_tokenizer("vqvae", quantizer={"kind": kind}).eval(), images, drawn, num_codes=5)
    assert (DISTANCES in titles) == (kind == "vq")


def test_more_codes_than_are_shown_are_the_most_used(images, drawn):
    found, titles, captions = page_of(make_tokenizer("palette", colors=40), images, drawn, num_codes=7)
    (title,) = [title for title in titles if title.endswith("(7 of 40)")]
    assert [int(name) for name in captions[title]] == found.shown.tolist()
    assert sorted(found.uses[0][found.shown].tolist()) == sorted(found.uses[0].tolist())[-7:]


# Figures


@every_tokenizer
def test_figures_are_those_of_reconstruct(name, images):
    model = make_tokenizer(name).eval()
    found, expected = examine(model, images, 8), evaluate_reconstruction(model, images, looks=5)
    looks = {key: expected.pop(key) for key in list(expected) if key.startswith(("ssim", "texture"))}
    assert {"ssim", "texture_flat"} < set(looks) and looks["ssim_images"] == 5
    looks = evaluate_reconstruction(model, images, looks=COUNT)
    assert {key: found.figures[key] for key in looks if key.startswith("texture")} == {
        key: value for key, value in looks.items() if key.startswith("texture")
    }
    assert found.figures["ssim"] == pytest.approx(looks["ssim"])
    assert {key: found.figures[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert found.psnr.shape == (COUNT,) and int(found.uses.sum()) == COUNT * len(model.grid)
    assert found.figures["psnr_worst"] <= found.figures["psnr"] <= found.figures["psnr_best"]


def planted(count=8, dead=(2, 5), **config):
    """A tokenizer with small random codes, but for some far away from them and from each other."""
    model = make_tokenizer("vqvae", quantizer={"kind": "vq", "codes": count, "dim": 4}, **config).eval()
    torch.nn.init.normal_(model.quantizer.codebook, std=0.05)
    with torch.no_grad():
        for n, code in enumerate(dead, 1):
            model.quantizer.codebook[code] += 900.0 * n
    return model


def test_dead_codes_are_listed(images, drawn, capsys):
    found, titles, _ = page_of(planted(), images, drawn)
    (unused,) = found.figures["unused_codes"]
    assert {2, 5} <= set(unused) and unused == [code for code in range(8) if not found.uses[0, code]]
    line = f" codes ({len(unused)}): {', '.join(map(str, unused))}"
    lines = inspect.sentences(found, exact=False)
    assert any(text.endswith(line) for text in lines)
    assert found.figures["codebook_usage"] == 1 - len(unused) / 8
    distances = found.distances["code to nearest code"]
    assert [code for code in range(8) if distances[code] > 100] == [2, 5]
    assert found.figures["code_to_nearest_code"] == pytest.approx(float(np.median(distances)))


def test_what_few_tokens_missed_is_not_called_dead(images):
    """84 tokens for 8 codes are too few to tell, 336 for 2 are enough."""
    few, many = (examine(model, images, 8) for model in (planted(8), planted(2, dead=(1,), factor=2)))
    assert any(line.startswith("unused codes") for line in inspect.sentences(few, False))
    assert any("may be rare" in line for line in inspect.sentences(few, False))
    assert "dead codes (1): 1" in inspect.sentences(many, False)
    assert not any("may be rare" in line for line in inspect.sentences(many, False))


@pytest.mark.parametrize("quantizer", [{"kind": "rvq", "depth": 3}, {"kind": "lfq", "bits": 8, "levels": 2}])
def test_each_level_is_counted_by_itself(quantizer, images):
    model = make_tokenizer("vqvae", quantizer=quantizer).eval()
    found = examine(model, images, 4)
    tokens = model.encode(images.batch(range(COUNT))).chunk(model.levels, dim=1)
    for level, ids in enumerate(tokens):
        used = sorted(set(ids.flatten().tolist()))
        missing = [code for code in range(model.grid.vocab_size) if code not in used]
        assert found.figures["unused_codes"][level] == missing
        assert found.figures["levels"][level]["usage"] == pytest.approx(len(used) / model.grid.vocab_size)
    assert any("at each level" in line for line in inspect.sentences(found, False))


def test_long_lists_are_cut():
    assert inspect.listed([1, 2, 3]) == "1, 2, 3"
    assert inspect.listed(list(range(20))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more"


# Codes and reconstructions


def test_around_its_places_is_the_mean_of_what_is_decoded_there(images):
    model = make_tokenizer("vqvae", quantizer={"kind": "ema", "codes": 6, "dim": 4}).eval()
    found = examine(model, images, 6)
    with torch.no_grad():
        tokens = model.encode(images.batch(range(COUNT)))
        decoded = model.decode(tokens)
    padded = torch.nn.functional.pad(decoded, (4, 4, 4, 4), mode="replicate")
    for code, mean in zip(found.shown.tolist(), found.in_place, strict=True):
        places = (tokens == code).nonzero().tolist()
        crops = [padded[n, :, 4 * row : 4 * row + 12, 4 * column : 4 * column + 12] for n, row, column in places]
        if not crops:
            assert mean.isnan().all()
        elif len(crops) <= PLACES:
            assert torch.allclose(mean, torch.stack(crops).mean(0), atol=1e-5)


def test_a_common_code_is_looked_at_in_some_places_all_over_the_images(images):
    model = make_tokenizer("vqvae")
    tokens = torch.zeros(100, 3, 2, dtype=torch.int32)
    around = Surroundings.of(model, tokens, torch.tensor([0, 3]))
    seen = around.places[:, 0]
    assert len(seen) == PLACES and int(seen.min()) < 3 and int(seen.max()) > 96
    for start in range(0, 100, 7):
        around.add(torch.full((min(7, 100 - start), 3, 12, 8), 0.5), start)
    assert around.counts.tolist() == [PLACES, 0]
    means = around.means()
    assert torch.allclose(means[0], torch.tensor(0.5)) and means[1].isnan().all()


@pytest.mark.parametrize(
    ("name", "config"),
    [("vqvae", {}), ("vqvae", {"quantizer": {"kind": "lfq", "bits": 8, "levels": 2}}), ("pixels", {})],
)
def test_a_code_alone_stands_on_all_positions(name, config):
    model = make_tokenizer(name, (24, 20), **config).eval()
    rows = model.grid.shape[0] // model.levels
    uses = torch.zeros(model.levels, model.grid.vocab_size)
    uses[:, 3] = 1
    with torch.inference_mode():
        found = alone(model, torch.tensor([1, 4]), uses)
        tokens = torch.full((2, *model.grid.shape), 3)
        tokens[:, :rows] = torch.tensor([1, 4])[:, None, None]
        decoded = model.decode(tokens)
    tiled = name == "vqvae"
    assert torch.allclose(found, decoded[:, :, 8:20, 4:16] if tiled else decoded, atol=1e-6)


def test_the_middle_of_an_image():
    assert middle((3, 64, 64), (8, 8)) == (slice(24, 48), slice(24, 48))
    assert middle((3, 8, 8), (2, 2)) == (slice(0, 12), slice(0, 12))
    assert middle((3, 8, 8), (24, 8)) == (slice(None), slice(None)) == middle((3, 8, 8), (5,))


def test_reconstructions_are_ordered_by_error(images, drawn):
    model = make_tokenizer("vqvae").eval()
    found, _, captions = page_of(model, images, drawn, num_images=12)
    with torch.no_grad():
        batch = images.batch(range(COUNT))
        errors = psnr(model.decode(model.encode(batch)), batch).sort(descending=True).values.tolist()
    assert captions[EXAMPLES[0]] == [f"{error:.1f} dB" for error in errors[:4]]
    assert captions[EXAMPLES[1]] == [f"{error:.1f} dB" for error in errors[5:9]]
    assert captions[EXAMPLES[2]] == [f"{error:.1f} dB" for error in errors[:-5:-1]]
    assert torch.allclose(found.psnr.sort(descending=True).values, torch.tensor(errors), atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_are_enough(count, data, drawn):
    images = load_images(DataConfig(**data, limit=count)).held_out
    _, titles, captions = page_of(make_tokenizer("vqvae").eval(), images, drawn)
    shown = [captions[title] for title in titles if "reconstructions" in title]
    assert [len(names) for names in shown] == ([1, 1, 1] if count == 3 else [count])


def test_pictures_fit_their_place():
    sizes = ((12, 12), (48, 24), (3, 5), (64, 128), (1, 4096))
    found = [fitted(torch.zeros(3, *size), 48).shape[:2] for size in sizes]
    assert found == [(48, 48), (48, 24), (27, 45), (24, 48), (1, 48)]
    pixel = fitted(torch.tensor([[[-1.0, 1.0]]]), 4)
    assert pixel[:, :2].max() == 0 and pixel[:, 2:].min() == 255 and pixel.shape == (2, 4, 3)


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
        assert picture.width == inspect.WIDTH + 2 * pages.MARGIN and picture.height > 800
    assert f"{COUNT} held-out images" in printed and "PSNR" in printed and "of 32 codes used" in printed
    assert "SSIM " in printed and "texture in flat areas" in printed


def test_run_returns_what_it_found(world, tmp_path):
    argv = [f"tokenizer={world / 'tokenizer'}", f"out={tmp_path / 'page.png'}", "device=cpu"]
    config = parse(InspectConfig, argv, verb="inspect", description=None, defaults=tokenizer_defaults)
    figures = inspect.run(config)
    assert json.loads(json.dumps(figures)) == figures
    assert {"psnr", "codebook_usage", "codebook_perplexity", "unused_codes", "l1", "l2"} <= set(figures)


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
    (["data.source={world}/empty"], "{world}/empty: no images here"),
    (["data.source={world}/nowhere"], "data.source: there is no file or folder {world}/nowhere"),
    (["data.channels=1"], "the tokenizer's images are (3, 12, 8)"),
    (["out={out}.tiff"], "should end in .png"),
    (["out={out}"], "should end in .png"),
    (["out={world}/tokenizer/config.json/page.png"], "cannot be written"),
    (["num_images=0"], "num_images: must be >= 3 (got 0)"),
    (["num_codes=0"], "num_codes: must be >= 1 (got 0)"),
    (["device=toaster"], "device: 'toaster' cannot be used here"),
    (["images=3"], "images: unknown key"),
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
        assert "lies in what is read" in line and sorted(pipeline.rglob("*")) == before

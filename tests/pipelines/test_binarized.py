"""Binarised grey images: `data.binarize` from the images to the figures of `smalti evaluate`.

Covers: pipelines/shuffling.py, pipelines/images/binarize.py, pipelines/images/dataset.py, pipelines/tokens/,
pipelines/encode.py, pipelines/train_prior.py, pipelines/evaluate.py.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from givens.images import write_pictures
from launch import prior_arguments, train_prior
from PIL import Image
from tiny_task import assert_same_run, killed_at

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.config.command import parse
from pipelines.encode import EncodeConfig
from pipelines.encode import run as encode
from pipelines.images import DataConfig, load_images
from pipelines.images.binarize import binarize
from pipelines.shuffling import draw_pixels
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask, TrainPriorConfig
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import FormatError, write_manifest
from tokenizer.spec import to_uint8

pytestmark = pytest.mark.usefixtures("one_process")
MADE = {"kind": "made", "hidden": [8]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 training and 12 test images of random grey pixels, 8 x 8."""
    folder = tmp_path_factory.mktemp("grey")
    for split, count in (("train", 40), ("test", 12)):
        write_pictures(folder / split, count, 8, 8)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("pixels") / "tokenizer")


@pytest.fixture(scope="module")
def drawn(source, tokenizer, tmp_path_factory):
    """The token dataset of `source`, with drawn pixels."""
    return encode_images(source, tokenizer, tmp_path_factory.mktemp("drawn") / "tokens")


def save_tokenizer(folder, kind="pixels", size=(8, 8), channels=1, **choices):
    choices = choices or {"levels": 2}
    Tokenizer.create(kind, image_size=size, channels=channels, **choices).save_pretrained(folder)
    return folder


def data_of(source, binarize="drawn", **more):
    return {"source": str(source), "image_size": 8, "label_column": None, "binarize": binarize, **more}


def encode_images(source, tokenizer, out, batch_size=5, **more):
    augmentations = more.pop("augmentations", 0)
    data, tokenizer = data_of(source, **more), str(tokenizer)
    return encode(
        EncodeConfig(tokenizer=tokenizer, out=str(out), data=data, batch_size=batch_size, augmentations=augmentations)
    )


def task_of(tokens, run, **more):
    argv = prior_arguments(run, tokens, model=MADE, **more)
    return PriorTask(parse(TrainPriorConfig, argv, verb="train_prior", description=None))


# Draws


def test_a_drawn_pixel_is_white_as_often_as_its_grey_value_says():
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(6000, 1, 1)
    found = draw_pixels(grey, np.arange(6000), 0, 0)
    assert found.dtype == torch.uint8 and int(found.max()) == 1
    share, wanted = found.double().mean(0).flatten(), torch.arange(256) / 255
    assert share[0] == 0 and share[-1] == 1  # black and white pixels stay
    assert ((share - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / 6000).sqrt() + 1e-12).all()
    assert abs(float(share.mean()) - 0.5) < 4 * float((wanted * (1 - wanted)).sum() / 6000).__pow__(0.5) / 256


def test_draws_are_independent_between_pixels_rows_epochs_and_seeds():
    grey = torch.full((400, 8, 8), 128, dtype=torch.uint8)
    rows = np.arange(400)
    one = draw_pixels(grey, rows, 0, 0).double()
    others = {
        "rows": one.roll(1, 0),
        "pixels": one.roll(1, 2),
        "epochs": draw_pixels(grey, rows, 1, 0).double(),
        "seeds": draw_pixels(grey, rows, 0, 1).double(),
    }
    for name, other in others.items():
        assert abs(float((one == other).double().mean()) - 0.5) < 4 * 0.5 / one.numel() ** 0.5 + 0.001, name


def test_a_draw_does_not_depend_on_its_batch():
    grey = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    rows, epochs = np.arange(50), np.arange(50) % 3
    whole = draw_pixels(grey, rows, epochs, 7)
    some = np.array([40, 3, 3, 17])
    assert torch.equal(draw_pixels(grey[some], some, epochs[some], 7), whole[some])
    for epoch in range(3):
        alone = draw_pixels(grey, rows, epoch, 7)
        assert torch.equal(alone[epochs == epoch], whole[epochs == epoch]) and not torch.equal(alone, whole)


# Images


def test_images_are_cut_at_mid_grey_or_drawn_by_fixed_seeds(source):
    grey, cut, random = (
        load_images(DataConfig(**data_of(source, kind))).held_out for kind in (None, "threshold", "drawn")
    )
    pixels = grey.pixels(range(12))
    assert torch.equal(cut.pixels(range(12)), torch.where(pixels >= 128, 255, 0))
    first = random.pixels(range(12))
    assert set(first.unique().tolist()) == {0, 255} and not torch.equal(first, cut.pixels(range(12)))
    again = load_images(DataConfig(**data_of(source))).held_out
    assert torch.equal(again.pixels(range(12)), first) and torch.equal(again.pixels([7, 2]), first[[7, 2]])
    assert torch.equal(to_uint8(random.batch(range(12))), first)
    assert not torch.equal(to_uint8(random.batch(range(12), epoch=1)), first)
    assert torch.equal(random.grey().pixels(range(12)), pixels)
    for images, how in ((cut, "threshold"), (random, "drawn")):  # at their own size, which has no row of pixels
        assert torch.equal(torch.stack([images.whole_images([k]).read(0) for k in range(12)]), binarize(pixels, how))


def test_preloaded_images_are_drawn_like_the_others(source):
    from pipelines.processes.group import ALONE

    images = load_images(DataConfig(**data_of(source))).held_out
    some = torch.tensor([9, 1, 4])
    for epoch in (0, 3):
        assert torch.equal(images.preload(some, ALONE).batch(range(3), epoch=epoch), images.batch(some, epoch=epoch))


# Images that users give

HIDDEN = torch.ones(8, 8, dtype=torch.bool)
HIDDEN[4:] = False
DOORS = {
    "encode": lambda pipe, images: pipe.encode(images),
    "reconstruct": lambda pipe, images: pipe.reconstruct(images, output_type="pt"),
    "encode_tiles": lambda pipe, images: pipe.encode_tiles(images, 8),
    "log_prob": lambda pipe, images: pipe.log_prob(images),
    "conditional_log_prob": lambda pipe, images: pipe.conditional_log_prob(images, HIDDEN),
    "complete": lambda pipe, images: pipe.complete(images, HIDDEN, seed=0, output_type="pt").images,
    "anomaly_map": lambda pipe, images: pipe.anomaly_map(images),
    "combined map": lambda pipe, images: calibrated(pipe, 8).anomaly_map(images, method="combined", stride=8),
    "heal": lambda pipe, images: calibrated(pipe).heal(images, draws=1).images,
    "embed": lambda pipe, images: pipe.embed(images),
    "compress": lambda pipe, images: pipe.compress(images),
    "compress by tiles": lambda pipe, images: pipe.compress(images, tile=True),
}


def calibrated(pipe, stride=None):
    pipe.calibrate(grey_images(60, seed=9), stride=stride)
    return pipe


def grey_images(count=12, seed=0, size=8):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, size, size), dtype=np.uint8))


def make_binarized(how):
    tokenizer = Tokenizer.create("pixels", image_size=(8, 8), channels=1, levels=2)
    torch.manual_seed(0)
    settings = {"dim": 16, "depth": 2, "heads": 2}
    pipe = ImagePipeline(tokenizer, Prior.create("gpt", grid=tokenizer.grid, num_classes=0, **settings))
    for weight in pipe.prior.requires_grad_(False).parameters():  # an untrained head may be zero
        torch.nn.init.normal_(weight, std=0.3)
    pipe.provenance = {"data": DataConfig(**data_of("elsewhere", how)).model_dump(mode="json")}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("how", ["drawn", "threshold"])
@pytest.mark.parametrize("door", DOORS)
def test_a_pipeline_sees_the_images_of_users_as_in_training(door, how):
    """Grey images have the result of the black and white ones that they become, as bytes and as floats."""
    pipe, grey = make_binarized(how), grey_images()
    seen = pipe.binarize(grey)
    expected = DOORS[door](pipe, seen)
    assert set(seen.unique().tolist()) == {0, 255} and same(DOORS[door](pipe, grey), expected)
    assert same(DOORS[door](pipe, grey.float() / 127.5 - 1), expected)
    if door in ("encode", "log_prob", "embed", "compress", "encode_tiles"):
        plain = make_binarized(None)
        assert same(DOORS[door](plain, grey), expected) == (how == "threshold")  # which such tokenizers do anyway


def test_a_draw_of_a_users_image_depends_on_its_pixels_only():
    grey = grey_images(2000, size=4)
    drawn = binarize(grey, "drawn")
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(binarize(grey[order], "drawn"), drawn[order])
    assert torch.equal(binarize(grey[7:8], "drawn"), drawn[7:8])
    flat = torch.full((4000, 1, 4, 4), 77, dtype=torch.uint8)
    flat[:, 0, 0, :2] = torch.arange(4000)[:, None] // torch.tensor([64, 1]) % 64  # which makes the others distinct
    white = (binarize(flat, "drawn")[:, 0, 1:] > 0).double()
    assert abs(float(white.mean()) - 77 / 255) < 4 * 0.46 / white.numel() ** 0.5
    assert float(white.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max()) < 5 / 4000**0.5
    rows = binarize(grey, "drawn", np.arange(2000))
    assert abs(float(((rows > 0) == (drawn > 0)).double().mean()) - 2 / 3) < 0.02  # independent: E[p^2 + (1 - p)^2]


@pytest.mark.parametrize("tile", [False, True])
def test_a_lossless_stream_keeps_grey_pixels(tile):
    pytest.importorskip("constriction")
    pipe, grey = make_binarized("drawn"), grey_images(3)
    found = pipe.decompress(pipe.compress(grey, lossless=True, tile=tile), output_type="np")
    assert np.array_equal(np.stack(found)[..., 0], grey[:, 0].numpy())


@pytest.mark.parametrize(("how", "options"), [("drawn", []), ("threshold", ["tile=true"])])
def test_a_picture_has_one_score_and_one_digest_whether_it_is_held_out_or_given(how, options, tmp_path, capsys):
    for split, seed in (("train", 1), ("test", 2)):
        (tmp_path / "source" / split).mkdir(parents=True)
        for number, image in enumerate(grey_images(80, seed)[:, 0].numpy()):
            Image.fromarray(image).save(tmp_path / "source" / split / f"{number:02d}.png")
    shutil.copytree(tmp_path / "source/test", tmp_path / "copies")
    pipe = make_binarized(how)
    pipe.provenance = {"data": DataConfig(**data_of(tmp_path / "source", how)).model_dump(mode="json")}
    pipe.save_pretrained(tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe", *options])
    capsys.readouterr()
    found = []
    for number, more in enumerate(([], [f"images={tmp_path}/copies"], [f"images={tmp_path}/source"])):
        main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/{number}", "num_shown=1", *more, *options])
        assert "40 were used for calibration" in capsys.readouterr().out
        rows = list(csv.DictReader((tmp_path / str(number) / "scores.csv").open()))
        found.append([(Path(row["file"]).name, row["score"], row["p_value"]) for row in rows])
    assert len(found[0]) == 40 and found[0] == found[1] == found[2]
    flagged = sum(float(p) <= 0.05 for _, _, p in found[1])
    assert flagged < 12  # of 40 normal images; once all of them


def test_a_calibration_of_0_3_knows_its_drawn_rows(tmp_path, source, capsys):
    """It was made with draws by row, of which it holds the digests."""
    for number, image in enumerate(grey_images(60, seed=3)[:, 0].numpy()):
        (tmp_path / "source/test").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "source/test" / f"{number:02d}.png")
    shutil.copytree(source / "train", tmp_path / "source/train")
    pipe, data = make_binarized("drawn"), DataConfig(**data_of(tmp_path / "source"))
    pipe.provenance = {"data": data.model_dump(mode="json")}
    pipe.calibrate(load_images(data).held_out.pixels(range(0, 60, 3)), false_alarms=0.2)
    pipe.save_pretrained(tmp_path / "pipe")
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found", "num_shown=1"])
    assert "scoring 40 of 60 held-out images" in capsys.readouterr().out


# Tokens


def test_training_tokens_are_grey_values_and_others_are_drawn_once(source, drawn):
    data, images = load_tokens(drawn), load_images(DataConfig(**data_of(source)))
    meta = json.loads((drawn / "meta.json").read_text())
    assert meta["drawn"] == ["train"] and data.grid.vocab_size == 2
    train, test, validation = (data.splits.get(name) for name in ("train", "test", "validation"))
    grey = images.train.grey().pixels(range(len(images.train)))[:, 0]
    assert train.stochastic and torch.equal(train.tokens, grey.unsqueeze(-1))
    assert not test.stochastic and len(test) == 5 * 12 and (validation is None or not validation.stochastic)
    draws = test.tokens.view(5, 12, 8, 8)
    for number in range(5):
        wanted = to_uint8(images.held_out.batch(range(12), epoch=number))[:, 0] // 255
        assert torch.equal(draws[number], wanted)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 5


def test_a_thresholded_dataset_is_an_ordinary_one(source, tokenizer, tmp_path):
    folder = encode_images(source, tokenizer, tmp_path / "tokens", binarize="threshold")
    plain = encode_images(source, tokenizer, tmp_path / "plain", binarize=None)
    assert "drawn" not in json.loads((folder / "meta.json").read_text())
    for name, split in load_tokens(folder).splits.items():
        assert not split.stochastic and torch.equal(split.tokens, load_tokens(plain).splits[name].tokens)


def test_grids_of_drawn_images_are_augmented_with_their_images_and_not_with_their_draws(source, tmp_path):
    """A grid of the same picture: as it is in each draw of a test image, and moved as the training image is."""
    tokenizer, grid = (save_tokenizer(tmp_path / name, levels=levels) for name, levels in (("two", 2), ("all", 256)))
    data = data_of(source, augment={"shift": 3})
    shutil.copytree(source, tmp_path / "copies")
    pair = {"same": {"images": str(tmp_path / "copies"), "tokenizer": str(grid)}}
    given = {"tokenizer": str(tokenizer), "data": data, "attributes": pair, "augmentations": 1}
    splits = load_tokens(encode(EncodeConfig(out=str(tmp_path / "tokens"), **given))).splits
    draws = splits["test"].given.raw("same")[:].view(5, 12, 8, 8)
    assert torch.equal(draws, draws[:1].expand_as(draws))
    assert torch.equal(draws[0], load_images(DataConfig(**data)).held_out.grey().pixels(range(12))[:, 0].long())
    train = splits["train"]
    moved = train.given.raw("same")[:]
    assert torch.equal(moved, train.tokens.squeeze(-1).long()) and not torch.equal(*moved.chunk(2))


@pytest.mark.parametrize("mapped", [False, True])
def test_rows_of_a_drawn_split_are_a_function_of_seed_epoch_and_row(drawn, tmp_path, mapped):
    split = load_tokens(drawn, mapped=mapped).splits["train"]
    whole = split.rows(slice(None), 0, 1)
    assert whole.dtype == torch.int64 and int(whole.max()) == 1
    assert torch.equal(split.rows([30, 2], 0, 1), whole[[30, 2]])
    for other in ((1, 1), (0, 2)):
        assert not torch.equal(split.rows(slice(None), *other), whole)
    assert torch.equal(split.ids(), split.rows(slice(None))) and split.ids().dtype == torch.uint8
    load_tokens(drawn, mapped=mapped).save(tmp_path / "copy")
    copied = load_tokens(tmp_path / "copy").splits["train"]
    assert copied.stochastic and torch.equal(copied.rows(slice(None), 0, 1), whole)


def test_an_impossible_draw_is_refused(drawn, tmp_path):
    load_tokens(drawn).save(tmp_path / "copy")
    path = tmp_path / "copy" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "grid": {**meta["grid"], "vocab_size": 6}}))
    write_manifest(tmp_path / "copy")
    with pytest.raises(FormatError, match="needs a grid of 2, 4, 8, 16"):
        load_tokens(tmp_path / "copy")


def test_ids_of_several_pixels_are_drawn_pixel_by_pixel(source, tmp_path):
    """With `patch`, held-out ids name the same pixels as without, and training ids white pixels as often."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", levels=2, patch=2)
    found = load_tokens(encode_images(source, tokenizer, tmp_path / "tokens"))
    train, test = found.splits["train"], found.splits["test"]
    assert found.grid.vocab_size == 16 and train.tokens.shape[1:] == (4, 4, 4) and train.ids().shape[1:] == (4, 4)
    images = load_images(DataConfig(**data_of(source)))
    white = found.tokenizer.decode(test.rows(range(12)))
    assert torch.equal(to_uint8(white), to_uint8(images.held_out.batch(range(12))))
    draws = [found.tokenizer.decode(train.rows(slice(None), epoch, 3)) for epoch in range(200)]
    share = (torch.stack(draws) > 0).double().mean(0)
    chance = images.train.grey().pixels(range(len(images.train))).double() / 255
    assert float((share - chance).abs().max()) < 5 * 0.5 / 200**0.5


# Training


def test_each_epoch_trains_on_other_pixels(drawn, tmp_path):
    task = task_of(drawn, tmp_path / "run")
    rows = np.arange(task.rows)
    batches = [task.batch(rows, np.full(task.rows, epoch), seed)[0] for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert torch.equal(task.batch(rows[5:8], np.zeros(3, np.int64), 0)[0], batches[0][5:8])


def test_a_resumed_run_on_drawn_pixels_equals_an_uninterrupted_one(drawn, tmp_path):
    """Over several epochs, killed after a checkpoint within one."""
    more = {"model": MADE, "train__steps": 9, "train__save_every": 4, "train__batch_size": 16}
    whole, run = train_prior(tmp_path / "whole", drawn, **more), tmp_path / "run"
    with killed_at(6):
        train_prior(run, drawn, **more)
    train_prior(run, drawn, **more)
    assert_same_run(run, whole)
    pipe = ImagePipeline.from_pretrained(whole / "pipeline")
    assert set(to_uint8(pipe(4, seed=0, output_type="pt").images).unique().tolist()) <= {0, 255}


# Figures


def evaluate(root, *options):
    main(["evaluate", f"pipeline={root}/pipeline", "num_images=0", "feature_steps=0", "overwrite=true", *options])
    return json.loads((root / "evaluation" / "evaluation.json").read_text())


def save_pipeline(root, source, binarize):
    tokenizer = Tokenizer.create("pixels", image_size=(8, 8), channels=1, levels=2)
    torch.manual_seed(0)
    pipe = ImagePipeline(tokenizer, Prior.create("made", grid=tokenizer.grid, num_classes=0, hidden=[8]))
    pipe.provenance = {"data": DataConfig(**data_of(source, binarize)).model_dump(mode="json")}
    pipe.save_pretrained(root / "pipeline")
    return pipe


def test_nats_per_image_are_the_mean_over_five_fixed_draws(source, drawn, tmp_path):
    pipe = save_pipeline(tmp_path, source, "drawn")
    test = load_tokens(drawn).splits["test"].tokens.long()
    nats = [-float(pipe.prior.log_prob(draw).detach().double().mean()) for draw in test.split(12)]
    assert len(nats) == 5 and len(set(nats)) == 5
    figures = evaluate(tmp_path)
    assert figures["nats_per_image"] == pytest.approx(statistics.fmean(nats), rel=1e-6)
    assert figures["nats_per_image_deviation"] == pytest.approx(statistics.stdev(nats), rel=1e-4)
    assert figures["draws"] == 5 and "bits_per_dim" not in figures
    assert figures["bits_per_token"] * 64 * np.log(2) == pytest.approx(nats[0], rel=1e-6)


def test_a_thresholded_image_has_one_figure_without_a_deviation(source, tmp_path):
    pipe = save_pipeline(tmp_path, source, "threshold")
    figures = evaluate(tmp_path)
    images = load_images(DataConfig(**data_of(source, "threshold"))).held_out.batch(range(12))
    nats = -float(pipe.prior.log_prob(pipe.encode(images)).detach().double().mean())
    assert figures["nats_per_image"] == pytest.approx(nats, rel=1e-6)
    assert "draws" not in figures and "nats_per_image_deviation" not in figures


# Bad input

PIXELS = ["model.kind=pixels", "model.levels=2"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([*PIXELS, "data.channels=3"], "binarize: needs grey images, channels=1 (got 3)"),
        ([*PIXELS, "data.dtype=uint16", "data.range=0,65535"], "binarize: needs 8-bit images"),
        ([*PIXELS, "data.crop=random"], "binarize: images are not streamed"),
        (["model.kind=pixels"], "needs the tokenizer pixels of 2 levels, this is pixels of 256 levels"),
    ],
)
def test_images_that_cannot_be_binarized_are_refused_in_one_line(source, tmp_path, options, reason, capsys):
    given = [f"out={tmp_path}/run", f"data.source={source}", "data.image_size=8", "data.binarize=drawn"]
    assert reason in fails(capsys, "train_tokenizer", *given, *options)


def test_other_tokenizers_do_not_take_binarized_images(source, tmp_path, capsys):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", levels=4)
    given = [f"tokenizer={tokenizer}", f"out={tmp_path}/out", f"data.source={source}", "data.image_size=8"]
    line = fails(capsys, "encode", *given, "data.binarize=drawn")
    assert "pixels of 2 levels, this is pixels of 4 levels" in line

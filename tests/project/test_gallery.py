"""The gallery: pictures that are small and honest, a page that tells what made them, and runs that go on."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_pipelines import make_pipeline

from benchmarks.support.gallery import pairs, pictures
from benchmarks.support.gallery.page import page
from benchmarks.uses import gallery

ROOT = Path(__file__).parents[2]


# Pictures


def drawn(side: int, channels: int, noise: int, columns: int = 3) -> dict[str, list[list[np.ndarray]]]:
    """Images whose first pixel says where they belong, in noise."""
    chance = np.random.default_rng(0)
    rows = {}
    for n, kind in enumerate(("real", "reconstructed", "sampled")):
        rows[kind] = [
            [chance.integers(0, noise + 1, (side, side, channels)).astype(np.uint8) for _ in range(columns)]
            for _ in range((2, 2, 4)[n])
        ]
        for r, row in enumerate(rows[kind]):
            for c, image in enumerate(row):
                image[0, 0] = 100 + 40 * n + 10 * r + c
    return rows


@pytest.mark.parametrize(("side", "channels"), [(64, 3), (28, 1)])
def test_every_image_is_in_its_place(side, channels):
    rows = drawn(side, channels, noise=90)
    board = pictures.compose(rows, ["one", "two", "three"])
    times = -(-56 // side)
    found = {}
    for kind, parts in rows.items():
        for row in parts:
            for image in row:
                large = np.broadcast_to(image.repeat(times, 0).repeat(times, 1), (times * side, times * side, 3))
                places = np.argwhere(board[..., 0] == image[0, 0, 0])
                fits = [
                    (int(y), int(x))
                    for y, x in places
                    if np.array_equal(board[y : y + times * side, x : x + times * side], large)
                ]
                found[kind, int(image[0, 0, 0])] = fits
    assert all(len(fits) == 1 for fits in found.values()) and len(found) == 24
    tops = [[fits[0][0] for (kind, _), fits in found.items() if kind == name] for name in rows]
    assert max(tops[0]) < min(tops[1]) <= max(tops[1]) < min(tops[2])
    lefts = {
        value % 10: {fits[0][1] for (_, v), fits in found.items() if v % 10 == value % 10} for value in (100, 101, 102)
    }
    assert all(len(places) == 1 for places in lefts.values())
    assert max(lefts[0]) < max(lefts[1]) < max(lefts[2])
    for top in (min(part) for part in tops):  # the name of the kind stands beside its first row
        assert (board[top : top + 20, : pictures.ASIDE - 4] < 128).any()
    assert (board[: min(tops[0]) - 2, pictures.ASIDE :] < 200).any(), "no class is named"
    bare = pictures.compose(rows, [])
    assert len(bare) == len(board) - pictures.HEADER


def test_a_picture_that_would_be_large_has_fewer_rows_then_fewer_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "compose", lambda rows, labels: sum(map(len, rows.values())))
    monkeypatch.setattr(pictures, "encoded", lambda count, colors: b"x" * count * {0: 3, 256: 2, 64: 1}[colors])
    rows, path = drawn(2, 3, noise=90), tmp_path / "images" / "a.png"
    found = {}
    for most in (24, 23, 17, 15, 9, 4, 3):
        told = pictures.write_small(rows, [], path, most)
        assert path.stat().st_size == told["bytes"] <= most
        found[most] = (*told["rows"].values(), told["colors"])
    assert found == {
        24: (2, 2, 4, 0),
        23: (2, 2, 2, 0),
        17: (2, 2, 4, 256),
        15: (1, 1, 3, 256),
        9: (1, 1, 2, 256),
        4: (1, 1, 2, 64),
        3: (1, 1, 1, 64),
    }
    with pytest.raises(SystemExit, match="3 bytes, more than 2"):
        pictures.write_small(rows, [], path, 2)


def test_few_colours_make_a_smaller_file():
    board = np.random.default_rng(0).integers(0, 99, (48, 48, 3)).astype(np.uint8)
    whole, fewer = (pictures.encoded(board, colors) for colors in (0, 256))
    with Image.open(io.BytesIO(whole)) as kept:
        assert np.array_equal(np.asarray(kept), board)
    with Image.open(io.BytesIO(fewer)) as kept:
        assert len(kept.getcolors()) <= 256 and np.abs(np.asarray(kept.convert("RGB")) - board.astype(int)).mean() < 20
    assert len(fewer) < 0.6 * len(whole)


def test_grey_pictures_keep_their_values():
    board = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    with Image.open(io.BytesIO(pictures.encoded(board, 64))) as kept:
        assert kept.mode == "L" and np.array_equal(np.asarray(kept), board[..., 0])


class Held:
    """Twelve images of four classes; image k is k levels bright."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return 12

    def batch(self, rows):
        import torch

        return torch.stack([torch.full((1, 8, 12), int(row) / 127.5 - 1) for row in rows])


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_are_the_first_of_each_class_and_the_first_samples(labelled):
    import torch

    names = ["a", "b", "nowhere", "c", "d"] if labelled else []
    pipe = make_pipeline("pixels", "marginal", 1, size=(8, 12), labels=names, num_classes=len(names))
    labels = torch.tensor([4, 0, 0, 1, 3, 1, 4, 4, 0, 1, 3, 3]) if labelled else None
    rows, shown = pictures.rows_of(pipe, Held(labels), seed=5)
    assert shown == [name for name in names if name != "nowhere"] and set(rows) == set(pictures.KINDS)
    chosen = [[int(image[0, 0, 0]) for image in row] for row in rows["real"]]
    if labelled:
        assert chosen == [[1, 3, 4, 0], [2, 5, 10, 6]]
    else:
        assert sum(chosen, []) == sorted(sum(chosen, [])) and len(chosen[0]) == 10
    given = [0, 1, 3, 4] * 4 if labelled else None
    expected = pipe(num_images=16 if labelled else 40, labels=given, seed=5, output_type="np", progress=False).images
    assert np.array_equal(np.concatenate([np.stack(row) for row in rows["sampled"]]), expected)
    kept = pipe.reconstruct(Held(labels).batch(chosen[0]), output_type="np")
    assert np.array_equal(np.stack(rows["reconstructed"][0]), kept)


def test_a_label_has_two_lines_where_it_has_two_parts():
    in_two = pictures.in_two
    assert [*map(in_two, ("T-shirt / top", "animals-nature", "7"))] == [
        ["T-shirt", "top"],
        ["animals", "nature"],
        ["7"],
    ]


# The page


def record(**more: Any) -> dict[str, Any]:
    figures = {
        "psnr": 20.114,
        "ssim": 0.8504,
        "num_images": 400,
        "bits_per_token": 4.3211,
        "uniform_bits_per_token": 9.0,
    }
    figures |= {"frechet_distance": 1.2344, "train_frechet_distance": 0.111, "reconstruction_frechet_distance": 0.7}
    figures |= {"feature_space": "classifier-64", "num_compared": 400, "class_agreement": 0.35}
    figures |= {"real_class_agreement": 0.635, "reconstruction_class_agreement": 0.5}
    base = {"name": "openmoji", "title": "OpenMoji", "about": "64x64 RGB.", "figures": figures, "grid": [8, 8]}
    base |= {"vocab_size": 512, "sampler": "guidance_scale=2.0", "share": 1.0, "limit": 0, "samples": 20, "seed": 0}
    base |= {"sample_seed": 0, "machine": "2 threads of a processor", "date": "27 November 2026"}
    base |= {"picture": {"colors": 0}, "minutes": {"train_tokenizer": 4.02, "tune": 1.5}}
    return {**base, "commands": ["smalti train_tokenizer a", "smalti tune b"], **more}


def test_the_page_tells_what_made_a_picture():
    tuned = record(chosen_on={"images": 76, "ended": "the time was up"})
    text = page([tuned, record(name="digits", title="Digits")])
    assert text.index("images/gallery/openmoji.png") < text.index("images/gallery/digits.png")
    for said in (
        "8x8 of 512: 576 bits an image",
        "20.11 dB / 0.850, 400 images",
        "4.321, uniform 9.000",
        "1.234; training images 0.111, their reconstructions 0.700; 400 images a side",
        "35.0%; real 63.5%, reconstructed 50.0%",
        "tokenizer 4.0, sampling settings 1.5; 5.5 in all. 2 threads of a processor, 27 November 2026.",
        "training seed 0; samples of seeds 0 to 19",
        "smalti train_tokenizer a\nsmalti tune b\n```",
        "| guidance_scale=2.0; chosen on 76 validation images, which is rough; the time was up |",
    ):
        assert said in text, said
    assert "trial" not in text and "256 colours" not in text and "enlarged" not in text


def test_the_page_says_what_is_less_than_it_seems():
    minutes = {"train_tokenizer": 4.0}
    text = page([record(share=0.1, limit=300, picture={"colors": 256}, enlarged_from=64, minutes=minutes)])
    for said in ("0.1 of the presets' training", "300 training images at most", "256 colours", "64 pixels a side"):
        assert said in text, said
    assert "The settings of sampling are the preset's." in text
    assert page([]).endswith("No pictures yet.\n")


# Commands


def test_commands_are_those_of_the_presets_and_shorter_for_a_trial(tmp_path):
    for pair in pairs.PAIRS.values():
        if not pairs.missing(pair, pairs.Choices(tmp_path, tmp_path)) or pair.data is None:
            whole = pairs.stages(pair, pairs.Choices(tmp_path))
            assert not [word for words in whole.values() for word in words if word.startswith("train.")]
    choices = pairs.Choices(tmp_path / "runs", share=0.1, limit=300, seed=3)
    found = pairs.stages(pairs.PAIRS["digits"], choices)
    assert list(found) == ["train_tokenizer", "encode", "train_prior", *["tune"] * pairs.has_tune(), "evaluate"]
    told = {verb: pairs.typed(verb, words, choices) for verb, words in found.items()}
    assert told["train_tokenizer"] == (
        "smalti train_tokenizer --config configs/tokenizer/vqvae_digits.yaml out=runs/gallery/digits/tokenizer "
        "data.limit=300 train.steps=80 train.minutes=0.12 train.seed=3"
    )
    assert told["encode"].endswith("out=runs/gallery/digits/tokens augmentations=4")
    assert "num_images=100" in told["evaluate"] and str(tmp_path) not in " ".join(told.values())


def test_what_cannot_be_made_is_told(tmp_path):
    choices = pairs.Choices(tmp_path, tmp_path)
    assert pairs.missing(pairs.PAIRS["digits"], choices) is None
    assert "there are no images in data/openmoji" in pairs.missing(pairs.PAIRS["openmoji"], choices)
    strange = pairs.Pair("a", "A", "nothing", "gpt_digits", "")
    assert pairs.missing(strange, choices) == "there is no preset configs/tokenizer/nothing.yaml"


def test_a_stage_is_run_once_and_adds_its_attempts_up(tmp_path, monkeypatch):
    codes, calls = [1, 0], []

    def verb(command, cwd):
        calls.append(command)
        return subprocess.CompletedProcess(command, codes[len(calls) - 1])

    monkeypatch.setattr(gallery.subprocess, "run", verb)
    times = iter([0.0, 60.0, 100.0, 280.0])
    monkeypatch.setattr(gallery.time, "monotonic", lambda: next(times))
    stamp = tmp_path / "done" / "encode.json"
    with pytest.raises(SystemExit, match="encode ended with 1"):
        gallery.run_stage("encode", ["a=1"], stamp, "smalti encode a=1")
    assert gallery.run_stage("encode", ["a=1"], stamp, "smalti encode a=1")
    assert json.loads(stamp.read_text()) == {"minutes": 4.0, "done": True, "command": "smalti encode a=1"}
    assert not gallery.run_stage("encode", ["a=1"], stamp, "smalti encode a=1") and len(calls) == 2
    with pytest.raises(SystemExit, match="was made by `smalti encode a=1`; choose another out="):
        gallery.run_stage("encode", ["a=2"], stamp, "smalti encode a=2")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gallery_is_made_and_not_made_again(tmp_path):
    command = [sys.executable, "-m", "benchmarks.uses.gallery", "only=digits", "share=0.01", "limit=100"]
    command += [f"out={tmp_path}/runs", f"docs={tmp_path}/docs"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = [subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True) for _ in range(2)]
    assert [attempt.returncode for attempt in done] == [0, 0], done[0].stderr[-2000:]
    commands = [re.findall(r"^smalti (\w+)", attempt.stdout, re.M) for attempt in done]
    assert commands[0][:3] == ["train_tokenizer", "encode", "train_prior"] and not commands[1]
    picture, page = tmp_path / "docs" / "images" / "gallery" / "digits.png", (tmp_path / "docs" / "gallery.md")
    assert picture.stat().st_size <= 150_000 and "0.01 of the presets' training" in page.read_text()
    assert str(tmp_path) not in page.read_text()

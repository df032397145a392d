"""`smalti train`: what it chooses, that it runs the five steps and goes on, and mistakes.

Covers: pipelines/commands/train.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import fails
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main as smalti
from pipelines.commands import train
from pipelines.config.command import parse


def write_images(folder: Path, count: int, size: tuple[int, int] = (12, 12), classes: int = 2) -> Path:
    """Colour noise, brighter in later classes."""
    chance = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"kind{number % classes}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 128, (*size, 3)) + 120 * (number % classes)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Let the measured speed and the time be so small that all lengths are minimal."""
    monkeypatch.setattr(train, "TRIAL", 1)
    monkeypatch.setattr(train, "LEAST_STEPS", 2)


def settings_of(images: Path, tmp_path: Path, *more: str) -> tuple[train.Facts, dict]:
    config = parse(train.TrainConfig, [f"images={images}", *more], verb="train", description=None)
    facts = train.read_facts(config)
    return facts, train.choose_tokenizer(config, facts, tmp_path)


def test_one_command_trains_a_pipeline_and_goes_on(tmp_path, capsys, quick):
    """The second run trains with the files as the user edited them, and a finished one changes no weights."""
    images, out = write_images(tmp_path / "images", 120), tmp_path / "out"
    words = ["train", f"images={images}", f"out={out}", "minutes=0.01"]
    smalti([*words, "choose=true"])
    assert {path.name for path in out.glob("*.yaml")} == {f"{name}.yaml" for name in train.FILES}
    assert not (out / "tokenizer").exists()
    for name, steps in (("tokenizer", 3), ("prior", 4)):
        settings = yaml.safe_load((path := out / f"{name}.yaml").read_text())
        settings["train"] |= {"steps": steps, "batch_size": 4}
        path.write_text(yaml.safe_dump(settings))
    for name, few in (("samples", {"num_images": 4}), ("evaluation", {"num_images": 20, "feature_steps": 2})):
        path = out / f"{name}.yaml"
        path.write_text(path.read_text() + yaml.safe_dump(few))
    smalti(words)
    printed = capsys.readouterr().out
    assert "bits per token" in printed and "Frechet distance" in printed and (out / "samples.png").is_file()
    assert json.loads((out / "prior" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    pipe = ImagePipeline.from_pretrained(out / "prior")
    assert pipe.labels == ["kind0", "kind1"] and pipe.tokenizer.image_shape == (3, 12, 12)
    weights = (out / "prior/pipeline/prior/model.safetensors").read_bytes()
    smalti(words)
    assert (out / "prior/pipeline/prior/model.safetensors").read_bytes() == weights


def test_the_choice_depends_on_the_images(tmp_path):
    facts, chosen = settings_of(write_images(tmp_path / "a", 120), tmp_path)
    assert (facts.size, facts.is_grey, facts.is_flat, facts.classes) == ((12, 12), False, False, 2)
    assert chosen["data"]["channels"] == 3 and chosen["data"]["augment"] == {"shift": 1, "rotate": 8, "zoom": 0.08}
    _, chosen = settings_of(tmp_path / "a", tmp_path, "data.image_size=[64,48]")
    assert chosen["data"]["image_size"] == [64, 48] and chosen["model"]["factor"] == 8
    for path in write_images(tmp_path / "b", 120, classes=1).rglob("*.png"):
        Image.open(path).convert("L").point(lambda value: 64 * (value // 64)).resize((70, 50)).save(path)
    facts, chosen = settings_of(tmp_path / "b", tmp_path, "data.label_column=null", "data.augment.shift=9")
    assert (facts.size, facts.is_grey, facts.classes) == ((50, 70), True, 0)
    assert chosen["data"]["image_size"] == [48, 72] and chosen["model"]["factor"] == 8
    assert chosen["data"]["augment"] == {"shift": 9} and chosen["data"]["channels"] == 1


@pytest.mark.parametrize(
    ("own", "minutes", "expected"),
    [
        ((28, 28), 60, ((28, 28), 4)),
        ((33, 30), 60, ((32, 32), 4)),
        ((64, 70), 60, ((64, 64), 8)),
        ((300, 200), 60, ((80, 56), 8)),
        ((256, 256), 300, ((128, 128), 16)),
        ((100, 4000), 60, ((16, 408), 8)),
    ],
)
def test_sizes(own, minutes, expected):
    assert train.choose_size(own, minutes) == expected


def test_a_column_that_names_objects_is_found(tmp_path):
    """Each object has several images and one class; names that are all different, or numbers of frames, are no such."""
    import datasets

    images = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in range(120)]
    labels = [number // 4 % 3 for number in range(120)]
    table = {"image": images, "label": labels, "frame": [number % 4 for number in range(120)]}
    table |= {"sign": [f"sign{number // 4}" for number in range(120)], "name": [str(number) for number in range(120)]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(tmp_path / "data/train.parquet")
    facts, chosen = settings_of(tmp_path / "data", tmp_path)
    assert facts.group == chosen["data"]["group"] == "sign" and facts.columns == ("frame", "name")


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    two, text, huge = write_images(tmp_path / "two", 2), tmp_path / "text", tmp_path / "huge"
    text.mkdir(), huge.mkdir(), (tmp_path / "empty").mkdir()
    for number in range(60):
        (text / f"{number}.png").write_text("no image")
        (huge / f"{number}.png").write_bytes(b"P6 10000 10000 255\n")
    for images, expected in (
        (two, "1 training image in .*; at least 50 are needed"),
        (tmp_path / "empty", "empty"),
        (tmp_path / "missing", "^error: images: there is no file or folder .*missing"),
        (text, "most cannot be read; .*not an image"),
        (huge, "10000 x 10000 pixels; the limit is"),
    ):
        assert re.search(expected, fails(capsys, "train", f"images={images}", f"out={tmp_path}/out"))
    assert "minutes: " in fails(capsys, "train", f"images={two}", "minutes=0")
    assert "data.flip" in fails(capsys, "train", f"images={two}", "data.flip=true")
    (tmp_path / "out").mkdir()
    for name in train.FILES:
        (tmp_path / "out" / f"{name}.yaml").write_text("data: {source: other}\n")
    assert "is for the images other, not" in fails(capsys, "train", f"images={two}", f"out={tmp_path}/out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs as one process" in fails(capsys, "train", f"images={two}")


def test_images_with_transparent_pixels_keep_them(tmp_path):
    for number in range(80):
        pixels = np.full((12, 12, 4), 10 * (number % 3), np.uint8)
        pixels[..., 3] = 255 if number < 20 else number
        (folder := tmp_path / "images" / "all").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    facts, chosen = settings_of(tmp_path / "images", tmp_path)
    assert facts.channels == 4 and "RGBA training images" in facts.describe()
    assert chosen["data"]["channels"] == 4 and chosen["data"]["alpha"]
    facts, chosen = settings_of(tmp_path / "images", tmp_path, "data.channels=3")
    assert chosen["data"]["channels"] == 3 and "alpha" not in chosen["data"]

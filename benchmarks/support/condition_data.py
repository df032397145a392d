"""Small data sets with conditions, written as folders of images: pairs, clips, and digits with `metadata.csv`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.support.options import image_folder
from pipelines.images import DataConfig, load_images

FRAMES = 8  # of a clip
DARK = 90  # the largest intensity of a dark pixel
FLAGS = ("hole", "slanted", "thick")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SOURCES = {"garments": "fashion_mnist", "emoji": "openmoji", "digits": "mnist", "motion": "mnist"}
Columns = dict[str, list[Any]]


def make_data(name: str, limit: int, folder: Path) -> Path:
    """Write a data set once: `images`, and for pairs `small` or `outline`, each with `train` and `test`."""
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    for split, images, labels in () if folder.is_dir() else read_source(name, limit):
        columns: Columns = {"label": labels}
        if name == "motion":
            images, columns = make_clips(images, len(images) // 5)
        elif name == "digits":
            columns |= describe_digits(images, labels)
        write_split(work / "images" / split, images, columns)
        if name == "garments":
            write_split(work / "small" / split, halve(images))
        elif name == "emoji":
            outlines = np.where(images.max(-1) < DARK, 0, 255).astype(np.uint8)
            write_split(work / "outline" / split, outlines)
    if not folder.is_dir():
        work.rename(folder)
    return folder


def read_source(name: str, limit: int) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Yield the split, uint8 images `(n, H, W[, 3])` and class names of training and held-out images."""
    folder = image_folder(SOURCES[name])
    source = str(folder) if folder.is_dir() else "digits"
    shape: Any = {"image_size": 64, "channels": 3} if name == "emoji" else {"image_size": 28, "channels": 1}
    images = load_images(DataConfig(source=source, limit=limit, validation_fraction=0, **shape))
    for split, part in (("train", images.train), ("test", images.held_out)):
        rows = np.arange(len(part))[: 1000 if split == "test" else None]
        labels = [] if part.labels is None else [part.class_names[label] for label in part.labels[rows]]
        yield split, read_pixels(part.pixels(rows)), labels


def write_split(folder: Path, images: np.ndarray, columns: Columns | None = None) -> None:
    """Write images, those of a clip in one folder, and `metadata.csv` if there are columns."""
    clips = "velocity_x" in (columns or {})
    files = [f"{row // FRAMES:05d}/{row % FRAMES}.png" if clips else f"{row:05d}.png" for row in range(len(images))]
    for name, pixels in zip(files, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    if columns:
        with (folder / "metadata.csv").open("w", newline="") as file:
            rows = zip(files, *columns.values(), strict=True)
            csv.writer(file).writerows([["file_name", *columns], *rows])


def read_pixels(pixels: Any) -> np.ndarray:
    """Convert a uint8 tensor `(n, C, H, W)` to an array `(n, H, W[, 3])`."""
    found: np.ndarray = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return found


def halve(images: np.ndarray) -> np.ndarray:
    """Average 2 x 2 pixels of `(n, 28, 28)`."""
    return images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)


def make_clips(digits: np.ndarray, count: int) -> tuple[np.ndarray, Columns]:
    """Move two digits of half size over a torus of 32 x 32 pixels, at one velocity of up to 4 pixels per frame."""
    rng, small = np.random.default_rng(count), halve(digits)
    frames, velocities = np.zeros((count, FRAMES, 32, 32), np.uint8), rng.integers(-4, 5, (count, 2))
    for clip, velocity in zip(frames, velocities, strict=True):
        canvas = np.zeros((32, 32), np.uint8)
        for digit in small[rng.integers(len(small), size=2)]:
            canvas = np.maximum(canvas, np.roll(np.pad(digit, (0, 18)), rng.integers(32, size=2), (0, 1)))
        for frame in range(FRAMES):
            clip[frame] = np.roll(canvas, frame * velocity, (0, 1))
    y, x = (velocities[:, axis].repeat(FRAMES).tolist() for axis in (0, 1))
    return frames.reshape(-1, 32, 32), {"velocity_x": x, "velocity_y": y}


def measure_digits(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the slant (pixels to the right per pixel upwards), the thickness in pixels, and whether there is a
    hole."""
    from scipy import ndimage

    found: dict[str, list[float]] = {"slant": [], "thickness": [], "hole": []}
    for image in images:
        ink = np.asarray(Image.fromarray(image).resize((84, 84), Image.Resampling.BILINEAR)) > 100
        y, x = np.nonzero(ink) if ink.any() else (np.arange(2), np.arange(2))
        found["slant"].append(-np.cov(x, y)[0, 1] / max(np.var(y), 1.0))
        found["thickness"].append(4 / 3 * float(ndimage.distance_transform_edt(ink)[y, x].mean()))
        sizes = np.bincount(ndimage.label(np.pad(~ink, 1, constant_values=True))[0].ravel())[1:]
        found["hole"].append(float((sizes > 20).sum() > 1))
    return {name: np.array(values) for name, values in found.items()}


def find_flags(measured: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([measured["hole"] > 0, measured["slant"] > 0.25, measured["thickness"] > 3.6], 1)


def describe_digits(images: np.ndarray, labels: list[str]) -> Columns:
    """Return columns of measurements, flags, and captions such as `a thick slanted three`."""
    measured = measure_digits(images)
    rows = [[name for name, holds in zip(FLAGS, row, strict=True) if holds] for row in find_flags(measured)]
    adjectives = [
        f"{'thick' if 'thick' in row else 'thin'} {'slanted' if 'slanted' in row else 'upright'}" for row in rows
    ]
    captions = [f"a {some} {NUMBERS[int(label)]}" for some, label in zip(adjectives, labels, strict=True)]
    numbers = {name: measured[name].round(4).tolist() for name in ("slant", "thickness")}
    return {**numbers, "flags": [json.dumps(row) for row in rows], "caption": captions}

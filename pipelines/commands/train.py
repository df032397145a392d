"""Train a pipeline on your images with one command: choose all settings, run the five steps, show the result.

The choice depends on the images (number, size, colours, classes, objects), the time, and the speed of this machine. It
is printed and written to `out`, one YAML file for each step; edit them and start again for other settings. An
interrupted command goes on when it is started again.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .. import steps
from ..config import Config, UserError, run_command
from ..config.command import build_config
from ..config.table import count_of
from ..config.yaml_text import read_yaml, write_yaml
from ..files import lock_output
from ..images.classes import number_labels
from ..images.dataset import GREY_SPREAD
from ..images.loading import open_source
from ..images.sources import Source
from ..images.splits import divide_images
from ..shuffling import spread_rows
from ..train_tokenizer import TrainTokenizerConfig

FILES = ("tokenizer", "tokens", "prior", "samples", "evaluation")
"""The names, within `out`, of the results of the five steps, and of the files with their settings."""
LEAST_IMAGES, LEAST_STEPS = 50, 50
SAMPLE = 32  # images that are looked at
FEW = 20_000  # images up to which a prior of the largest size would memorise them
FLAT = 64  # colours: an image with fewer is drawn pixel by pixel, and rotation would blur it
TOKENIZER_TIME, PRIOR_TIME = 0.27, 0.6  # shares; the rest is for start-up, encoding, samples and evaluation
PRIORS = ((64, 4), (96, 5), (128, 6), (192, 8), (256, 8), (384, 12))
"""Width and depth of the priors to choose from."""
IMAGES_OF_96 = 100_000  # images that a prior of width 96 should see; others in proportion to their weights
LEAST_FOR_CRITIC = 10  # minutes
TRIAL = 10  # steps between measurements of speed, of which the third counts


class TrainConfig(Config):
    """Settings of `smalti train`."""

    examples = (
        "images=my-images",
        "images=my-images minutes=20 out=runs/mine",
        "images=my-table data.group=object data.image_column=photo choose=true",
    )
    often = "images minutes out choose"

    images: str = Field(
        description="folder of images, with a subfolder for each class if there are classes; or any other data.source "
        "of train_tokenizer: a folder of parquet files, a Hub id, `digits`"
    )
    minutes: float = Field(60.0, gt=0, le=100_000, description="time for all steps on this machine, about")
    out: str | None = Field(None, description="folder of the results; default: runs/ and the name of the images")
    choose: bool = Field(False, description="only choose the settings and write them to `out`")
    data: dict[str, Any] = Field(
        {},
        description="settings of train_tokenizer's `data` that are not to be chosen, such as data.group, which keeps "
        "images of one object together, data.image_size or data.label_column",
    )

    @property
    def folder(self) -> Path:
        name = Path(re.sub(r"[^\w.-]+", "_", Path(self.images).name).strip("._") or "images")
        return Path(os.path.expanduser(self.out)) if self.out else Path("runs") / name


@dataclass(frozen=True)
class Facts:
    """What the choice depends on. size: median height and width, or data.image_size. channels: 1, 3, or 4 if most
    images have transparent pixels. is_flat: whether most have few colours, as pixel art. group: a column that names
    objects. columns: the others of a table."""

    count: int
    size: tuple[int, int]
    channels: int
    is_flat: bool
    classes: int
    group: str | None
    columns: tuple[str, ...]

    @property
    def is_grey(self) -> bool:
        return self.channels == 1

    def describe(self) -> str:
        kind = {1: "grey", 4: "RGBA"}.get(self.channels, "colour")
        classes = f"{self.classes:,} class{'es' * (self.classes != 1)}" if self.classes else "no classes"
        height, width = self.size
        return f"{self.count:,} {kind} training images, {height} x {width} pixels, {classes}"


def run(config: TrainConfig) -> dict[str, Any]:
    """Choose the settings unless `out` has them, run the steps, and return the figures of the evaluation."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("train runs as one process; with choose=true it writes the settings of the steps to launch")
    out, files = config.folder, {name: config.folder / f"{name}.yaml" for name in FILES}
    with lock_output(out):
        if all(path.is_file() for path in files.values()):
            print(f"{out}: with the settings in {', '.join(path.name for path in files.values())}", flush=True)
            require_same_images(config, files["tokenizer"])
        else:
            header, chosen = choose(config, out)
            out.mkdir(parents=True, exist_ok=True)
            for name, settings in chosen.items():  # all before any is printed, which a closed pipe would end
                files[name].write_text(f"# {header}\n{write_yaml(settings)}", encoding="utf-8")
            for name, settings in chosen.items():
                print(f"\n# {files[name]}\n{write_yaml(settings)}", end="", flush=True)
    if config.choose:
        return {}
    print(f"\n{out}: training the tokenizer", flush=True)
    steps.train_tokenizer(files["tokenizer"])
    steps.encode(files["tokens"])
    steps.train_prior(files["prior"])
    steps.generate(files["samples"])
    figures = steps.evaluate(files["evaluation"])
    print(f"\npipeline: {out / 'prior' / 'pipeline'}; pictures: {out / 'samples.png'} and {out / 'evaluation'}")
    return figures


def require_same_images(config: TrainConfig, path: Path) -> None:
    """Raise `UserError` if the settings in `path` are for other images."""
    try:
        source = read_yaml(path.read_text(encoding="utf-8"))["data"]["source"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to choose again") from error
    if source != config.images:
        raise UserError(f"out: {path} is for the images {source}, not {config.images}; choose another folder")


# Facts


def read_facts(config: TrainConfig) -> Facts:
    """Divide the images as training will, and look at a sample. Raises `UserError`."""
    given = {"channels": 3, **config.data, "source": config.images}
    data = build_config(TrainTokenizerConfig, [], {"out": "trial", "data": given}).data
    try:
        splits = open_source(data)
    except UserError as error:
        raise UserError(re.sub(r"^data\.source\b", "images", str(error))) from None
    if "group" not in config.data and (group := find_objects(splits[data.split]() if data.split in splits else None)):
        data = data.model_copy(update={"group": group})
        splits = open_source(data)
    part = divide_images(splits, data, quiet=True).parts["train"]
    if len(part.positions) < LEAST_IMAGES:
        found = count_of(len(part.positions), "training image")
        raise UserError(f"images: {found} in {config.images}; at least {LEAST_IMAGES} are needed, better thousands")
    rows = part.positions[spread_rows(len(part.positions), SAMPLE)].tolist()
    read = [part.source.read(row, data.spec.frame) for row in rows]
    images = [image for image in read if not isinstance(image, str)]
    if 2 * len(images) < len(read):
        row, reason = next((row, image) for row, image in zip(rows, read, strict=True) if isinstance(image, str))
        raise UserError(f"images: most cannot be read; {part.source.name(row)}: {reason}")
    clear = [part.source.read(row, replace(data.spec.frame, channels=4, alpha=True)) for row in rows]
    table = part.source.table
    known = {data.image_column, data.label_column, data.group}
    return Facts(
        count=len(part.positions),
        size=data.spec.size if "image_size" in config.data else median_size(images),
        channels=count_channels(images, [] if "channels" in config.data else clear),
        is_flat=median([count_colours(image) for image in images]) <= FLAT,
        classes=0 if part.source.labels is None else len(number_labels([part.source])[1]),
        group=data.group,
        columns=() if table is None else tuple(name for name in table.column_names if name not in known),
    )


def median(numbers: list[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


def median_size(images: list[NDArray[Any]]) -> tuple[int, int]:
    return median([image.shape[1] for image in images]), median([image.shape[2] for image in images])


def count_channels(images: list[NDArray[Any]], clear: list[NDArray[Any] | str]) -> int:
    """Return 4 if most images have transparent pixels, 1 if most are grey, or else 3. clear: the images as RGBA."""
    if 2 * sum(not isinstance(image, str) and image[3].min() < 255 for image in clear) > len(images):
        return 4
    return 1 if median([int(np.ptp(image, axis=0).max()) for image in images]) <= GREY_SPREAD else 3


def count_colours(image: NDArray[Any]) -> int:
    return len(np.unique(image.reshape(image.shape[0], -1), axis=1).T)


def find_objects(source: Source | None) -> str | None:
    """Return the column of a table that names objects: several images have the same value, which then show one class;
    None without such a column, or without classes."""
    if source is None or source.table is None or source.labels is None:
        return None
    for name, feature in source.table.features.items():
        if getattr(feature, "dtype", None) not in ("string", "int64", "int32") or hasattr(feature, "names"):
            continue
        cells = source.table[name][:]
        distinct, classes = len(set(cells)), len(set(source.labels))
        if 2 * classes <= distinct <= len(cells) / 2 and len({*zip(cells, source.labels, strict=True)}) == distinct:
            return str(name)
    return None


# The choice


def choose(config: TrainConfig, out: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a sentence about the images and the time, and the settings of each step."""
    facts = read_facts(config)
    print(facts.describe(), flush=True)
    if facts.group and "group" not in config.data:
        print(f"images with the same {facts.group} are held out together: they show one object", flush=True)
    if facts.columns:
        print(f"not used: {', '.join(facts.columns)}; as conditions: attributes in tokens.yaml", flush=True)
    print("measuring the speed of this machine", flush=True)
    tokenizer, prior = choose_tokenizer(config, facts, out), choose_prior(facts, out)
    with tempfile.TemporaryDirectory() as scratch:
        set_lengths(tokenizer, prior, facts, config.minutes, Path(scratch))
    seen = prior["train"]["steps"] * prior["train"]["batch_size"]
    copies = min(count_copies(facts.count), max(1, seen // facts.count))
    pipeline = str(out / "prior" / "pipeline")
    return f"Chosen by smalti train, minutes={config.minutes:g}: {facts.describe()}.", {
        "tokenizer": tokenizer,
        "tokens": {"tokenizer": tokenizer["out"], "out": prior["tokens"], "augmentations": copies},
        "prior": prior,
        "samples": {"pipeline": pipeline, "out": str(out / "samples.png"), "overwrite": True},
        "evaluation": {"pipeline": pipeline, "out": str(out / "evaluation"), "overwrite": True},
    }


def choose_tokenizer(config: TrainConfig, facts: Facts, out: Path) -> dict[str, Any]:
    """Return the settings of `train_tokenizer`, as in the presets for digits, garments and emoji."""
    (height, width), factor = choose_size(facts.size, config.minutes)
    is_easy = facts.is_grey and facts.count <= FEW
    if facts.is_grey:
        codes, rate = (512, 0.5) if is_easy else (1024, 0.1)
        network: dict[str, Any] = {"widths": [96], "blocks": [1], "tail": [32, 16]}
    else:
        codes, rate = (2048, 0.2) if factor > 4 else (1024, 0.1)
        network = {"widths": [64, 128], "blocks": [1, 1]}
    moves: dict[str, float] = {} if facts.is_flat else {"rotate": 8, "zoom": 0.08}
    if facts.is_flat or not facts.is_grey:  # shifts would change the places of digits
        moves["shift"] = max(1, round(max(height, width) / 20))
    quantizer = {"kind": "ema", "codes": codes, "dim": 32 if facts.is_grey else 64, "rate": rate}
    chosen: dict[str, Any] = {
        "out": str(out / "tokenizer"),
        "data": {
            "source": config.images,
            "image_size": height if height == width else [height, width],
            "channels": facts.channels,
            **({"alpha": True} if facts.channels == 4 else {}),
        },
        "augmented": False,  # variants are for the prior; they cost the tokenizer half a decibel
        "model": {"kind": "vqvae", "factor": factor, **network, "quantizer": quantizer},
    }
    if count_copies(facts.count):
        chosen["data"]["augment"] = moves
    chosen["data"] |= {"group": facts.group} if facts.group else {}
    chosen["data"] |= config.data
    if not facts.is_grey:
        chosen["loss"] = {"l1": 0.5, "l2": 1.0, "gradient": 2.0}
    if config.minutes >= LEAST_FOR_CRITIC and not is_easy:
        ramp = {"start": 500, "warmup": 200, "ramp": 300}
        chosen["critic"] = {"weight": 0.4, "adaptive": True, **ramp, "width": 16, "layers": 2}
    optimizer = {"optimizer": "muon", "muon_lr": 0.05, "lr": 3e-3, "warmup_steps": 50, "mixed_precision": "auto"}
    chosen["train"] = {"batch_size": 32 if facts.is_grey else 16, **optimizer}
    return chosen


def choose_size(own: tuple[int, int], minutes: float) -> tuple[tuple[int, int], int]:
    """Return the height and width for images of a median size, and the tokenizer's factor: up to 64 x 64 pixels, or
    128 x 128 in four hours. A grid has about 8 x 8 tokens, with which the prior's time grows."""
    if max(own) <= 40:
        factor, area = 4, own[0] * own[1]
    elif min(own) >= 128 and minutes >= 240:
        factor, area = 16, 128 * 128
    else:
        factor, area = 8, 64 * 64
    scale = min(1.0, math.sqrt(area / (own[0] * own[1])))
    if max(own) <= 1.25 * min(own):
        own = (min(own), min(own))
    height, width = (max(2, round(scale * side / factor)) * factor for side in own)
    return (height, width), factor


def choose_prior(facts: Facts, out: Path) -> dict[str, Any]:
    """Return the settings of `train_prior` but its size and length."""
    chosen: dict[str, Any] = {
        "out": str(out / "prior"),
        "tokens": str(out / "tokens"),
        "model": {"kind": "gpt", "heads": 4, "dropout": 0.1 if facts.count <= FEW else 0.0},
    }
    if facts.classes > 1:
        chosen["sampler"] = {"guidance_scale": 1.5}
    chosen["train"] = {"batch_size": 64, "optimizer": "muon", "muon_lr": 0.01, "lr": 3e-3, "weight_decay": 0.1}
    return chosen


def set_lengths(tokenizer: Any, prior: Any, facts: Facts, minutes: float, scratch: Path) -> None:
    """Measure a few real steps of both stages, and set how long each is trained, and the size of the prior: the largest
    that sees enough images in its time, and does not memorise them."""
    minutes_of_prior = PRIOR_TIME * minutes
    speed = measure_speed(steps.train_tokenizer, tokenizer, scratch / "tokenizer", data={"limit": 256})
    set_steps(tokenizer, speed, TOKENIZER_TIME * minutes)
    with silence():
        tokens = steps.encode(tokenizer=scratch / "tokenizer", out=scratch / "tokens")
    most = facts.count * (20 + 2.5 * count_copies(facts.count))  # images until it memorises them
    largest = 96 if facts.count <= FEW else 192 if facts.count <= 5 * FEW else max(width for width, _ in PRIORS)
    for place, (width, depth) in enumerate(PRIORS):
        if width > largest:
            break
        size = {"dim": width, "depth": depth}
        trial = {**prior, "model": prior["model"] | size}
        speed = measure_speed(steps.train_prior, trial, scratch / f"prior{place}", tokens=str(tokens))
        enough = min(most, IMAGES_OF_96 * (width / 96) ** 2)
        if place and 60 * minutes_of_prior * speed < enough:
            break
        prior["model"] |= size
        set_steps(prior, speed, min(minutes_of_prior, most / speed / 60))


def count_copies(count: int) -> int:
    """Return the number of augmented variants of each of `count` images for the prior."""
    return next((copies for most, copies in ((2000, 32), (5000, 16), (FEW, 4)) if count <= most), 0)


def set_steps(settings: Any, speed: float, minutes: float) -> None:
    """Set the steps that a run takes at `speed`, in images per second, and the average that suits them."""
    number = max(LEAST_STEPS, int(60 * minutes * speed / settings["train"]["batch_size"]) // 50 * 50)
    decay = 0.99 if number < 1000 else 0.995 if number < 5000 else 0.999
    settings["train"] = {"steps": number, **settings["train"], "ema_decay": decay}


def measure_speed(train: Callable[..., Path], settings: dict[str, Any], out: Path, **changes: Any) -> float:
    """Run a few real steps, with the critic if there is one. Return images per second, without those of start-up."""
    length = {"steps": 3 * TRIAL, "log_every": TRIAL, "evaluate_every": 3 * TRIAL, "preview_every": 3 * TRIAL}
    trial = {**settings, "out": str(out), "train": settings["train"] | length, "track": {"wandb": "disabled"}}
    for key, value in changes.items():
        trial[key] = settings[key] | value if isinstance(value, dict) else value
    if "critic" in settings:
        trial["critic"] = settings["critic"] | {"start": TRIAL, "warmup": 0}
    with silence():
        train(**trial)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(next(speed for line in reversed(lines) if (speed := json.loads(line).get("images_per_second"))))


@contextmanager
def silence() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


main = partial(run_command, TrainConfig, run, verb="train", description=__doc__)

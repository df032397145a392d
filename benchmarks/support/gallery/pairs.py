"""The preset pairs of the gallery, and the commands that make each: what a user would type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, image_folder

Node = dict[str, Any]
CONFIGS = ROOT / "configs"
RUNS = "runs/gallery"  # where the page says that runs lie
SAMPLES, FEATURE_STEPS, TUNE_IMAGES = 1000, 300, 50  # of `smalti evaluate`, as its defaults; of `smalti tune`, at least


@dataclass(frozen=True)
class Pair:
    """`tokenizer` and `prior` are presets; `data`, a folder of images, or None for the preset's own; `augmentations`,
    copies of each image for the prior; `tune`, minutes; `about`, a sentence."""

    name: str
    title: str
    tokenizer: str
    prior: str
    about: str
    data: str | None = None
    augmentations: int = 0
    tune: float = 3.0


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("digits", "Digits", "vqvae_digits", "gpt_digits", "28x28 grey; 5,000 images.", None, 4),
        Pair(
            "fashion_mnist",
            "Fashion-MNIST",
            "vqvae_fashion_mnist",
            "gpt_fashion_mnist",
            "28x28 grey; 60,000 images.",
            "fashion_mnist",
            tune=8.0,
        ),
        Pair(
            "openmoji",
            "OpenMoji, 64x64",
            "vqvae_openmoji",
            "gpt_openmoji",
            "64x64 RGB; 1,523 images.",
            "openmoji",
            32,
        ),
        Pair(
            "openmoji128",
            "OpenMoji, 128x128",
            "vqvae_openmoji128",
            "gpt_openmoji128",
            "128x128 RGB; 1,523 images.",
            "openmoji",
            16,
        ),
        Pair(
            "palette",
            "OpenMoji, 16x16 in 64 colours",
            "palette_openmoji",
            "gpt_openmoji",
            "16x16 RGB; each pixel is a token, one of 64 colours.",
            "openmoji",
            16,
        ),
        Pair(
            "pixels",
            "Fashion-MNIST, black and white pixels",
            "pixels_fashion_binary",
            "gpt_fashion_binary",
            "28x28; each pixel is a token, so every image comes back as its two grey levels.",
            "fashion_mnist",
        ),
    )
}


@dataclass(frozen=True)
class Choices:
    """`data`, the folder of the image folders, or None for where benchmarks look; `share` of the presets' minutes and
    steps; `limit` of images, 0 for all; `out`, the folder of runs."""

    out: Path
    data: Path | None = None
    share: float = 1.0
    limit: int = 0
    seed: int = 0


def source_of(pair: Pair, choices: Choices) -> Path | None:
    """The folder of the images that is there, or None for what the preset says."""
    if pair.data is None:
        return None
    folder = choices.data / pair.data if choices.data else image_folder(pair.data)
    return folder if folder.exists() else None


def missing(pair: Pair, choices: Choices) -> str | None:
    """Why a pair cannot be made, if it cannot."""
    for folder, preset in (("tokenizer", pair.tokenizer), ("prior", pair.prior)):
        if not (CONFIGS / folder / f"{preset}.yaml").is_file():
            return f"there is no preset configs/{folder}/{preset}.yaml"
    if pair.data is None or source_of(pair, choices):
        return None
    source = preset_of("tokenizer", pair.tokenizer)["data"]["source"]
    is_hub_id = not source.startswith("data/")
    return None if is_hub_id or (ROOT / source).exists() else f"there are no images in {source}; choose data=FOLDER"


def preset_of(stage: str, name: str) -> Node:
    """The preset as it is written."""
    import yaml

    return yaml.safe_load((CONFIGS / stage / f"{name}.yaml").read_text())


def pace(preset: Node, share: float) -> list[str]:
    """Arguments that shorten a training to a share of its steps and minutes; none for all of it."""
    train = preset.get("train", {})
    if share == 1 or not train:
        return []
    steps, minutes = train.get("steps"), train.get("minutes")
    found = [f"train.steps={max(1, round(share * steps))}"] if steps else []
    return found + ([f"train.minutes={share * minutes:.4g}"] if minutes else [])


def stages(pair: Pair, choices: Choices) -> dict[str, list[str]]:
    """The verbs in their order, each with its arguments; `tune` only where there is this verb."""
    folder, source, share = choices.out / pair.name, source_of(pair, choices), choices.share
    run, tokens, prior = (str(folder / part) for part in ("tokenizer", "tokens", "prior"))
    seed = [f"train.seed={choices.seed}"] if choices.seed else []
    quiet = [*seed, "track.wandb=disabled"]
    data = [f"data.source={source}"] if source else []
    data += [f"data.limit={choices.limit}"] if choices.limit else []
    found = {
        "train_tokenizer": [
            *("--config", f"configs/tokenizer/{pair.tokenizer}.yaml", f"out={run}", *data),
            *pace(preset_of("tokenizer", pair.tokenizer), share),
            *quiet,
        ],
        "encode": [f"tokenizer={run}/tokenizer", f"out={tokens}"],
        "train_prior": [
            *("--config", f"configs/prior/{pair.prior}.yaml", f"tokens={tokens}", f"out={prior}"),
            *pace(preset_of("prior", pair.prior), share),
            *quiet,
        ],
        "tune": [f"pipeline={prior}/pipeline", "overwrite=true", f"minutes={pair.tune * share:.4g}"],
        "evaluate": [f"pipeline={prior}/pipeline", "overwrite=true"],
    }
    if pair.augmentations:
        found["encode"].append(f"augmentations={pair.augmentations}")
    if share < 1:
        found["evaluate"] += [f"num_images={max(20, round(share * SAMPLES))}"]
        found["evaluate"] += [f"feature_steps={max(1, round(share * FEATURE_STEPS))}"]
        found["tune"] += [f"num_images={TUNE_IMAGES}", f"feature_steps={max(1, round(share * FEATURE_STEPS))}"]
    if not has_tune():
        del found["tune"]
    return found


def has_tune() -> bool:
    """Whether there is the verb that chooses the settings of sampling."""
    return (ROOT / "pipelines" / "commands" / "tune.py").is_file()


def typed(verb: str, arguments: list[str], choices: Choices) -> str:
    """The command as a user would type it: folders of this machine are called by what they hold."""
    told = []
    for argument in arguments:
        if argument.startswith("data.source="):
            argument = f"data.source=data/{Path(argument).name}"
        elif argument.startswith("track."):
            continue
        told.append(argument.replace(str(choices.out), RUNS))
    return " ".join(["smalti", verb, *told])

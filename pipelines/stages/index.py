"""`model_index.json`: what a pipeline folder holds, every field checked."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from prior import Prior
from prior.sampling import SamplingOptions
from tokenizer import Tokenizer
from tokenizer.files import (
    MANIFEST,
    ConfigError,
    FolderKind,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    quote,
    read_json,
)
from tokenizer.model import CONFIG, PROVENANCE, weights_names

from ..config import Within
from ..files import FieldError, Text, validate
from ..images.dataset import LONGEST, is_class_name
from .card import FIGURES, TUNING

INDEX, CARD, GRID = "model_index.json", "README.md", "samples.png"
BACKGROUND, CALIBRATION = "background", "calibration.json"
FORMAT_VERSION = 1
MAX_PICTURE_BYTES, MAX_GRID_PIXELS = 64 << 20, 32 << 20
PARTS = ("tokenizer", "prior", BACKGROUND)
FILES = [INDEX, PROVENANCE, CARD, GRID, CALIBRATION, MANIFEST] + [
    f"{part}/{name}" for part in PARTS for name in (CONFIG, *weights_names(), PROVENANCE)
]


PipelineFolder = Annotated[str, Within("pipeline", INDEX)]
"""A pipeline's folder, the run that it is in, or a Hub id."""
PIPELINE = FolderKind("a pipeline", INDEX, lambda index: index.get("_class_name") == "ImagePipeline")


def kind_of_model(found: Any) -> str:
    """A registered name, by the look of it. Raises `ValueError`."""
    if not isinstance(found, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", found):
        raise ValueError(f"{quote(found)} is not a name (lower case letters, digits, _)")
    return found


KindName = Annotated[str, PlainValidator(kind_of_model)]


class IndexFile(BaseModel):
    """What `model_index.json` holds, but for its class and version, which are looked at before."""

    model_config = ConfigDict(extra="forbid")

    class_name: Any = Field(alias="_class_name")
    format_version: Any
    tokenizer: KindName
    prior: KindName
    background: KindName = ""
    variant: Literal["fp16", "bf16"] | None = None
    labels: list[Text]
    sampler: Any


def read_index(folder: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Read `model_index.json`, every field checked; given: parts that are not read, whose kinds need not be known.
    Raises `FormatError` or `ConfigError`."""
    path, index = folder / INDEX, read_json(folder / INDEX)
    version = index.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version: found {quote(version)}, this version of smalti reads {FORMAT_VERSION}; a newer "
            "smalti may read it"
        )
    if index.get("_class_name") != "ImagePipeline":
        raise FormatError(f"{path}: _class_name: found {quote(index.get('_class_name'))}, expected 'ImagePipeline'")
    validate(IndexFile, index, path)
    families: list[tuple[str, type[Tokenizer] | type[Prior]]] = [("tokenizer", Tokenizer), ("prior", Prior)]
    for part, family in families + [(BACKGROUND, Prior)] * (BACKGROUND in index):
        if part not in given and not family.has(index[part]):
            raise ConfigError(f"{path}: {part}: {family.describe_unknown(index[part])}")
    check_labels(index["labels"])
    if "prior" not in given:
        make_sampler(Prior.find(index["prior"]), index["sampler"], path)
    return index


def require_variant(index: dict[str, Any], variant: str | None, path: Path) -> None:
    """Raise `PathError` where another variant is asked for than the one that is there; None takes what is there."""
    weights_names(variant)
    found = index.get("variant")
    if variant is not None and variant != found:
        there = f"of variant {found!r}" if found else "that are no variant"
        raise PathError(f"{path}: variant: no {variant!r}, only weights {there}; leave variant out to load them")


def known_settings(prior: type[Prior], settings: Any) -> dict[str, Any]:
    """Of the defaults for sampling from another prior, those that this one has, too. Raises `ConfigError`."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{INDEX}: sampler: found {quote(settings)}, expected an object")
    return {name: value for name, value in settings.items() if name in prior.Sampling.names()}


def make_sampler(prior: type[Prior], settings: dict[str, Any], path: str | Path = INDEX) -> SamplingOptions:
    """The default settings of sampling from a prior of this kind. Raises `ConfigError`, naming the file, for one that
    the prior does not have or that is out of range."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: sampler: found {quote(settings)}, expected an object")
    try:
        return prior.make_sampling_options(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: sampler: {error}") from error


def check_listed(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise `IntegrityError` for a file of a pipeline that the manifest does not list."""
    unlisted = [name for name in FILES if name not in {MANIFEST, *manifest["files"]} and (folder / name).exists()]
    if unlisted:
        raise IntegrityError(f"{folder / MANIFEST}: files: does not list {', '.join(unlisted)}")


def check_labels(labels: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that cannot be printed as it is: a terminal would obey it."""
    for label in labels:
        if not is_class_name(label):
            raise ConfigError(f"{INDEX}: labels: {quote(label)} is no name: at most {LONGEST} printable characters")


def check_figures(found: dict[str, Any], names: Iterable[str] = FIGURES) -> dict[str, Any]:
    """Raise `FieldError` for a figure that the model card would show and that is neither number nor text."""
    for name in names:
        if not isinstance(found.get(name), (int, float, str, type(None))):
            raise FieldError(name, "should be a number or text")
    return found


Figures = Annotated[dict[str, Any], AfterValidator(check_figures)]
Tuning = Annotated[dict[str, Any], AfterValidator(partial(check_figures, names=TUNING))]


class DataFacts(BaseModel):
    """What the model card shows of the images."""

    source: Text | None = None


class TrainingFacts(BaseModel):
    """What the model card shows of how a model was trained."""

    steps: Any = None
    minutes: Any = None
    evaluation: Figures = {}

    @model_validator(mode="after")
    def has_both(self) -> TrainingFacts:
        """Steps are quote with the minutes that they took."""
        if "steps" in self.model_fields_set and not {type(self.steps), type(self.minutes)} <= {int, float}:
            raise FieldError("steps", "should be a number, beside one of minutes")
        return self


class ProvenanceFile(BaseModel):
    """What is looked at of `provenance.json`."""

    data: DataFacts = DataFacts()
    tokenizer: TrainingFacts = TrainingFacts()
    prior: TrainingFacts = TrainingFacts()
    evaluation: Figures = {}
    tuning: Tuning = {}
    license: Text | None = None


def read_provenance(path: Path) -> dict[str, Any]:
    """Read `provenance.json`: any facts, with numbers or text where the model card shows them. Raises `FormatError`."""
    found = read_json(path)
    validate(ProvenanceFile, found, path)
    return found


def parse_picture(data: bytes, path: Path) -> np.ndarray:
    """The PNG file `data`, read from `path`, as uint8 (H, W, 3). Raises `LimitError` for one of too many
    pixels, `FormatError` for one that cannot be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_GRID_PIXELS:
            raise LimitError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_GRID_PIXELS} allowed")
        return np.asarray(image.convert("RGB"))
    except LimitError:
        raise
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise FormatError(f"{path}: not a PNG file") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise FormatError(f"{path}: not a readable PNG file ({error})") from error

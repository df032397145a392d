"""Reading, writing and locating the folder of a pipeline: `model_index.json` and the files beside it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from prior import Prior
from prior.columns import LABEL, MAX_COLUMNS, NAME, Column
from prior.options import SamplingOptions
from tokenizer import Tokenizer
from tokenizer.files import (
    MANIFEST,
    ConfigError,
    FolderKind,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    UnreadableError,
    atomic_folder,
    check_format_version,
    find_folder,
    is_file,
    parse_json,
    quote,
    read_bytes,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)
from tokenizer.model import CONFIG, PROVENANCE, PretrainedModel, round_weights, weights_names

from .anomaly.calibration import MAX_CALIBRATION_BYTES, Calibration
from .card import pipeline_card
from .columns import FORMATS
from .config import RunSubfolder
from .files import Number, Text, validate
from .frequencies import FREQUENCIES, Frequencies
from .images.classes import LONGEST, is_class_name
from .images.pictures import write_picture
from .images.splits import SPLITS, SPLITS_KEY, join_splits, split_off
from .inference.scales import INFERENCE, Inference

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline

INDEX, CARD, GRID = "model_index.json", "README.md", "samples.png"
BACKGROUND, CALIBRATION, CONDITIONS = "background", "calibration.json", "conditions"
FORMAT_VERSION = 1
MAX_PICTURE_BYTES, MAX_GRID_PIXELS = 64 << 20, 32 << 20
PARTS = ("tokenizer", "prior", BACKGROUND)
FILES = [INDEX, PROVENANCE, SPLITS, FREQUENCIES, INFERENCE, CARD, GRID, CALIBRATION, MANIFEST] + [
    f"{part}/{name}" for part in (*PARTS, f"{CONDITIONS}/*") for name in (CONFIG, *weights_names(), PROVENANCE)
]
"""Patterns of the names of all files."""


WITHIN_RUN = RunSubfolder("pipeline", INDEX)
PipelineFolder = Annotated[str, WITHIN_RUN]
"""A pipeline's folder, a run that contains it, or a Hub id."""
PIPELINE = FolderKind("a pipeline", INDEX, lambda index: index.get("_class_name") == "ImagePipeline")


class IndexFile(BaseModel):
    """The content of `model_index.json`; its class and version are checked separately."""

    model_config = ConfigDict(extra="forbid")

    class_name: Any = Field(alias="_class_name")
    format_version: Any
    tokenizer: Text
    prior: Text
    background: Text = ""
    conditions: dict[Annotated[Text, Field(pattern=f"^{NAME.pattern}$")], Text] = Field({}, max_length=MAX_COLUMNS)
    variant: Literal["fp16", "bf16"] | None = None
    labels: list[Text]
    sampler: dict[str, Any]
    code_distance: float | None = Field(None, gt=0)


def read_index(folder: Path) -> dict[str, Any]:
    """Read and validate `model_index.json`. Raises `FormatError` or `ConfigError`."""
    path, index = folder / INDEX, read_json(folder / INDEX)
    check_format_version(index, FORMAT_VERSION, path)
    if index.get("_class_name") != "ImagePipeline":
        raise FormatError(f"{path}: _class_name: found {quote(index.get('_class_name'))}, expected 'ImagePipeline'")
    validate(IndexFile, index, path)
    return index


def make_sampler(prior: Prior, settings: dict[str, Any]) -> SamplingOptions:
    """Return the default sampling settings of a prior. Raises `ConfigError` for unknown settings and values out of
    range."""
    try:
        sampler = prior.make_sampling_options(**settings)
        prior.check_sampling_options(sampler)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{INDEX}: sampler: {error}") from error
    return sampler


def check_texts(columns: Mapping[str, Column]) -> None:
    """Raise `ConfigError` for a text with unprintable characters, such as terminal escape sequences."""
    for name, column in columns.items():
        place = f"{INDEX}: labels" if name == LABEL else f"prior/{CONFIG}: conditions.{name}"
        for text in column.texts:
            if not is_class_name(text):
                raise ConfigError(f"{place}: {quote(text)} should be at most {LONGEST} printable characters")


class DataFacts(BaseModel):
    source: Text | None = None


class CutFacts(BaseModel):
    """The limit that ended training, and the steps that were planned."""

    minutes: Number
    steps: Number


class TrainingFacts(BaseModel):
    steps: Number = 0
    minutes: Number = 0
    cut: CutFacts | None = None
    evaluation: dict[str, Any] = {}


class ProvenanceFile(BaseModel):
    """The part of `provenance.json` that a model card shows."""

    data: DataFacts = DataFacts()
    tokenizer: TrainingFacts = TrainingFacts()
    prior: TrainingFacts = TrainingFacts()
    evaluation: dict[str, Any] = {}
    tuning: dict[str, Any] = {}
    license: Text | None = None


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Write `provenance.json` and, with the division of the images among the facts, `splits.json`."""
    if facts:
        write_json(folder / PROVENANCE, split_off(facts))
    if SPLITS_KEY in facts:
        write_json(folder / SPLITS, facts[SPLITS_KEY])


def parse_picture(data: bytes, path: Path) -> np.ndarray:
    """Decode the PNG file `data`, read from `path`, to uint8 (H, W, 3). Raises `LimitError` for too many pixels,
    `FormatError` if it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if (pixels := image.width * image.height) <= MAX_GRID_PIXELS:
            return np.asarray(image.convert("RGB"))
    except Exception:  # damaged files make Pillow raise almost anything
        raise FormatError(f"{path}: not a readable PNG file") from None
    raise LimitError(f"{path}: {pixels} pixels, at most {MAX_GRID_PIXELS} allowed")


SHIPPED = Path(__file__).parent / "shipped"


def list_shipped() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{INDEX}"))


def resolve_shipped(source: str | Path) -> str | Path:
    """Return the folder of the shipped pipeline called `source`, or else `source` itself; a local folder of that name
    goes first."""
    return SHIPPED / source if source in list_shipped() and not os.path.isdir(source) else source


def find_pipeline(source: str | Path, **options: Any) -> Path:
    """Like `find_folder`, for a pipeline, also a shipped one or that of a run."""
    try:
        return find_folder(WITHIN_RUN.resolve(str(resolve_shipped(source))), FILES, **options)
    except UnreadableError:
        raise
    except PathError as error:
        bare = re.fullmatch(r"\w+", str(source))
        raise PathError(f"{error}; shipped pipelines: {', '.join(list_shipped())}" if bare else str(error)) from error


# Compatibility of models


def check_fit(
    tokenizer: Tokenizer,
    prior: Prior,
    background: Prior | None = None,
    condition_tokenizers: Mapping[str, Tokenizer] | None = None,
) -> dict[str, Tokenizer]:
    """Return the tokenizers of grids (see `match_tokenizers`). Raises `IntegrityError` unless the priors model the
    tokens of this tokenizer, `TypeError` for what is no model, such as a compiled one."""
    families: dict[str, tuple[Any, type]] = {"tokenizer": (tokenizer, Tokenizer), "prior": (prior, Prior)}
    families |= {} if background is None else {BACKGROUND: (background, Prior)}
    others = condition_tokenizers or {}
    families |= {f"condition_tokenizers.{name}": (other, Tokenizer) for name, other in others.items()}
    for name, (model, family) in families.items():
        if not isinstance(model, family):
            found = f"(got {type(model).__name__}); to compile it, call pipe.{name}.compile()"
            raise TypeError(f"{name} should be a {family.__name__} {found}")
    if tokenizer.grid != prior.grid:
        raise IntegrityError(f"prior/{CONFIG}: grid: {prior.grid} is not the tokenizer's, {tokenizer.grid}")
    if prior.config.tokenizer and prior.config.tokenizer != tokenizer.fingerprint():
        raise IntegrityError(
            f"prior/{CONFIG}: tokenizer: the prior was trained on the tokens of another tokenizer "
            f"({prior.config.tokenizer[:12]}..., this one is {tokenizer.fingerprint()[:12]}...)"
        )
    if background is not None:
        ours, theirs = ((one.grid, one.num_classes, one.config.tokenizer) for one in (prior, background))
        if ours != theirs:
            raise IntegrityError(f"{BACKGROUND}/{CONFIG}: not a prior over the same tokens and classes as prior/")
        if background.config.conditions not in ({}, prior.config.conditions):
            raise IntegrityError(f"{BACKGROUND}/{CONFIG}: conditions: neither those of prior/ nor none")
    return match_tokenizers(tokenizer, prior, others)


def match_tokenizers(tokenizer: Tokenizer, prior: Prior, others: Mapping[str, Tokenizer]) -> dict[str, Tokenizer]:
    """Return the tokenizer of each grid column by name: the pipeline's own if it made the tokens, or one of `others`.
    Raises `IntegrityError` if another tokenizer made the tokens."""
    columns = prior.config.conditions
    grids: dict[str, Any] = {name: one for name, one in columns.items() if FORMATS[one.kind].of_pictures}
    if unknown := [name for name in others if name not in grids]:
        hint = f"its grids are {', '.join(grids) or 'none'}"
        raise IntegrityError(f"{CONDITIONS}/{unknown[0]}: the prior has no such grid; {hint}")
    own = tokenizer.fingerprint() if any(column.tokenizer for column in grids.values()) else None
    found = {}
    for name, column in grids.items():
        where, made = f"{CONDITIONS}/{name}", f"{column.tokenizer[:12]}..."
        one = tokenizer if column.tokenizer == own else others.get(name)
        if one is None and column.tokenizer:
            raise IntegrityError(f"{where}: missing: the tokenizer ({made}) of this grid's tokens")
        if one is None:
            continue
        if one.grid != column.grid:
            raise IntegrityError(f"{where}: grid: {one.grid} is not the column's, {column.grid}")
        if one is not tokenizer and column.tokenizer not in ("", fingerprint := one.fingerprint()):
            this = f"this one is {fingerprint[:12]}..."
            raise IntegrityError(f"{where}: the grid holds tokens of another tokenizer ({made}, {this})")
        found[name] = one
    return found


def set_fingerprints(models: Mapping[str, PretrainedModel], grids: Collection[str]) -> None:
    """Record the fingerprints of tokenizers, which change when weights are rounded, in priors that fit them. models:
    `ImagePipeline.models`; grids: the columns whose tokens a tokenizer made."""
    tokenizer = models["tokenizer"]
    fingerprint = tokenizer.fingerprint()
    made = {name: models.get(f"{CONDITIONS}/{name}", tokenizer).fingerprint() for name in grids}
    for prior in models.values():
        if not isinstance(prior, Prior):
            continue
        columns = {
            name: column.model_copy(update={"tokenizer": made[name]}) if name in made else column
            for name, column in prior.config.conditions.items()
        }
        if (prior.config.tokenizer, prior.config.conditions) != (fingerprint, columns):
            prior.config = prior.config.model_copy(update={"tokenizer": fingerprint, "conditions": columns})


def change_dtype(pipeline: ImagePipeline, choose: Callable[[PretrainedModel], torch.dtype | None]) -> None:
    """Convert each model's weights to the dtype that `choose` returns for it; None leaves them unchanged."""
    chosen = [(model, choose(model)) for model in pipeline.models.values()]
    if all(dtype in (None, model.dtype) for model, dtype in chosen):
        return
    check_fit(**pipeline.components)
    for model, dtype in chosen:
        model.to(dtype=dtype)
    set_fingerprints(pipeline.models, pipeline.condition_tokenizers)


# Writing


def save(pipeline: ImagePipeline, folder: str | Path, variant: str | None) -> None:
    """See `ImagePipeline.save_pretrained`."""
    grid = pipeline.sample_grid
    check_fit(**pipeline.components)
    models = pipeline.models
    if variant is not None:
        models = {name: round_weights(model, variant) for name, model in models.items()}
    if grid is not None and grid[..., 0].size > MAX_GRID_PIXELS:
        raise LimitError(f"sample_grid: {grid.shape} is more than {MAX_GRID_PIXELS} pixels")
    set_fingerprints(models, pipeline.condition_tokenizers)
    tokenizers = {Path(name).name: model.name for name, model in models.items() if name.startswith(CONDITIONS)}
    with atomic_folder(folder, kind=PIPELINE) as target:
        for name, model in models.items():
            model.save_pretrained(target / name, **({} if variant is None else {"variant": variant}))
        if pipeline.calibration is not None:
            (target / CALIBRATION).write_text(pipeline.calibration.to_json(), encoding="utf-8")
        index = {
            "_class_name": "ImagePipeline",
            "format_version": FORMAT_VERSION,
            "tokenizer": pipeline.tokenizer.name,
            "prior": pipeline.prior.name,
            "labels": pipeline.labels,
            "sampler": pipeline.sampler.to_dict(),
            **({} if pipeline.background is None else {"background": pipeline.background.name}),
            **({CONDITIONS: tokenizers} if tokenizers else {}),
            **({} if variant is None else {"variant": variant}),
            **({} if pipeline.measured_distance is None else {"code_distance": pipeline.measured_distance}),
        }
        write_json(target / INDEX, index)
        write_provenance(target, pipeline.provenance)
        pipeline.frequencies.save(target)
        pipeline.inference.save(target)
        if grid is not None:
            write_picture(grid, target / GRID)
        (target / CARD).write_text(pipeline_card(pipeline, grid is not None), encoding="utf-8")
        write_manifest(target)


def save_again(pipeline: ImagePipeline, folder: str | Path, sample_grid: Any = None) -> None:
    """Write a pipeline back to the `folder` it was loaded from, with new facts. Weights, their dtypes and the variant
    do not change. Afterwards the pipeline is `restore_dtypes`."""
    restore_dtypes(pipeline).save_pretrained(folder, variant=read_variant(folder), sample_grid=sample_grid)


def restore_dtypes(pipeline: ImagePipeline) -> ImagePipeline:
    """Move the pipeline's weights to the CPU and convert them to the dtypes in its files."""
    change_dtype(pipeline.to(device="cpu"), lambda model: model.stored_dtype)
    return pipeline


def read_variant(folder: str | Path) -> Any:
    return read_json(Path(folder) / INDEX).get("variant")


# Reading


def load(cls: type[Any], folder: Path, variant: str | None, verify: bool) -> Any:
    """See `ImagePipeline.from_pretrained`."""
    if not is_file(folder / INDEX):
        raise PathError(f"{folder}: not a pipeline folder (no {INDEX})")
    if verify:
        listed = {MANIFEST, *verify_manifest(folder)["files"]}
        found = [path.relative_to(folder).as_posix() for pattern in FILES for path in sorted(folder.glob(pattern))]
        if unlisted := [name for name in found if name not in listed]:
            raise IntegrityError(f"{folder / MANIFEST}: files: does not list {', '.join(unlisted)}")
    index = read_index(folder)

    def load_model(family: type[Tokenizer] | type[Prior], name: str, kind: str) -> PretrainedModel:
        if not family.has(kind):
            raise ConfigError(f"{folder / INDEX}: {name.replace('/', '.')}: {family.describe_unknown(kind)}")
        return family.find(kind).load_folder(folder / name, variant=variant or index.get("variant"))

    families: Any = {"tokenizer": Tokenizer, "prior": Prior, BACKGROUND: Prior}
    models: dict[str, Any] = {
        name: load_model(family, name, index[name]) for name, family in families.items() if name in index
    }
    models["condition_tokenizers"] = {
        name: load_model(Tokenizer, f"{CONDITIONS}/{name}", kind) for name, kind in index.get(CONDITIONS, {}).items()
    }
    try:
        pipeline = cls(**models, labels=index["labels"], sampler=index["sampler"])
    except (ConfigError, IntegrityError) as error:  # the message begins with the file name
        raise type(error)(f"{folder / str(error)}") from error
    pipeline.measured_distance = index.get("code_distance")
    if (path := folder / CALIBRATION).exists():
        pipeline.calibration = Calibration.from_dict(parse_json(read_bytes(path, MAX_CALIBRATION_BYTES), path), path)
    if (path := folder / PROVENANCE).exists():
        facts = read_json(path)
        validate(ProvenanceFile, facts, path)
        pipeline.provenance = join_splits(facts, folder / SPLITS)
    pipeline.frequencies = Frequencies.load(folder, pipeline.columns)
    pipeline.inference = Inference.load(folder)
    if (path := folder / GRID).exists():
        pipeline.sample_grid = parse_picture(read_bytes(path, MAX_PICTURE_BYTES), path)
    return pipeline

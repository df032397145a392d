"""The folder of a pipeline: `model_index.json` and what lies beside it, written, read, and found by name."""

from __future__ import annotations

import copy
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
    UnreadableError,
    atomic_folder,
    find_folder,
    is_file,
    parse_json,
    quote,
    read_bytes,
    read_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)
from tokenizer.model import CONFIG, PROVENANCE, Dtype, choose_dtype, round_weights, weights_names

from .anomaly.calibration import MAX_CALIBRATION_BYTES, Calibration
from .card import TUNING, model_card
from .config import Within
from .files import FieldError, Text, validate
from .images.dataset import LONGEST, is_class_name
from .images.pictures import write_picture
from .metrics.figures import FIGURES
from .stages.compiled import unwrapped

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


HERE = Path(__file__).parent / "shipped"


def shipped() -> list[str]:
    """The names of the pipelines in the package."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{INDEX}"))


def located(source: str | Path) -> str | Path:
    """The folder of the pipeline of that name in the package, and else `source` itself. A folder of the user's that is
    called so goes first, as it does before a Hub id."""
    return HERE / source if source in shipped() and not os.path.isdir(source) else source


def resolve_pipeline(source: str | Path, names: list[str], **options: Any) -> Path:
    """`resolve_folder` of a pipeline, which may be one that comes with the package. Raises `PathError`."""
    try:
        return find_folder(located(source), names, **options)
    except UnreadableError:
        raise
    except PathError as error:
        bare = re.fullmatch(r"\w+", str(source))
        raise PathError(
            f"{error}; these come with the package: {', '.join(shipped())}" if bare else str(error)
        ) from error


Dtypes = Dtype | Mapping[str, Dtype]
"""A type for all parts, or one for each: `{"tokenizer": ..., "prior": ..., "background": ..., "default": ...}`."""

M = TypeVar("M", Tokenizer, Prior)


# Writing


def save(pipeline: Any, folder: str | Path, variant: str | None) -> None:
    """`Stages.save_pretrained`."""
    require_fit(pipeline)
    if variant is not None:
        pipeline = in_variant(pipeline, variant)
    grid = pipeline.sample_grid
    if grid is not None and grid[..., 0].size > MAX_GRID_PIXELS:
        raise LimitError(f"sample_grid: {grid.shape} is more than {MAX_GRID_PIXELS} pixels")
    fingerprint = pipeline.tokenizer.fingerprint()
    for prior in filter(None, (pipeline.prior, pipeline.background)):
        if prior.config.tokenizer != fingerprint:  # another dtype has another fingerprint
            prior.config = prior.config.model_copy(update={"tokenizer": fingerprint})
    with atomic_folder(folder, kind=PIPELINE) as target:
        for name, model in pipeline.components.items():
            model.save_pretrained(target / name, **({} if variant is None else {"variant": variant}))
        if pipeline.calibration is not None:
            (target / CALIBRATION).write_text(pipeline.calibration.to_json(), encoding="utf-8")
        write_json(target / INDEX, index_of(pipeline, variant))
        if pipeline.provenance:
            write_json(target / PROVENANCE, pipeline.provenance)
        if grid is not None:
            write_picture(grid, target / GRID)
        card = model_card(pipeline.tokenizer, pipeline.prior, pipeline.labels, pipeline.provenance, grid is not None)
        (target / CARD).write_text(card, encoding="utf-8")
        write_manifest(target)


def require_fit(pipeline: Any) -> None:
    """Raise `IntegrityError` for a tokenizer or prior that was put in the place of another since the pipeline was made,
    and with which none could be made."""
    if pipeline.replaced:
        type(pipeline)(**pipeline.components, labels=pipeline.labels)


def in_variant(pipeline: Any, variant: str) -> Any:
    """A copy whose models are rounded to the type of `variant`, so that they fit each other as they will be loaded."""
    smaller = copy.copy(pipeline)
    smaller._tokenizer, smaller._prior = (
        round_weights(pipeline.tokenizer, variant),
        round_weights(pipeline.prior, variant),
    )
    if pipeline.background is not None:
        smaller.background = round_weights(pipeline.background, variant)
    return smaller


def index_of(pipeline: Any, variant: str | None) -> dict[str, Any]:
    """What `model_index.json` holds."""
    return {
        "_class_name": "ImagePipeline",
        "format_version": FORMAT_VERSION,
        "tokenizer": pipeline.tokenizer.name,
        "prior": pipeline.prior.name,
        "labels": pipeline.labels,
        "sampler": pipeline.sampler.to_dict(),
        **({} if pipeline.background is None else {"background": pipeline.background.name}),
        **({} if variant is None else {"variant": variant}),
    }


def save_again(pipeline: Any, folder: str | Path, sample_grid: Any = None) -> None:
    """Write a pipeline that was loaded from `folder` into it again, with what has become known of it: no weight
    changes, nor its type, nor the folder's variant. The pipeline is then `as_stored`."""
    as_stored(pipeline).save_pretrained(folder, variant=variant_of(folder), sample_grid=sample_grid)


def as_stored(pipeline: Any) -> Any:
    """The pipeline, its weights now on the CPU and of the types that its files have."""
    for model in pipeline.to(device="cpu").components.values():
        model.to(dtype=model.stored_dtype)
    return pipeline


def variant_of(folder: str | Path) -> str | None:
    """That of the weights in a pipeline's folder."""
    variant: str | None = read_json(Path(folder) / INDEX).get("variant")
    return variant


# Parts of the caller's


def instead(pipeline: Any, place: str, model: M) -> M:
    """`model`, which comes in the place of another of the pipeline's models, if there is one, and is then in eval mode.
    What is known of that one is forgotten, as where `from_pretrained` is given parts: calibration, provenance, sample
    pictures. Of the settings of sampling those stay that a new prior has."""
    if getattr(pipeline, place, model) is not model:
        model.eval()
        pipeline.replaced = True
        pipeline.calibration, pipeline.provenance, pipeline.sample_grid = None, {}, None
        if isinstance(model, Prior):
            pipeline.sampler = make_sampler(type(model), known_settings(type(model), pipeline.sampler.to_dict()))
    return model


# Reading


def given_parts(**parts: Any) -> dict[str, Any]:
    """Those parts that a caller gives. Raises `TypeError` for one that is no model of its family."""
    families: dict[str, Any] = {"tokenizer": Tokenizer}
    given = {name: model for name, model in parts.items() if model is not None}
    return {name: unwrapped(model, families.get(name, Prior), name) for name, model in given.items()}


def read(cls: type[Any], folder: Path, parts: dict[str, Any], variant: str | None, verify: bool) -> Any:
    """Load the pipeline in `folder`, with these `parts` in place of its own, whose files are not opened. What is known
    of the folder's parts (calibration, provenance, sample pictures) is then left out. verify: check every file's
    sha256."""
    return read_folder(folder, lambda: _read(cls, folder, parts, variant, verify))


def _read(cls: type[Any], folder: Path, parts: dict[str, Any], variant: str | None, verify: bool) -> Any:
    if not is_file(folder / INDEX):
        inner = folder / "pipeline"
        hint = f"; did you mean {inner}?" if (inner / INDEX).is_file() else ""
        raise PathError(f"{folder}: not a pipeline folder (no {INDEX}){hint}")
    if verify:
        check_listed(folder, verify_manifest(folder, without=tuple(parts)))
    index = read_index(folder, parts)
    require_variant(index, variant, folder / INDEX)

    def part(name: str, family: Any) -> Any:
        if name in parts:
            return parts[name]
        return family.find(index[name]).load_folder(folder / name, variant=index.get("variant"))

    tokenizer, prior = part("tokenizer", Tokenizer), part("prior", Prior)
    settings = known_settings(type(prior), index["sampler"]) if "prior" in parts else index["sampler"]
    pipeline = cls(tokenizer, prior, labels=index["labels"], sampler=settings)
    if BACKGROUND in parts or (BACKGROUND in index and not parts):
        pipeline.set_background(part(BACKGROUND, Prior))
    if not parts:
        read_facts(pipeline, folder)
    return pipeline


def read_facts(pipeline: Any, folder: Path) -> None:
    """Read what is known of the parts that are in the folder."""
    if (path := folder / CALIBRATION).exists():
        pipeline.calibration = Calibration.from_dict(parse_json(read_bytes(path, MAX_CALIBRATION_BYTES), path), path)
    if (path := folder / PROVENANCE).exists():
        pipeline.provenance = read_provenance(path)
    if (path := folder / GRID).exists():
        pipeline.sample_grid = parse_picture(read_bytes(path, MAX_PICTURE_BYTES), path)


def convert(pipeline: Any, parts: dict[str, Any], dtype: Dtypes) -> None:
    """Change the types of the parts that were loaded, as `from_pretrained` is asked to; those given stay as they are.
    Raises `ValueError` for a part that there is none of."""
    each: dict[str, Any] = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype}
    if unknown := sorted(set(each) - {*PARTS, "default"}):
        raise ValueError(f"dtype: no part is called {unknown[0]!r}; there are {', '.join(PARTS)} and default")
    for name, model in pipeline.components.items():
        if name not in parts:
            model.to(dtype=choose_dtype(each.get(name, each.get("default")), model.stored_dtype))

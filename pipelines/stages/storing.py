"""A pipeline's folder: how it is written, and how it becomes a pipeline again, perhaps with parts of the caller's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import (
    LimitError,
    PathError,
    atomic_folder,
    is_file,
    parse_json,
    read_bytes,
    read_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)
from tokenizer.model import PROVENANCE, Dtype, choose_dtype, round_weights

from ..images.pictures import write_picture
from .calibration import MAX_CALIBRATION_BYTES, Calibration
from .card import model_card
from .compiled import unwrapped
from .index import (
    BACKGROUND,
    CALIBRATION,
    CARD,
    FORMAT_VERSION,
    GRID,
    INDEX,
    MAX_GRID_PIXELS,
    MAX_PICTURE_BYTES,
    PARTS,
    PIPELINE,
    check_listed,
    known_settings,
    make_sampler,
    parse_picture,
    read_index,
    read_provenance,
    require_variant,
)

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

"""What `smalti calibrate column=NAME` fits to held-out images, and stores in the pipeline folder as `inference.json`.

One half of the units fits a temperature for each size of a group, by the log score; the other half gives the mass that
is denser than the true value. A unit is an image or, if images show objects, an object: the levels of a region are
those of new objects."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from prior.columns import find_column
from tokenizer.files import check_format_version, parse_json, read_bytes, write_json

from ..files import Whole, validate
from .posterior import Posterior, Scale

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

INFERENCE, FORMAT_VERSION = "inference.json", 1
MAX_BYTES = 8 << 20
MAX_UNITS = 20_000
"""Units of which scores are stored."""
LEAST_UNITS = 20
SIZES = (1, 2, 4, 8, 16)
"""Images in the groups that are calibrated, if enough objects have as many."""
TEMPERATURES = [2 ** (step / 20) for step in range(-40, 201)]

Mass = Annotated[float, Field(ge=0, le=1)]


class SizeFit(BaseModel):
    """The fit to groups of some size."""

    model_config = ConfigDict(extra="forbid")

    size: Whole = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    denser: list[Mass] = Field(min_length=1, max_length=MAX_UNITS)


class ColumnFit(BaseModel):
    """The fit of one column while others were given. units: images or, if `objects`, objects."""

    model_config = ConfigDict(extra="forbid")

    column: str
    given: list[str]
    objects: bool
    digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = Field(max_length=16 * MAX_UNITS)
    """Of the tokens of the images, which are no longer new."""
    sizes: list[SizeFit] = Field(min_length=1, max_length=len(SIZES))


class Inference(BaseModel):
    """The fits of a pipeline."""

    model_config = ConfigDict(extra="forbid")

    format_version: Whole = FORMAT_VERSION
    fits: list[ColumnFit] = []

    def find(self, column: str, given: Collection[str]) -> ColumnFit | None:
        return next((fit for fit in self.fits if fit.column == column and {*fit.given} == {*given}), None)

    def scale(self, column: str, given: Collection[str], size: int) -> Scale:
        """Return the scale of groups of `size` images: that of the largest fitted size up to it, with levels only if
        the size was fitted itself."""
        fit = self.find(column, given)
        if fit is None:
            return Scale()
        found = max((each for each in fit.sizes if each.size <= size), key=lambda each: each.size, default=fit.sizes[0])
        return Scale(found.temperature, found.denser if found.size == size else ())

    def with_fit(self, fit: ColumnFit) -> Inference:
        others = [each for each in self.fits if (each.column, {*each.given}) != (fit.column, {*fit.given})]
        return self.model_copy(update={"fits": [*others, fit]})

    def save(self, folder: Path) -> None:
        """Write `inference.json`, unless there are no fits."""
        if self.fits:
            write_json(folder / INFERENCE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Inference:
        """Read `inference.json` of a folder; without the file, there are no fits. Raises `FormatError`."""
        path = folder / INFERENCE
        if not path.is_file():
            return cls()
        found = parse_json(read_bytes(path, MAX_BYTES), path)
        check_format_version(found, FORMAT_VERSION, path)
        return validate(cls, found, path)


def calibrate_column(
    pipeline: ImagePipeline,
    images: Tensor,
    column: str,
    truth: Tensor,
    *,
    condition: Any = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> ColumnFit:
    """Fit temperatures and levels of one column to images that were not trained on, store them in
    `pipeline.inference`, and return them.

    truth: the raw values of the column, one per image; images whose value is null are left out. condition: values of
    other columns, which `infer` must be given again. groups: the objects that images show; groups of `SIZES` images are
    fitted too, and an object counts once. Raises `ValueError` for less than `LEAST_UNITS` units."""
    kind = find_column(pipeline.columns, column, "column")
    if kind.list_values() is None and kind.span is None:
        raise ValueError(
            f"column: {column!r} ({kind.kind}) cannot be calibrated; classes, few flags, a number or an angle can"
        )
    given = pipeline.read_given(None, condition, len(images))
    rows = torch.nonzero(~kind.is_null(truth))[:, 0].tolist()
    objects = [str(k) for k in range(len(images))] if groups is None else [str(each) for each in groups]
    members = dict[str, list[int]]()
    for row in np.random.default_rng(seed).permutation(rows).tolist():
        members.setdefault(objects[row], []).append(row)
    sizes, used_rows = list[SizeFit](), set[int]()
    for size in SIZES if groups is not None else (1,):
        chosen = [found[:size] for found in members.values() if len(found) >= size][:MAX_UNITS]
        if len(chosen) < LEAST_UNITS:
            if size == 1:
                what = "images" if groups is None else "objects"
                raise ValueError(
                    f"column {column!r}: {len(chosen)} {what} have a value; at least {LEAST_UNITS} are needed"
                )
            break
        flat = [row for each in chosen for row in each]
        used_rows.update(flat)
        names = [unit for unit, each in enumerate(chosen) for _ in each]
        posterior = pipeline.infer(images[flat], column, condition=given[flat], groups=names)
        fitting, scoring = slice(0, len(chosen) // 2), slice(len(chosen) // 2, None)
        firsts = kind.to_targets(truth[[each[0] for each in chosen]])
        scores = {one: with_temperature(posterior, one).log_density_at(firsts)[fitting].mean() for one in TEMPERATURES}
        temperature = max(TEMPERATURES, key=scores.__getitem__)
        scaled = with_temperature(posterior, temperature)
        denser = scaled.denser(scaled.log_density_at(firsts)[:, None])[scoring, 0]
        sizes.append(SizeFit(size=size, temperature=temperature, denser=denser.sort().values.tolist()))
    used = digest_tokens(pipeline.encode(images[sorted(used_rows)]))
    fit = ColumnFit(
        column=column, given=list(given.names), objects=groups is not None, digests=sorted(set(used)), sizes=sizes
    )
    pipeline.inference = pipeline.inference.with_fit(fit)
    return fit


def digest_tokens(tokens: Tensor) -> list[str]:
    """Identify images by their tokens."""
    rows = tokens.flatten(1).long().cpu().numpy()
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]


def with_temperature(posterior: Posterior, temperature: float) -> Posterior:
    return replace(posterior, scales=[Scale(temperature)] * len(posterior))

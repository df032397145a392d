"""A calibration on normal images, stored in the pipeline folder as `calibration.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from prior.columns import LABEL, MAX_COLUMNS, NAME
from tokenizer.spec import to_uint8

from ..files import FieldError, validate
from ..images.views import View
from .conformal import cross_bound
from .distances import CalibrationError, Distance, Part, Row, Table

MAX_CALIBRATION_BYTES = 4 << 20
"""Maximum size of the file; large calibrations need up to 3 MB."""
MAX_IMAGES = 50_000
"""Maximum number of images, because the file stores a digest of each."""
MAX_FOLDS, MAX_FOLDED = 8, 10_000
"""Maximum number of folds, and of images with them, because the file stores what was fitted without each."""
LEVELS = (0.9, 0.95, 0.98, 0.99, 0.995)
"""The quantiles of token surprise available to `heal`."""


class Fitted(Part):
    """Fitted reference for scores. `statistics` measures log bits and errors from their mean; `features` measures prior
    features from their nearest neighbours (None for a prior without layers)."""

    optional = ("names",)
    typical_bits: float
    """Mean bits per image."""
    statistics: Distance
    features: Distance | None
    names: list[str] | None = Field(None, min_length=1, max_length=16)
    """The statistics that `statistics` measures, in order; not in files of 0.3, which have all but `top_bits`."""


class NormalScores(Part):
    """One method's scores of normal images that were not used for fitting; see `conformal`."""

    values: Row
    tie: float = Field(ge=0)
    """A score that exceeds a value by at most this ties with it."""
    threshold: float | None
    """None with folds, of which p-values have no threshold."""


class MapReference(Part):
    """Fitted reference for maps: `codes`, the mean bits of each id while it is hidden; mean and deviation of filter
    responses, and normal ones as `points`, standardized; mean and deviation over pixels of the surprisal and of the
    distance from the points, and over images of the peak of the surprisal and of the logarithms of the largest changes
    of responses down and across."""

    codes: Row
    response_mean: Row
    response_deviation: Row
    points: Table
    pixel_mean: Row
    pixel_deviation: Row
    image_mean: Row
    image_deviation: Row

    @model_validator(mode="after")
    def _shapes_fit(self) -> MapReference:
        size = self.points.shape[1]
        sizes = {"response_mean": size, "response_deviation": size, "pixel_mean": 2, "pixel_deviation": 2}
        sizes |= {"image_mean": 3, "image_deviation": 3}
        for name, expected in sizes.items():
            if len(getattr(self, name)) != expected:
                raise FieldError(name, f"should have {expected} numbers")
        for name in ("response_deviation", "pixel_deviation", "image_deviation"):
            if (getattr(self, name) <= 0).any():
                raise FieldError(name, "should be positive")
        return self


class NormalStatistics(Part):
    """What was fitted to some normal images, and the scores by it of others, by method."""

    optional = ("maps",)
    fitted: Fitted
    maps: MapReference | None = None
    scores: dict[str, Row]


class Calibration(Part):
    """Calibration on held-out normal images: one half was used for fitting, the other half gave the scores; or with
    folds, each image gave a score by what was fitted to the other folds."""

    optional = (
        "columns",
        "marginal",
        "objects",
        "tile",
        "stride",
        "sizes",
        "maps",
        "object_digests",
        "fitted",
        "folds",
    )
    count: int = Field(ge=2)
    """Number of images in both halves."""
    objects: int | None = Field(None, ge=2)
    """Number of objects that the images show, if each object has a single score, that of its most anomalous image; not
    in the file otherwise."""
    labels: bool
    """Whether token bits were conditioned on the images' classes."""
    columns: list[Annotated[str, Field(pattern=f"^{NAME.pattern}$")]] = Field([], max_length=MAX_COLUMNS)
    """The columns that token bits were conditioned on; not in the file if there are none."""
    marginal: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = None
    """The column of classes over which token bits are those of a mixture; not in the file if there is none."""
    tile: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=2, max_length=2)
    """Height and width of the tiles of which each score is the maximum; None, and not in the file, for whole images."""
    stride: int | None = Field(None, ge=1)
    """Distance of the tiles in pixels; None, and not in the file, for whole images."""
    sizes: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=4, max_length=4)
    """With tiles, the smallest height and width of the images, and the largest; not in files of 0.3."""
    false_alarms: float = Field(gt=0, lt=1)
    """Share of normal images above a method's threshold."""
    confidence: float | None = Field(gt=0, lt=1)
    """Probability over calibrations that the share is at most `false_alarms`; None: on average over calibrations."""
    fitted: Fitted | None = None
    """None, and not in the file, with folds, which have their own."""
    scores: dict[str, NormalScores] = Field(min_length=1)
    """Scores by method, of all folds; `map` is the highest value of the combined map."""
    folds: list[NormalStatistics] | None = Field(None, min_length=2, max_length=MAX_FOLDS)
    """With folds, what was fitted to the objects of all others, and the scores by it of the objects of each; None, and
    not in the file, for two halves. Not in files of 0.3."""
    surprise: Table
    """`LEVELS` quantiles of the bits per token, `(5, N)`, or `(5, 1)` over all positions, of the half for fitting."""
    error: Table
    """Mean |x - decode(encode(x))| per pixel, from 0 to 2, `(h, w)`, of the half for fitting; downsampled for large
    images."""
    maps: MapReference | None = None
    """NormalStatistics for the method `hidden` and for maps; None, and not in the file, without them."""
    digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = Field(max_length=MAX_IMAGES)
    """Digests of the images in both halves; see `digest_of`."""
    object_digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] | None = Field(None, max_length=MAX_IMAGES)
    """Digests of the names of the objects, see `digest_of_name`; not in files of 0.3."""

    @model_validator(mode="after")
    def _tables_fit(self) -> Calibration:
        if len(self.surprise) != len(LEVELS):
            raise FieldError("surprise", f"should have {len(LEVELS)} rows")
        if (self.error < 0).any():
            raise FieldError("error", "should not be negative")
        if (self.tile is None) != (self.stride is None):
            raise FieldError("stride", "should be given with tile, and only with it")
        if (self.fitted is None) == (self.folds is None):
            raise FieldError("fitted", "should be given without folds, and only without")
        if self.folds and self.confidence is not None:
            raise FieldError("confidence", "should be null with folds")
        for name, normal in self.scores.items():
            if (normal.threshold is None) == (self.folds is None):
                raise FieldError(f"scores.{name}.threshold", "should be a number without folds, else null")
        folds = self.folds or []
        for number, fold in enumerate(folds):
            if fold.scores.keys() != self.scores.keys() or (fold.maps is None) != (folds[0].maps is None):
                raise FieldError(f"folds.{number}", "should have the same scores and maps as the others")
        return self

    def __repr__(self) -> str:
        of = "" if self.objects is None else f" of {self.objects} objects"
        return f"Calibration({self.count} images{of}, {', '.join(self.scores)}; {self.promise})"

    def check_given(self, given: Collection[str]) -> None:
        """Raise `CalibrationError` unless these `terms` of what is given were those of the calibration."""
        then = {*self.columns, *([LABEL] if self.labels else []), *self.mixture}
        if then != set(given):
            key = "condition" if {*then, *given} - {LABEL} else "labels"
            key = "marginal" if any(term.startswith("marginal=") for term in then ^ {*given}) else key
            before, now = (", ".join(sorted(names)) or "nothing" for names in (then, given))
            raise CalibrationError(
                f"{key}: calibrated with {before} given, but now with {now}, so scores are not comparable"
            )

    @property
    def mixture(self) -> list[str]:
        """The term of `marginal`, as in `Given.terms`."""
        return [] if self.marginal is None else [f"marginal={self.marginal}"]

    def check_view(self, view: View) -> None:
        """Raise `CalibrationError` unless images are seen as in the calibration."""
        now = None if view.stride is None else ([*view.size], view.stride[0])
        then = None if self.tile is None else (self.tile, self.stride)
        if now != then:
            before, after = (
                "whole images" if each is None else f"tiles of {' x '.join(map(str, each[0]))} and stride={each[1]}"
                for each in (then, now)
            )
            raise CalibrationError(
                f"stride: calibrated with {before}, but now with {after}, so scores are not comparable"
            )

    @property
    def references(self) -> list[NormalStatistics]:
        """What was fitted, and the normal scores by it: once, or without each fold."""
        if self.fitted is None:
            return self.folds or []
        scores = {name: each.values for name, each in self.scores.items()}
        return [NormalStatistics(fitted=self.fitted, maps=self.maps, scores=scores)]

    @property
    def has_maps(self) -> bool:
        """Whether there are references for maps."""
        return self.references[0].maps is not None

    @property
    def bound(self) -> float | None:
        """With folds, what is guaranteed of the share of normal images, or objects, with a p-value of at most
        `false_alarms`."""
        count = len(next(iter(self.scores.values())).values)
        return cross_bound(self.false_alarms, count, len(self.folds)) if self.folds else None

    @property
    def promise(self) -> str:
        """The guarantee, in words: of a threshold, or with folds of p-values."""
        if self.bound is not None:
            what = "images" if self.objects is None else "objects (by their most anomalous image)"
            return (
                f"about {100 * self.false_alarms:g} % of new normal {what} have p <= {self.false_alarms:g}; guaranteed "
                f"is at most {100 * self.bound:.1f} %, on average over calibrations"
            )
        how = "on average over calibrations"
        how = how if self.confidence is None else f"in {100 * self.confidence:.6g} % of calibrations"
        if self.objects is not None:
            return f"at most {100 * self.false_alarms:g} % of new normal objects have an image that exceeds it, {how}"
        return f"at most {100 * self.false_alarms:g} % of new normal images exceed it, {how}"

    def find_used(self, digests: Sequence[str], objects: Sequence[str] | None = None) -> NDArray[np.bool_]:
        """Return which images were used for the calibration, `(n,)`: by the digest of each and, with the names of the
        `objects` that they show, also those that show the object of a used image, since they are not independent."""
        known = set(self.digests)
        used = np.array([digest in known for digest in digests], bool)
        if objects is None:
            return used
        names = np.array(objects)
        calibrated = set(self.object_digests or ())
        shown = [digest_of_name(name) in calibrated for name in objects]
        return used | np.array(shown, bool) | np.isin(names, names[used])

    def to_json(self) -> str:
        """Return the text of `calibration.json`."""
        return self.model_dump_json() + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Calibration:
        """Validate the content of `path`. Raises `FormatError`, which names the file and the field."""
        return validate(cls, data, path)


def digest_of(image: NDArray[Any]) -> str:
    """Identify an image `(H, W, C)` by the first 16 digits of the sha256 of its bytes."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def digest_of_name(name: str) -> str:
    """Identify an object by the first 16 digits of the sha256 of its name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def require_calibration(calibration: Calibration | None) -> Calibration:
    """Return the calibration, or raise `CalibrationError` if there is none."""
    if calibration is None:
        raise CalibrationError(
            "the pipeline is not calibrated: run `smalti calibrate` or `pipe.calibrate(images)` with normal images"
        )
    return calibration


def digest_of_pixels(image: Tensor) -> str:
    """Identify an image `(C, H, W)`, uint8 or float, as calibrations do: as the models see it, so after `binarize`."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image.cpu())
    return digest_of(np.ascontiguousarray(pixels.movedim(0, -1).cpu().numpy()))

"""A calibration on normal images, stored in the pipeline folder as `calibration.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from prior.columns import LABEL, MAX_COLUMNS, NAME

from ..files import FieldError, validate
from ..images.views import View
from .conformal import cross_bound
from .distances import CalibrationError, Distance, Matrix, StoredObject, Vector

MAX_CALIBRATION_BYTES = 4 << 20  # large calibrations need up to 3 MB
MAX_IMAGES = 50_000  # the file stores a digest of each
MAX_FOLDS, MAX_FOLDED = 8, 10_000  # of folds, and of images with them: the file stores what was fitted without each
LEVELS = (0.9, 0.95, 0.98, 0.99, 0.995)
"""The quantiles of token surprise available to `heal`."""

ColumnName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Length = Annotated[int, Field(ge=1)]


class Fitted(StoredObject):
    """What was fitted for scores: the mean bits of an image; the distance of log bits and errors from their mean; and
    that of prior features from their nearest neighbours (None for a prior without layers)."""

    typical_bits: float
    statistics: Distance
    features: Distance | None
    names: list[str] | None = Field(None, min_length=1, max_length=16)
    """The statistics that `statistics` measures, in order; not in files of 0.3, which have all except `top_bits`."""


class NormalScores(StoredObject):
    """One method's scores of normal images that were not used for fitting. A score that exceeds a value by at most
    `tie` ties with it. With folds, there is no threshold. See `conformal`."""

    values: Vector
    tie: float = Field(ge=0)
    threshold: float | None


class MapReference(StoredObject):
    """What was fitted for maps: `codes`, the mean bits of each id while it is hidden; mean and deviation of filter
    responses, and normal ones as `points`, standardized; mean and deviation over pixels of the surprisal and of the
    distance from the points, and over images of the peak of the surprisal and of the logarithms of the largest changes
    of responses down and across."""

    codes: Vector
    response_mean: Vector
    response_deviation: Vector
    points: Matrix
    pixel_mean: Vector
    pixel_deviation: Vector
    image_mean: Vector
    image_deviation: Vector

    @model_validator(mode="after")
    def _shapes_fit(self) -> MapReference:
        for kind, size in (("response", self.points.shape[1]), ("pixel", 2), ("image", 3)):
            for name in (f"{kind}_mean", f"{kind}_deviation"):
                if len(getattr(self, name)) != size:
                    raise FieldError(name, f"should have {size} numbers")
            if (getattr(self, f"{kind}_deviation") <= 0).any():
                raise FieldError(f"{kind}_deviation", "should be positive")
        return self


class NormalStatistics(StoredObject):
    """What was fitted to some normal images, and the scores of others by it, by method."""

    fitted: Fitted
    maps: MapReference | None = None
    scores: dict[str, Vector]


class Calibration(StoredObject):
    """Calibration on held-out normal images: one half was used for fitting, the other half gave the scores; or with
    folds, each image gave a score by what was fitted to the other folds."""

    count: int = Field(ge=2)
    """Number of images in both halves."""
    objects: int | None = Field(None, ge=2)
    """Number of objects that the images show, if each object has a single score, that of its most anomalous image."""
    labels: bool
    """Whether token bits were conditioned on the images' classes."""
    columns: list[ColumnName] = Field([], max_length=MAX_COLUMNS)
    """The columns that token bits were conditioned on."""
    marginal: ColumnName | None = None
    """The column of classes over which token bits are those of a mixture."""
    tile: list[Length] | None = Field(None, min_length=2, max_length=2)
    """Height and width of the tiles of which each score is the maximum, at every `stride` pixels."""
    stride: int | None = Field(None, ge=1)
    sizes: list[Length] | None = Field(None, min_length=4, max_length=4)
    """With tiles, the smallest height and width of the images, and the largest; not in files of 0.3."""
    false_alarms: float = Field(gt=0, lt=1)
    """Share of normal images above a method's threshold."""
    confidence: float | None = Field(gt=0, lt=1)
    """Probability over calibrations that the share is at most `false_alarms`; None: on average over calibrations."""
    fitted: Fitted | None = None
    """None with folds, which have their own."""
    scores: dict[str, NormalScores] = Field(min_length=1)
    """Scores by method, of all folds; `map` is the highest value of the combined map."""
    folds: list[NormalStatistics] | None = Field(None, min_length=2, max_length=MAX_FOLDS)
    """With folds, what was fitted to the objects of all others, and the scores by it of the objects of each."""
    surprise: Matrix
    """`LEVELS` quantiles of the bits per token, `(5, N)`, or `(5, 1)` over all positions, of the half for fitting."""
    error: Matrix
    """Mean |x - decode(encode(x))| per pixel, from 0 to 2, `(h, w)`, of the half for fitting; downsampled for large
    images."""
    maps: MapReference | None = None
    """For the method `hidden` and for maps."""
    digests: list[Digest] = Field(max_length=MAX_IMAGES)
    """Digests of the images in both halves; see `digest_image`."""
    object_digests: list[Digest] | None = Field(None, max_length=MAX_IMAGES)
    """Digests of the names of the objects; not in files of 0.3."""

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

    __str__ = __repr__  # pydantic's own prints all arrays

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
        used = np.isin(digests, self.digests)
        if objects is None:
            return used
        names = np.array(objects)
        calibrated = np.isin([digest_name(name) for name in objects], self.object_digests or [])
        return used | calibrated | np.isin(names, names[used])

    def to_json(self) -> str:
        return self.model_dump_json() + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Calibration:
        """Validate the content of `path`. Raises `FormatError`, which names the file and the field."""
        return validate(cls, data, path)


def digest_image(image: NDArray[Any]) -> str:
    """Identify an image `(H, W, C)` as the models see it, so after `binarize`."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def digest_name(name: str) -> str:
    """Identify an object by its name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def require_calibration(calibration: Calibration | None) -> Calibration:
    """Return the calibration, or raise `CalibrationError` if there is none."""
    if calibration is None:
        raise CalibrationError(
            "the pipeline is not calibrated: run `smalti calibrate` or `pipe.calibrate(images)` with normal images"
        )
    return calibration

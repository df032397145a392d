"""Distances of feature vectors from normal ones: to the nearest neighbours, or to the mean."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ..files import FieldError
from .conformal import Floats

NEAREST = 5
RIDGE = 0.2
"""Fraction of the mean variance that is added to every variance, for directions that hardly vary in the fitted rows."""
USUAL = 0.99
LARGEST = sys.float_info.max


class CalibrationError(ValueError):
    """The pipeline is not calibrated for the requested score."""


def parse_array(axes: int, found: Any) -> Floats:
    if isinstance(found, np.ndarray):
        return found
    rows = found if axes == 2 and isinstance(found, list) else [found]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    even = len(lengths) == 1 and 0 not in lengths
    # Reject strings here: numpy would allocate room for the longest one in every element.
    if not even or not all(type(value) in (int, float) and abs(value) <= LARGEST for row in rows for value in row):
        raise ValueError(f"should be {'a list' if axes == 1 else 'lists of equal length'} of finite numbers")
    return np.array(found, np.float64)


to_lists = PlainSerializer(lambda numbers: numbers.tolist())
Vector = Annotated[Floats, PlainValidator(lambda found: parse_array(1, found)), to_lists]
Matrix = Annotated[Floats, PlainValidator(lambda found: parse_array(2, found)), to_lists]


class StoredObject(BaseModel):
    """An object in `calibration.json`. Fields with a default are not in the file if they are empty or None."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        required = {name for name, field in type(self).model_fields.items() if field.is_required()}
        return {name: value for name, value in handler(self).items() if name in required or value}


class Distance(StoredObject):
    """Distance of rows (n, d) to the fifth nearest of `points` (m, d), after whitening by (row - `mean`) @
    `whitener`.T. Scaled so that 99 % of normal rows are below 1."""

    mean: Vector
    whitener: Matrix
    points: Matrix

    @model_validator(mode="after")
    def _shapes_fit(self) -> Distance:
        size = len(self.mean)
        if self.whitener.shape != (size, size):
            raise FieldError("whitener", f"should be {size} x {size}, because mean has {size} numbers")
        if self.points.shape[1] != size:
            raise FieldError("points", f"should have {size} columns, because mean has {size} numbers")
        return self

    def of(self, rows: Floats) -> Floats:
        """Return the distance of each row, `(n,)`. Raises `CalibrationError` for rows of another length."""
        if rows.shape[1] != len(self.mean):
            raise CalibrationError(
                f"calibrated with {len(self.mean)} statistics or features per image, now there are {rows.shape[1]}: "
                "run `smalti calibrate` again"
            )
        return to_nearest((rows - self.mean) @ self.whitener.T, self.points)

    @classmethod
    def fit(cls, rows: Floats, neighbours: int = 0) -> Distance:
        """Fit to normal `rows`: the first `neighbours` rows become the points; with 0, the mean does (Mahalanobis
        distance). The other rows set the scale, because a row is not its own neighbour."""
        mean = rows.mean(0)
        covariance, identity = np.cov(rows.T, ddof=0).reshape(len(mean), -1), np.eye(len(mean))
        ridge = RIDGE * max(float(np.trace(covariance)) / len(mean), 1e-12)
        whitener = np.linalg.cholesky(np.linalg.inv(covariance + ridge * identity)).T
        white = (rows - mean) @ whitener.T
        points = white[:neighbours] if neighbours else np.zeros((1, len(mean)))
        usual = max(np.quantile(to_nearest(white[neighbours:], points), USUAL), 1e-9)
        return cls(
            mean=round_digits(mean), whitener=round_digits(whitener / usual), points=round_digits(points / usual)
        )


def to_nearest(rows: Floats, points: Floats) -> Floats:
    """Return the distance of each of `rows` (n, d) to the fifth nearest of `points` (m, d), or the last of fewer."""
    found = []
    for start in range(0, len(rows), 1024):  # in parts, to bound memory
        part = rows[start : start + 1024]
        squares = np.square(part).sum(1)[:, None] + np.square(points).sum(1) - 2 * part @ points.T
        nearest = min(NEAREST, len(points)) - 1
        found.append(np.sqrt(np.maximum(np.partition(squares, nearest, 1)[:, nearest], 0)))
    return np.concatenate(found)


def round_digits(values: Floats) -> Floats:
    """Round to six digits, which keeps the file small and makes it round-trip exactly."""
    return np.array([float(f"{value:.6g}") for value in values.ravel().tolist()]).reshape(values.shape)

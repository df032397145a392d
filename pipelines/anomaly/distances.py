"""How far rows of numbers are from normal ones: from the nearest of them, or from their mean."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, model_validator

from ..files import FieldError
from .conformal import Floats

NEAREST = 5
RIDGE = 0.2
"""Of the mean variance, added to all of them: what hardly varies among the rows fitted to may vary among others."""
USUAL = 0.99
LARGEST = sys.float_info.max


class CalibrationError(ValueError):
    """A score was asked for that this pipeline was not calibrated for."""


def read_numbers(axes: int, found: Any) -> Floats:
    """A list of numbers, or for two `axes` a list of such lists, as an array. Raises `ValueError`."""
    if isinstance(found, np.ndarray):
        return found
    rows = found if axes == 2 and isinstance(found, list) else [found]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    even = len(lengths) == 1 and 0 not in lengths
    # Text is refused here, as numpy would make room for the longest one in every place.
    if not even or not all(type(value) in (int, float) and abs(value) <= LARGEST for row in rows for value in row):
        raise ValueError(f"should be finite numbers along {axes} axes")
    return np.array(found, np.float64)


to_lists = PlainSerializer(lambda numbers: numbers.tolist())
Row = Annotated[Floats, PlainValidator(lambda found: read_numbers(1, found)), to_lists]
Table = Annotated[Floats, PlainValidator(lambda found: read_numbers(2, found)), to_lists]


class Part(BaseModel):
    """Base of what `calibration.json` consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Distance(Part):
    """Of rows (n, d): from the fifth nearest of `points` (m, d), after (row - `mean`) @ `whitener`.T, in which normal
    rows are white. The unit is what 99 % of normal rows are below."""

    mean: Row
    whitener: Table
    points: Table

    @model_validator(mode="after")
    def _shapes_fit(self) -> Distance:
        size = len(self.mean)
        if self.whitener.shape != (size, size):
            raise FieldError("whitener", f"should be {size} x {size}, as mean is {size}")
        if self.points.shape[1] != size:
            raise FieldError("points", f"should have {size} columns, as mean has numbers")
        return self

    def of(self, rows: Floats) -> Floats:
        """That of each row, `(n,)`. Raises `CalibrationError` for rows of another length."""
        if rows.shape[1] != len(self.mean):
            raise CalibrationError(
                f"calibrated with {len(self.mean)} statistics or features of an image, and now there are "
                f"{rows.shape[1]}: run `smalti calibrate` again"
            )
        return to_nearest((rows - self.mean) @ self.whitener.T, self.points)

    @classmethod
    def fit(cls, rows: Floats, neighbours: int = 0) -> Distance:
        """Fitted to normal `rows`: from the first of them, as many as there are to be `neighbours`, or with 0 from
        their mean (Mahalanobis). The other rows say what is usual, as a row is no neighbour of itself."""
        mean = rows.mean(0)
        covariance, identity = np.cov(rows.T, ddof=0).reshape(len(mean), -1), np.eye(len(mean))
        ridge = RIDGE * max(float(np.trace(covariance)) / len(mean), 1e-12)
        whitener = np.linalg.cholesky(np.linalg.inv(covariance + ridge * identity)).T
        white = (rows - mean) @ whitener.T
        points = white[:neighbours] if neighbours else np.zeros((1, len(mean)))
        usual = max(np.quantile(to_nearest(white[neighbours:], points), USUAL), 1e-9)
        return cls(mean=rounded(mean), whitener=rounded(whitener / usual), points=rounded(points / usual))


def to_nearest(rows: Floats, points: Floats) -> Floats:
    """How far each of `rows` (n, d) is from the fifth nearest of `points` (m, d), or the farthest of fewer, `(n,)`."""
    found = []
    for start in range(0, len(rows), 1024):  # the table of all distances would be large
        part = rows[start : start + 1024]
        squares = np.square(part).sum(1)[:, None] + np.square(points).sum(1) - 2 * part @ points.T
        nearest = min(NEAREST, len(points)) - 1
        found.append(np.sqrt(np.maximum(np.partition(squares, nearest, 1)[:, nearest], 0)))
    return np.concatenate(found)


def rounded(values: Floats) -> Floats:
    """To six digits, so that the file is small, and what is read from it is what was written."""
    return np.array([float(f"{value:.6g}") for value in values.ravel().tolist()]).reshape(values.shape)

"""How far rows of numbers are from normal ones, fitted to these: a Gaussian, and nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import PlainValidator

from ..files import FieldError
from .conformal import Floats

NEAREST = 5
KEPT_AXES = 64
"""How many principal axes of features are kept."""
NO_SPREAD = 1e-5
"""Of the largest deviation: along an axis of less, rows differ by rounding."""


def numbers_along(axes: int, found: Any) -> Floats:
    """A list of numbers, or for two `axes` a list of such lists, as an array. Raises `ValueError`."""
    if isinstance(found, np.ndarray):
        return found
    rows = found if axes == 2 and isinstance(found, list) else [found]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    even = len(lengths) == 1 and 0 not in lengths
    # Text is refused here, as numpy would make room for the longest one in every place.
    if not even or not all(type(value) in (int, float) for row in rows for value in row):
        raise ValueError(f"should be numbers along {axes} axes")
    return np.array(found, np.float64)


Row = Annotated[Floats, PlainValidator(lambda found: numbers_along(1, found))]
Table = Annotated[Floats, PlainValidator(lambda found: numbers_along(2, found))]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`mean` (d,), and `whitener` (d, d), which makes rows of this distribution white."""

    mean: Row
    whitener: Table

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.whitener.shape != (size, size):
            raise FieldError("whitener", f"should be {size} x {size}, as mean is {size}")

    def distance(self, rows: Floats) -> Floats:
        """The squared Mahalanobis distance of each of `rows` (n, d) from the mean, `(n,)`."""
        return np.square((rows - self.mean) @ self.whitener.T).sum(1)

    @classmethod
    def fit(cls, rows: Floats) -> Gaussian:
        """Of `rows` (n, d): the covariance of standardised columns is shrunk towards 1 as far as Ledoit and Wolf (2004)
        find best. A column that does not vary gets a deviation of 1e-6 of its size, so that a value that stands out is
        far away, but finitely."""
        mean = rows.mean(0)
        scale = np.maximum(rows.std(0), 1e-6 * (1 + np.abs(mean)))
        values, axes = np.linalg.eigh(shrunk_covariance((rows - mean) / scale))
        whitener = (axes / np.sqrt(np.maximum(values, 1e-6))).T / scale
        return cls(rounded(mean), rounded(whitener))


def shrunk_covariance(rows: Floats) -> Floats:
    """Covariance (d, d) of centred `rows` (n, d) after Ledoit and Wolf: (1 - a) S + a tr(S) / d I, with the `a` of the
    least expected squared error."""
    count, size = rows.shape
    covariance = rows.T @ rows / count
    level = np.trace(covariance) / size
    distance = np.square(covariance - level * np.eye(size)).sum()
    noise = (np.square(rows).T @ np.square(rows) / count - np.square(covariance)).sum() / count
    share = min(1.0, noise / distance) if distance > 0 else 1.0
    return (1 - share) * covariance + share * level * np.eye(size)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Features of normal images, whitened: `points` (m, k) are (features - `mean` (d,)) @ `axes` (k, d).T."""

    mean: Row
    axes: Table
    points: Table

    def __post_init__(self) -> None:
        if self.axes.shape[1] != len(self.mean):
            raise FieldError("axes", f"should have {len(self.mean)} columns, as mean has numbers")
        if self.points.shape[1] != len(self.axes):
            raise FieldError("points", f"should have {len(self.axes)} columns, one per axis")

    def distance(self, rows: Floats) -> Floats:
        """How far each of `rows` (n, d) is from the fifth nearest point, `(n,)`."""
        found = []
        for start in range(0, len(rows), 1024):  # the table of all distances would be large
            away = (rows[start : start + 1024] - self.mean) @ self.axes.T
            squares = np.square(away).sum(1)[:, None] + np.square(self.points).sum(1) - 2 * away @ self.points.T
            nearest = min(NEAREST, len(self.points)) - 1
            found.append(np.sqrt(np.maximum(np.partition(squares, nearest, 1)[:, nearest], 0)))
        return np.concatenate(found)

    @classmethod
    def fit(cls, rows: Floats) -> Neighbours:
        """Of `rows` (n, d): the axes are their principal ones, those of little variance held back from counting as much
        as the others. Those of none are kept only if all are: some of them alone would be chosen by rounding."""
        mean = rows.mean(0)
        _, scales, axes = np.linalg.svd(rows - mean, full_matrices=False)
        count = min(KEPT_AXES, len(axes))
        if count < rows.shape[1]:
            count = max(1, int((scales[:count] > NO_SPREAD * scales[0]).sum()))
        variances, axes = np.square(scales[:count]) / len(rows), axes[:count]
        axes = axes / np.sqrt(variances + 0.01 * variances.max() + 1e-12)[:, None]
        mean, axes = rounded(mean), rounded(axes)
        return cls(mean, axes, rounded((rows - mean) @ axes.T))


def rounded(values: Floats) -> Floats:
    """To six digits, so that the file is small, and what is read from it is what was written."""
    return np.array([float(f"{value:.6g}") for value in values.ravel().tolist()]).reshape(values.shape)

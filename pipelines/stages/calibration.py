"""What `smalti calibrate` learned of normal images, kept in the pipeline as `calibration.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.files.errors import FormatError

from .conformal import Floats, tie_of_six_digits

Digests = NDArray[np.uint64]
MAX_CALIBRATION_BYTES = 4 << 20
"""Of the file: with as much as is kept of large calibrations, it has up to 2.5 MB."""
MOST_IMAGES = 50_000
"""How many images a pipeline is calibrated with at most, as the digest of each is kept."""
LATER = ("confidence", "ties", "digests")
"""The fields that files did not have at first."""
LEVELS = (0.9, 0.95, 0.98, 0.99, 0.995)
"""The quantiles of token surprise that are kept, from which `heal` chooses."""
NEAREST = 5
KEPT_AXES = 64
"""How many principal axes of features are kept."""


class CalibrationError(ValueError):
    """A score was asked for that this pipeline was not calibrated for."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`mean` (d,), and `whitener` (d, d), which makes rows of this distribution white."""

    mean: Floats
    whitener: Floats

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

    mean: Floats
    axes: Floats
    points: Floats

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
        as the others."""
        mean = rows.mean(0)
        _, scales, axes = np.linalg.svd(rows - mean, full_matrices=False)
        variances, axes = np.square(scales[:KEPT_AXES]) / len(rows), axes[:KEPT_AXES]
        axes = axes / np.sqrt(variances + 0.01 * variances.max() + 1e-12)[:, None]
        mean, axes = rounded(mean), rounded(axes)
        return cls(mean, axes, rounded((rows - mean) @ axes.T))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of held-out normal images. One half of them was fitted to, the other half gave the scores."""

    count: int
    """Images of both halves."""
    data: str
    """sha256 of their pixels."""
    labels: bool
    """Whether token bits were those given the images' classes."""
    false_alarms: float
    """The share of normal images above a method's threshold."""
    confidence: float | None
    """With what probability over calibrations it is at most that share; None: it is so on average over them."""
    statistics: list[str]
    """The columns of `mahalanobis`."""
    typical_bits: float
    """Mean bits of an image."""
    mahalanobis: Gaussian
    """Of the logarithms of the statistics."""
    neighbours: Neighbours | None
    """Features of the prior; None for a prior without layers."""
    usual: dict[str, float]
    """What 99 % of the images fitted to are below, in distances from both."""
    scores: dict[str, Floats]
    """Of each method, ascending."""
    ties: dict[str, float]
    """How far above one of these a score still ties with it; see `conformal.kept`."""
    thresholds: dict[str, float]
    surprise: Floats
    """`LEVELS` quantiles of the bits of a token, `(5, N)`, or `(5, 1)` for all positions together."""
    error: Floats
    """Mean |x - decode(encode(x))| per pixel, on a scale of 0 to 2, `(h, w)`: coarser than large images."""
    digests: Digests | None
    """Of the images of both halves, see `digests_of`; None if the calibration is older than these."""

    @property
    def promise(self) -> str:
        """What the thresholds are for."""
        how = "on average over calibrations"
        how = how if self.confidence is None else f"in {self.confidence:.6g} of calibrations"
        return f"at most {self.false_alarms:g} of new normal images are above, {how}"

    def includes(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of the images `(n, H, W, C)` it was fitted to or took scores from, as far as is known, `(n,)`."""
        known = np.empty(0, np.uint64) if self.digests is None else self.digests
        return np.isin(digests_of(pixels), known)

    def to_dict(self) -> dict[str, Any]:
        """As `calibration.json` holds it."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """The text of `calibration.json`: a field a line, as a number a line would make it half as large again."""
        fields = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in self.to_dict().items())
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Calibration:
        """Checked. Raises `FormatError` naming the file and the field."""
        older = not set(LATER) & set(data)
        data = {**dict.fromkeys(LATER), **data} if older else data
        read = Reader(data, path)
        read.fields({field.name for field in dataclasses.fields(cls)})
        names = read.names("statistics")
        scores = {name: read.array(f"scores.{name}", 1) for name in read.mapping("scores")}
        for name, values in scores.items():
            read.check(bool((np.diff(values) >= 0).all()), f"scores.{name}", "should ascend")
        read.check(bool(scores), "scores", "is empty")
        thresholds = read.numbers("thresholds", set(scores))
        if older:  # rounded to six digits, perhaps downwards
            ties = {name: tie_of_six_digits(values) for name, values in scores.items()}
            thresholds = {name: value + ties[name] for name, value in thresholds.items()}
        else:
            ties = read.numbers("ties", set(scores))
        read.check(min(ties.values()) >= 0, "ties", "should not be negative")
        gaussian = read.gaussian("mahalanobis")
        numbers = f"should hold {len(names)} numbers, one per statistic"
        read.check(len(gaussian.mean) == len(names), "mahalanobis.mean", numbers)
        surprise, error = read.array("surprise", 2), read.array("error", 2)
        read.check(len(surprise) == len(LEVELS), "surprise", f"should have {len(LEVELS)} rows")
        read.check(bool((error >= 0).all()), "error", "should not be negative")
        neighbours = None if data["neighbours"] is None else read.neighbours("neighbours")
        usual = {name: read.number(f"usual.{name}") for name in read.mapping("usual")}
        expected = {"mahalanobis"} | ({"neighbours"} if neighbours is not None else set())
        read.check(
            set(usual) == expected and min(usual.values()) > 0,
            "usual",
            f"should be positive numbers for {', '.join(sorted(expected))}",
        )
        count, share = read.number("count"), read.number("false_alarms")
        read.check(type(data["count"]) is int and count >= 2, "count", "should be a whole number of at least 2")
        read.check(0 < share < 1, "false_alarms", "should lie between 0 and 1")
        confidence = None if data["confidence"] is None else read.number("confidence")
        read.check(confidence is None or 0 < confidence < 1, "confidence", "should be null, or lie between 0 and 1")
        read.check(type(data["labels"]) is bool, "labels", "should be true or false")
        digest = data["data"]
        read.check(isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest)), "data", "is no sha256")
        return cls(
            count=int(count),
            data=digest,
            labels=data["labels"],
            false_alarms=share,
            confidence=confidence,
            statistics=names,
            typical_bits=read.number("typical_bits"),
            mahalanobis=gaussian,
            neighbours=neighbours,
            usual=usual,
            scores=scores,
            ties=ties,
            thresholds=thresholds,
            surprise=surprise,
            error=error,
            digests=None if data["digests"] is None else read.digests("digests"),
        )


def digests_of(pixels: NDArray[np.uint8]) -> Digests:
    """What tells the images `(n, H, W, C)` apart: the first 8 bytes of each one's sha256, `(n,)`."""
    digests = (hashlib.sha256(image.tobytes()).digest()[:8] for image in pixels)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def rounded(values: Floats) -> Floats:
    """To six digits, so that the file is small, and what is read from it is what was written."""
    return np.array([float(f"{value:.6g}") for value in values.ravel().tolist()]).reshape(values.shape)


def plain(value: Any) -> Any:
    """Arrays as lists, digests as one hexadecimal string, what holds arrays as a mapping."""
    if isinstance(value, (Gaussian, Neighbours)):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == np.uint64:
        return value.astype(">u8").tobytes().hex()
    return value.tolist() if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class Reader:
    """Reads `data`, the object in the file `path`, by dotted names of fields; what is wrong is a `FormatError`."""

    data: dict[str, Any]
    path: Path

    def check(self, holds: bool, name: str, problem: str) -> None:
        if not holds:
            raise FormatError(f"{self.path}: {name}: {problem}")

    def fields(self, expected: set[str]) -> None:
        for name in sorted(expected ^ set(self.data)):
            self.check(False, name, "missing" if name in expected else "no such field")

    def get(self, name: str) -> Any:
        value: Any = self.data
        for part in name.split("."):
            self.check(isinstance(value, dict) and part in value, name, "missing")
            value = value[part]
        return value

    def mapping(self, name: str) -> list[str]:
        value = self.get(name)
        self.check(isinstance(value, dict), name, "should be a mapping")
        return list(value)

    def names(self, name: str) -> list[str]:
        value = self.get(name)
        right = isinstance(value, list) and all(isinstance(item, str) for item in value)
        self.check(right, name, "should be a list of names")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        self.check(type(value) in (int, float) and bool(np.isfinite(value)), name, "should be a number")
        return float(value)

    def numbers(self, name: str, keys: set[str]) -> dict[str, float]:
        """One per method."""
        found = {key: self.number(f"{name}.{key}") for key in self.mapping(name)}
        self.check(set(found) == keys, name, "should be of the same methods as scores")
        return found

    def digests(self, name: str) -> Digests:
        value = self.get(name)
        right = isinstance(value, str) and len(value) % 16 == 0 and bool(re.fullmatch("[0-9a-f]+", value))
        self.check(right, name, "should be null, or 16 hexadecimal digits for each image")
        self.check(len(value) <= 16 * MOST_IMAGES, name, f"should be of at most {MOST_IMAGES:,} images")
        return np.frombuffer(bytes.fromhex(value), ">u8").astype(np.uint64)

    def array(self, name: str, axes: int) -> Floats:
        found = self.get(name)
        rows = found if axes == 2 and isinstance(found, list) else [found]
        lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
        right = (
            len(lengths) == 1
            and 0 not in lengths
            and all(type(number) in (int, float) for row in rows for number in row)
        )
        self.check(right, name, f"should be numbers along {axes} axes")  # numpy would make room for any text
        return np.array(found, np.float64)

    def gaussian(self, name: str) -> Gaussian:
        mean, whitener = self.array(f"{name}.mean", 1), self.array(f"{name}.whitener", 2)
        size = len(mean)
        self.check(whitener.shape == (size, size), f"{name}.whitener", f"should be {size} x {size}, as mean is {size}")
        return Gaussian(mean, whitener)

    def neighbours(self, name: str) -> Neighbours:
        mean, axes, points = (self.array(f"{name}.{part}", 1 + (part != "mean")) for part in ("mean", "axes", "points"))
        self.check(axes.shape[1] == len(mean), f"{name}.axes", f"should have {len(mean)} columns, as mean has numbers")
        self.check(points.shape[1] == len(axes), f"{name}.points", f"should have {len(axes)} columns, one per axis")
        return Neighbours(mean, axes, points)

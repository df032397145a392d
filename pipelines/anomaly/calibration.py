"""What `smalti calibrate` learned of normal images, kept in the pipeline as `calibration.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, PlainValidator

from tokenizer.files import one_line

from ..files import Bool, FieldError, Number, Text, Whole, validate
from .distances import Gaussian, Neighbours, Row, Table

MAX_CALIBRATION_BYTES = 4 << 20
"""Of the file: with as much as is kept of large calibrations, it has up to 2.5 MB."""
MOST_IMAGES = 50_000
"""How many images a pipeline is calibrated with at most, as the digest of each is kept."""
LEVELS = (0.9, 0.95, 0.98, 0.99, 0.995)
"""The quantiles of token surprise that are kept, from which `heal` chooses."""


class CalibrationError(ValueError):
    """A score was asked for that this pipeline was not calibrated for."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))  # which may quote what a file holds


def read_digests(found: Any) -> NDArray[np.uint64]:
    """Digests from one hexadecimal string. Raises `ValueError`."""
    if isinstance(found, np.ndarray):
        return found
    if not isinstance(found, str) or len(found) % 16 or not re.fullmatch("[0-9a-f]+", found):
        raise ValueError("should be 16 hexadecimal digits for each image")
    if len(found) > 16 * MOST_IMAGES:
        raise ValueError(f"should be of at most {MOST_IMAGES:,} images")
    return np.frombuffer(bytes.fromhex(found), ">u8").astype(np.uint64)


Digests = Annotated[NDArray[np.uint64], PlainValidator(read_digests)]


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What is known of held-out normal images. One half of them was fitted to, the other half gave the scores. Raises
    `FieldError` if its fields do not go together."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    count: Whole
    """Images of both halves."""
    data: Text
    """sha256 of their pixels."""
    labels: Bool
    """Whether token bits were those given the images' classes."""
    false_alarms: Number
    """The share of normal images above a method's threshold."""
    confidence: Number | None
    """With what probability over calibrations it is at most that share; None: it is so on average over them."""
    statistics: list[Text]
    """The columns of `mahalanobis`."""
    typical_bits: Number
    """Mean bits of an image."""
    mahalanobis: Gaussian
    """Of the logarithms of the statistics."""
    neighbours: Neighbours | None
    """Features of the prior; None for a prior without layers."""
    usual: dict[Text, Number]
    """What 99 % of the images fitted to are below, in distances from both."""
    scores: dict[Text, Row]
    """Of each method, ascending."""
    ties: dict[Text, Number]
    """How far above one of these a score still ties with it; see `conformal.kept`."""
    thresholds: dict[Text, Number]
    surprise: Table
    """`LEVELS` quantiles of the bits of a token, `(5, N)`, or `(5, 1)` for all positions together."""
    error: Table
    """Mean |x - decode(encode(x))| per pixel, on a scale of 0 to 2, `(h, w)`: coarser than large images."""
    digests: Digests
    """Of the images of both halves, see `digests_of`."""

    def __repr__(self) -> str:
        return f"Calibration({self.count} images, {', '.join(self.scores)}; {self.promise})"

    @property
    def promise(self) -> str:
        """What the thresholds are for."""
        how = "on average over calibrations"
        how = how if self.confidence is None else f"in {self.confidence:.6g} of calibrations"
        return f"at most {self.false_alarms:g} of new normal images are above, {how}"

    def includes(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of the images `(n, H, W, C)` it was fitted to or took scores from, `(n,)`."""
        return np.isin(digests_of(pixels), self.digests)

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
        return validate(cls, data, path)

    def __post_init__(self) -> None:
        def check(holds: bool, field: str, problem: str) -> None:
            if not holds:
                raise FieldError(field, problem)

        check(self.count >= 2, "count", "should be a whole number of at least 2")
        check(bool(re.fullmatch("[0-9a-f]{64}", self.data)), "data", "is no sha256")
        check(0 < self.false_alarms < 1, "false_alarms", "should lie between 0 and 1")
        possible = self.confidence is None or 0 < self.confidence < 1
        check(possible, "confidence", "should be null, or lie between 0 and 1")
        count = len(self.statistics)
        check(
            len(self.mahalanobis.mean) == count, "mahalanobis.mean", f"should hold {count} numbers, one per statistic"
        )
        expected = {"mahalanobis"} | ({"neighbours"} if self.neighbours is not None else set())
        usual = set(self.usual) == expected and min(self.usual.values()) > 0
        check(usual, "usual", f"should be positive numbers for {', '.join(sorted(expected))}")
        check(bool(self.scores), "scores", "is empty")
        for name, values in self.scores.items():
            check(bool((np.diff(values) >= 0).all()), f"scores.{name}", "should ascend")
        for field, found in (("ties", self.ties), ("thresholds", self.thresholds)):
            check(set(found) == set(self.scores), field, "should be of the same methods as scores")
        check(min(self.ties.values()) >= 0, "ties", "should not be negative")
        check(len(self.surprise) == len(LEVELS), "surprise", f"should have {len(LEVELS)} rows")
        check(bool((self.error >= 0).all()), "error", "should not be negative")


def digests_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """What tells the images `(n, H, W, C)` apart: the first 8 bytes of each one's sha256, `(n,)`."""
    digests = (hashlib.sha256(image.tobytes()).digest()[:8] for image in pixels)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def plain(value: Any) -> Any:
    """Arrays as lists, digests as one hexadecimal string, what holds arrays as a mapping."""
    if isinstance(value, (Gaussian, Neighbours)):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == np.uint64:
        return value.astype(">u8").tobytes().hex()
    return value.tolist() if isinstance(value, np.ndarray) else value

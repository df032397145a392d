"""What `smalti calibrate` learned of normal images, saved in the pipeline as `calibration.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..files import FieldError, validate
from .distances import CalibrationError, Distance, Part, Row, Table

MAX_CALIBRATION_BYTES = 4 << 20
"""Of the file: that of a large calibration has up to 3 MB."""
MAX_IMAGES = 50_000
"""How many images a pipeline is calibrated with at most, as the file has a digest of each."""
LEVELS = (0.9, 0.95, 0.98, 0.99, 0.995)
"""The quantiles of token surprise from which `heal` chooses."""


class Fitted(Part):
    """What scores are measured against. `statistics` takes the logarithms of bits and errors, and measures from their
    mean; `features`, those of the prior, from the nearest; None for a prior without layers."""

    typical_bits: float
    """Mean bits of an image."""
    statistics: Distance
    features: Distance | None


class NormalScores(Part):
    """Of normal images that nothing was fitted to, by one method; see `conformal`."""

    values: Row
    tie: float = Field(ge=0)
    """How far above one of these a score still ties with it."""
    threshold: float


class Calibration(Part):
    """What is known of held-out normal images. One half of them was fitted to, the other half gave the scores."""

    count: int = Field(ge=2)
    """Images of both halves."""
    labels: bool
    """Whether token bits were those given the images' classes."""
    false_alarms: float = Field(gt=0, lt=1)
    """The share of normal images above a method's threshold."""
    confidence: float | None = Field(gt=0, lt=1)
    """With what probability over calibrations it is at most that share; None: it is so on average over them."""
    fitted: Fitted
    scores: dict[str, NormalScores] = Field(min_length=1)
    """By method."""
    surprise: Table
    """`LEVELS` quantiles of the bits of a token, `(5, N)`, or `(5, 1)` for all positions together."""
    error: Table
    """Mean |x - decode(encode(x))| per pixel, on a scale of 0 to 2, `(h, w)`: coarser than large images."""
    digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = Field(max_length=MAX_IMAGES)
    """Of the images of both halves, see `digest_of`."""

    @model_validator(mode="after")
    def _tables_fit(self) -> Calibration:
        if len(self.surprise) != len(LEVELS):
            raise FieldError("surprise", f"should have {len(LEVELS)} rows")
        if (self.error < 0).any():
            raise FieldError("error", "should not be negative")
        return self

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
        digests = set(self.digests)
        return np.array([digest_of(image) in digests for image in pixels], bool)

    def to_json(self) -> str:
        """The text of `calibration.json`."""
        return self.model_dump_json() + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Calibration:
        """Checked. Raises `FormatError` that names the file and the field."""
        return validate(cls, data, path)


def digest_of(image: NDArray[np.uint8]) -> str:
    """What tells an image `(H, W, C)` from others: the first 16 digits of the sha256 of its bytes."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def require_calibration(calibration: Calibration | None) -> Calibration:
    """The calibration, or `CalibrationError` that says how to get one."""
    if calibration is None:
        raise CalibrationError(
            "the pipeline is not calibrated: `smalti calibrate`, or `calibrate(images)`, fits it to normal images"
        )
    return calibration

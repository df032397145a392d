"""Fit anomaly scores to held-out normal images, and keep what was learned in the pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tokenizer.ownership import require_ours

from .anomaly import METHODS, calibrate
from .calibration import Calibration
from .config import Config, UserError, run_command
from .evaluate import choose_device, defaults
from .generation import ImagePipeline
from .images import DataConfig, check_shape, load_images
from .index import PIPELINE


class CalibrateConfig(Config):
    """What is normal, and how often it may be called an anomaly."""

    pipeline: str = Field(description="pipeline folder; calibration.json is written into it")
    data: DataConfig = Field(
        DataConfig(), description="normal images, of which the held-out split is used; defaults to those trained on"
    )
    background: str | None = Field(
        None, description="another pipeline folder, over the same tokens, whose prior becomes the background prior"
    )
    false_alarms: float = Field(0.05, gt=0, lt=1, description="share of normal images that may be flagged")
    seed: int = Field(0, ge=0, description="chooses the half that is fitted to; the other half gives the scores")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: CalibrateConfig) -> Calibration:
    """Calibrate, save, and print a table; returns the calibration."""
    if not Path(config.pipeline).is_dir():
        raise UserError(f"pipeline: {config.pipeline!r} is not a folder, and the calibration is written into it")
    require_ours(Path(config.pipeline), PIPELINE)
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if config.background is not None:
        pipeline.set_background(ImagePipeline.from_pretrained(config.background, device=pipeline.device).prior)
    images = load_images(config.data).held_out
    pixels = images.pixels(np.arange(len(images)))
    try:
        calibration = calibrate(pipeline, pixels, false_alarms=config.false_alarms, seed=config.seed)
    except ValueError as error:
        raise UserError(f"data: {error}") from error
    pipeline.to(device="cpu").save_pretrained(config.pipeline)
    print(table(calibration))
    print(f"\n{config.pipeline}: calibrated with {calibration.count:,} images of {config.data.source}")
    return calibration


def table(calibration: Calibration) -> str:
    """Median and threshold of each method."""
    rows = [("score", "median", f"threshold ({calibration.false_alarms:g} above)", "")]
    for method, scores in calibration.scores.items():
        threshold = calibration.thresholds[method]
        rows.append((method, f"{np.median(scores):.4g}", f"{threshold:.4g}", METHODS.get(method, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{name:<{widths[0]}}  {median:>{widths[1]}}  {limit:>{widths[2]}}  {what}".rstrip()
                     for name, median, limit, what in rows)  # fmt: skip


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(CalibrateConfig, run, argv, verb="calibrate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()

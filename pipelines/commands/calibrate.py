"""Calibrate anomaly scores on held-out normal images, and save the calibration in the pipeline folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tokenizer.files import require_replaceable

from ..anomaly.calibrating import calibrate, check_promise, least_false_alarms, least_units
from ..anomaly.calibration import MAX_FOLDED, MAX_FOLDS, MAX_IMAGES, Calibration
from ..anomaly.scores import METHODS, NEEDS
from ..condition_keys import ScoresWithCondition
from ..config import RunSubfolder, UserError, run_command, user_errors
from ..config.table import count_of, table
from ..files import lock_output
from ..image_pipeline import ImagePipeline
from ..provenance import defaults
from ..saving import INDEX, PIPELINE, save_again


class CalibrateConfig(ScoresWithCondition):
    examples = ("pipeline=runs/gpt_digits/pipeline",)

    every: int = Field(
        2, ge=1, description="use every n-th held-out image (or object), and leave the others to `smalti detect`"
    )
    background: Annotated[str | None, RunSubfolder("pipeline", INDEX)] = Field(
        None, description="folder of another pipeline over the same tokens, whose prior becomes the background prior"
    )
    false_alarms: float = Field(
        0.05, gt=0, lt=1, description="share of new normal images that may be flagged, on average"
    )
    confidence: float | None = Field(
        None, gt=0, lt=1, description="probability that at most this share is flagged, instead of on average: 0.9"
    )
    folds: int = Field(
        1,
        ge=1,
        le=MAX_FOLDS,
        description="1: half of the images fit the score, the others set the threshold, with the guarantee of "
        "`false_alarms`. 5: for few images, all do both; the rate varies less, but less is guaranteed",
    )
    seed: int = Field(0, ge=0, description="seed of the split of the images into halves or folds")


def run(config: CalibrateConfig) -> Calibration:
    """Calibrate, save the result, print a table, and return the calibration."""
    folder = Path(config.pipeline)
    if not folder.is_dir():
        raise UserError(f"pipeline: {config.pipeline!r} is not a folder, in which the calibration could be saved")
    require_replaceable(folder, PIPELINE)
    with lock_output(folder, key="pipeline"):
        pipeline = config.load_pipeline()
        if config.background is not None:
            pipeline.set_background(ImagePipeline.from_pretrained(config.background, device=pipeline.device).prior)
        if config.data.crop is not None and not config.tile:
            raise UserError("tile: the pipeline was trained on crops; tile=true scores whole images by their tiles")
        view = config.choose_view(pipeline.spec)
        images = config.load_images(pipeline, whole=config.tile).held_out
        chosen, units, groups, objects = np.arange(0, len(images), config.every), len(images), None, None
        if (names := images.objects()) is not None:
            every = np.unique(names)
            chosen, units = np.flatnonzero(np.isin(names, every[:: config.every])), len(every)
            groups, objects = [names[row] for row in chosen], len(every[:: config.every])
        try:
            check_promise(len(chosen), config.false_alarms, config.confidence, objects, config.folds)
        except ValueError as error:
            if config.folds > 1 and config.confidence is not None:
                raise UserError(str(error)) from error
            most = MAX_IMAGES if config.folds == 1 else MAX_FOLDED
            fewer = f"every={1 + (len(images) - 1) // most} selects fewer"
            raise UserError(f"data: {error}; {fewer if len(chosen) > most else find_remedy(config, units)}") from error
        given = config.read_given(pipeline, images.names(chosen))
        with user_errors(ValueError, prefix="data: "):
            pixels = config.read_pixels(pipeline, images, chosen)
            calibration = calibrate(
                pipeline,
                pixels,
                condition=given,
                groups=groups,
                stride=None if view.stride is None else view.stride[0],
                false_alarms=config.false_alarms,
                confidence=config.confidence,
                folds=config.folds,
                seed=config.seed,
            )
        if not config.tile:
            pipeline.measure_code_distance(pixels)
        save_again(pipeline, folder)
    print(format_calibration(calibration))
    used = f"{len(chosen):,} of {count_of(len(images), 'image')}"
    of = "" if objects is None else f", which show {count_of(objects, 'object')}: one score an object, the highest"
    print(f"\n{config.pipeline}: calibrated with {used} of {config.data.source}{of}")
    return calibration


def find_remedy(config: CalibrateConfig, units: int) -> str:
    """Return which settings would do where there are too few images. units: number of all images, or objects."""
    other = "data.source=FOLDER uses other images"
    least = least_units(config.false_alarms, config.confidence, config.folds)
    for step in range(config.every - 1, 0, -1):
        if -(-units // step) >= least:
            return f"every={step} is enough"
    rate = least_false_alarms(units, config.confidence, config.folds)
    if rate is None:
        return other if config.every == 1 else f"every=1 uses all {units:,}; {other}"
    every = "every=1 " if config.every > 1 else ""
    return f"{every}false_alarms={rate:g} can be promised, or {other}"


def format_calibration(calibration: Calibration) -> str:
    """Format the median and threshold of each method, the guarantee, and the methods left out."""
    rows = [("score", "median", "threshold", "")]
    for method, normal in calibration.scores.items():
        median = float(np.median(normal.values))
        limit = "-" if normal.threshold is None else f"{normal.threshold:.4g}"
        what = METHODS.get(method, "the highest value of the combined map, for regions")
        rows.append((method, f"{median:.4g}", limit, what))
    promise = f"{'p-values' if calibration.folds else 'thresholds'}: {calibration.promise}"
    lines = [table(rows, right=[1, 2]), "", promise]
    if calibration.tile is not None:
        tiles = " x ".join(map(str, calibration.tile))
        whole = " (hidden, map: of the map of all tiles)" if calibration.has_maps else ""
        lines.append(
            f"an image's score is the maximum over its tiles of {tiles}, every {calibration.stride} pixels{whole}"
        )
    lines += [f"left out: {name} (needs {what})" for name, what in NEEDS.items() if name not in calibration.scores]
    if calibration.folds and calibration.has_maps:
        lines.append(f"left out: thresholds of regions (they need folds=1, not folds={len(calibration.folds)})")
    return "\n".join(lines)


main = partial(run_command, CalibrateConfig, run, verb="calibrate", description=__doc__, defaults=defaults)

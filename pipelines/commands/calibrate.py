"""Calibrate anomaly scores, or what is inferred of a column, on held-out images; save that in the pipeline folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from prior.columns import LABEL, find_column
from prior.given import Given
from tokenizer.files import require_replaceable

from ..anomaly.calibrating import calibrate, check_promise, least_false_alarms, least_units
from ..anomaly.calibration import MAX_FOLDED, MAX_FOLDS, MAX_IMAGES, Calibration
from ..anomaly.scores import METHODS, NEEDS
from ..condition_keys import ScoresWithCondition
from ..config import RunSubfolder, UserError, run_command, user_errors
from ..config.table import count_of, table
from ..evaluate import are_same_images, check_classes, load_training_tokens, require_rows
from ..files import lock_output
from ..image_pipeline import ImagePipeline
from ..images import ImageDataset
from ..inference.scales import ColumnFit
from ..provenance import defaults
from ..saving import INDEX, PIPELINE, save_again
from ..tokens import TokenSplit


class CalibrateConfig(ScoresWithCondition):
    examples = ("pipeline=runs/gpt_digits/pipeline", "pipeline=runs/gpt_digits/pipeline column=label")

    often = "pipeline every false_alarms confidence folds column given condition.NAME marginal tile data.source device"

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
    column: str | None = Field(
        None, description="calibrate `smalti infer column=NAME` instead, by the values of held-out images"
    )
    given: list[str] = Field([], description="for `column`: other columns whose values `infer` will be given")
    tokens: str | None = Field(
        None, description="for `column`: the token dataset with these values; default: that of the prior"
    )


def run(config: CalibrateConfig) -> Calibration | ColumnFit:
    """Calibrate, save the result, print a table, and return the calibration."""
    folder = Path(config.pipeline)
    if not folder.is_dir():
        raise UserError(f"pipeline: {config.pipeline!r} is not a folder, in which the calibration could be saved")
    require_replaceable(folder, PIPELINE)
    with lock_output(folder, key="pipeline"):
        pipeline = config.load_pipeline()
        found, text = (calibrate_scores if config.column is None else calibrate_values)(config, pipeline)
        save_again(pipeline, folder)
    print(text)
    return found


def calibrate_scores(config: CalibrateConfig, pipeline: ImagePipeline) -> tuple[Calibration, str]:
    """Calibrate anomaly scores, and return the calibration and a description. Raises `UserError`."""
    if config.given or config.tokens is not None:
        raise UserError(f"{'given' if config.given else 'tokens'}: needs column=NAME")
    if config.background is not None:
        pipeline.set_background(ImagePipeline.from_pretrained(config.background, device=pipeline.device).prior)
    if config.data.crop is not None and not config.tile:
        raise UserError("tile: the pipeline was trained on crops; tile=true scores whole images by their tiles")
    view = config.choose_view(pipeline.spec)
    images = config.load_images(pipeline, whole=config.tile).held_out
    chosen, groups, units = choose_units(images, config.every)
    objects = None if groups is None else len(set(groups))
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
    used = f"{len(chosen):,} of {count_of(len(images), 'image')}"
    of = "" if objects is None else f", which show {count_of(objects, 'object')}: one score an object, the highest"
    last = f"{config.pipeline}: calibrated with {used} of {config.data.source}{of}"
    return calibration, f"{format_calibration(calibration)}\n\n{last}"


def choose_units(images: ImageDataset, every: int) -> tuple[NDArray[np.int64], list[str] | None, int]:
    """Return every n-th image or, if it is known which objects images show, all images of every n-th object; the object
    of each; and the number of all images, or objects."""
    if (names := images.objects()) is None:
        return np.arange(0, len(images), every), None, len(images)
    units = np.unique(names)
    chosen = np.flatnonzero(np.isin(names, units[::every]))
    return chosen, [names[row] for row in chosen], len(units)


def calibrate_values(config: CalibrateConfig, pipeline: ImagePipeline) -> tuple[ColumnFit, str]:
    """Calibrate what is inferred of a column, and return the fit and a description. Raises `UserError`."""
    column = str(config.column)
    for key in ("tile", "condition", "conditions", "marginal", "background"):
        if getattr(config, key):
            raise UserError(f"{key}: is not for column=NAME; `given` names the other columns that `infer` will have")
    with user_errors(ValueError):
        for name in (column, *config.given):
            find_column(pipeline.columns, name, "column" if name == column else "given")
    if column in config.given:
        raise UserError(f"given: {column!r} cannot be both inferred and given")
    images = config.load_images(pipeline).held_out
    chosen, groups, _ = choose_units(images, config.every)
    pixels = config.read_pixels(pipeline, images, chosen)
    known = read_values(config, pipeline, images, chosen, pixels, [column, *config.given])
    with user_errors(ValueError):
        fit = pipeline.calibrate_column(
            pixels,
            column,
            known.raw(column).cpu(),
            condition=known.without(set(known.columns) - {*config.given}),
            groups=groups,
            seed=config.seed,
        )
    what = "object" if fit.objects else "image"
    rows = [("images together", "temperature", f"{what}s")]
    rows += [(str(each.size), f"{each.temperature:.3g}", f"{2 * len(each.denser):,}") for each in fit.sizes]
    promise = f"`smalti infer column={column} level=0.9` is right for 90 % of new {what}s, on average"
    return fit, f"{table(rows, right=[0, 1, 2])}\n\n{config.pipeline}: {promise}"


def read_values(
    config: CalibrateConfig,
    pipeline: ImagePipeline,
    images: ImageDataset,
    chosen: NDArray[np.int64],
    pixels: Any,
    names: list[str],
) -> Given:
    """Return the values of columns of held-out images: classes of the data set, other columns of the token dataset.
    Raises `UserError`."""
    rows = dict[str, Any]()
    if LABEL in names:
        check_classes(pipeline, images)
        if images.labels is None:
            raise UserError("column: these images have no classes")
        rows[LABEL] = images.labels[torch.from_numpy(chosen)]
    if others := [name for name in names if name != LABEL]:
        test = require_rows(load_training_tokens(config.tokens, pipeline), "test", images)
        tokens = TokenSplit(pipeline.encode(pixels).cpu(), Given({}, {}, len(chosen)))
        if not are_same_images(TokenSplit(test.rows(chosen), tokens.given), tokens):
            raise UserError("tokens: the rows of its test split are not those of the held-out images")
        rows |= {name: test.given[torch.from_numpy(chosen)].raw(name) for name in others}
    return Given(pipeline.columns, rows, len(chosen))


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

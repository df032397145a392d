"""Infer a column of the condition, such as the class, from images: the probability of each value, by Bayes' rule."""

from __future__ import annotations

import csv
import json
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

from pydantic import Field
from torch import Tensor

from prior.columns import find_column
from prior.given import Given

from ..anomaly.distances import CalibrationError
from ..condition_keys import UsesCondition
from ..config import OutputConfig, UserError, run_command, tell, user_errors
from ..config.table import count_of
from ..files import Output
from ..image_pipeline import ImagePipeline
from ..images import ImageDataset
from ..images.pictures import PICTURE_SUFFIXES, write_picture
from ..images.splits import find_objects
from ..inference.infer import POINTS
from ..inference.posterior import Posterior
from ..inference.sheets import draw_evidence
from ..options import ImageChoice, UsesImages, choose_images, split_choice
from ..provenance import defaults

SHOWN = 10  # rows that are printed


class InferConfig(UsesCondition, UsesImages, OutputConfig):
    examples = (
        "pipeline=garments images=my-photos",
        "pipeline=runs/gpt_faces/pipeline column=age condition.hat=no level=0.9 out=ages.csv",
    )
    often = "pipeline images column out overwrite condition.NAME conditions prior level groups plot evidence device"

    images: ImageChoice = Field(None, description="image files, folders, or indices of held-out images; default: these")
    num_images: int = Field(1000, ge=1, description="maximum number of images from folders or held out")
    column: str = Field("label", description="the column to infer: of classes, flags, a number or an angle")
    prior: Literal["uniform"] | None = Field(
        None, description="`uniform`, or null: how often values occur in the training split, given the condition"
    )
    groups: bool = Field(
        False, description="take the images of an object together (data.group, or the objects of held-out images)"
    )
    level: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="add the values, or the interval, that contain the true value of new images with this probability; "
        "needs `smalti calibrate column=NAME`",
    )
    out: str = Field("inferred.csv", description="table to write, a row for each image or object")
    plot: str | None = Field(None, description="picture of the first eight rows to write")
    evidence: str | None = Field(
        None, description="picture to write: where in the first images the likeliest value differs from the second"
    )


def run(config: InferConfig) -> Posterior:
    """Infer, write the table and the pictures, print the first rows, and return the posterior."""
    paths, _ = split_choice(config.images)
    inputs = [config.pipeline, config.data.path, *paths]
    out = Output(config.out, inputs, config.overwrite)
    out.check_file([".csv"])
    pictures = {
        name: Output(path, inputs, config.overwrite)
        for name, path in (("plot", config.plot), ("evidence", config.evidence))
        if path is not None
    }
    for picture in pictures.values():
        picture.check_file(PICTURE_SUFFIXES)
    pipeline = config.load_pipeline()
    with user_errors(ValueError):
        find_column(pipeline.columns, config.column, "column")
    held_out = None if paths else config.load_images(pipeline).held_out
    images, names = choose_images(config.images, config.num_images, pipeline.spec, lambda: cast(ImageDataset, held_out))
    if config.groups and config.evidence is not None:
        raise UserError("evidence: is drawn for single images, without groups")
    groups = find_groups(config, held_out, names) if config.groups else None
    pixels = pipeline.binarize(images)
    given = config.read_condition(pipeline, len(names), names).given
    with user_errors(ValueError, CalibrationError):
        if config.column in given.rows:
            raise ValueError(f"condition.{config.column}: cannot be both inferred and given")
        if config.level is not None:  # before the densities, which take a while
            pipeline.inference.scale(config.column, given.names, 1).level(config.level)
        announce(pipeline, config.column, pixels, given)
        options: dict[str, Any] = {"condition": given, "prior": config.prior, "groups": groups}
        posterior = pipeline.infer(pixels, config.column, **options)
        rows = replace(posterior, rows=names) if len(posterior) == len(names) and groups is None else posterior
        columns = {"name": [*rows.rows], **rows.columns()}
        if config.level is not None:
            columns[f"set_{config.level:g}"] = [json.dumps(each) for each in rows.conformal(config.level)]
        if groups is None:
            columns |= find_p_values(pipeline, pixels, given)
    with out.file() as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    if "plot" in pictures:
        with pictures["plot"].file() as path:
            write_picture(rows.plot(), path)
    if "evidence" in pictures:
        with user_errors(ValueError, prefix="evidence: "), pictures["evidence"].file() as path:
            write_picture(draw_evidence(pipeline, pixels[:8], rows, given[:8]), path)
    print(rows.table(SHOWN))
    print(f"\n{config.out}: {count_of(len(rows), 'row')}; p({config.column}): {rows.prior}")
    if all(scale.temperature == 1 for scale in rows.scales):
        print(f"not calibrated, so too confident; `smalti calibrate column={config.column}` fits a temperature")
    return rows


def find_groups(config: InferConfig, held_out: ImageDataset | None, names: list[str]) -> list[str]:
    """Return the object that each image shows. Raises `UserError`."""
    if held_out is not None:
        by_name = dict(zip(held_out.names(range(len(held_out))), held_out.objects() or [], strict=False))
        if by_name:
            return [by_name[name] for name in names]
    elif config.data.group is not None:
        return find_objects(names, config.data.group)
    raise UserError("groups: it is not known which object an image shows; data.group=PATTERN finds it in file names")


def announce(pipeline: ImagePipeline, column: str, pixels: Tensor, given: Given) -> None:
    """Say how many densities are evaluated, and how long that takes, by a measurement."""
    kind = pipeline.columns[column]
    values = kind.list_values()
    flags = 2 * kind.null(1).numel()
    count = len(values) if values is not None else POINTS if kind.span is not None else flags
    some = pixels[:1].expand(min(64, len(pixels)), *pixels.shape[1:])
    pipeline.log_prob(some[:1], condition=given[:1])  # the first pass is slower
    start = time.monotonic()
    pipeline.log_prob(some, condition=given[: len(some)])
    seconds = (time.monotonic() - start) * len(pixels) * count / max(1, len(some))
    pairs = f"{count_of(len(pixels), 'image')} x {count_of(count, 'value')}"
    tell(f"{pairs}: {len(pixels) * count:,} densities, about {seconds:.0f} s")


def find_p_values(pipeline: ImagePipeline, pixels: Tensor, given: Given) -> dict[str, list[float]]:
    """Return p-values of anomaly scores, if the pipeline is calibrated for what is given: a small one says that none
    of the values may be true."""
    calibration = pipeline.calibration
    if calibration is None or calibration.tile is not None:
        return {}
    options: dict[str, Any] = {} if calibration.marginal is None else {"marginal": calibration.marginal}
    method = next(iter(calibration.scores))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pipeline.anomaly_score(pixels, method, condition=given, p_values=True, **options)
    except CalibrationError as error:
        tell(f"no p-values: {error}")
        return {}
    return {"p_value": found.tolist()}


main = partial(run_command, InferConfig, run, verb="infer", description=__doc__, defaults=defaults)

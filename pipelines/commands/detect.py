"""Find anomalous images with a calibrated pipeline; write their scores and a picture of the anomalous regions."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenizer.files import write_json

from ..anomaly.calibration import Calibration
from ..anomaly.conformal import benjamini_hochberg
from ..anomaly.distances import CalibrationError
from ..anomaly.healing import anomaly_map, heal
from ..anomaly.image_statistics import measure
from ..anomaly.scores import p_value_of, score_of
from ..anomaly.separation import separation
from ..condition_keys import ConditionRows, UsesCondition
from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import to_float, to_uint8
from ..images.grids import class_grid
from ..images.origin import resolve_source
from ..images.pictures import SUFFIXES, show_of, shown_channels, write_picture
from ..options import UsesImages, find_image_files, read_images
from ..provenance import defaults, trained_data


class DetectConfig(UsesCondition, OutputConfig, UsesImages):
    """Which images, and which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images out overwrite normal_labels condition.NAME conditions method fdr device"

    images: str | list[str] | None = Field(
        None,
        description="image files and folders; default: the held-out images of `data`. Images that the pipeline was "
        "calibrated with are skipped",
    )
    normal_labels: list[int | str] | None = Field(
        None,
        description="the normal classes (for `images`: names of folders); the report then measures how well images of "
        "other classes are detected",
    )
    method: Literal["joint", "neighbours", "nll", "typicality", "ratio", "reconstruction"] = Field(
        "joint",
        description="anomaly score; `smalti calibrate` explains each method",
    )
    fdr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="false discovery rate: on average at most this share of the flagged images is normal "
        "(Benjamini and Hochberg); null: flag scores above the calibrated threshold",
    )
    out: str = Field("anomalies", description="folder for scores.csv, sheet.png and, with normal_labels, figures.json")
    num_shown: int = Field(
        8, ge=1, le=64, description="number of most anomalous images to show, and of least anomalous images"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the healed images")

    @property
    def paths(self) -> list[str]:
        """The given files and folders."""
        return [self.images] if isinstance(self.images, str) else self.images or []


class Found(NamedTuple):
    """Images to score: names, pixels uint8 `(n, C, H, W)`, class names or None, a description of their origin, and
    their condition."""

    names: list[str]
    pixels: Tensor
    classes: list[str] | None
    origin: str
    given: ConditionRows


def run(config: DetectConfig) -> dict[str, Any]:
    """Score the images, write and print the results, and return the figures, which are empty without
    `normal_labels`."""
    pipeline = config.load_pipeline()
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    out = Output(config.out, [config.pipeline, config.data.path, *config.paths], config.overwrite)
    if out.path.suffix.lower() in (*SUFFIXES, ".csv", ".json"):
        raise UserError(f"out: {config.out!r} should be a folder, for scores.csv and sheet.png")
    out.check_files(["scores.csv", "sheet.png", "figures.json"])
    with lock_output(config.out):
        names, pixels, classes, _, given = skip_calibrated(pipeline, find_images(config, pipeline), calibration)
        anomalous = None if config.normal_labels is None else find_anomalous(classes, config.normal_labels)
        try:
            measured = measure(pipeline, pixels, condition=given.values())
            found = measured.statistics
            scores = score_of(config.method, found, calibration, measured.given)
            p = p_value_of(config.method, scores, calibration, measured.given)
        except CalibrationError as error:
            raise UserError(str(error)) from error
        above = ~(scores.numpy() <= calibration.scores[config.method].threshold)  # also flags NaN
        flagged = above if config.fdr is None else benjamini_hochberg(p.numpy(), config.fdr)
        figures = {} if anomalous is None else separation(scores.numpy(), anomalous)
        columns = {"file": names, "class": classes, "anomalous": None if anomalous is None else anomalous.astype(int)}
        columns |= {"score": scores.numpy(), "p_value": p.numpy(), "flagged": flagged.astype(int)}
        columns |= {name: values.numpy() for name, values in found.items() if values.ndim == 1}
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            sheet = draw_sheet(pipeline, pixels, given, scores, config.num_shown, config.seed)
            write_picture(sheet, folder / "sheet.png")
            if figures:
                write_json(folder / "figures.json", figures)
    print(format_report(config, calibration, flagged, anomalous, figures))
    return figures


# Images


def find_images(config: DetectConfig, pipeline: ImagePipeline) -> Found:
    """Read the given images, or the held-out ones. Raises `UserError`."""
    if config.paths:
        trained = trained_data(pipeline.provenance)
        if trained is not None and any(resolve_source(path) == resolve_source(trained.source) for path in config.paths):
            raise UserError(
                "images: the pipeline was trained on this folder; omit images= to score its held-out images"
            )
        files = find_image_files(config.paths)
        pixels = read_images(files, pipeline.tokenizer.image_shape, pipeline.values)
        folders = [file.absolute().parent.name for file in files]
        names = [str(file) for file in files]
        given = config.read_condition(pipeline, len(names), names)
        return Found(names, pixels, folders, f"images in {', '.join(config.paths)}", given)
    images = config.load_images(pipeline).held_out
    every = np.arange(len(images))
    classes = None if images.labels is None else [images.class_names[label] for label in images.labels.tolist()]
    names = images.names(every)
    given = config.read_condition(pipeline, len(names), names)
    return Found(names, images.pixels(every), classes, f"held-out images of {config.data.source}", given)


def skip_calibrated(pipeline: ImagePipeline, found: Found, calibration: Calibration) -> Found:
    """Drop the images that the pipeline was calibrated with. Raises `UserError` if none are left."""
    new = np.flatnonzero(~calibration.includes(pipeline.convert_images(to_float(found.pixels), "np"))).tolist()
    if not new:
        raise UserError(
            f"images: the pipeline was calibrated with all {len(found.names):,}; give other images, or calibrate with "
            "fewer (`smalti calibrate every=2`)"
        )
    skipped = len(found.names) - len(new)
    print(f"scoring {len(new):,} of {len(found.names):,} {found.origin}; {skipped:,} were used for calibration")
    classes = None if found.classes is None else [found.classes[row] for row in new]
    names = [found.names[row] for row in new]
    return Found(names, found.pixels[new], classes, found.origin, found.given.select(new))


def find_anomalous(classes: list[str] | None, normal: list[int | str]) -> NDArray[np.bool_]:
    """Return which images are not of a `normal` class, `(n,)`. Raises `UserError` for an unknown class, and if all
    images or no images are normal."""
    if classes is None:
        raise UserError("normal_labels: these images have no classes (data.label_column)")
    wanted, there = {str(label) for label in normal}, set(classes)
    if unknown := sorted(wanted - there):
        raise UserError(
            f"normal_labels: no image has the class {unknown[0]!r}; the classes are {', '.join(sorted(there)[:20])}"
        )
    if wanted in (set(), there):
        raise UserError("normal_labels: expected some normal and some other images")
    return np.array([label not in wanted for label in classes])


# Output


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a CSV row per image, omitting columns that are None. Bytes of names that are not UTF-8 are escaped."""
    columns = {name: column for name, column in columns.items() if column is not None}
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])


def draw_sheet(
    pipeline: ImagePipeline, pixels: Tensor, given: ConditionRows, scores: Tensor, count: int, seed: int
) -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images: the image, its bits per pixel (if
    tokens have positions), the healed image, and the difference, each below its score or name."""
    ranked = torch.argsort(scores, descending=True)
    chosen = ranked if len(ranked) <= 2 * count else torch.cat([ranked[:count], ranked[-count:]])
    images = to_float(pixels[chosen])
    condition = given.select(chosen.tolist()).values()
    healed = heal(pipeline, images, condition=condition, seed=seed)
    panels = {"healed": healed.images.cpu(), "difference": apply_colormap(healed.difference.cpu())}
    if pipeline.tokenizer.placed:
        heat = anomaly_map(pipeline, images, condition=condition).cpu()
        panels = {"bits per pixel": apply_colormap(heat / heat.amax().clamp(min=1e-6)), **panels}
    chosen_channels = show_of(pipeline.tokenizer)
    panels["healed"] = shown_channels(panels["healed"], chosen_channels)
    shown = shown_channels(images, chosen_channels)
    columns = [panel.expand(-1, 3, -1, -1) for panel in (shown, *panels.values())]
    names = [name for score in scores[chosen].tolist() for name in (f"score {score:.3g}", *panels)]
    panel_pixels = to_uint8(torch.stack(columns, 1).flatten(0, 1))
    return class_grid(panel_pixels.movedim(1, -1).numpy(), names, len(columns))


def apply_colormap(values: Tensor) -> Tensor:
    """Map `(B, H, W)` in [0, 1] to colour images `(B, 3, H, W)`: black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)], 1) * 2 - 1


def format_report(
    config: DetectConfig,
    calibration: Calibration,
    flagged: NDArray[np.bool_],
    anomalous: NDArray[np.bool_] | None,
    figures: dict[str, Any],
) -> str:
    """Format what was flagged, the guarantee, and how well the score separates the classes."""
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    promise = calibration.promise if config.fdr is None else f"on average, at most {config.fdr:g} of these are normal"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  guarantee", promise)]
    if anomalous is not None:
        auroc, low, high = figures["auroc"]
        rows += [
            ("  of normal images", f"{flagged[~anomalous].mean():.1%} of {(~anomalous).sum():,}"),
            ("  of other images", f"{flagged[anomalous].mean():.1%} of {anomalous.sum():,}"),
            ("AUROC", f"{auroc:.4f} ({low:.4f} to {high:.4f})"),
            ("AUPRC", f"{figures['auprc']:.4f} (by chance {figures['prevalence']:.4f})"),
            ("FPR95", f"{figures['fpr95']:.4f}"),
        ]
    panels = (
        "rows from most to least anomalous; columns: image, bits per pixel (grid tokenizers only), healed image, "
        "difference"
    )
    rows += [(), ("scores", f"{config.out}/scores.csv"), ("sheet", f"{config.out}/sheet.png: {panels}")]
    return table(rows)


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

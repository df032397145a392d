"""Find the images that are unlike a pipeline's normal ones: a table of scores, and a sheet that shows where."""

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
from ..anomaly.image_statistics import statistics
from ..anomaly.scores import p_value_of, score_of
from ..anomaly.separation import separation
from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import to_float
from ..images.origin import place_of
from ..images.pictures import grid_picture, write_picture
from ..options import UsesImages, find_image_files, read_images
from ..provenance import defaults, trained_data


class DetectConfig(OutputConfig, UsesImages):
    """Which images, against which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images out overwrite normal_labels method fdr device"

    images: str | list[str] | None = Field(
        None,
        description="image files and folders of them; default: the images held out of `data`; images that the pipeline "
        "was calibrated with are left out",
    )
    normal_labels: list[int | str] | None = Field(
        None,
        description="the classes that are normal, in folders the names of those that images lie in; the report then "
        "says how well the others are found",
    )
    method: Literal["joint", "neighbours", "nll", "typicality", "ratio", "reconstruction"] = Field(
        "joint",
        description="the score: nll is bits of the tokens, and of the pixels given them where the tokenizer has a "
        "likelihood of pixels; `smalti calibrate` says what each of them is",
    )
    fdr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="flag so that on average at most this share of the flagged images is normal (Benjamini and "
        "Hochberg); null: flag the scores above the calibration's threshold",
    )
    out: str = Field("anomalies", description="folder for scores.csv, sheet.png and, where measured, figures.json")
    num_shown: int = Field(8, ge=1, le=64, description="how many of the most and of the least anomalous are shown")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of healing")

    @property
    def paths(self) -> list[str]:
        """The files and folders to look through."""
        return [self.images] if isinstance(self.images, str) else self.images or []


class Found(NamedTuple):
    """Images to score: the name of each, uint8 `(n, C, H, W)`, and the name of each one's class, or None."""

    names: list[str]
    pixels: Tensor
    classes: list[str] | None


def run(config: DetectConfig) -> dict[str, Any]:
    """Score, write, and print what was found; returns the figures, empty where there is nothing to compare to."""
    pipeline = config.load_pipeline()
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    out = Output(config.out, [config.pipeline, config.data.path, *config.paths], config.overwrite)
    out.check_files(["scores.csv", "sheet.png", "figures.json"])
    with lock_output(config.out):
        names, pixels, classes = without_known(find_images(config, pipeline), calibration)
        anomalous = None if config.normal_labels is None else other_classes(classes, config.normal_labels)
        try:
            found = statistics(pipeline, pixels)
            scores = score_of(config.method, found, calibration, labelled=False)
            p = p_value_of(config.method, scores, calibration, labelled=False)
        except CalibrationError as error:
            raise UserError(str(error)) from error
        above = ~(scores.numpy() <= calibration.scores[config.method].threshold)  # NaN is flagged, too
        flagged = above if config.fdr is None else benjamini_hochberg(p.numpy(), config.fdr)
        figures = {} if anomalous is None else separation(scores.numpy(), anomalous)
        columns = {"file": names, "class": classes, "anomalous": None if anomalous is None else anomalous.astype(int)}
        columns |= {"score": scores.numpy(), "p_value": p.numpy(), "flagged": flagged.astype(int)}
        columns |= {name: values.numpy() for name, values in found.items() if values.ndim == 1}
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            write_picture(sheet(pipeline, pixels, scores, config.num_shown, config.seed), folder / "sheet.png")
            if figures:
                write_json(folder / "figures.json", figures)
    print(report(config, calibration, flagged, anomalous, figures))
    return figures


# Images


def find_images(config: DetectConfig, pipeline: ImagePipeline) -> Found:
    """The images in files and folders, or the held-out ones. Raises `UserError`."""
    if config.paths:
        trained = trained_data(pipeline.provenance)
        if trained is not None and any(place_of(path) == place_of(trained.source) for path in config.paths):
            raise UserError(
                "images: the pipeline was trained on this folder; leave images= out to read its held-out part"
            )
        files = find_image_files(config.paths)
        pixels = read_images(files, pipeline.tokenizer.image_shape)
        return Found([str(file) for file in files], pixels, [file.absolute().parent.name for file in files])
    images = config.load_images(pipeline).held_out
    every = np.arange(len(images))
    classes = None if images.labels is None else [images.class_names[label] for label in images.labels.tolist()]
    return Found(images.names(every), images.pixels(every), classes)


def without_known(found: Found, calibration: Calibration) -> Found:
    """The images that the pipeline was not calibrated with. Raises `UserError` if there are none."""
    new = np.flatnonzero(~calibration.includes(found.pixels.movedim(1, -1).numpy())).tolist()
    if not new:
        raise UserError(
            f"images: the pipeline was calibrated with all {len(found.names):,}; look through others, or calibrate "
            "with fewer (`smalti calibrate every=2`)"
        )
    print(f"{len(new):,} images; {len(found.names) - len(new):,} that the pipeline was calibrated with are left out")
    classes = None if found.classes is None else [found.classes[row] for row in new]
    return Found([found.names[row] for row in new], found.pixels[new], classes)


def other_classes(classes: list[str] | None, normal: list[int | str]) -> NDArray[np.bool_]:
    """Which images are of other classes than `normal`, `(n,)`. Raises `UserError` for an unknown class, and where all
    images are normal, or none is."""
    if classes is None:
        raise UserError("normal_labels: these images have no classes (data.label_column)")
    wanted, there = {str(label) for label in normal}, set(classes)
    if unknown := sorted(wanted - there):
        raise UserError(f"normal_labels: no image is a {unknown[0]!r}; there are {', '.join(sorted(there)[:20])}")
    if wanted in (set(), there):
        raise UserError("normal_labels: all images are normal, or none is, so there is nothing to tell apart")
    return np.array([label not in wanted for label in classes])


# Output


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a row per image, without the columns that are None. Bytes of a name that are no UTF-8 are escaped."""
    columns = {name: column for name, column in columns.items() if column is not None}
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])


def sheet(pipeline: ImagePipeline, pixels: Tensor, scores: Tensor, count: int, seed: int) -> np.ndarray:
    """A row for each of the `count` most anomalous images and, below, of the least: the image, the bits of its pixels
    where tokens have a place, the healed image, and how that differs."""
    ranked = torch.argsort(scores, descending=True)
    chosen = ranked if len(ranked) <= 2 * count else torch.cat([ranked[:count], ranked[-count:]])
    images = to_float(pixels[chosen])
    healed = heal(pipeline, images, seed=seed)
    panels = [images, healed.images.cpu(), colored(healed.difference.cpu())]
    if pipeline.tokenizer.placed:
        heat = anomaly_map(pipeline, images).cpu()
        panels.insert(1, colored(heat / heat.amax().clamp(min=1e-6)))
    columns = [panel.expand(-1, 3, -1, -1) for panel in panels]
    return grid_picture(torch.stack(columns, 1).flatten(0, 1), len(columns))


def colored(values: Tensor) -> Tensor:
    """`(B, H, W)` in [0, 1] as images `(B, 3, H, W)`: black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)], 1) * 2 - 1


def report(
    config: DetectConfig,
    calibration: Calibration,
    flagged: NDArray[np.bool_],
    anomalous: NDArray[np.bool_] | None,
    figures: dict[str, Any],
) -> str:
    """What was flagged, what that promises, and how well the score separates."""
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    promise = calibration.promise if config.fdr is None else f"on average, at most {config.fdr:g} of these are normal"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  promised", promise)]
    if anomalous is not None:
        auroc, low, high = figures["auroc"]
        rows += [
            ("  of the normal", f"{flagged[~anomalous].mean():.1%} of {(~anomalous).sum():,}"),
            ("  of the others", f"{flagged[anomalous].mean():.1%} of {anomalous.sum():,}"),
            ("AUROC", f"{auroc:.4f} ({low:.4f} to {high:.4f})"),
            ("AUPRC", f"{figures['auprc']:.4f} (by chance {figures['prevalence']:.4f})"),
            ("FPR95", f"{figures['fpr95']:.4f}"),
        ]
    panels = "the most anomalous images, then the least; bits of pixels if tokens have a place; healed; the difference"
    rows += [(), ("scores", f"{config.out}/scores.csv"), ("sheet", f"{config.out}/sheet.png: {panels}")]
    return table(rows)


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

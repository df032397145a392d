"""Find anomalous images with a calibrated pipeline; write their scores and a picture of the anomalous regions."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenizer.files import write_json

from ..anomaly.calibration import Calibration
from ..anomaly.conformal import benjamini_hochberg
from ..anomaly.distances import CalibrationError
from ..anomaly.healing import anomaly_map, heal
from ..anomaly.image_statistics import measure
from ..anomaly.scores import p_value_of, score_of, score_tiles
from ..anomaly.separation import separation
from ..anomaly.tiling import LazyImages, digest_of_pixels, load_image, read_given
from ..condition_keys import ConditionRows, UsesCondition
from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import to_float, to_uint8
from ..images.decoding import try_decode_whole
from ..images.grids import class_grid
from ..images.origin import resolve_source
from ..images.pictures import SUFFIXES, write_picture
from ..options import REMOVE, UsesTiles, find_image_files, read_images
from ..provenance import defaults, trained_data

MAX_SHOWN = 512
"""Side of a large image on a sheet."""


class DetectConfig(UsesCondition, OutputConfig, UsesTiles):
    """Which images, and which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images out overwrite normal_labels condition.NAME conditions method fdr tile device"

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
    """Images to score: names, pixels uint8 `(n, C, H, W)` (with tiles: images at their own size, loaded on access),
    class names or None, a description of their origin, and their condition."""

    names: list[str]
    pixels: Any
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
        stride = config.choose_stride(pipeline.tokenizer.image_shape)
        try:
            calibration.check_tiles(pipeline.tokenizer.image_shape[1:], stride)
        except CalibrationError as error:
            hint = f"tile=true stride={calibration.stride}" if calibration.tile else "tile=false, or calibrate again"
            raise UserError(f"{error}; give {hint}") from error
        found = skip_calibrated(find_images(config, pipeline), calibration, pipeline.tokenizer.image_shape)
        names, pixels, classes, _, given = found
        anomalous = None if config.normal_labels is None else find_anomalous(classes, config.normal_labels)
        try:
            scores, p, details = score_images(config, pipeline, found, stride)
        except CalibrationError as error:
            raise UserError(str(error)) from error
        above = ~(scores.numpy() <= calibration.scores[config.method].threshold)  # also flags NaN
        flagged = above if config.fdr is None else benjamini_hochberg(p.numpy(), config.fdr)
        figures = {} if anomalous is None else separation(scores.numpy(), anomalous)
        columns = {"file": names, "class": classes, "anomalous": None if anomalous is None else anomalous.astype(int)}
        columns |= {"score": scores.numpy(), "p_value": p.numpy(), "flagged": flagged.astype(int)}
        columns |= details
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            if stride is None:
                sheet = draw_sheet(pipeline, pixels, given, scores, config.num_shown, config.seed)
            else:
                sheet = draw_whole(pipeline, pixels, given, scores, config.num_shown, stride)
            write_picture(sheet, folder / "sheet.png")
            if figures:
                write_json(folder / "figures.json", figures)
    print(format_report(config, calibration, flagged, anomalous, figures))
    return figures


def score_images(
    config: DetectConfig, pipeline: ImagePipeline, found: Found, stride: int | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return scores and p-values `(n,)`, and further columns of `scores.csv`: the statistics of the images, or with
    tiles, their number and the most anomalous one. Raises `CalibrationError`."""
    calibration, given = pipeline.calibration, found.given.values()
    if stride is None:
        measured = measure(pipeline, found.pixels, condition=given)
        scores = score_of(config.method, measured.statistics, calibration, measured.given)
        p = p_value_of(config.method, scores, calibration, measured.given)
        return scores, p, {name: each.numpy() for name, each in measured.statistics.items() if each.ndim == 1}
    rows = read_given(pipeline, None, given, len(found.names))
    tiled = score_tiles(pipeline, found.pixels, config.method, rows, stride)
    tiling = pipeline.tokenizer.image_shape[1:], stride
    p = p_value_of(config.method, tiled.scores, calibration, rows.names, tiling)
    places = {"top": [place.top for place in tiled.places], "left": [place.left for place in tiled.places]}
    return tiled.scores, p, {"tiles": tiled.counts, **places}


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
        shape = pipeline.tokenizer.image_shape
        pixels = whole_files(files, shape[0]) if config.tile else read_images(files, shape)
        folders = [file.absolute().parent.name for file in files]
        names = [str(file) for file in files]
        given = config.read_condition(pipeline, len(names), names)
        return Found(names, pixels, folders, f"images in {', '.join(config.paths)}", given)
    images = config.load_images(pipeline, whole=config.tile).held_out
    every = np.arange(len(images))
    classes = None if images.labels is None else [images.class_names[label] for label in images.labels.tolist()]
    names = images.names(every)
    given = config.read_condition(pipeline, len(names), names)
    pixels = LazyImages(len(every), images.whole, names.__getitem__) if config.tile else images.pixels(every)
    return Found(names, pixels, classes, f"held-out images of {config.data.source}", given)


def whole_files(files: list[Path], channels: int) -> LazyImages:
    """Return image files at their own size, which are read on access."""

    def load(number: int) -> Tensor:
        pixels = try_decode_whole(files[number], channels)
        if isinstance(pixels, str):
            raise UserError(f"images: {files[number]}: {pixels}{REMOVE}")
        return torch.from_numpy(np.array(pixels))  # Pillow's pixels are read-only

    return LazyImages(len(files), load, lambda number: str(files[number]))


def skip_calibrated(found: Found, calibration: Calibration, shape: tuple[int, int, int]) -> Found:
    """Drop the images that the pipeline was calibrated with. shape: of the pipeline's images. Raises `UserError` if
    none are left, and for an image that is smaller than a tile."""
    if isinstance(found.pixels, LazyImages):
        known = set(calibration.digests)
        try:
            digests = [digest_of_pixels(load_image(found.pixels, k, shape)) for k in range(len(found.names))]
        except ValueError as error:
            raise UserError(f"images: {error}") from error
        new = [k for k, digest in enumerate(digests) if digest not in known]
        chosen = found.pixels.select(new)
    else:
        new = np.flatnonzero(~calibration.includes(found.pixels.movedim(1, -1).numpy())).tolist()
        chosen = found.pixels[new]
    if not new:
        raise UserError(
            f"images: the pipeline was calibrated with all {len(found.names):,}; give other images, or calibrate with "
            "fewer (`smalti calibrate every=2`)"
        )
    skipped = len(found.names) - len(new)
    print(f"scoring {len(new):,} of {len(found.names):,} {found.origin}; {skipped:,} were used for calibration")
    classes = None if found.classes is None else [found.classes[row] for row in new]
    names = [found.names[row] for row in new]
    return Found(names, chosen, classes, found.origin, found.given.select(new))


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
    columns = [panel.expand(-1, 3, -1, -1) for panel in (images, *panels.values())]
    names = [name for score in scores[chosen].tolist() for name in (f"score {score:.3g}", *panels)]
    panel_pixels = to_uint8(torch.stack(columns, 1).flatten(0, 1))
    return class_grid(panel_pixels.movedim(1, -1).numpy(), names, len(columns))


def draw_whole(
    pipeline: ImagePipeline, images: LazyImages, given: ConditionRows, scores: Tensor, count: int, stride: int
) -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images of any size: the whole image and (if
    tokens have positions) its map of bits per pixel, shrunk to at most 512 pixels."""
    ranked = torch.argsort(scores, descending=True)
    chosen = ranked if len(ranked) <= 2 * count else torch.cat([ranked[:count], ranked[-count:]])
    panels, highest = list[tuple[Tensor, Tensor | None]](), 1e-6
    for number in chosen.tolist():
        image, condition = images.select([number]), given.select([number]).values()
        heat = None
        if pipeline.tokenizer.placed:
            (full,) = anomaly_map(pipeline, image, condition=condition, stride=stride)
            heat = shrink(full.cpu()[None])[0]
            highest = max(highest, float(heat.max()))
        pixels = load_image(image, 0, pipeline.tokenizer.image_shape)
        panels.append((shrink(to_float(pixels) if pixels.dtype == torch.uint8 else pixels), heat))
    height, width = (max(image.shape[axis] for image, _ in panels) for axis in (1, 2))
    drawn, names = [], []
    for (shown, heat), score in zip(panels, scores[chosen].tolist(), strict=True):
        row = [shown.expand(3, -1, -1), *([] if heat is None else apply_colormap(heat[None] / highest))]
        drawn += [F.pad(part, (0, width - part.shape[2], 0, height - part.shape[1]), value=1.0) for part in row]
        names += [f"score {score:.3g}", "bits per pixel"][: len(row)]
    return class_grid(to_uint8(torch.stack(drawn)).movedim(1, -1).numpy(), names, len(drawn) // len(panels))


def shrink(image: Tensor) -> Tensor:
    """Reduce an image `(C, H, W)` to at most 512 pixels per side."""
    scale = MAX_SHOWN / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    return image if scale >= 1 else F.interpolate(image[None], size=size, mode="area")[0]


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
    panels = "rows from most to least anomalous; columns: image, bits per pixel (grid tokenizers only)"
    panels += "" if config.tile else ", healed image, difference"
    rows += [(), ("scores", f"{config.out}/scores.csv"), ("sheet", f"{config.out}/sheet.png: {panels}")]
    return table(rows)


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

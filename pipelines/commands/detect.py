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
from ..anomaly.ground_truth import find_masks, measure_defects, rank_maps, read_masks
from ..anomaly.healing import heal_images, map_bits
from ..anomaly.image_statistics import measure
from ..anomaly.scores import p_value_of, score_of
from ..anomaly.separation import separation
from ..condition_keys import ConditionRows, UsesCondition
from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import to_float, to_uint8
from ..images.dataset import find_objects
from ..images.grids import class_grid
from ..images.origin import resolve_source
from ..images.pictures import SUFFIXES, show_of, shown_channels, write_picture
from ..options import UsesImages, find_image_files, read_images
from ..provenance import defaults, trained_data

TRUTH_FILES = ("ground_truth.csv", "ground_truth.png")


class DetectConfig(UsesCondition, OutputConfig, UsesImages):
    """Which images, and which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images ground_truth out overwrite normal_labels condition.NAME conditions method fdr device"

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
    ground_truth: str | None = Field(
        None,
        description="folder with the masks of defects: images=test has test/good and test/DEFECT/NAME.*, whose mask is "
        "DEFECT/NAME_mask.png or DEFECT/NAME.png here; writes ground_truth.csv and ground_truth.png, too",
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
    out: str = Field(
        "anomalies",
        description="folder for scores.csv, sheet.png and, with normal_labels or ground_truth, figures.json",
    )
    num_shown: int = Field(
        8, ge=1, le=64, description="number of most anomalous images to show, and of least anomalous images"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the healed images")

    @property
    def paths(self) -> list[str]:
        """The given files and folders."""
        return [self.images] if isinstance(self.images, str) else self.images or []

    @property
    def normal(self) -> list[int | str] | None:
        """The normal classes, if there are other classes: with ground truth, `good` by default."""
        return ["good"] if self.normal_labels is None and self.ground_truth is not None else self.normal_labels


class Found(NamedTuple):
    """Images to score: names, pixels uint8 `(n, C, H, W)`, class names or None, a description of their origin, their
    condition, and the objects that they show or None."""

    names: list[str]
    pixels: Tensor
    classes: list[str] | None
    origin: str
    given: ConditionRows
    objects: list[str] | None = None


def run(config: DetectConfig) -> dict[str, Any]:
    """Score the images, write and print the results, and return the figures, which are empty without
    `normal_labels` and `ground_truth`."""
    pipeline = config.load_pipeline()
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    check_ground_truth(config, pipeline)
    truth = [] if config.ground_truth is None else [config.ground_truth]
    out = Output(config.out, [config.pipeline, config.data.path, *config.paths, *truth], config.overwrite)
    if out.path.suffix.lower() in (*SUFFIXES, ".csv", ".json"):
        raise UserError(f"out: {config.out!r} should be a folder, for scores.csv and sheet.png")
    out.check_files(["scores.csv", "sheet.png", "figures.json", *(TRUTH_FILES if truth else [])])
    with lock_output(config.out):
        images = skip_calibrated(pipeline, find_images(config, pipeline), calibration)
        names, pixels, classes, _, given, objects = images
        anomalous = None if config.normal is None else find_anomalous(classes, config.normal)
        masks = None if anomalous is None or not truth else load_masks(config, images, anomalous)
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
        columns = {
            "file": names,
            "object": objects,
            "class": classes,
            "anomalous": None if anomalous is None else anomalous.astype(int),
        }
        columns |= {"score": scores.numpy(), "p_value": p.numpy(), "flagged": flagged.astype(int)}
        columns |= {name: values.numpy() for name, values in found.items() if values.ndim == 1}
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            sheet = draw_sheet(pipeline, pixels, given, scores, config.num_shown, config.seed)
            write_picture(sheet, folder / "sheet.png")
            if masks is not None and anomalous is not None:
                maps = map_bits(pipeline, to_float(pixels), condition=given.values()).cpu().float().numpy()
                owners = objects or names
                rows = measure_defects(scores.numpy(), maps, masks, classes or [], anomalous, owners)
                write_table(folder / TRUTH_FILES[0], {key: [row[key] for row in rows] for key in rows[0]})
                write_picture(draw_truth(pixels, maps, masks, names, config.num_shown), folder / TRUTH_FILES[1])
                figures["defects"] = rows
            if figures:
                write_json(folder / "figures.json", figures)
    print(format_report(config, calibration, flagged, anomalous, figures, objects))
    if masks is not None and anomalous is not None:
        print(format_truth(config, figures["defects"], int((~masks[anomalous].any((1, 2))).sum())))
    return figures


# Images


def check_ground_truth(config: DetectConfig, pipeline: ImagePipeline) -> None:
    """Raise `UserError` for mistakes that can be detected before images are read."""
    if config.ground_truth is None:
        return
    if len(config.paths) != 1 or not Path(config.paths[0]).is_dir():
        raise UserError("ground_truth: needs images=FOLDER, with a folder of good images and one for each defect")
    if not Path(config.ground_truth).is_dir():
        raise UserError(f"ground_truth: no such folder: {config.ground_truth}")
    if not pipeline.tokenizer.placed:
        raise UserError("ground_truth: the tokens of this pipeline have no place in the image, so there are no maps")


def load_masks(config: DetectConfig, images: Found, anomalous: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Read the masks of the images, bool `(n, H, W)`. Raises `UserError`."""
    files = [Path(name) for name in images.names]
    masks = find_masks(files, Path(config.paths[0]), Path(str(config.ground_truth)), anomalous)
    height, width = images.pixels.shape[2:]
    return read_masks(masks, files, (height, width))


def find_images(config: DetectConfig, pipeline: ImagePipeline) -> Found:
    """Read the given images, or the held-out ones. Raises `UserError`."""
    if config.paths and pipeline.frames > 1:
        raise UserError("images: files of clips are not scored; omit images= for the held-out clips of data.source")
    if config.paths:
        trained = trained_data(pipeline.provenance)
        if trained is not None and any(resolve_source(path) == resolve_source(trained.source) for path in config.paths):
            raise UserError(
                "images: the pipeline was trained on this folder; omit images= to score its held-out images"
            )
        files = find_image_files(config.paths)
        pixels = read_images(files, pipeline.tokenizer.image_shape, pipeline.values)
        if config.ground_truth is None:
            folders = [file.absolute().parent.name for file in files]
        else:
            parts = [file.relative_to(config.paths[0]).parts for file in files]
            folders = ["" if len(part) == 1 else part[0] for part in parts]
            if "" in folders:
                raise UserError(f"ground_truth: {files[folders.index('')]} is in no folder of good images or a defect")
        names = [str(file) for file in files]
        given = config.read_condition(pipeline, len(names), names)
        objects = None if config.data.group is None else find_objects(paths_within(files, config), config.data.group)
        return Found(names, pixels, folders, f"images in {', '.join(config.paths)}", given, objects)
    images = config.load_images(pipeline).held_out
    every = np.arange(len(images))
    classes = None if images.labels is None else [images.class_names[label] for label in images.labels.tolist()]
    names = images.names(every)
    given = config.read_condition(pipeline, len(names), names)
    objects = None if config.data.group is None else find_objects(names, config.data.group)
    return Found(names, images.pixels(every), classes, f"held-out images of {config.data.source}", given, objects)


def paths_within(files: list[Path], config: DetectConfig) -> list[str]:
    """Return the path of each file within the folder that was given; the name of a file that was given itself."""
    roots = [Path(path) for path in config.paths if Path(path).is_dir()]
    within = [next((root for root in roots if file.is_relative_to(root)), file.parent) for file in files]
    return [str(file.relative_to(root)) for file, root in zip(files, within, strict=True)]


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
    objects = None if found.objects is None else [found.objects[row] for row in new]
    return Found(names, found.pixels[new], classes, found.origin, found.given.select(new), objects)


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


def draw_truth(
    pixels: Tensor, maps: NDArray[np.float32], masks: NDArray[np.bool_], names: list[str], count: int
) -> np.ndarray:
    """Draw the image, its map and its mask for the `count` defective images whose maps fit worst and, below, best."""
    ranked = rank_maps(maps, masks) or list(range(len(maps)))
    chosen = ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]
    heat = torch.from_numpy(maps[chosen])
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    marked = torch.from_numpy(masks[chosen]).float()[:, None] * 2 - 1
    panels = (to_float(pixels[chosen]), apply_colormap((heat - low) / (high - low).clamp(min=1e-6)), marked)
    shown = to_uint8(torch.stack([panel.expand(-1, 3, -1, -1) for panel in panels], 1).flatten(0, 1))
    captions = [text for row in chosen for text in (Path(names[row]).name, "bits per pixel", "mask")]
    return class_grid(shown.movedim(1, -1).numpy(), captions, len(panels))


def draw_sheet(
    pipeline: ImagePipeline, pixels: Tensor, given: ConditionRows, scores: Tensor, count: int, seed: int
) -> np.ndarray:
    """Draw a row for each of the `count` most and, below, least anomalous images: the image, its bits per pixel (if
    tokens have positions), the healed image, and the difference, each below its score or name."""
    ranked = torch.argsort(scores, descending=True)
    chosen = ranked if len(ranked) <= 2 * count else torch.cat([ranked[:count], ranked[-count:]])
    images = to_float(pixels[chosen])
    condition = given.select(chosen.tolist()).values()
    healed = heal_images(pipeline, images, condition=condition, seed=seed)
    panels = {"healed": healed.images.cpu(), "difference": apply_colormap(healed.difference.cpu())}
    if pipeline.tokenizer.placed:
        heat = map_bits(pipeline, images, condition=condition).cpu()
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
    objects: list[str] | None,
) -> str:
    """Format what was flagged, the guarantee, and how well the score separates the classes."""
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    promise = calibration.promise if config.fdr is None else f"on average, at most {config.fdr:g} of these are normal"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  guarantee", promise)]
    if calibration.objects is not None:
        count = len(calibration.scores[config.method].values)
        rows.append(("  p-values", f"compared with {count:,} normal objects, each by its most anomalous image"))
    if objects is not None:
        rows += count_objects(objects, flagged, anomalous)
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


def count_objects(
    objects: list[str], flagged: NDArray[np.bool_], anomalous: NDArray[np.bool_] | None
) -> list[tuple[str, ...]]:
    """Return rows on how many objects, and how many normal ones, have a flagged image."""
    names = np.array(objects)
    every, hit = set(objects), set(names[flagged].tolist())
    rows: list[tuple[str, ...]] = [
        ("  objects", f"{len(hit):,} of {len(every):,} have a flagged image ({len(hit) / len(every):.1%})")
    ]
    if anomalous is not None and (normal := every - set(names[anomalous].tolist())):
        share = len(hit & normal) / len(normal)
        rows.append(("  of normal objects", f"{share:.1%} of {len(normal):,} have a flagged image"))
    return rows


def format_truth(config: DetectConfig, defects: list[dict[str, Any]], vanished: int) -> str:
    """Format the figures of each defect, and how many masks have no pixel left. defects: from `measure_defects`."""
    rows = [("", "images", "objects", "image AUROC", "95 %", "pixel AUROC", "PRO to 0.3")]
    for row in defects:
        pixels = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("pixel_auroc", "pro")]
        counts = (f"{row['images']:,}", f"{row['objects']:,}")
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append((row["defect"], *counts, f"{row['image_auroc']:.3f}", interval, *pixels))
    lines = ["", table(rows, right=range(1, 7)), ""]
    if vanished:
        lines.append(
            f"{vanished:,} masks of defects have no pixel at this image size (a pixel needs half its area) and count "
            "only for image AUROC"
        )
    panels = "rows from the worst to the best map; columns: image, bits per pixel, mask"
    files = [("table", f"{config.out}/{TRUTH_FILES[0]}"), ("pictures", f"{config.out}/{TRUTH_FILES[1]}: {panels}")]
    return "\n".join([*lines, table(files)])


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

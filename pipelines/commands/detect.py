"""Find anomalous images with a calibrated pipeline; write their scores and a picture of the anomalous regions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenizer.files import one_line, write_json

from ..anomaly.calibration import Calibration
from ..anomaly.conformal import benjamini_hochberg
from ..anomaly.distances import CalibrationError
from ..anomaly.examine import Examination
from ..anomaly.ground_truth import evaluate_defects, find_masks, read_mask, read_mask_table
from ..anomaly.maps import MAPPED, require_maps
from ..anomaly.scores import OF_MAPS, p_values_by, require_scores, score_images
from ..anomaly.sheets import draw_sheet, draw_truth, reduce_map, reduce_mask
from ..condition_keys import ScoresWithCondition
from ..config import OutputConfig, UserError, run_command, tell
from ..config.table import count_of, table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.pictures import SUFFIXES, write_picture
from ..images.splits import Inherited, SplitFacts, find_objects
from ..images.unseen import find_parts
from ..images.views import View, as_lazy, check_places, read_whole
from ..metrics.localization import separation
from ..options import REMOVE, open_files, read_files
from ..provenance import defaults, inherit, trained_data

TRUTH_FILES = ("ground_truth.csv", "ground_truth.png")


class DetectConfig(ScoresWithCondition, OutputConfig):
    """Which images, and which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images ground_truth out overwrite normal_labels condition.NAME conditions method fdr tile"

    images: str | list[str] | None = Field(
        None,
        description="image files and folders; default: the held-out images of `data`. Images (with data.group, "
        "objects) of training and calibration are skipped",
    )
    normal_labels: list[int | str] | None = Field(
        None,
        description="the normal classes (for `images`: names of folders), to measure how well others are detected",
    )
    ground_truth: str | None = Field(
        None,
        description="folder with the masks of defects: images=test has test/good and test/DEFECT/NAME.*, whose mask is "
        "DEFECT/NAME_mask.png or DEFECT/NAME.png here; or a table of file_name, mask, label",
    )
    method: Literal["joint", "neighbours", "nll", "top_bits", "typicality", "ratio", "reconstruction", "hidden"] = (
        Field("joint", description="anomaly score; `smalti calibrate` explains each method")
    )
    map: Literal["bits", "hidden", "combined"] | None = Field(
        None,
        description="the map in pictures and ground truth: bits of tokens, bits of tokens whose block is hidden, or "
        "these combined with filter responses; null: combined if the calibration has it, else bits",
    )
    fdr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="false discovery rate: mean share of normal images among those flagged (Benjamini and Hochberg); "
        "null: flag scores above the threshold, or with folds p <= false_alarms",
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

    def kind_of_map(self, calibration: Calibration) -> str:
        """The map in pictures, one of `MAPS`."""
        return self.map or ("bits" if calibration.maps is None else "combined")

    @property
    def normal(self) -> list[int | str] | None:
        """The normal classes, if there are other classes: with ground truth, `good` by default."""
        return ["good"] if self.normal_labels is None and self.ground_truth is not None else self.normal_labels


@dataclass(frozen=True)
class DetectInput:
    """Images to score, a description of their origin, and the columns of `scores.csv` that are known before: `file`,
    and perhaps `object` and `class`."""

    images: Examination
    origin: str
    columns: dict[str, list[str]]

    def select(self, rows: list[int]) -> DetectInput:
        """Return the images `rows`."""
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        return DetectInput(self.images.select(rows), self.origin, columns)


class Results(NamedTuple):
    """Scores and p-values `(n,)`, further columns of `scores.csv`, sizes of the images, and maps to compare with masks,
    reduced to at most 512 pixels a side."""

    scores: Tensor
    p_values: Tensor
    columns: dict[str, list[Any]]
    sizes: list[tuple[int, int]]
    maps: list[NDArray[np.float32]]


def run(config: DetectConfig) -> dict[str, Any]:
    """Score the images, write and print the results, and return the figures, which are empty without
    `normal_labels` and `ground_truth`."""
    pipeline = config.load_pipeline()
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    if calibration.folds and config.fdr is not None:
        raise UserError(f"fdr: holds for a calibration with folds=1, this one has folds={len(calibration.folds)}")
    check_ground_truth(config, pipeline)
    truth = [] if config.ground_truth is None else [config.ground_truth]
    out = Output(config.out, [config.pipeline, config.data.path, *config.paths, *truth], config.overwrite)
    if out.path.suffix.lower() in (*SUFFIXES, ".csv", ".json"):
        raise UserError(f"out: {config.out!r} should be a folder, for scores.csv and sheet.png")
    out.check_files(["scores.csv", "sheet.png", "figures.json", *(TRUTH_FILES if truth else [])])
    with lock_output(config.out):
        view = config.choose_view(pipeline.spec)
        try:
            calibration.check_view(view)
        except CalibrationError as error:
            hint = f"tile=true stride={calibration.stride}" if calibration.tile else "tile=false, or calibrate again"
            raise UserError(f"{error}; give {hint}") from error
        found = skip_used(*find_images(config, pipeline, view), calibration)
        columns: dict[str, Any] = {**found.columns}
        anomalous = None
        if config.normal is not None:
            anomalous = find_anomalous(columns.get("class"), config.normal)
            columns["anomalous"] = anomalous.astype(int)
        masks = None if anomalous is None or not truth else find_all_masks(config, columns["file"], anomalous)
        try:
            results = examine_images(config, found.images, calibration, keep=masks is not None)
        except CalibrationError as error:
            raise UserError(str(error)) from error
        scores, p, limit = results.scores.numpy(), results.p_values.numpy(), calibration.scores[config.method].threshold
        flagged = p <= calibration.false_alarms if limit is None else ~(scores <= limit)  # also flags NaN
        flagged = flagged if config.fdr is None else benjamini_hochberg(p, config.fdr)
        columns |= {"score": scores, "p_value": p, "flagged": flagged.astype(int), **results.columns}
        figures, kind = {} if anomalous is None else separation(scores, anomalous), config.kind_of_map(calibration)
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            sheet = draw_sheet(found.images, results.scores, config.num_shown, config.seed, kind)
            write_picture(sheet, folder / "sheet.png")
            if masks is not None and anomalous is not None:
                names, objects = columns["file"], columns.get("object", columns["file"])
                pairs = zip(masks, names, results.sizes, strict=True)
                marked = [reduce_mask(read_mask(mask, Path(name), size)) for mask, name, size in pairs]
                rows = evaluate_defects(scores, results.maps, marked, columns["class"], anomalous, objects)
                write_table(folder / TRUTH_FILES[0], {key: [row[key] for row in rows] for key in rows[0]})
                sheet = draw_truth(found.images, results.maps, marked, names, config.num_shown, kind)
                write_picture(sheet, folder / TRUTH_FILES[1])
                figures["defects"] = rows
                figures["vanished"] = sum(not marked[row].any() for row in np.flatnonzero(anomalous))
            if figures:
                write_json(folder / "figures.json", figures)
    print(format_report(config, calibration, columns, figures))
    if "defects" in figures:
        print(format_truth(config, figures))
    return figures


def examine_images(config: DetectConfig, images: Examination, calibration: Calibration, keep: bool) -> Results:
    """Score the images, and with `keep`, keep their maps. Columns are the number of pixels above the threshold of the
    map, if maps are needed and have one; the statistics of the images, or with tiles, their number and the most
    anomalous one. Raises `CalibrationError`."""
    method, kind, want = config.method, config.kind_of_map(calibration), list[str]()
    require_scores(images, method)
    regions = None
    if method in OF_MAPS or (kind != "bits" and (config.map is not None or keep)):
        check_places(images.given)
        require_maps(images)
        want += MAPPED
        regions = calibration.scores.get("map")
    want += ["statistics"] if method not in OF_MAPS else []
    want += ["bits"] if keep and kind == "bits" else []
    by_reference, sizes, maps, columns = list[Any](), list[tuple[int, int]](), list[Any](), dict[str, list[Any]]()
    examined = images.examine(want)
    for each in score_images(images, examined, [method], calibration.references):
        evidence = each.evidence
        by_reference.append(each.scores[method])
        sizes.append(evidence.size)
        row = dict[str, Any]()
        if each.maps is not None and regions is not None and regions.threshold is not None:
            row["area"] = int((each.maps.combined > regions.threshold).sum())
        if method not in OF_MAPS and images.view.is_tiled:
            worst = evidence.tiles[each.worst]
            row |= {"tiles": len(evidence.tiles), "top": worst.top, "left": worst.left}
        elif method not in OF_MAPS:
            row |= {name: float(values) for name, values in evidence.statistics.items() if values.ndim == 1}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        if keep:
            heat = images.map_bits(evidence) if kind == "bits" else getattr(each.maps, kind)
            maps.append(reduce_map(heat.cpu()).numpy())
    scores = np.stack(by_reference, 1)
    return Results(torch.from_numpy(scores.mean(0)), p_values_by(method, scores, calibration), columns, sizes, maps)


# Images


def check_ground_truth(config: DetectConfig, pipeline: ImagePipeline) -> None:
    """Raise `UserError` for mistakes that can be detected before images are read."""
    if config.ground_truth is None:
        return
    if pipeline.frames > 1:
        raise UserError("ground_truth: is for images, not for clips")
    if len(config.paths) != 1 or not Path(config.paths[0]).is_dir():
        raise UserError("ground_truth: needs images=FOLDER, with a folder of good images and one for each defect")
    if not Path(config.ground_truth).exists():
        raise UserError(f"ground_truth: no such folder or table: {config.ground_truth}")
    if not pipeline.tokenizer.placed:
        raise UserError("ground_truth: the tokens of this pipeline have no place in the image, so there are no maps")


def find_all_masks(config: DetectConfig, names: Sequence[str], anomalous: NDArray[np.bool_]) -> list[Path | None]:
    """Return the mask file of each image, None for normal ones. Raises `UserError`."""
    files, truth = [Path(name) for name in names], Path(str(config.ground_truth))
    if truth.is_dir():
        return find_masks(files, Path(config.paths[0]), truth, anomalous)
    masks, _ = read_mask_table(truth, files)
    for file, mask, defective in zip(files, masks, anomalous, strict=True):
        if defective != (mask is not None):
            found = "no mask" if defective else "a mask"
            raise UserError(one_line(f"ground_truth: {file} has {found}; normal_labels says which labels are good"))
    return masks


def find_images(
    config: DetectConfig, pipeline: ImagePipeline, view: View
) -> tuple[DetectInput, NDArray[np.bool_], list[str]]:
    """Read the given images, or the held-out ones; also return which of them were trained on, `(n,)`, and further
    digests by which a calibration may know them, or none. Raises `UserError`."""
    columns, digests = dict[str, list[str] | None](), list[str]()
    if config.paths:
        source = open_files(config.paths, pipeline.spec)
        names, files = [source.name(row) for row in range(source.size)], [Path(path) for path in source.paths or []]
        pixels: Any
        if view.is_tiled:
            pixels = pipeline.list_images(read_whole(source, range(len(source)), names, pipeline.spec, REMOVE))
        else:
            pixels = pipeline.binarize(read_files(source, range(source.size), pipeline.spec))
        division = inherit(trained_data(pipeline.provenance) or config.data, pipeline.provenance)
        columns["object"], columns["class"] = name_objects(files, config, division), name_classes(files, config)
        splits = find_parts(files, trained_data(pipeline.provenance), division)
        trained = np.array([split in ("train", "validation") for split in splits], bool)
        more = f" and {len(config.paths) - 3} more" if len(config.paths) > 3 else ""
        origin = f"images in {', '.join(config.paths[:3])}{more}"
    else:
        held_out = config.load_images(pipeline, whole=config.tile).held_out
        every, labels = np.arange(len(held_out)), held_out.labels
        names, pixels = held_out.names(every), config.read_pixels(pipeline, held_out, every)
        columns["object"] = held_out.objects()
        columns["class"] = None if labels is None else [held_out.class_names[label] for label in labels.tolist()]
        trained, origin = np.zeros(len(every), bool), f"held-out images of {config.data.source}"
    given = config.read_given(pipeline, names)
    lazy, given = (pixels, check_places(given)) if view.is_tiled else (as_lazy(pixels), given)
    images = Examination(pipeline, lazy, given, view)
    if not config.paths and pipeline.binarized == "drawn" and not view.is_tiled:
        digests = images.digest(held_out.pixels(every))  # calibrations of 0.3 know rows by their own draw
    known = {name: column for name, column in columns.items() if column is not None}
    return DetectInput(images, origin, {"file": names, **known}), trained, digests


def name_classes(files: list[Path], config: DetectConfig) -> list[str]:
    """Return the class of each file: its folder, or what a table of masks says. Raises `UserError` for a file outside
    the folders of good images and defects."""
    if config.ground_truth is None:
        return [file.absolute().parent.name for file in files]
    if Path(config.ground_truth).is_file():
        return read_mask_table(Path(config.ground_truth), files)[1]
    parts = [file.relative_to(config.paths[0]).parts for file in files]
    if outside := [file for file, part in zip(files, parts, strict=True) if len(part) == 1]:
        raise UserError(f"ground_truth: {outside[0]} is in no folder of good images or a defect")
    return [part[0] for part in parts]


def name_objects(files: list[Path], config: DetectConfig, division: Inherited) -> list[str] | None:
    """Return the object that each file shows, found in its path by `data.group`; None if a column named objects in
    training, which files do not have."""
    facts = division.rule if isinstance(division.rule, SplitFacts) else None
    if config.data.group is None or (facts is not None and facts.by == "column"):
        return None
    return find_objects(paths_within(files, config), config.data.group)


def paths_within(files: list[Path], config: DetectConfig) -> list[str]:
    """Return the path of each file within the source of `data` or else the folder that was given; the name of a file
    that was given itself."""
    folders = [*([] if config.data.path is None else [config.data.path]), *map(Path, config.paths)]
    roots = [folder for folder in folders if folder.is_dir()]
    within = [next((root for root in roots if file.is_relative_to(root)), file.parent) for file in files]
    return [str(file.relative_to(root)) for file, root in zip(files, within, strict=True)]


def skip_used(
    found: DetectInput, trained: NDArray[np.bool_], others: list[str], calibration: Calibration
) -> DetectInput:
    """Drop the images that the pipeline was trained or calibrated with, and other images of calibrated objects. Warns
    about sizes beyond those of the calibration. others: further digests of the images, or none. Raises `UserError` if
    no image is left, and for one that is smaller than a tile."""
    count, digests, sizes = len(found.images), list[str](), list[tuple[int, int]]()
    try:
        for number in range(count):
            image = found.images.read(number)
            digests += found.images.digest(image[None])
            sizes.append((image.shape[-2], image.shape[-1]))
    except ValueError as error:
        raise UserError(f"images: {error}") from error
    used = np.zeros(count, bool)
    for each in (digests, others) if others else (digests,):
        used |= calibration.find_used(each, found.columns.get("object"))
    new, used = np.flatnonzero(~(used | trained)).tolist(), used & ~trained
    skipped = f"{used.sum():,} were used for calibration"
    skipped += f", {trained.sum():,} in training" if trained.any() else ""
    if not new:
        why = f"of {count:,}, {skipped}" if trained.any() else f"the pipeline was calibrated with all {count:,}"
        raise UserError(f"images: {why}; give other images, or calibrate with fewer (`smalti calibrate every=2`)")
    print(f"scoring {len(new):,} of {count:,} {found.origin}; {skipped}")
    warn_about_sizes([sizes[row] for row in new], calibration)
    return found.select(new)


def warn_about_sizes(sizes: list[tuple[int, int]], calibration: Calibration) -> None:
    """Print one line if images have sizes (height, width) beyond those of the calibration."""
    if calibration.sizes is None:
        return
    low, high = calibration.sizes[:2], calibration.sizes[2:]
    inside = ((np.array(low) <= np.array(sizes)) & (np.array(sizes) <= np.array(high))).all(1)
    if not inside.all():
        known = " to ".join(f"{height} x {width}" for height, width in dict.fromkeys((tuple(low), tuple(high))))
        tell(
            f"warning: {(~inside).sum():,} of {count_of(len(sizes), 'image')} have other sizes than those of the "
            f"calibration, {known} (height x width); the more tiles an image has, the higher its score"
        )


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
    """Write a CSV row per image. Bytes of names that are not UTF-8 are escaped."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])


def format_report(
    config: DetectConfig, calibration: Calibration, columns: dict[str, Any], figures: dict[str, Any]
) -> str:
    """Format what was flagged, the guarantee, and how well the score separates the classes. columns: of
    `scores.csv`."""
    flagged, anomalous = columns["flagged"] == 1, columns["anomalous"] == 1 if "anomalous" in columns else None
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    promise = calibration.promise if config.fdr is None else f"on average, at most {config.fdr:g} of these are normal"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  guarantee", promise)]
    if calibration.objects is not None:
        count = len(calibration.scores[config.method].values)
        rows.append(("  p-values", f"compared with {count:,} normal objects, each by its most anomalous image"))
    if "object" in columns:
        rows += count_objects(columns["object"], flagged, anomalous)
    if "area" in columns:
        hit = sum(pixels > 0 for pixels in columns["area"])
        rows.append(("regions", f"in {hit:,} of {len(flagged):,} images, where the combined map exceeds its threshold"))
    elif calibration.folds and calibration.has_maps:
        rows.append(("regions", f"not flagged: with folds={len(calibration.folds)}, the map has no threshold"))
    if anomalous is not None:
        auroc, low, high = figures["auroc"]
        rows += [
            ("  of normal images", f"{flagged[~anomalous].mean():.1%} of {(~anomalous).sum():,}"),
            ("  of other images", f"{flagged[anomalous].mean():.1%} of {anomalous.sum():,}"),
            ("AUROC", f"{auroc:.4f} ({low:.4f} to {high:.4f})"),
            ("AUPRC", f"{figures['auprc']:.4f} (by chance {figures['prevalence']:.4f})"),
            ("FPR95", f"{figures['fpr95']:.4f}"),
        ]
    panels = "rows from most to least anomalous; columns: image, map (if tokens have places)"
    regions = ", flagged regions (combined map)" if "map" in calibration.scores else ""
    panels += regions if config.tile else ", healed image, difference"
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


def format_truth(config: DetectConfig, figures: dict[str, Any]) -> str:
    """Format the figures of each defect, and how many masks have no pixel left."""
    rows = [("", "images", "objects", "image AUROC", "95 %", "pixel AUROC", "PRO to 0.3")]
    for row in figures["defects"]:
        pixels = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("pixel_auroc", "pro")]
        counts = (f"{row['images']:,}", f"{row['objects']:,}")
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append((row["defect"], *counts, f"{row['image_auroc']:.3f}", interval, *pixels))
    lines = ["", table(rows, right=range(1, 7)), ""]
    if vanished := figures["vanished"]:
        lines.append(
            f"without a pixel in the mask at this size: {count_of(vanished, 'defective image')}, counted for image "
            "AUROC only (a pixel needs half its area)"
        )
    panels = "rows from the worst to the best map; columns: image, map, mask"
    files = [("table", f"{config.out}/{TRUTH_FILES[0]}"), ("pictures", f"{config.out}/{TRUTH_FILES[1]}: {panels}")]
    return "\n".join([*lines, table(files)])


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

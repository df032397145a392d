"""Find anomalous images with a calibrated pipeline; write their scores and a picture of the anomalous regions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

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
from ..config import OutputConfig, UserError, run_command, tell, user_errors
from ..config.table import count_of, table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.pictures import PICTURE_SUFFIXES, write_picture
from ..images.splits import Inherited, SplitFacts, find_objects
from ..images.unseen import find_parts
from ..images.views import View, as_lazy, check_places, read_whole
from ..metrics.localization import separation
from ..options import REMOVE, open_files, read_files
from ..provenance import defaults, inherit, trained_data

TRUTH_FILES = ("ground_truth.csv", "ground_truth.png")


class DetectConfig(ScoresWithCondition, OutputConfig):
    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images ground_truth out overwrite normal_labels condition.NAME conditions method fdr tile"

    images: str | list[str] | None = Field(
        None, description="image files and folders, without those of training and calibration; default: held-out images"
    )
    normal_labels: list[int | str] | None = Field(
        None, description="normal classes (for `images`: names of folders), to measure how well others are detected"
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
        description="map in pictures and ground truth: bits of tokens, bits of tokens whose block is hidden, or these "
        "combined with filter responses; null: combined if the calibration has it, else bits",
    )
    fdr: float | None = Field(
        None, gt=0, lt=1, description="flag by this false discovery rate instead: mean share of normal images flagged"
    )
    out: str = Field("anomalies", description="folder for scores.csv, sheet.png and, with other classes, figures.json")
    num_shown: int = Field(8, ge=1, le=64, description="how many of the most, and of the least, anomalous to show")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the healed images")

    @property
    def paths(self) -> list[str]:
        return [self.images] if isinstance(self.images, str) else self.images or []

    def kind_of_map(self, calibration: Calibration) -> str:
        """The map in pictures, one of `MAPS`."""
        return self.map or ("bits" if calibration.maps is None else "combined")

    @property
    def normal(self) -> list[int | str] | None:
        """The normal classes, if there are other classes."""
        return ["good"] if self.normal_labels is None and self.ground_truth is not None else self.normal_labels


@dataclass(frozen=True)
class DetectInput:
    """Images that may be scored, where they come from, and the columns of `scores.csv` known so far: `file`, and
    perhaps `object` and `class`.

    trained: which images the pipeline was trained on, `(n,)`. digests: others by which a calibration of 0.3 may know
    the images, or none.
    """

    images: Examination
    origin: str
    columns: dict[str, Any]
    trained: NDArray[np.bool_]
    digests: list[str]


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
    if out.path.suffix.lower() in (*PICTURE_SUFFIXES, ".csv", ".json"):
        raise UserError(f"out: {config.out!r} should be a folder, for scores.csv and sheet.png")
    out.check_files(["scores.csv", "sheet.png", "figures.json", *(TRUTH_FILES if truth else [])])
    with lock_output(config.out):
        view = config.choose_view(pipeline.spec)
        try:
            calibration.check_view(view)
        except CalibrationError as error:
            hint = f"tile=true stride={calibration.stride}" if calibration.tile else "tile=false, or calibrate again"
            raise UserError(f"{error}; give {hint}") from error
        images, columns = skip_used(load_input(config, pipeline, view), calibration)
        anomalous, masks, figures = None, None, dict[str, Any]()
        if config.normal is not None:
            anomalous = find_anomalous(columns.get("class"), config.normal)
            columns["anomalous"] = anomalous.astype(int)
            masks = find_all_masks(config, columns["file"], anomalous) if truth else None
        with user_errors(CalibrationError):
            scores, found, sizes, maps = score(config, images, calibration, needs_maps=masks is not None)
        p_values, limit = found["p_value"], calibration.scores[config.method].threshold
        flagged = p_values <= calibration.false_alarms if limit is None else ~(scores <= limit)  # also flags NaN
        flagged = flagged if config.fdr is None else benjamini_hochberg(p_values, config.fdr)
        columns |= {"score": scores, "p_value": p_values, "flagged": flagged.astype(int), **found}
        kind = config.kind_of_map(calibration)
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            sheet = draw_sheet(images, torch.from_numpy(scores), config.num_shown, config.seed, kind)
            write_picture(sheet, folder / "sheet.png")
            if anomalous is not None:
                figures = separation(scores, anomalous)
            if masks is not None and anomalous is not None:
                names, objects = columns["file"], columns.get("object", columns["file"])
                pairs = zip(masks, names, sizes, strict=True)
                marked = [reduce_mask(read_mask(mask, Path(name), size)) for mask, name, size in pairs]
                rows = evaluate_defects(scores, maps, marked, columns["class"], anomalous, objects)
                write_table(folder / TRUTH_FILES[0], {key: [row[key] for row in rows] for key in rows[0]})
                sheet = draw_truth(images, maps, marked, names, config.num_shown, kind)
                write_picture(sheet, folder / TRUTH_FILES[1])
                figures["defects"] = rows
                figures["vanished"] = sum(not marked[row].any() for row in np.flatnonzero(anomalous))
            if figures:
                write_json(folder / "figures.json", figures)
    print(format_results(config, calibration, columns, figures))
    if "defects" in figures:
        print(format_truth(config, figures))
    return figures


def score(
    config: DetectConfig, images: Examination, calibration: Calibration, needs_maps: bool
) -> tuple[NDArray[np.float64], dict[str, Any], list[tuple[int, int]], list[NDArray[np.float32]]]:
    """Return the scores `(n,)`, further columns of `scores.csv`, the sizes of the images and, if needed, their maps,
    reduced to at most 512 pixels a side.

    Columns are p-values; the number of pixels above the threshold of the map, if maps are computed and have one; the
    statistics of the images, or with tiles, their number and the most anomalous one. Raises `CalibrationError`.
    """
    method, kind, want, regions = config.method, config.kind_of_map(calibration), list[str](), None
    require_scores(images, method)
    if method in OF_MAPS or (kind != "bits" and (config.map is not None or needs_maps)):
        check_places(images.given)
        require_maps(images)
        want += MAPPED
        regions = calibration.scores.get("map")
    want += ["statistics"] if method not in OF_MAPS else []
    want += ["bits"] if needs_maps and kind == "bits" else []
    by_reference, sizes, maps, columns = list[Any](), list[tuple[int, int]](), list[Any](), dict[str, Any]()
    for each in score_images(images, images.examine(want), [method], calibration.references):
        evidence, row = each.evidence, dict[str, Any]()
        by_reference.append(each.scores[method])
        sizes.append(evidence.size)
        if each.maps is not None and regions is not None and regions.threshold is not None:
            row["area"] = int((each.maps.combined > regions.threshold).sum())
        if method not in OF_MAPS and images.view.is_tiled:
            worst = evidence.tiles[each.worst]
            row |= {"tiles": len(evidence.tiles), "top": worst.top, "left": worst.left}
        elif method not in OF_MAPS:
            row |= {name: float(values) for name, values in evidence.statistics.items() if values.ndim == 1}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        if needs_maps:
            heat = images.map_bits(evidence) if kind == "bits" else getattr(each.maps, kind)
            maps.append(reduce_map(heat.cpu()).numpy())
    scores = np.stack(by_reference, 1)
    return scores.mean(0), {"p_value": p_values_by(method, scores, calibration).numpy(), **columns}, sizes, maps


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


def load_input(config: DetectConfig, pipeline: ImagePipeline, view: View) -> DetectInput:
    """Load the given images, or the held-out ones. Raises `UserError`."""
    columns = dict[str, list[str] | None]()
    pixels: Any
    if config.paths:
        source = open_files(config.paths, pipeline.spec)
        names, files = [source.name(row) for row in range(source.size)], [Path(path) for path in source.paths or []]
        if view.is_tiled:
            pixels = pipeline.list_images(read_whole(source, range(len(source)), names, pipeline.spec, REMOVE))
        else:
            pixels = pipeline.binarize(read_files(source, range(source.size), pipeline.spec))
        division = inherit(trained_data(pipeline.provenance) or config.data, pipeline.provenance)
        columns["object"], columns["class"] = list_objects(files, config, division), list_classes(files, config)
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
    own_draw = not config.paths and pipeline.binarized == "drawn" and not view.is_tiled
    digests = images.digest(held_out.pixels(every)) if own_draw else []  # calibrations of 0.3 know rows by these
    known = {name: column for name, column in columns.items() if column is not None}
    return DetectInput(images, origin, {"file": names, **known}, trained, digests)


def list_classes(files: list[Path], config: DetectConfig) -> list[str]:
    """Return the class of each file: its folder, or what a table of masks says."""
    if config.ground_truth is None:
        return [file.absolute().parent.name for file in files]
    if Path(config.ground_truth).is_file():
        return read_mask_table(Path(config.ground_truth), files)[1]
    parts = [file.relative_to(config.paths[0]).parts for file in files]
    if outside := [file for file, part in zip(files, parts, strict=True) if len(part) == 1]:
        raise UserError(f"ground_truth: {outside[0]} is in no folder of good images or a defect")
    return [part[0] for part in parts]


def list_objects(files: list[Path], config: DetectConfig, division: Inherited) -> list[str] | None:
    """Return the object that each file shows, found by `data.group` in its path within the source of `data` or else the
    folder that was given; None if a column named objects in training, which files do not have."""
    by_column = isinstance(division.rule, SplitFacts) and division.rule.by == "column"
    if config.data.group is None or by_column:
        return None
    folders = [*([] if config.data.path is None else [config.data.path]), *map(Path, config.paths)]
    roots = [folder for folder in folders if folder.is_dir()]
    within = [next((root for root in roots if file.is_relative_to(root)), file.parent) for file in files]
    paths = [str(file.relative_to(root)) for file, root in zip(files, within, strict=True)]
    return find_objects(paths, config.data.group)


def skip_used(found: DetectInput, calibration: Calibration) -> tuple[Examination, dict[str, Any]]:
    """Return the images, and their columns, that are new: not trained on, and of no calibrated image or object."""
    images, trained, count = found.images, found.trained, len(found.images)
    digests, sizes = list[str](), list[tuple[int, int]]()
    with user_errors(ValueError, prefix="images: "):
        for number in range(count):
            image = images.read(number)
            digests += images.digest(image[None])
            sizes.append((image.shape[-2], image.shape[-1]))
    used = np.zeros(count, bool)
    for each in (digests, found.digests) if found.digests else (digests,):
        used |= calibration.find_used(each, found.columns.get("object"))
    new, used = np.flatnonzero(~(used | trained)).tolist(), used & ~trained
    skipped = f"{used.sum():,} were used for calibration"
    skipped += f", {trained.sum():,} in training" if trained.any() else ""
    if not new:
        why = f"of {count:,}, {skipped}" if trained.any() else f"the pipeline was calibrated with all {count:,}"
        raise UserError(f"images: {why}; give other images, or calibrate with fewer (`smalti calibrate every=2`)")
    print(f"scoring {len(new):,} of {count:,} {found.origin}; {skipped}")
    if calibration.sizes is not None:
        low, high = tuple(calibration.sizes[:2]), tuple(calibration.sizes[2:])
        inside = ((np.array(low) <= np.array(sizes)[new]) & (np.array(sizes)[new] <= np.array(high))).all(1)
        if not inside.all():
            known = " to ".join(f"{height} x {width}" for height, width in dict.fromkeys((low, high)))
            tell(
                f"warning: {(~inside).sum():,} of {count_of(len(new), 'image')} have other sizes than those of the "
                f"calibration, {known} (height x width); the more tiles an image has, the higher its score"
            )
    return images.select(new), {name: [column[row] for row in new] for name, column in found.columns.items()}


def find_anomalous(classes: list[str] | None, normal: list[int | str]) -> NDArray[np.bool_]:
    """Return which images are not of a `normal` class, `(n,)`."""
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


def format_results(
    config: DetectConfig, calibration: Calibration, columns: dict[str, Any], figures: dict[str, Any]
) -> str:
    """Format what was flagged, the guarantee, and how well the score separates the classes."""
    flagged, anomalous = columns["flagged"] == 1, columns["anomalous"] == 1 if "anomalous" in columns else None
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    promise = calibration.promise if config.fdr is None else f"on average, at most {config.fdr:g} of these are normal"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  guarantee", promise)]
    if calibration.objects is not None:
        count = len(calibration.scores[config.method].values)
        rows.append(("  p-values", f"compared with {count:,} normal objects, each by its most anomalous image"))
    if "object" in columns:
        names = np.array(columns["object"])
        every, hit = set(names.tolist()), set(names[flagged].tolist())
        rows.append(("  objects", f"{len(hit):,} of {len(every):,} have a flagged image ({len(hit) / len(every):.1%})"))
        if anomalous is not None and (normal := every - set(names[anomalous].tolist())):
            rate = len(hit & normal) / len(normal)
            rows.append(("  of normal objects", f"{rate:.1%} of {len(normal):,} have a flagged image"))
    if "area" in columns:
        there = sum(pixels > 0 for pixels in columns["area"])
        rows.append(
            ("regions", f"in {there:,} of {len(flagged):,} images, where the combined map exceeds its threshold")
        )
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

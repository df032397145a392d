"""Find the images that are unlike a pipeline's normal ones: a table of scores, and a sheet that shows where."""

from __future__ import annotations

import csv
import sys
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
from ..images import DataConfig, check_shape, to_float
from ..images.dataset import check_bad, choose_held_out, choose_splits, open_source, require_split, say_splits
from ..images.decoding import Rows, decode_all
from ..images.origin import place_of
from ..images.pictures import grid_picture, write_picture
from ..images.unseen import require_unseen
from ..options import UsesImages
from ..provenance import defaults, trained_data


class DetectConfig(OutputConfig, UsesImages):
    """Which images, against which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images out overwrite normal normal_labels method fdr device"

    images: str | None = Field(
        None,
        description="what to look through: `digits`, a folder, parquet or a Hub id: its held-out split, or all of it "
        "where it has none; default: the images held out of data.source; images that the pipeline was calibrated with "
        "are left out",
    )
    normal: str | None = Field(
        None,
        description="normal images, read in the same way; all `images` then count as anomalous, and the report says "
        "how well the score separates the two",
    )
    normal_labels: list[int | str] | None = Field(
        None, description="the classes of `images` that are normal; the report then says how well the others are found"
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
        description="flag so that on average at most this share of what is flagged is normal (Benjamini and "
        "Hochberg); default: flag what is above the calibration's threshold, as `false_alarms` and `confidence` of "
        "`smalti calibrate` chose it",
    )
    out: str = Field("anomalies", description="folder for scores.csv, sheet.png and, where measured, figures.json")
    num_shown: int = Field(8, ge=1, le=64, description="how many of the most and of the least anomalous are shown")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of healing")


class Found(NamedTuple):
    """Images of a source: the name of each, uint8 `(n, C, H, W)`, the name of each one's class, or None; and how many
    others the pipeline was calibrated with."""

    names: list[str]
    pixels: Tensor
    classes: list[str] | None
    known: int


def run(config: DetectConfig) -> dict[str, Any]:
    """Score, write, and print what was found; returns the figures, empty where there is nothing to compare to."""
    if config.normal is not None and config.normal_labels is not None:
        raise UserError("normal, normal_labels: give one of the two")
    pipeline = config.load_pipeline()
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    sources = [config.images or config.data.source, *([] if config.normal is None else [config.normal])]
    data = [config.data.model_copy(update={"source": source, "streaming": False}) for source in sources]
    out = Output(config.out, [config.pipeline, *(each.path for each in data)], config.overwrite)
    out.check_files(["scores.csv", "sheet.png", "figures.json"])
    with lock_output(config.out):
        found = [find(each, pipeline, calibration) for each in data]
        names, pixels = [name for part in found for name in part.names], torch.cat([part.pixels for part in found])
        classes, anomalous = found[0].classes if len(found) == 1 else None, None
        if config.normal is not None:
            anomalous = np.arange(len(names)) < len(found[0].names)
        elif config.normal_labels is not None:
            anomalous = other_classes(classes, config.normal_labels)
        try:
            known = statistics(pipeline, pixels)
            scores = score_of(config.method, known, calibration, labelled=False)
            p = p_value_of(config.method, scores, calibration, labelled=False).numpy()
        except CalibrationError as error:
            raise UserError(str(error)) from error
        above = ~(scores.numpy() <= calibration.scores[config.method].threshold)  # NaN is, too
        flagged = above if config.fdr is None else benjamini_hochberg(p, config.fdr)
        figures = {} if anomalous is None else separation(scores.numpy(), anomalous)
        columns = {"file": names, "class": classes, "anomalous": None if anomalous is None else anomalous.astype(int)}
        columns |= {"score": scores.numpy(), "p_value": p, "flagged": flagged.astype(int)}
        columns |= {name: values.numpy() for name, values in known.items() if values.ndim == 1}
        with out.files() as folder:
            write_table(folder / "scores.csv", columns)
            write_picture(sheet(pipeline, pixels, scores, config.num_shown, config.seed), folder / "sheet.png")
            if figures:
                write_json(folder / "figures.json", figures)
    for source, part in zip(sources, found, strict=True):
        left_out = f"; {part.known:,} that the pipeline was calibrated with are left out" if part.known else ""
        print(f"{source}: {len(part.names):,} images{left_out}")
    print(report(config, pipeline, calibration, flagged, anomalous, figures))
    return figures


# Images


def find(data: DataConfig, pipeline: ImagePipeline, calibration: Calibration) -> Found:
    """The images of a source that the pipeline was neither trained nor calibrated with. Raises `UserError`, also if
    there are none."""
    trained = trained_data(pipeline.provenance)
    require_unseen(data, trained, "held_out")
    rows, positions = held_out_rows(data, trained)
    decoded = decode_all(rows, positions, data.image_shape, room=sys.maxsize)
    check_bad([(decoded.bad, len(positions))], data)
    if decoded.pixels is None or not len(decoded.positions):
        raise UserError(f"{data.source}: there are no images")
    known = calibration.includes(decoded.pixels.movedim(1, -1).numpy())
    if known.all():
        raise UserError(
            f"{data.source}: the pipeline was calibrated with all {len(known):,} images; look through others, or "
            "calibrate with fewer (`smalti calibrate every=2`)"
        )
    new, classes = decoded.positions[~known].tolist(), None
    if data.label_column is not None and rows.labels:
        labels, called = rows.labels, rows.class_names
        classes = [str(called[labels[row]] if called else labels[row]) for row in new]
    pixels = decoded.pixels[torch.from_numpy(~known)]
    return Found([rows.name(row) for row in new], pixels, classes, int(known.sum()))


def held_out_rows(data: DataConfig, trained: DataConfig | None) -> tuple[Rows, NDArray[np.int64]]:
    """The held-out split of a source, and which of its images; where it has none: all, or of the source that was
    trained on what was held out. Raises `UserError`."""
    splits = open_source(data)
    if trained is not None and place_of(data.source) == place_of(trained.source):
        return choose_splits(splits, data)["held_out"]
    only_one = set(splits) <= {data.split}  # which need not have the name of the split that was held out in training
    if (name := None if only_one else choose_held_out(splits, data)) is None:
        require_split(splits, data)
    say_splits(splits, data, name, f"all of {data.split!r}", "looked through")
    rows = splits[name or data.split]()
    return rows, np.arange(rows.size)[: data.limit]


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
    """The most anomalous images on the left, from the top, and the least on the right: each with the bits of its
    pixels where tokens have a place, healed, and how that differs from it."""
    ranked = torch.argsort(scores, descending=True)
    count = min(count, len(ranked))
    chosen = torch.cat([ranked[:count], ranked.flip(0)[:count]])
    images = to_float(pixels[chosen])
    maps = []
    if pipeline.tokenizer.placed:
        heat = anomaly_map(pipeline, images, smooth=True).cpu()
        maps.append(colored(heat / heat.amax().clamp(min=1e-6)))
    healed = heal(pipeline, images, seed=seed)
    panels = [
        images.expand(-1, 3, -1, -1),
        *maps,
        healed.images.cpu().expand(-1, 3, -1, -1),
        colored(healed.difference.cpu()),
    ]
    left, right = (torch.stack([panel[half] for panel in panels], 1) for half in (slice(count), slice(count, None)))
    return grid_picture(torch.cat([left, right], 1).flatten(0, 1), 2 * len(panels))


def colored(values: Tensor) -> Tensor:
    """`(B, H, W)` in [0, 1] as images `(B, 3, H, W)`: black, red, yellow, white."""
    return torch.stack([(3 * values - channel).clamp(0, 1) for channel in range(3)], 1) * 2 - 1


def report(
    config: DetectConfig,
    pipeline: ImagePipeline,
    calibration: Calibration,
    flagged: NDArray[np.bool_],
    anomalous: NDArray[np.bool_] | None,
    figures: dict[str, Any],
) -> str:
    """What was flagged, what that promises, and how well the score separates."""
    promise = f"on average, at most {config.fdr:g} of these are normal" if config.fdr else calibration.promise
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    rows: list[tuple[str, ...]] = [("flagged", f"{share} by {config.method}"), ("  promised", promise)]
    if anomalous is not None:
        rows += [
            ("  of the normal", f"{flagged[~anomalous].mean():.1%} of {(~anomalous).sum():,}"),
            ("  of the others", f"{flagged[anomalous].mean():.1%} of {anomalous.sum():,}"),
        ]
        auroc, low, high = figures["auroc"]
        rows += [
            ("AUROC", f"{auroc:.4f} ({low:.4f} to {high:.4f})"),
            ("AUPRC", f"{figures['auprc']:.4f} (by chance {figures['prevalence']:.4f})"),
            ("FPR95", f"{figures['fpr95']:.4f}"),
        ]
    bits = "bits, " if pipeline.tokenizer.placed else ""
    panels = f"the most anomalous left, the least right; image, {bits}healed, what healing changed"
    rows += [(), ("scores", f"{config.out}/scores.csv"), ("sheet", f"{config.out}/sheet.png: {panels}")]
    return table(rows)


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

"""Find the images that are unlike a pipeline's normal ones: a table of scores, and a sheet that shows where."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenizer.files import one_line, write_json

from ..anomaly.calibration import Calibration, CalibrationError
from ..anomaly.healing import anomaly_map, heal
from ..anomaly.image_statistics import statistics
from ..anomaly.scores import p_value_of, score_of
from ..anomaly.separation import benjamini_hochberg, separation
from ..config import Of, OutputConfig, UserError, choose_device, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, check_shape, to_float
from ..images.dataset import check_bad, choose_held_out, choose_splits, open_source, say_splits
from ..images.decoding import Rows, decode_all
from ..images.origin import place_of
from ..images.pictures import grid_picture, write_picture
from ..images.unseen import require_unseen
from ..provenance import defaults, trained_data
from ..saving import PipelineFolder


class DetectConfig(OutputConfig):
    """Which images, against which calibrated pipeline."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=runs/detected",)
    often = "pipeline images out overwrite normal normal_labels method fdr device"

    pipeline: PipelineFolder = Field(description="calibrated pipeline folder, or a Hub id")
    images: str | None = Field(
        None,
        description="what to look through: `digits`, a folder, parquet or a Hub id; default: data.source; images that "
        "the pipeline was calibrated with are left out",
    )
    normal: str | None = Field(
        None,
        description="normal images, read in the same way; all `images` then count as anomalous, and the report says "
        "how well the score separates the two",
    )
    normal_labels: list[int | str] | None = Field(
        None, description="the classes of `images` that are normal; the report then says how well the others are found"
    )
    method: Literal[
        "joint", "neighbours", "mahalanobis", "nll", "typicality", "complexity", "ratio", "reconstruction", "surprise"
    ] = Field(
        "joint",
        description="the score: nll is bits of the tokens, and of the pixels given them where the tokenizer has a "
        "likelihood of pixels, which complexity needs; `smalti calibrate` says what each of them is",
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
    seed: int = Field(0, ge=0, lt=1 << 63, description="of healing and of the intervals")
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(),
        description="how images are read: of each source the split data.held_out, where it has one, else all of "
        "data.split, or of the source that was trained on what was held out of it; defaults to the pipeline's own",
    )
    device: str = Field("auto", description="cpu, cuda, mps or auto")


class Found(NamedTuple):
    """Images of a source: the name of each, uint8 `(n, C, H, W)`, and the name of each one's class, or None; how many
    there were besides that the pipeline was calibrated with; and which part of which source they are, in words."""

    names: list[str]
    pixels: Tensor
    classes: list[str] | None
    known: int = 0
    parts: tuple[str, ...] = ()


def run(config: DetectConfig) -> dict[str, Any]:
    """Score, write, and print what was found; returns the figures, empty where there is nothing to compare to."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if (calibration := pipeline.calibration) is None:
        raise UserError(f"pipeline: not calibrated; run `smalti calibrate pipeline={config.pipeline}`")
    sources = [config.images or config.data.source, *([config.normal] if config.normal else [])]
    inputs = [config.pipeline, *(source_at(config.data, source).path for source in sources)]
    out = Output(config.out, inputs, config.overwrite)
    out.check_files(["scores.csv", "sheet.png", "figures.json"])
    with lock_output(config.out):
        found, anomalous = choose(config, pipeline, calibration)
        try:
            known = statistics(pipeline, found.pixels)
            scores = score_of(config.method, known, calibration, labelled=False)
            p = p_value_of(config.method, scores, calibration, labelled=False).numpy()
        except CalibrationError as error:
            raise UserError(str(error)) from error
        above = ~(scores.numpy() <= calibration.thresholds[config.method])  # NaN is, too
        flagged = above if config.fdr is None else benjamini_hochberg(p, config.fdr)
        figures = {} if anomalous is None else separation(scores.numpy(), anomalous, config.seed)
        columns = {"score": scores.numpy(), "p_value": p, "flagged": flagged.astype(int)}
        columns |= {name: values.numpy() for name, values in known.items() if values.ndim == 1}
        with out.files() as folder:
            write_table(folder / "scores.csv", found, anomalous, columns)
            write_picture(sheet(pipeline, found.pixels, scores, config.num_shown, config.seed), folder / "sheet.png")
            if figures:
                write_json(folder / "figures.json", figures)
        print(report(config, pipeline, calibration, found, flagged, anomalous, figures))
        return figures


# Images


def choose(config: DetectConfig, pipeline: ImagePipeline, calibration: Calibration) -> tuple[Found, np.ndarray | None]:
    """The images to look through, and which of them are anomalous, where that is known. Raises `UserError`."""
    if config.normal is not None and config.normal_labels is not None:
        raise UserError("normal, normal_labels: give one of the two")
    found = find(config.data, config.images or config.data.source, pipeline, calibration)
    if config.normal is None:
        return found, truth(found, config.normal_labels)
    other = find(config.data, config.normal, pipeline, calibration)
    names, pixels = found.names + other.names, torch.cat([found.pixels, other.pixels])
    anomalous = np.arange(len(names)) < len(found.names)
    return Found(names, pixels, None, found.known + other.known, found.parts + other.parts), anomalous


def find(data: DataConfig, source: str, pipeline: ImagePipeline, calibration: Calibration) -> Found:
    """The images of a source that the pipeline was neither trained nor calibrated with. Raises `UserError`, also if
    there are none."""
    trained, there = trained_data(pipeline.provenance), source_at(data, source)
    require_unseen(there, trained, "held_out")
    found, part = read(there, trained is not None and place_of(source) == place_of(trained.source))
    known = calibration.includes(found.pixels.movedim(1, -1).numpy())
    if known.all():
        raise UserError(
            f"{source}: the pipeline was calibrated with all {len(known):,} images of {part}; look through others, or "
            "calibrate with fewer (`smalti calibrate every=2`)"
        )
    rest = np.flatnonzero(~known)
    names, classes = ([each[i] for i in rest] if each else None for each in (found.names, found.classes))
    looked_at = one_line(f"{len(rest):,} images: {part} of {source}")
    return Found(names or [], found.pixels[torch.from_numpy(rest)], classes, int(known.sum()), (looked_at,))


def held_out_rows(data: DataConfig, trained: bool) -> tuple[Rows, NDArray[np.int64], str]:
    """The source's held-out split, which of its images, and these in words. Where it has none: its only one, or what
    training held out of that. Raises `UserError`."""
    splits = open_source(data)
    one_only = not trained and set(splits) <= {data.split}  # whose name need not be that of the images trained on
    held_out = None if one_only else choose_held_out(splits, data)
    if (name := held_out or data.split) not in splits:
        raise UserError(f"data.split: {data.source} has no split {data.split!r}; it has {', '.join(sorted(splits))}")
    if trained and held_out is None:
        rows, positions = choose_splits(splits, data)["held_out"]
        return rows, positions, f"{100 * data.held_out_fraction:.3g}% held out of {data.split!r}"
    say_splits(splits, data, held_out, f"all of {data.split!r}", "looked through")
    rows = splits[name]()
    return rows, np.arange(rows.size)[: data.limit], f"the split {name!r}"


def read(data: DataConfig, trained: bool) -> tuple[Found, str]:
    """All images of `held_out_rows`, and these in words. Raises `UserError`."""
    rows, positions, part = held_out_rows(data, trained)
    decoded = decode_all(rows, positions, data.image_shape, room=1 << 62)
    check_bad([(decoded.bad, len(positions))], data)
    if decoded.pixels is None or not len(decoded.positions):
        raise UserError(f"{data.source}: there are no images")
    names = [rows.name(row) for row in decoded.positions.tolist()]
    labels = rows.labels if data.label_column is not None else None
    called = rows.class_names
    classes = labels and [str(called[labels[i]] if called else labels[i]) for i in decoded.positions]
    return Found(names, decoded.pixels, classes or None), part


def source_at(data: DataConfig, source: str) -> DataConfig:
    """Return how images of another source are read: all of them, in any order."""
    return data.model_copy(update={"source": source, "streaming": False})


def truth(found: Found, normal: list[int | str] | None) -> np.ndarray | None:
    """Which images are anomalous, bool `(n,)`: those of other classes than `normal`. Raises `UserError`."""
    if normal is None:
        return None
    if found.classes is None:
        raise UserError("normal_labels: these images have no classes (data.label_column)")
    wanted = {str(label) for label in normal}
    if unknown := wanted - set(found.classes):
        raise UserError(
            f"normal_labels: none of the images is a {sorted(unknown)[0]!r}; there are "
            f"{', '.join(sorted(set(found.classes))[:20])}"
        )
    if wanted in (set(), set(found.classes)):
        raise UserError("normal_labels: all images are normal, or none is, so there is nothing to tell apart")
    return np.array([label not in wanted for label in found.classes])


# Output


def write_table(path: Path, found: Found, anomalous: np.ndarray | None, columns: dict[str, Any]) -> None:
    """A row per image: its name, class and truth where known, and the columns. Bytes of a name that are no UTF-8 are
    escaped."""
    known: dict[str, Any] = {"file": [name.encode("utf-8", "backslashreplace").decode() for name in found.names]}
    if found.classes is not None:
        known["class"] = found.classes
    if anomalous is not None:
        known["anomalous"] = anomalous.astype(int)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*known, *columns])
        for row in zip(*known.values(), *columns.values(), strict=True):
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
    found: Found,
    flagged: np.ndarray,
    anomalous: np.ndarray | None,
    figures: dict[str, Any],
) -> str:
    """What a person wants to know."""
    rows: list[tuple[str, ...]] = []
    rows += [("looked through", part) for part in found.parts]
    if found.known:
        rows.append(("left out", f"{found.known:,} images that the pipeline was calibrated with"))
    promise = f"on average, at most {config.fdr:g} of these are normal" if config.fdr else calibration.promise
    share = f"{flagged.sum():,} of {len(flagged):,} images ({flagged.mean():.1%})"
    rows += [("flagged", f"{share} by {config.method}"), ("  promised", promise)]
    if anomalous is not None:
        rows += [
            ("  of the normal", f"{flagged[~anomalous].mean():.1%} of {(~anomalous).sum():,}"),
            ("  of the others", f"{flagged[anomalous].mean():.1%} of {anomalous.sum():,}"),
        ]
        for name, label in (("auroc", "AUROC"), ("auprc", "AUPRC"), ("fpr95", "FPR95")):
            value, low, high = figures[name]
            beside = f"; by chance {figures['prevalence']:.4f}" if name == "auprc" else ""
            rows.append((label, f"{value:.4f} ({low:.4f} to {high:.4f}{beside})"))
    bits = "bits, " if pipeline.tokenizer.placed else ""
    shown = f"the most anomalous left, the least right; image, {bits}healed, what healing changed"
    rows += [(), ("scores", f"{config.out}/scores.csv"), ("sheet", f"{config.out}/sheet.png: {shown}")]
    return table(rows)


main = partial(run_command, DetectConfig, run, verb="detect", description=__doc__, defaults=defaults)

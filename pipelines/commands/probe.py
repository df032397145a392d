"""Say what each layer of a prior knows of the classes: the accuracy of a linear probe, beside pixels and codes.

A probe's accuracy says something only beside those of features that need no prior (pixels, their principal components,
codes) and of the same prior with random weights, so the table has all of these.
"""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..config import Of, OutputConfig, UserError, choose_device, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, ImageDataset, check_shape, load_images
from ..images.pictures import write_picture
from ..images.unseen import require_unseen
from ..metrics.charts import BLUE, INK, Pixels, render
from ..provenance import defaults, trained_data
from ..representation import choose_layer, embed, embed_layers
from ..saving import PipelineFolder
from ..shuffling import random_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the probe's fit against its L2 penalty, from stiff to loose: scikit-learn's C."""
MOST_STEPS = 200  # of a fit
WIDEST = 1 << 14  # features: a probe of more takes too long to be a yardstick, and is left out
VALIDATION = 5  # one in so many images of the fit split chooses among them
YARDSTICK = "#999966"  # the colour of what needs no prior
TITLES = {"pixels": "raw pixels", "codes": "bag of codes", "embeddings": "code embeddings"}


class ProbeConfig(OutputConfig):
    """Which pipeline, on what images."""

    examples = ("pipeline=runs/gpt_digits/pipeline",)
    often = "pipeline out overwrite num_train num_test layers pool data.source device"

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    out: str | None = Field(
        None, description="folder for probe.csv and probe.png; default: `probe` beside the pipeline folder"
    )
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(), description="the images; defaults to those the pipeline was trained on"
    )
    num_train: int = Field(5000, ge=10, description="training images that probes are fitted to, or all if fewer")
    num_test: int = Field(2000, ge=1, description="held-out images that they are measured on, or all if fewer")
    layers: list[int] | None = Field(None, description="layers of the prior, from 0; default: all")
    pool: Literal["mean", "flatten", "last"] = Field(
        "mean", description="how a layer's positions become one vector; what the prior is compared to stays as it is"
    )
    seed: int = Field(0, ge=0, description="draws the images, the validation part and the random weights")
    batch_size: int = Field(64, ge=1, description="images at a time; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


@dataclass(frozen=True)
class Probe:
    """A row of the table: accuracies on held-out images, of the features and of those of a prior with random weights;
    `strength` is the C that the validation part chose."""

    features: str
    width: int
    strength: float
    accuracy: float
    random_accuracy: float | None = None


class Labelled(NamedTuple):
    """uint8 images `(n, C, H, W)` and their classes `(n,)`."""

    images: Tensor
    labels: Tensor


def run(config: ProbeConfig) -> list[Probe]:
    """Fit the probes, print the table, write `probe.csv` and `probe.png`; returns the rows."""
    need_sklearn()
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "probe" if local else "probe"))
    output = Output(out, [config.pipeline, config.data.path], config.overwrite)
    output.check_files(["probe.png", "probe.csv"])
    with lock_output(out):
        return measure(config, output)


def measure(config: ProbeConfig, out: Output) -> list[Probe]:
    """`run`, while no other process writes there."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    layers = prior_layers(pipeline, config.layers)
    check_shape(config.data, pipeline.tokenizer.image_shape)
    require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
    splits = load_images(config.data)
    train = some_of(splits.train, config.num_train, config.seed)
    test = some_of(splits.held_out, config.num_test, config.seed)
    rows = [*compare_to(pipeline, train, test, layers, config), *probe_prior(pipeline, train, test, layers, config)]
    print(report(rows, train, test, len(splits.train.class_names)))
    with out.files() as folder:
        write_picture(bar_chart(rows), folder / "probe.png")
        write_csv(rows, folder / "probe.csv")
    print("", table([("picture", f"{out.path / 'probe.png'}"), ("figures", f"{out.path / 'probe.csv'}")]), sep="\n")
    return rows


def need_sklearn() -> None:
    """Raise `UserError` without scikit-learn, before anything takes time."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError('smalti probe needs scikit-learn: pip install "smalti[probe]"') from error


def prior_layers(pipeline: ImagePipeline, layers: list[int] | None) -> list[str]:
    """The names of `layers` of the prior, None being all. Raises `UserError` for one that is not there."""
    wanted = range(pipeline.prior.feature_layers) if layers is None else layers
    try:
        return [".".join(map(str, choose_layer(pipeline, layer))) for layer in wanted]
    except ValueError as error:
        raise UserError(f"layers: {error}") from error


def some_of(split: ImageDataset, count: int, seed: int) -> Labelled:
    """Up to `count` images, drawn at random. Raises `UserError` without labels, or if there is one class only."""
    if split.labels is None:
        raise UserError("data.label_column: a probe needs images with labels, and these have none")
    if len(split.labels.unique()) < 2:
        raise UserError("data.label_column: a probe tells classes apart, and these images are all of one")
    chosen = random_rows(len(split), count, seed)
    return Labelled(split.pixels(chosen), split.labels[chosen])


# probes -------------------------------------------------------------------------------------------


def compare_to(
    pipeline: ImagePipeline, train: Labelled, test: Labelled, layers: list[str], config: ProbeConfig
) -> list[Probe]:
    """What needs no prior: pixels, codes and their embeddings, and as many principal components of the pixels as the
    middle one of `layers` has features."""
    rows = probes(pipeline, train, test, list(TITLES), None, config)
    if layers and math.prod(pipeline.tokenizer.image_shape) <= WIDEST:
        layer = layers[len(layers) // 2]
        width = embed(pipeline, train.images[:1], layer=layer, pool=config.pool).shape[1]
        pixels, unseen = (embed(pipeline, part.images, layer="pixels").cpu() for part in (train, test))
        a, b = principal_components(pixels, unseen, width, config.seed)
        rows.append(probe("PCA of pixels", a, b, train.labels, test.labels, config.seed))
    return rows


def probe_prior(
    pipeline: ImagePipeline, train: Labelled, test: Labelled, layers: list[str], config: ProbeConfig
) -> list[Probe]:
    """Each of the prior's `layers`, beside the same one of a prior with random weights."""
    untrained = with_random_prior(pipeline, config.seed)
    rows, controls = (probes(pipe, train, test, layers, config.pool, config) for pipe in (pipeline, untrained))
    return [replace(row, random_accuracy=control.accuracy) for row, control in zip(rows, controls, strict=True)]


def with_random_prior(pipeline: ImagePipeline, seed: int) -> ImagePipeline:
    """The pipeline with its prior as it was before training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's, where weights are drawn, and not a GPU's
        prior = type(pipeline.prior)(pipeline.prior.config)
    return ImagePipeline(pipeline.tokenizer, prior.to(pipeline.device))


def probes(
    pipeline: ImagePipeline, train: Labelled, test: Labelled, layers: list[str], pool: str | None, config: ProbeConfig
) -> list[Probe]:
    """A probe of each of `layers` that is not too wide. The prior is never told a class."""
    widths = [one.shape[1] for one in embed_layers(pipeline, train.images[:1], layers, pool=pool)]
    layers = [layer for layer, width in zip(layers, widths, strict=True) if width <= WIDEST]
    fit, held_out = (
        embed_layers(pipeline, part.images, layers, pool=pool, batch_size=config.batch_size) for part in (train, test)
    )
    return [
        probe(TITLES.get(layer, layer), a, b, train.labels, test.labels, config.seed)
        for layer, a, b in zip(layers, fit, held_out, strict=True)
    ]


def probe(name: str, features: Tensor, unseen: Tensor, labels: Tensor, truth: Tensor, seed: int) -> Probe:
    """A logistic regression on `features` (n, dim), measured on `unseen` (m, dim), both standardised by the former's
    means and deviations. Part of the former chooses the L2 penalty: the stiffest of those that are right most often."""
    mean, deviation = features.mean(0), features.std(0, correction=0)
    scale = torch.where(deviation > 1e-6, deviation, 1)  # what never changes says nothing, and is left at 0
    x, new = (((each - mean) / scale).cpu().numpy() for each in (features, unseen))
    y, true = labels.numpy(), truth.numpy()
    order = random_rows(len(y), len(y), seed).numpy()
    kept, validation = order[len(y) // VALIDATION :], order[: len(y) // VALIDATION]
    if len(np.unique(y[kept])) < 2:
        raise UserError(f"num_train: {len(y)} images are too few to tell classes apart")
    scores = accuracies(x[kept], y[kept], x[validation], y[validation], STRENGTHS)
    best = STRENGTHS[int(np.argmax(scores))]  # the first of equal ones
    return Probe(name, x.shape[1], best, accuracies(x, y, new, true, (best,))[0])


def accuracies(
    x: np.ndarray, y: np.ndarray, unseen: np.ndarray, truth: np.ndarray, strengths: tuple[float, ...]
) -> list[float]:
    """The share of `unseen` that a probe is right about, for each of the ascending `strengths`; a fit starts where the
    one before it ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model, found = LogisticRegression(max_iter=MOST_STEPS, tol=1e-3, warm_start=True), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a loose fit that stops early is a stiffer one
        for strength in strengths:
            model.set_params(C=strength).fit(x, y)
            found.append(float((model.predict(unseen) == truth).mean()))
    return found


def principal_components(pixels: Tensor, unseen: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Both (n, dim) in the first `width` principal components of the former, or in all there are if fewer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the sketch that the components are found from is random
        directions = torch.pca_lowrank(pixels, min(width, *pixels.shape), niter=4)[2]
    return (pixels - pixels.mean(0)) @ directions, (unseen - pixels.mean(0)) @ directions


# what people see ----------------------------------------------------------------------------------


def report(rows: list[Probe], train: Labelled, test: Labelled, classes: int) -> str:
    """The rows as people read them, the best layer marked, and what chance and the number of images leave open."""
    best = max(row.accuracy for row in rows)
    cells = [("features", "width", "accuracy", "random weights", "")]
    for row in rows:
        control = "" if row.random_accuracy is None else f"{row.random_accuracy:.1%}"
        mark = "*" if row.accuracy == best else ""
        cells.append((row.features, f"{row.width}", f"{row.accuracy:.1%}", control, mark))
    error = math.sqrt(best * (1 - best) / len(test.labels))
    most = float(test.labels.bincount().max()) / len(test.labels)
    return (
        f"{table(cells, right=[1, 2, 3])}\n\n"
        f"* best. Linear probes fitted to {len(train.labels):,} images, measured on {len(test.labels):,}: "
        f"standard error {error:.1%}; the commonest of {classes} classes is {most:.1%}"
    )


def write_csv(rows: list[Probe], path: Path) -> None:
    """The rows, a column per field of `Probe`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def bar_chart(rows: list[Probe]) -> Pixels:
    """Accuracies as bars, those of random weights thin and grey below."""
    width, height = 720, 80 + 30 * len(rows)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((160 / width, 30 / height, 480 / width, 1 - 70 / height))
        places = np.arange(len(rows))
        colors = [YARDSTICK if row.random_accuracy is None else BLUE for row in rows]
        found = axes.barh(places, [100 * row.accuracy for row in rows], 0.54, color=colors)
        axes.barh(places + 0.35, [100 * (row.random_accuracy or 0) for row in rows], 0.12, color="#aaaaaa")
        axes.bar_label(found, [f"{row.accuracy:.1%}" for row in rows], padding=6)
        axes.set_title("Linear probes on held-out images (grey: random weights)", loc="left", size=14)
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.5))
        axes.set_yticks(places, [row.features for row in rows], color=INK, size=14)
        axes.set_xticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
        axes.grid(axis="x")
        axes.grid(axis="y", visible=False)
        axes.spines[:].set_visible(False)

    return render((width, height), draw)


main = partial(run_command, ProbeConfig, run, verb="probe", description=__doc__, defaults=defaults)

"""Measure what each layer of a prior knows of the classes: the accuracy of a linear probe, beside pixels and codes.

A probe's accuracy only means something beside that of features that need no prior (pixels, codes) and of the same prior
with random weights.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files import write_json

from ..config import OutputConfig, UserError, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import ImageDataset, check_shape, load_images
from ..images.pictures import write_picture
from ..images.unseen import require_unseen
from ..metrics.charts import BLUE, GREY, Pixels, render
from ..options import UsesImages
from ..provenance import defaults, trained_data
from ..representation import embed_layers
from ..shuffling import random_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the inverse strength of the L2 penalty, scikit-learn's C."""
WIDEST = 1 << 14  # features; a wider probe would take too long
YARDSTICKS = {"pixels": "raw pixels", "codes": "bag of codes", "embeddings": "code embeddings"}


class ProbeConfig(UsesImages, OutputConfig):
    """Which pipeline, on what images."""

    examples = ("pipeline=runs/gpt_digits/pipeline",)
    often = "pipeline out overwrite num_train num_test layers pool data.source device"

    out: str | None = Field(
        None, description="folder for probe.json and probe.png; default: `probe` beside the pipeline folder"
    )
    num_train: int = Field(5000, ge=10, description="training images that probes are fitted to, or all if fewer")
    num_test: int = Field(2000, ge=1, description="held-out images that they are measured on, or all if fewer")
    layers: list[int] | None = Field(None, description="layers of the prior, from 0; default: all")
    pool: Literal["mean", "flatten", "last"] = Field(
        "mean", description="how a layer's positions become one vector; pixels and codes do not depend on it"
    )
    seed: int = Field(0, ge=0, description="draws the images, the validation part and the random weights")
    batch_size: int = Field(64, ge=1, description="images at a time; the result does not depend on it")


@dataclass(frozen=True)
class Probe:
    """A row of the table: the C that the validation part chose, and accuracies on held-out images, of these features
    and of those of a prior with random weights."""

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
    """Fit the probes, print the table, write `probe.json` and `probe.png`; return the rows."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError('smalti probe needs scikit-learn: pip install "smalti[probe]"') from error
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "probe" if local else "probe"))
    output = Output(out, [config.pipeline, config.data.path], config.overwrite)
    output.check_files(["probe.png", "probe.json"])
    with lock_output(out):
        pipeline = config.load_pipeline()
        count = pipeline.prior.feature_layers
        chosen = list(range(count)) if config.layers is None else config.layers
        if unknown := [layer for layer in chosen if not 0 <= layer < count]:
            raise UserError(f"layers: this prior has {count} layers, from 0 (got {unknown[0]})")
        layers = [f"prior.{layer}" for layer in chosen]
        check_shape(config.data, pipeline.tokenizer.image_shape)
        require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
        splits = load_images(config.data)
        train = some_of(splits.train, config.num_train, config.seed)
        test = some_of(splits.held_out, config.num_test, config.seed)
        rows = probe_layers(pipeline, train, test, list(YARDSTICKS), None, config)
        untrained = with_random_prior(pipeline, config.seed)
        trained, control = (
            probe_layers(each, train, test, layers, config.pool, config) for each in (pipeline, untrained)
        )
        rows += [replace(row, random_accuracy=other.accuracy) for row, other in zip(trained, control, strict=True)]
        print(report(rows, test))
        with output.files() as folder:
            write_picture(bar_chart(rows), folder / "probe.png")
            write_json(folder / "probe.json", {"probes": [asdict(row) for row in rows]})
        print(f"\nprobe.json and probe.png: {out}")
    return rows


def some_of(split: ImageDataset, count: int, seed: int) -> Labelled:
    """Up to `count` images, drawn at random. Raises `UserError` for a split without labels, or all of one class."""
    if split.labels is None:
        raise UserError("data.label_column: a probe needs images with labels, and these have none")
    if len(split.labels.unique()) < 2:
        raise UserError("data.label_column: a probe needs images of two classes or more, and these are all of one")
    chosen = random_rows(len(split), count, seed)
    return Labelled(split.pixels(chosen), split.labels[chosen])


def with_random_prior(pipeline: ImagePipeline, seed: int) -> ImagePipeline:
    """The pipeline with an untrained prior of the same kind."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's, where weights are drawn, and not a GPU's
        prior = type(pipeline.prior)(pipeline.prior.config)
    return ImagePipeline(pipeline.tokenizer, prior.to(pipeline.device))


def probe_layers(
    pipeline: ImagePipeline, train: Labelled, test: Labelled, layers: list[str], pool: str | None, config: ProbeConfig
) -> list[Probe]:
    """A probe of each of `layers` that is not too wide. The prior gets no classes."""
    widths = [features.shape[1] for features in embed_layers(pipeline, train.images[:1], layers, pool=pool)]
    layers = [layer for layer, width in zip(layers, widths, strict=True) if width <= WIDEST]
    fit, unseen = (
        embed_layers(pipeline, part.images, layers, pool=pool, batch_size=config.batch_size) for part in (train, test)
    )
    return [
        fit_probe(YARDSTICKS.get(layer, layer), a, b, train.labels, test.labels, config.seed)
        for layer, a, b in zip(layers, fit, unseen, strict=True)
    ]


def fit_probe(name: str, features: Tensor, unseen: Tensor, labels: Tensor, truth: Tensor, seed: int) -> Probe:
    """Fit a logistic regression to standardised `features` (n, dim), and measure it on `unseen` (m, dim). A fifth of
    the former chooses the L2 penalty: the strongest of those with the highest accuracy. Raises `UserError` if the
    others are all of one class."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3)),
        {"logisticregression__C": STRENGTHS},
        cv=ShuffleSplit(1, test_size=0.2, random_state=seed),
        error_score="raise",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is a penalty too
        try:
            model.fit(features.cpu().numpy(), labels.numpy())
        except ValueError as error:
            raise UserError(f"num_train: {len(labels)} images are too few to tell classes apart") from error
    accuracy = float(model.score(unseen.cpu().numpy(), truth.numpy()))
    return Probe(name, features.shape[1], model.best_params_["logisticregression__C"], accuracy)


# Results


def report(rows: list[Probe], test: Labelled) -> str:
    """The table, the best layer marked, and the accuracy of chance."""
    best = max(row.accuracy for row in rows)
    cells = [("features", "width", "accuracy", "random weights", "")]
    for row in rows:
        control = "" if row.random_accuracy is None else f"{row.random_accuracy:.1%}"
        cells.append((row.features, f"{row.width}", f"{row.accuracy:.1%}", control, "*" * (row.accuracy == best)))
    count = len(test.labels)
    return (
        f"{table(cells, right=[1, 2, 3])}\n\n* best; measured on {count:,} held-out images, standard error "
        f"{math.sqrt(best * (1 - best) / count):.1%}; {int(test.labels.bincount().max()) / count:.1%} are of the "
        "commonest class"
    )


def bar_chart(rows: list[Probe]) -> Pixels:
    """Accuracies as bars, those of random weights grey and narrow below."""
    places = np.arange(len(rows))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(places, [100 * row.accuracy for row in rows], 0.5, color=BLUE)
        axes.bar_label(bars, [f"{row.accuracy:.1%}" for row in rows], padding=4)
        axes.barh(places + 0.34, [100 * (row.random_accuracy or 0) for row in rows], 0.14, color=GREY)
        axes.set_yticks(places, [row.features for row in rows])
        axes.set(title="Linear probes (grey: random weights)", xlabel="accuracy on held-out images, %", xlim=(0, 108))
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()

    return render(720, 100 + 34 * len(rows), draw)


main = partial(run_command, ProbeConfig, run, verb="probe", description=__doc__, defaults=defaults)

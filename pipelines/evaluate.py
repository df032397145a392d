"""Measure a pipeline on held-out images: what the tokenizer keeps, likelihoods, how good and how new samples are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior.checks import NotCausalError, is_built_in, require_causal
from tokenizer.files import PathError, write_json

from .config import Of, OutputConfig, UserError, run_command
from .config.importing import as_asked
from .config.table import table
from .files import Output, lock_output
from .image_pipeline import ImagePipeline
from .images import DataConfig, ImageDataset, Splits, check_shape, load_images, to_float, to_uint8
from .images.origin import describe_source
from .images.pictures import grid_picture, write_picture
from .images.unseen import require_unseen
from .metrics.agreement import agreement
from .metrics.fid import Ruler, make_ruler
from .metrics.likelihood import evaluate_likelihood
from .metrics.quality import AT_A_TIME, LEAST, compare, feature_space, shuffled
from .metrics.reconstruction import (
    SOME,
    evaluate_reconstruction,
    images_at_a_time,
    reconstruction_picture,
)
from .metrics.report import report
from .metrics.samples import Samples
from .processes.group import ALONE, ProcessGroup
from .processes.launch import join_group
from .provenance import defaults, trained_data
from .saving import PipelineFolder, save_again
from .tokens import TokenSplit
from .tokens.shards import smallest_type

T = TypeVar("T")
Figures = dict[str, Any]
RESULTS = ("samples.png", "reconstructions.png", "nearest.png", "evaluation.json", "evaluation.txt")
KNOWN = 1 << 28  # numbers, 1 GiB, of training images whose pixels are compared to at most


class EvaluateConfig(OutputConfig):
    """What is measured, on what."""

    examples = (
        "pipeline=runs/gpt_digits/pipeline",
        "pipeline=runs/gpt_digits/pipeline num_images=200 update_card=false",
    )
    often = (
        "pipeline out overwrite num_images data.source feature_steps inception_weights num_orders update_card device"
    )

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    out: str | None = Field(
        None, description="folder for pictures and evaluation.json; default: `evaluation` beside the pipeline folder"
    )
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(), description="the images; defaults to those the pipeline was trained on"
    )
    num_images: int = Field(
        1000,
        ge=0,
        description="samples that are judged; sets of images are compared at this size, or at that of the training or "
        "held-out split if it is smaller",
    )
    feature_steps: int = Field(
        300,
        ge=0,
        description="training steps of the small classifier in whose features samples are judged; 0, and data without "
        "classes: a net of random weights",
    )
    inception_weights: str | None = Field(
        None,
        description="file of torch-fidelity's Inception weights, which add the true FID, Inception Score and the FID "
        "of reconstructions; nothing is downloaded",
    )
    reference: str = Field(
        "held_out",
        description="what the FID of samples is taken against: as many images `held_out`, all images of `train`, or "
        "a .npz file with `mu` and `sigma`, as ADM published them; the last two with num_images=50000",
    )
    num_orders: int = Field(1, ge=1, description="score a mixture of so many orders, with a prior that takes any")
    seed: int = Field(0, ge=0, lt=1 << 63, description="sample k uses seed + k")
    device: str = Field("auto", description="cpu, cuda, mps or auto")
    update_card: bool = Field(True, description="write the figures into the pipeline's model card")


def run(config: EvaluateConfig) -> Figures:
    """Measure, print a table, write pictures and `evaluation.json`, and update the model card; returns the figures. Of
    several processes each takes its part of the images; the first prints and writes."""
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "evaluation" if local else "evaluation"))
    with join_group(config.device) as (group, device):
        pipeline, ruler = group.main_first(lambda: prepare(config, out, device))
        card = config.pipeline if local and config.update_card else None
        with lock_output(out, group), lock_output(card, group, key="pipeline"):
            figures, pictures = measure(pipeline, config, ruler, group)
            if group.is_main:
                publish(pipeline, config, out, figures, pictures)
    return figures


def prepare(config: EvaluateConfig, out: Path, device: torch.device) -> tuple[ImagePipeline, Ruler | None]:
    """What measures. Raises `UserError` for mistakes that can be found before anything is measured."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=device)
    check_choices(config, pipeline)
    require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
    ruler = make_ruler(config.inception_weights, config.reference, device)
    output_of(config, out).check_files(RESULTS)
    return pipeline, ruler


def output_of(config: EvaluateConfig, out: Path) -> Output:
    """Where the results go."""
    return Output(out, [config.pipeline, config.data.path], config.overwrite)


def measure(
    pipeline: ImagePipeline, config: EvaluateConfig, ruler: Ruler | None, group: ProcessGroup
) -> tuple[Figures, dict[str, np.ndarray]]:
    """All figures, and the pictures."""
    images = load_images(config.data)
    check_classes(pipeline, images.train, images.held_out)
    figures: Figures = {"num_images": len(images.held_out)}
    figures |= evaluate_reconstruction(pipeline.tokenizer, images.held_out, group=group, looks=SOME)
    train, test = (encode_all(pipeline, part, group) for part in (images.train, images.held_out))
    if not is_built_in(pipeline.prior):
        try:
            require_causal(pipeline.prior, test.tokens[:1].long())
        except NotCausalError as error:
            raise UserError(f"pipeline: {error}; its likelihoods mean nothing") from error
    figures |= evaluate_likelihood(
        pipeline.tokenizer, pipeline.prior, train, test, images.held_out, config.num_orders, group
    )
    pictures = {
        "samples": pipeline.sample_picture(seed=config.seed, group=group),
        "reconstructions": reconstruction_picture(pipeline.tokenizer, images.held_out),
    }
    samples = None
    if config.num_images:
        labels = wanted_labels(pipeline, images.train, config.num_images)
        samples = draw_samples(pipeline, labels, config.num_images, config.seed, group)
        found, shown = evaluate_samples(pipeline, images, config, samples, labels)
        figures, pictures = figures | found, pictures | shown
    if ruler is not None:
        figures |= ruler.figures(images, partial(reconstruct, pipeline), samples, group)
    return figures, pictures


def publish(
    pipeline: ImagePipeline, config: EvaluateConfig, out: Path, figures: Figures, pictures: dict[str, np.ndarray]
) -> None:
    """Print and write what was measured."""
    text = report(
        figures,
        exact=pipeline.prior.exact,
        vocab_size=pipeline.prior.grid.vocab_size,
        num_images=figures["num_images"],
        device=str(pipeline.device),
    )
    with output_of(config, out).files() as folder:
        for name, picture in pictures.items():
            write_picture(picture, folder / f"{name}.png")
        orders = {"num_orders": config.num_orders} if config.num_orders > 1 else {}
        write_json(folder / "evaluation.json", figures | orders)
        (folder / "evaluation.txt").write_text(text + "\n", encoding="utf-8")
    if config.update_card and Path(config.pipeline).is_dir():
        pipeline.provenance = {**pipeline.provenance, "evaluation": figures}
        try:
            save_again(pipeline, config.pipeline, pictures["samples"])
        except PathError as error:  # the figures are there all the same
            print(f"warning: the model card is as it was: {error}", file=sys.stderr)
    print(text + "\n")
    print(table([(name, f"{out / name}.png") for name in pictures] + [("figures", str(out / "evaluation.json"))]))
    # What `tune` chooses is written into a folder, and once is enough.
    tunes = Path(config.pipeline).is_dir() and "tuning" not in pipeline.provenance
    verb = "tune" if tunes else "generate"
    print(f"\ndone; next: smalti {verb}{as_asked()} pipeline={quote(config.pipeline)}")


def check_choices(config: EvaluateConfig, pipeline: ImagePipeline) -> None:
    """Raise `UserError` for what does not go with the pipeline."""
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if config.num_orders > 1 and not (pipeline.prior.any_order and pipeline.prior.exact):
        raise UserError(f"num_orders: this {pipeline.prior.name} prior has one density, not one for each order")


def check_classes(pipeline: ImagePipeline, *splits: ImageDataset) -> None:
    """Raise `UserError` for labelled images of other classes than the pipeline's."""
    count, names = pipeline.prior.num_classes, pipeline.labels
    for split in splits:
        found = split.class_names
        if split.labels is not None and count and (len(found) != count or (names and names != found)):
            raise UserError(
                f"data.label_column: the pipeline's {count} classes are not the {len(found)} of these images "
                f"({', '.join(found[:10])}); null compares without labels"
            )


def encode_all(pipeline: ImagePipeline, images: ImageDataset, group: ProcessGroup = ALONE) -> TokenSplit:
    """Tokens and labels of a whole data set."""
    size, kind = images_at_a_time(images.image_shape), smallest_type(pipeline.prior.grid.vocab_size)

    def encode(start: int) -> np.ndarray:
        batch = images.batch(np.arange(start, min(start + size, len(images))))
        return pipeline.encode(batch).cpu().to(kind).numpy()

    parts = group.map(encode, range(0, len(images), size))
    return TokenSplit(torch.from_numpy(np.concatenate(parts)), images.labels)


def reconstruct(pipeline: ImagePipeline, images: Tensor) -> Tensor:
    """Reconstructions `(B, C, H, W)` as `in_bytes`."""
    size = images_at_a_time(pipeline.tokenizer.image_shape)
    tokens = pipeline.encode(images, batch_size=size)
    return in_bytes(pipeline.decode(tokens, output_type="pt", batch_size=size))


def in_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] on the CPU, of 256 levels: what is compared to real images has been an 8-bit image too."""
    return to_float(to_uint8(images)).cpu()


def draw_samples(
    pipeline: ImagePipeline, labels: Tensor | None, count: int, seed: int, group: ProcessGroup = ALONE
) -> Samples:
    """Sample k is of class `labels[k]` and uses seed + k, however many processes there are."""

    def draw(start: int, end: int) -> Tensor:
        given = None if labels is None else labels[start:end].tolist()
        return pipeline(end - start, given, seed=seed + start, output_type="pt", progress=False).images

    return Samples(draw, count, group)


def evaluate_samples(
    pipeline: ImagePipeline, images: Splits, config: EvaluateConfig, samples: Samples, labels: Tensor | None
) -> tuple[Figures, dict[str, np.ndarray]]:
    """Figures of samples whose classes, `labels`, are as frequent as in the training images; and the picture `nearest`:
    the most suspicious samples, each row above the row of the training images nearest to them."""
    train, held_out, group = images.train, images.held_out, samples.group
    figures: Figures = {"num_samples": samples.count, "samples_per_second": samples.count / samples.seconds}
    if labels is not None and train.labels is not None and held_out.labels is not None:
        figures |= evaluate_classes(pipeline, samples, labels, train, held_out)
    count = min(samples.count, len(train), len(held_out))
    if count < LEAST:
        return figures, {}
    space = feature_space(train, held_out, config.feature_steps, describe_source(config.data.source), group)
    drawn = samples.rows(space, count)
    found, suspects, copied = compare(space, drawn, train, held_out, partial(reconstruct, pipeline), group)
    figures |= {"feature_space": space.name, "feature_origin": space.origin, **found}
    columns = min(8, count)
    shown = samples.some(suspects[:16].tolist())
    rows = zip(shown.split(columns), train.batch(copied[:16]).split(columns), strict=True)
    return figures, {"nearest": grid_picture(torch.cat([part for pair in rows for part in pair]), columns)}


def wanted_labels(pipeline: ImagePipeline, train: ImageDataset, count: int) -> Tensor | None:
    """The class `(count,)` of each sample: those of random training images, or all classes in turn where these have
    none."""
    if not pipeline.prior.num_classes:
        return None
    turns = torch.arange(count)
    if train.labels is None:
        return turns % pipeline.prior.num_classes
    return train.labels[shuffled(len(train))[turns % len(train)]]


def evaluate_classes(
    pipeline: ImagePipeline, samples: Samples, wanted: Tensor, train: ImageDataset, held_out: ImageDataset
) -> Figures:
    """How often a 1-nearest-neighbour classifier on training pixels gives a sample the class that was asked for, the
    same for real held-out images and for their reconstructions."""
    assert train.labels is not None and held_out.labels is not None
    some = shuffled(len(held_out))[:SOME]
    parts, truth = some.split(AT_A_TIME), held_out.labels[some]
    most = max(1, KNOWN // math.prod(train.image_shape))
    seen = torch.arange(len(train)) if len(train) <= most else shuffled(len(train))[:most]
    known, labels = train.batch(seen), train.labels[seen]

    def share(parts: Sequence[T], images_of: Callable[[T], Tensor], wanted: Tensor) -> float:
        return agreement(parts, images_of, wanted, known, labels, samples.group)

    figures: Figures = {
        "class_agreement": share(samples.parts, samples.images, wanted),
        "real_class_agreement": share(parts, held_out.batch, truth),
        "reconstruction_class_agreement": share(parts, lambda rows: reconstruct(pipeline, held_out.batch(rows)), truth),
        "class_agreement_images": len(some),
    }
    return figures if len(seen) == len(train) else figures | {"class_agreement_known": len(seen)}


main = partial(run_command, EvaluateConfig, run, verb="evaluate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()

"""Measure a pipeline on held-out images: what the tokenizer keeps, likelihoods, how good and how new samples are."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files.errors import PathError
from tokenizer.files.writing import results_folder, write_json

from .config import Config, UserError, choose_device, run_command
from .config.outputs import check_out_results
from .config.table import table
from .image_pipeline import ImagePipeline
from .images import DataConfig, ImageDataset, Splits, check_shape, load_images, to_float, to_uint8
from .images.origin import named
from .images.pictures import grid_picture, save_picture
from .metrics.agreement import agreement
from .metrics.likelihood import evaluate_likelihood
from .metrics.quality import (
    LEAST,
    FeatureSpace,
    compare,
    feature_space,
    frechet_distance,
    inception_space,
    shuffled,
    ssim,
)
from .metrics.reconstruction import evaluate_reconstruction, images_at_a_time, reconstruction_picture
from .metrics.report import report
from .stages.provenance import defaults
from .tokens import TokenSplit

Figures = dict[str, Any]
RESULTS = ("samples.png", "reconstructions.png", "nearest.png", "evaluation.json", "evaluation.txt")
SOME = 2000  # held-out images for the figures that are slow, drawn at random


class EvaluateConfig(Config):
    """What is measured, on what."""

    pipeline: str = Field(description="pipeline folder, or a Hub id")
    out: str | None = Field(
        None, description="folder for pictures and evaluation.json; default: `evaluation` beside the pipeline folder"
    )
    data: DataConfig = Field(DataConfig(), description="the images; defaults to those the pipeline was trained on")
    num_samples: int = Field(
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
        None, description="file of torch-fidelity's Inception weights, which add the true FID; nothing is downloaded"
    )
    num_orders: int = Field(1, ge=1, description="score a mixture of so many orders, with a prior that takes any")
    seed: int = Field(0, ge=0, description="sample k uses seed + k")
    device: str = Field("auto", description="cpu, cuda, mps or auto")
    update_card: bool = Field(True, description="write the figures into the pipeline's model card")


def run(config: EvaluateConfig) -> Figures:
    """Measure, print a table, write pictures and `evaluation.json`, and update the model card; returns the figures."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    check_choices(config, pipeline)
    inception = inception_space(config.inception_weights, pipeline.device) if config.inception_weights else None
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "evaluation" if local else "evaluation"))
    inputs = [config.pipeline, config.data.path]
    check_out_results(out, RESULTS, inputs)
    images = load_images(config.data)
    check_classes(pipeline, images.train, images.held_out)
    figures: Figures = {"num_images": len(images.held_out)}
    figures |= evaluate_reconstruction(pipeline.tokenizer, images.held_out)
    figures |= evaluate_similarity(pipeline, images.held_out)
    tokens = (encode_all(pipeline, images.train), encode_all(pipeline, images.held_out))
    figures |= evaluate_likelihood(pipeline.tokenizer, pipeline.prior, *tokens, images.held_out, config.num_orders)
    pictures = {
        "samples": pipeline.sample_picture(seed=config.seed),
        "reconstructions": reconstruction_picture(pipeline.tokenizer, images.held_out),
    }
    if config.num_samples:
        found, shown = evaluate_samples(pipeline, images, config, inception)
        figures, pictures = figures | found, pictures | shown
    text = report(
        figures,
        exact=pipeline.prior.exact,
        vocab_size=pipeline.prior.grid.vocab_size,
        num_images=len(images.held_out),
        device=str(pipeline.device),
    )
    with results_folder(out, inputs=inputs) as folder:
        for name, picture in pictures.items():
            save_picture(picture, folder / f"{name}.png")
        orders = {"num_orders": config.num_orders} if config.num_orders > 1 else {}
        write_json(folder / "evaluation.json", figures | orders)
        (folder / "evaluation.txt").write_text(text + "\n", encoding="utf-8")
    if config.update_card and local:
        pipeline.provenance = {**pipeline.provenance, "evaluation": figures}
        try:
            pipeline.to(device="cpu").save_pretrained(config.pipeline, sample_grid=pictures["samples"])
        except PathError as error:  # the figures are there all the same
            print(f"warning: the model card is as it was: {error}", file=sys.stderr)
    print(text + "\n")
    print(table([(name, f"{out / name}.png") for name in pictures] + [("figures", str(out / "evaluation.json"))]))
    return figures


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


def encode_all(pipeline: ImagePipeline, images: ImageDataset) -> TokenSplit:
    """Tokens and labels of a whole data set."""
    size = images_at_a_time(images.image_shape)
    starts = range(0, len(images), size)
    parts = [pipeline.encode(images.batch(np.arange(i, min(i + size, len(images))))).cpu() for i in starts]
    return TokenSplit(torch.cat(parts), images.labels)


def reconstruct(pipeline: ImagePipeline, images: Tensor) -> Tensor:
    """Reconstructions `(B, C, H, W)` as `in_bytes`."""
    return in_bytes(pipeline.reconstruct(images, output_type="pt"))


def in_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] on the CPU, of 256 levels: what is compared to real images has been an 8-bit image too."""
    return to_float(to_uint8(images)).cpu()


def evaluate_similarity(pipeline: ImagePipeline, held_out: ImageDataset) -> Figures:
    """Mean SSIM of held-out images and their reconstructions."""
    some = shuffled(len(held_out))[:SOME]
    parts = map(held_out.batch, some.split(images_at_a_time(held_out.image_shape)))
    found = torch.cat([ssim(part, reconstruct(pipeline, part)) for part in parts])
    return {"ssim": float(found.double().mean()), "ssim_images": len(some)}


def evaluate_samples(
    pipeline: ImagePipeline, images: Splits, config: EvaluateConfig, inception: FeatureSpace | None
) -> tuple[Figures, dict[str, np.ndarray]]:
    """Figures of samples whose classes are as frequent as in the training images; and the picture `nearest`: the most
    suspicious samples, each row above the row of the training images nearest to them."""
    train, held_out = images.train, images.held_out
    labels = wanted_labels(pipeline, train, config.num_samples)
    given = None if labels is None else labels.tolist()
    began = time.monotonic()
    drawn = pipeline(num_images=config.num_samples, labels=given, seed=config.seed, output_type="pt").images
    samples = in_bytes(drawn)  # on the CPU: a GPU is still computing the last of them when the call returns
    seconds = time.monotonic() - began
    figures: Figures = {"num_samples": config.num_samples, "samples_per_second": config.num_samples / seconds}
    if labels is not None and train.labels is not None and held_out.labels is not None:
        figures |= evaluate_classes(pipeline, samples, labels, train, held_out)
    count = min(len(samples), len(train), len(held_out))
    if count < LEAST:
        return figures, {}
    space = feature_space(train, held_out, config.feature_steps, named(config.data.source))
    found, suspects, copied = compare(space, samples, train, held_out, lambda batch: reconstruct(pipeline, batch))
    figures |= {"feature_space": space.name, "feature_origin": space.origin, **found}
    if inception is not None:
        real = inception.of(held_out, shuffled(len(held_out))[:count])
        figures["fid"] = frechet_distance(inception(samples[:count]), real)
        figures["train_fid"] = frechet_distance(inception.of(train, shuffled(len(train))[:count]), real)
    columns = min(8, count)
    rows = zip(samples[suspects[:16]].split(columns), train.batch(copied[:16]).split(columns), strict=True)
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
    pipeline: ImagePipeline, samples: Tensor, wanted: Tensor, train: ImageDataset, held_out: ImageDataset
) -> Figures:
    """How often a 1-nearest-neighbour classifier on training pixels gives a sample the class that was asked for, the
    same for real held-out images and for their reconstructions."""
    assert train.labels is not None and held_out.labels is not None
    some = shuffled(len(held_out))[:SOME]
    real, truth = held_out.batch(some), held_out.labels[some]
    known = train.batch(np.arange(len(train)))
    sets = {
        "class_agreement": (samples, wanted),
        "real_class_agreement": (real, truth),
        "reconstruction_class_agreement": (reconstruct(pipeline, real), truth),
    }
    figures = {name: agreement(each, labels, known, train.labels) for name, (each, labels) in sets.items()}
    return figures | {"class_agreement_images": len(some)}


main = partial(run_command, EvaluateConfig, run, verb="evaluate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()

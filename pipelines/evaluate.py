"""Measure a pipeline on held-out images: reconstruction, codebook use, likelihood, whether samples look their class."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior import Prior
from tokenizer.storage import read_json, write_json

from .config import Config, UserError, run_command
from .generation import ImagePipeline
from .images import DataConfig, ImageDataset, load_images
from .index import PROVENANCE
from .pictures import save_picture
from .tokens import TokenSplit
from .train_prior import bits_per_token
from .train_tokenizer import evaluate_reconstruction, reconstruction_picture


class EvaluateConfig(Config):
    """What is measured, on what."""

    pipeline: str = Field(description="pipeline folder, or a Hub id")
    out: str | None = Field(
        None, description="folder for the grids and evaluation.json; default: `evaluation` beside the pipeline folder"
    )
    data: DataConfig = Field(DataConfig(), description="the images; defaults to those the pipeline was trained on")
    num_samples: int = Field(1000, ge=0, description="samples judged by the nearest-neighbour classifier")
    num_orders: int = Field(1, ge=1, description="score a mixture of so many orders, with a prior that takes any")
    seed: int = Field(0, ge=0, description="sample k uses seed + k")
    device: str = Field("auto", description="cpu, cuda, mps or auto")
    update_card: bool = Field(True, description="write the figures into the pipeline's model card")


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The data source that the pipeline named on the command line was trained on."""
    path = Path(str(given.get("pipeline", ""))) / PROVENANCE
    return {"data": read_json(path).get("data", {})} if path.is_file() else {}


def run(config: EvaluateConfig) -> dict[str, float]:
    """Measure, print a table, write grids and `evaluation.json`, and update the model card; returns the figures."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    if config.data.image_shape != pipeline.tokenizer.image_shape:
        raise UserError(
            f"data.image_size, data.channels: the pipeline's images are {pipeline.tokenizer.image_shape} "
            f"(channels, height, width), these are {config.data.image_shape}"
        )
    if config.num_orders > 1 and not (pipeline.prior.any_order and pipeline.prior.exact):
        raise UserError(f"num_orders: this {pipeline.prior.name} prior has one density, not one for each order")
    images = load_images(config.data)
    train, held_out = images.train, images.held_out
    check_classes(pipeline, train, held_out)
    figures = evaluate_reconstruction(pipeline.tokenizer, held_out)
    figures |= evaluate_likelihood(pipeline, train, held_out, config.num_orders)
    if train.labels is not None and held_out.labels is not None and pipeline.prior.num_classes and config.num_samples:
        figures |= evaluate_classes(pipeline, train, held_out, config.num_samples, config.seed)
    local = Path(config.pipeline).is_dir()
    out = (
        Path(config.out)
        if config.out
        else (Path(config.pipeline).parent / "evaluation" if local else Path("evaluation"))
    )
    grid = pipeline.sample_picture(seed=config.seed)
    save_picture(grid, out / "samples.png")
    save_picture(reconstruction_picture(pipeline.tokenizer, held_out), out / "reconstructions.png")
    write_json(out / "evaluation.json", figures | ({"num_orders": config.num_orders} if config.num_orders > 1 else {}))
    if config.update_card and local:
        pipeline.provenance = {**pipeline.provenance, "evaluation": figures}
        pipeline.to(device="cpu").save_pretrained(config.pipeline, sample_grid=grid)
    report = table(figures, pipeline, held_out)
    (out / "evaluation.txt").write_text(report + "\n", encoding="utf-8")
    print(report)
    print(
        f"\nsamples          {out / 'samples.png'}\nreconstructions  {out / 'reconstructions.png'}\n"
        f"figures          {out / 'evaluation.json'}"
    )
    return figures


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


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one. Raises `UserError` for one that is not there."""
    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} can not be used here ({str(error).splitlines()[0]})") from error


def evaluate_likelihood(
    pipeline: ImagePipeline, train: ImageDataset, held_out: ImageDataset, num_orders: int
) -> dict[str, float]:
    """Bits per token of the prior on held-out images, beside those of `Marginal` fitted to the training images."""
    rows, test = encode_all(pipeline, train), encode_all(pipeline, held_out)
    classes = pipeline.prior.num_classes if train.labels is not None else 0
    marginal = Prior.create("marginal", grid=pipeline.prior.grid, num_classes=classes)
    marginal.initialize(rows.tokens, rows.labels)
    unlabelled = TokenSplit(test.tokens, None)
    known = test if pipeline.prior.num_classes else unlabelled
    return {
        "bits_per_token": bits_per_token(pipeline.prior, known, num_orders=num_orders),
        "unconditional_bits_per_token": bits_per_token(pipeline.prior, unlabelled, num_orders=num_orders),
        "marginal_bits_per_token": bits_per_token(marginal, test),
        "uniform_bits_per_token": math.log2(pipeline.prior.grid.vocab_size),
    }


def encode_all(pipeline: ImagePipeline, images: ImageDataset, batch_size: int = 256) -> TokenSplit:
    """Tokens and labels of a whole data set."""
    starts = range(0, len(images), batch_size)
    parts = [pipeline.encode(images.batch(np.arange(i, min(i + batch_size, len(images))))).cpu() for i in starts]
    return TokenSplit(torch.cat(parts), images.labels)


def evaluate_classes(
    pipeline: ImagePipeline, train: ImageDataset, held_out: ImageDataset, count: int, seed: int
) -> dict[str, float]:
    """How often a 1-nearest-neighbour classifier on training pixels gives a sample the class that was asked for, the
    same for real held-out images and for their reconstructions, and samples per second."""
    assert train.labels is not None and held_out.labels is not None
    wanted = torch.arange(count) % pipeline.prior.num_classes
    began = time.monotonic()
    samples = pipeline(num_images=count, labels=wanted.tolist(), seed=seed, output_type="pt").images
    seconds = time.monotonic() - began
    some = np.linspace(0, len(held_out) - 1, min(len(held_out), 2000)).astype(np.int64)
    real = held_out.batch(some)
    truth = held_out.labels[some]
    kept = pipeline.reconstruct(real, output_type="pt").cpu()
    known = train.batch(np.arange(len(train)))
    agreement = {
        name: float((nearest_label(images, known, train.labels) == labels).double().mean())
        for name, images, labels in (("class_agreement", samples.cpu(), wanted), ("real_class_agreement", real, truth),
                                     ("reconstruction_class_agreement", kept, truth))
    }  # fmt: skip
    return {**agreement, "samples_per_second": count / seconds}


def nearest_label(images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Label `(B,)` of the nearest of `known` `(n, C, H, W)` to each of `images` `(B, C, H, W)`, by squared error."""
    rows, known = images.flatten(1), known.flatten(1)
    squares, transposed = known.square().sum(1), known.t()
    found = [torch.addmm(squares, part, transposed, alpha=-2).argmin(1) for part in rows.split(256)]
    return labels[torch.cat(found)]


def table(figures: dict[str, float], pipeline: ImagePipeline, held_out: ImageDataset) -> str:
    """The figures as people read them, each with what it should be compared to."""
    f, vocab, at_most = figures, pipeline.prior.grid.vocab_size, "" if pipeline.prior.exact else "<= "
    rows = [
        ("held-out PSNR", f"{f['psnr']:.2f} dB", f"{len(held_out):,} images"),
        ("codebook use", f"{f['codebook_usage']:.1%} of {vocab}", f"perplexity {f['codebook_perplexity']:.0f}"),
        ("bits per token", f"{at_most}{f['bits_per_token']:.3f}",
         f"position frequencies {f['marginal_bits_per_token']:.3f}, uniform {f['uniform_bits_per_token']:.3f}"),
        ("  without labels", f"{at_most}{f['unconditional_bits_per_token']:.3f}", ""),
    ]  # fmt: skip
    if "class_agreement" in f:
        rows += [
            ("class agreement", f"{f['class_agreement']:.1%}", f"real held-out images {f['real_class_agreement']:.1%}, "
             f"their reconstructions {f['reconstruction_class_agreement']:.1%}"),
            ("samples per second", f"{f['samples_per_second']:.0f}", f"on {pipeline.device}"),
        ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {beside}".rstrip() for name, value, beside in rows)


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(EvaluateConfig, run, argv, verb="evaluate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()

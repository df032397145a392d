"""Measure a pipeline on held-out images: what the tokenizer keeps, likelihoods, how good and how new samples are."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files.errors import PathError
from tokenizer.files.writing import results_folder, write_json

from .config import Config, UserError, choose_device, run_command
from .config.outputs import check_out_results
from .image_pipeline import ImagePipeline
from .images import DataConfig, ImageDataset, Splits, check_shape, load_images, to_float, to_uint8
from .images.origin import named
from .images.pictures import grid_picture, save_picture
from .metrics.likelihood import bits_per_token, log_probs, rows_at_a_time
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
from .stages.provenance import defaults
from .tokens import TokenSplit

Figures = dict[str, Any]
RESULTS = ("samples.png", "reconstructions.png", "nearest.png", "evaluation.json", "evaluation.txt")
SOME = 2000  # held-out images for the figures that are slow, drawn at random
FEW = 256  # held-out images that are scored in several orders
ORDERS = 8


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
        description="samples that are judged; sets of images are compared at this "
        "size, or at that of the training or held-out split if it is smaller",
    )
    feature_steps: int = Field(
        300,
        ge=0,
        description="training steps of the small classifier in whose features "
        "samples are judged; 0, and data without classes: a net of random weights",
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
    figures |= evaluate_likelihood(pipeline, images.train, images.held_out, config.num_orders)
    pictures = {
        "samples": pipeline.sample_picture(seed=config.seed),
        "reconstructions": reconstruction_picture(pipeline.tokenizer, images.held_out),
    }
    if config.num_samples:
        found, shown = evaluate_samples(pipeline, images, config, inception)
        figures, pictures = figures | found, pictures | shown
    report = table(figures, pipeline, images.held_out)
    with results_folder(out, inputs=inputs) as folder:
        for name, picture in pictures.items():
            save_picture(picture, folder / f"{name}.png")
        orders = {"num_orders": config.num_orders} if config.num_orders > 1 else {}
        write_json(folder / "evaluation.json", figures | orders)
        (folder / "evaluation.txt").write_text(report + "\n", encoding="utf-8")
    if config.update_card and local:
        pipeline.provenance = {**pipeline.provenance, "evaluation": figures}
        try:
            pipeline.to(device="cpu").save_pretrained(config.pipeline, sample_grid=pictures["samples"])
        except PathError as error:  # the figures are there all the same
            print(f"warning: the model card is as it was: {error}", file=sys.stderr)
    print(report + "\n")
    for name in pictures:
        print(f"{name:<15}  {out / name}.png")
    print(f"{'figures':<15}  {out / 'evaluation.json'}")
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


def evaluate_likelihood(
    pipeline: ImagePipeline, train: ImageDataset, held_out: ImageDataset, num_orders: int
) -> Figures:
    """Bits per token of the prior on held-out images, beside those of `Marginal` fitted to the training images; bits
    per dim, where the decoder has a likelihood; and what the order has to do with it, where the prior takes any."""
    rows, test = encode_all(pipeline, train), encode_all(pipeline, held_out)
    prior, grid = pipeline.prior, pipeline.prior.grid
    classes = prior.num_classes if train.labels is not None else 0
    marginal = Prior.create("marginal", grid=grid, num_classes=classes)
    marginal.initialize(rows.tokens[:], rows.labels)
    unlabelled = TokenSplit(test.tokens, None)
    known = test if prior.num_classes else unlabelled
    nats = log_probs(prior, known, np.arange(len(known)), num_orders)
    return {
        "bits_per_token": float(-nats.mean()) / (math.log(2) * len(grid)),
        "unconditional_bits_per_token": bits_per_token(prior, unlabelled, num_orders=num_orders),
        "marginal_bits_per_token": bits_per_token(marginal, known if classes else unlabelled),
        "uniform_bits_per_token": math.log2(grid.vocab_size),
        **evaluate_bits(pipeline.tokenizer, held_out, test, nats),
        **(evaluate_orders(prior, known) if prior.any_order else {}),
    }


@torch.inference_mode()
def evaluate_bits(tokenizer: Tokenizer, held_out: ImageDataset, test: TokenSplit, nats: Tensor) -> Figures:
    """Bits per dim of held-out images, with the standard error over images; and the parts of it, of the tokens, whose
    log p are `nats` `(n,)`, and of the pixels given the tokens. Nothing if the decoder has no likelihood."""
    pixels = []
    for rows in np.array_split(np.arange(len(test)), -(-len(test) // images_at_a_time(held_out.image_shape))):
        images, tokens = held_out.batch(rows).to(tokenizer.device), test.rows(rows).to(tokenizer.device)
        found = tokenizer.pixel_log_prob(images, tokens)
        if found is None:
            return {}
        pixels.append(found.cpu().double())
    dims = math.log(2) * math.prod(held_out.image_shape)
    prior, decoder = -nats / dims, -torch.cat(pixels) / dims
    total = prior + decoder
    return {
        "bits_per_dim": float(total.mean()),
        "bits_per_dim_error": float(total.std(correction=0)) / math.sqrt(len(total)),
        "prior_bits_per_dim": float(prior.mean()),
        "pixel_bits_per_dim": float(decoder.mean()),
    }


@torch.inference_mode()
def evaluate_orders(prior: Prior, test: TokenSplit) -> Figures:
    """How much log p of an image differs from order to order, in nats: its standard deviation over `ORDERS` orders,
    the mean over a few images."""
    found = []
    for rows in shuffled(len(test))[:FEW].split(rows_at_a_time(prior.grid)):
        labels = None if test.labels is None else test.labels[rows].to(prior.device)
        found.append(prior.order_spread(test.rows(rows).to(prior.device), labels, ORDERS).cpu().double())
    spread = torch.cat(found)
    return {"order_spread": float(spread.mean()), "order_spread_images": len(spread)}


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
    samples = in_bytes(drawn)  # on the CPU: a GPU has still to make the last of them when it is asked for them
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
    """The class `(count,)` of each sample: those of training images at random, or all alike where these have none."""
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
    agreement = {
        name: float((nearest_label(images, known, train.labels) == labels).double().mean())
        for name, (images, labels) in sets.items()
    }
    return agreement | {"class_agreement_images": len(some)}


def nearest_label(images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Label `(B,)` of the nearest of `known` `(n, C, H, W)` to each of `images` `(B, C, H, W)`, by squared error."""
    rows, known = images.flatten(1), known.flatten(1)
    squares, transposed = known.square().sum(1), known.t()
    found = [torch.addmm(squares, part, transposed, alpha=-2).argmin(1) for part in rows.split(256)]
    return labels[torch.cat(found)]


def table(figures: Figures, pipeline: ImagePipeline, held_out: ImageDataset) -> str:
    """The figures as people read them, each with what it should be compared to."""
    f, vocab, at_most = figures, pipeline.prior.grid.vocab_size, "" if pipeline.prior.exact else "<= "
    rows = [("held-out PSNR", f"{f['psnr']:.2f} dB", f"{len(held_out):,} images, as all but where another number is")]
    if "ssim" in f:
        rows.append(("  SSIM", f"{f['ssim']:.3f}", f"{f['ssim_images']:,} images"))
    rows.append(("codebook use", f"{f['codebook_usage']:.1%} of {vocab}", f"perplexity {f['codebook_perplexity']:.0f}"))
    beside = f"position frequencies {f['marginal_bits_per_token']:.3f}, uniform {f['uniform_bits_per_token']:.3f}"
    rows.append(("bits per token", f"{at_most}{f['bits_per_token']:.3f}", beside))
    rows.append(("  without labels", f"{at_most}{f['unconditional_bits_per_token']:.3f}", ""))
    if "order_spread" in f:
        beside = f"nats that log p of an image differs by between {ORDERS} orders; {f['order_spread_images']:,} images"
        rows.append(("  spread over orders", f"{f['order_spread']:.2f}", beside))
    if "bits_per_dim" in f:
        parts = f"tokens {f['prior_bits_per_dim']:.3f} + pixels given the tokens {f['pixel_bits_per_dim']:.3f}"
        beside = f"+- {f['bits_per_dim_error']:.3f}; {parts}"
        rows.append(("bits per dim", f"{at_most}{f['bits_per_dim']:.3f}", beside))
    else:
        rows.append(("bits per dim", "none", "this decoder has no likelihood"))
    rows += sample_rows(f, str(pipeline.device))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {beside}".rstrip() for name, value, beside in rows)


def sample_rows(f: Figures, device: str) -> list[tuple[str, str, str]]:
    """The rows of the table about samples."""
    rows = []
    if "class_agreement" in f:
        compared = (
            f"of {f['num_samples']:,} samples; {f['class_agreement_images']:,} real held-out images "
            f"{f['real_class_agreement']:.1%}, their reconstructions {f['reconstruction_class_agreement']:.1%}"
        )
        rows.append(("class agreement", f"{f['class_agreement']:.1%}", compared))
    if "samples_per_second" in f:
        rows += [("samples per second", f"{f['samples_per_second']:.0f}", f"on {device}")]
    if "feature_space" not in f:
        return [*rows, ("Frechet distance", "none", f"needs {LEAST} samples, training images and held-out images")]

    def beside(name: str) -> str:
        return f"training images {f['train_' + name]:.3f}, their reconstructions {f['reconstruction_' + name]:.3f}"

    rows += [
        ("features", f["feature_space"], f["feature_origin"]),
        (
            f"Frechet distance [{f['feature_space']}]",
            f"{f['frechet_distance']:.3f}",
            f"{beside('frechet_distance')}; all with {f['num_compared']:,} held-out images",
        ),
    ]
    rows += [(f"  {name}", f"{f[name]:.3f}", beside(name)) for name in ("precision", "recall", "density", "coverage")]
    if "fid" in f:
        rows += [("FID", f"{f['fid']:.2f}", f"training images {f['train_fid']:.2f}")]
    return [
        *rows,
        (
            "nearest training image",
            f"{f['nearest_ratio']:.2f} x",
            "as far as from held-out images (medians); "
            f"{f['nearest_share']:.1%} of samples are nearer than 99% of these",
        ),
        (
            "copying C_T",
            f"{f['copying_z']:+.1f}",
            "below -3 suggests copies, above 3 samples unlike the data; "
            f"held-out reconstructions {f['reconstruction_copying_z']:+.1f}",
        ),
    ]


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(EvaluateConfig, run, argv, verb="evaluate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()

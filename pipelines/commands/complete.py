"""Hide a part of images and have a pipeline draw it: a sheet of truth, mask and draws, and how near they come."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import ImageOps
from pydantic import Field
from torch import Tensor

from prior import Prior

from ..completion import ConditionError, complete, conditional_log_prob, make_mask, sees_all_known
from ..config import Of, OutputConfig, UserError, choose_device, run_command
from ..config.table import table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, check_shape, load_images, to_float
from ..images.decoding import flatten, open_image, try_decode
from ..images.folder import find_images
from ..images.pictures import SUFFIXES, grid_picture, write_picture
from ..images.unseen import require_unseen
from ..options import Sampling
from ..provenance import defaults, trained_data
from ..saving import PipelineFolder

TINTS = ((0.15, 0.35, 0.65), (-0.2, 0.0, 0.35))  # of the hatching, RGB in [-1, 1]: no grey image has them


class CompleteConfig(OutputConfig):
    """What is hidden of which images, and how it is drawn."""

    examples = (
        "pipeline=runs/gpt_digits/pipeline mask=bottom draws=4 out=completions.png",
        "pipeline=runs/gpt_digits/pipeline mask=my-mask.png images=my-images",
    )
    often = "pipeline mask images num_images draws labels out overwrite temperature guidance_scale seed data.source"

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    mask: str = Field(
        "bottom",
        description="what is hidden: top, bottom, left, right, box (the middle), scatter:SHARE of the patches, or a "
        "picture of the images' size, white where they are hidden",
    )
    images: int | str | list[int | str] | None = Field(
        None, description="picture files, a folder of them, or indices of held-out images; default: held-out images"
    )
    num_images: int = Field(8, ge=1, le=256, description="how many of a folder or the held-out images, evenly spread")
    draws: int = Field(4, ge=1, le=64, description="completions of each image")
    labels: int | str | list[int | str] | None = Field(
        None, description="classes (ids or names), one for all or one per image; default: the class is not told"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="draw d of image k uses seed + k * draws + d")
    out: str = Field("completions.png", description="the picture to write")
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(), description="the images; defaults to those the pipeline was trained on"
    )
    temperature: float | None = Field(None, ge=0, description="below 1 is safer, 0 is greedy; default: the pipeline's")
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest ids only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest ids of this mass only")
    guidance_scale: float | None = Field(None, ge=0, description="above 1 exaggerates the class")
    guidance_end: float | None = Field(
        None, ge=0, description="guidance goes from guidance_scale at the first token to this at the last"
    )
    guidance_power: float | None = Field(
        None, gt=0, description="and does so by a power-cosine: the higher, the later; default: in a straight line"
    )
    steps: int | None = Field(
        None, ge=1, description="decode a masked-token prior in so many passes: quicker, not exact"
    )
    batch_size: int = Field(64, ge=1, description="completions at a time; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: CompleteConfig) -> dict[str, float]:
    """Draw, write the sheet and print what the draws are given and how near they come; returns the figures."""
    out = Output(config.out, files_read(config), config.overwrite)
    out.check_file(SUFFIXES)
    with lock_output(config.out):
        return draw(config, out)


def draw(config: CompleteConfig, out: Output) -> dict[str, float]:
    """`run`, while no other process writes the sheet."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    known = read_mask(config.mask, pipeline)
    truth = to_float(choose_images(config, pipeline))
    try:
        made = complete(
            pipeline,
            truth,
            known,
            config.labels,
            draws=config.draws,
            seed=config.seed,
            output_type="pt",
            batch_size=config.batch_size,
            **config.model_dump(include=set(Sampling.model_fields), exclude_none=True),
        ).images.cpu()
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    made = made.reshape(len(truth), config.draws, *truth.shape[1:])
    figures = pixel_errors(pipeline, truth, made, known)
    score, refusal = truth_log_prob(pipeline, truth, known, config.labels)
    if score is not None:
        figures["conditional_log_prob"] = score
    picture = sheet(truth, made, known)
    with out.file() as path:
        write_picture(picture, path)
    print(report(config, pipeline, known, figures, refusal))
    return figures


# What is asked for


def files_read(config: CompleteConfig) -> list[Any]:
    """The files and folders that are read: the pipeline, the mask, and the images or the data that they are of."""
    asked = config.images if isinstance(config.images, list) else [config.images]
    files = [one for one in asked if isinstance(one, str)]
    return [config.pipeline, config.mask, *files] if files else [config.pipeline, config.mask, config.data.path]


def read_mask(name: str, pipeline: ImagePipeline) -> Tensor:
    """What is known, bool `(H, W)`, under the mask or mask file `name`. Raises `UserError`."""
    shape, path = pipeline.tokenizer.image_shape, Path(name)
    if path.suffix.lower() not in SUFFIXES:
        try:
            return make_mask(name, shape, pipeline.prior.grid.shape)
        except ValueError as error:
            files = "" if name.startswith("scatter:") else f"; a mask of your own ends in {', '.join(SUFFIXES)}"
            raise UserError(f"mask: {error}{files}") from error
    try:
        picture = flatten(ImageOps.exif_transpose(open_image(path))).convert("L")
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(f"mask: {name}: {getattr(error, 'strerror', None) or error}") from error
    if picture.size != (shape[2], shape[1]):
        raise UserError(
            f"mask: {name} has {picture.width} x {picture.height} pixels, the images have "
            f"{shape[2]} x {shape[1]}; it should be of their size"
        )
    known = torch.from_numpy(np.asarray(picture) < 128)
    if bool(known.all()):
        raise UserError(f"mask: {name} hides nothing; it should be white where images are hidden")
    return known


def choose_images(config: CompleteConfig, pipeline: ImagePipeline) -> Tensor:
    """The images to complete, uint8 `(B, C, H, W)`. Raises `UserError`."""
    asked = config.images if config.images is None or isinstance(config.images, list) else [config.images]
    if asked is not None and (not asked or len({type(one) for one in asked}) > 1):
        raise UserError("images: expected picture files, one folder, or indices of held-out images, and at least one")
    names = [one for one in asked or [] if isinstance(one, str)]
    indices = [one for one in asked or [] if isinstance(one, int)]
    if names:
        return read_images(names, config.num_images, pipeline.tokenizer.image_shape)
    check_shape(config.data, pipeline.tokenizer.image_shape)
    require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
    held_out = load_images(config.data).held_out
    if wrong := [index for index in indices if not 0 <= index < len(held_out)]:
        raise UserError(f"images: there is no held-out image {wrong[0]}; they go from 0 to {len(held_out) - 1}")
    return held_out.pixels(indices if indices else evenly(len(held_out), config.num_images))


def read_images(names: list[str], most: int, shape: tuple[int, int, int]) -> Tensor:
    """Pictures, or those of one folder (`most` of them, evenly spread), resized and cropped to `shape`, uint8."""
    paths = [Path(name) for name in names]
    if len(paths) == 1 and paths[0].is_dir():
        found = sorted(find_images(paths[0]))
        if not found:
            raise UserError(f"images: no pictures in {paths[0]}")
        paths = [found[index] for index in evenly(len(found), most)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"images: there is no file {missing[0]}" + (" (a folder is given alone)" * missing[0].is_dir()))
    decoded = [(path, try_decode(path, shape)) for path in paths]
    if problems := [f"images: {path}: {pixels}" for path, pixels in decoded if isinstance(pixels, str)]:
        raise UserError("\n".join(problems))
    return torch.from_numpy(np.stack([pixels for _, pixels in decoded if not isinstance(pixels, str)]))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64).tolist()


# What comes of it


def pixel_errors(pipeline: ImagePipeline, truth: Tensor, made: Tensor, known: Tensor) -> dict[str, float]:
    """Mean absolute difference of hidden pixels from `truth` `(B, C, H, W)`, in grey levels of 255: over all draws
    `made` `(B, draws, C, H, W)`, of the best draw of each image, and of what the tokenizer makes of the truth."""
    decoded = pipeline.reconstruct(truth, output_type="pt").cpu()

    def error(images: Tensor) -> Tensor:
        return (images - truth[:, None]).abs()[..., ~known].double().mean((-2, -1)) * 127.5

    each = error(made)
    return {
        "pixel_error": float(each.mean()),
        "best_pixel_error": float(each.amin(1).mean()),
        "tokenizer_pixel_error": float(error(decoded[:, None]).mean()),
    }


def truth_log_prob(
    pipeline: ImagePipeline, truth: Tensor, known: Tensor, labels: list[int | str] | int | str | None
) -> tuple[float | None, str]:
    """The mean of log p of the hidden tokens given the known ones, in nats; or None, and why the prior has none."""
    try:
        return float(conditional_log_prob(pipeline, truth, known, labels).cpu().double().mean()), ""
    except ConditionError as error:
        return None, str(error)


def sheet(truth: Tensor, made: Tensor, known: Tensor) -> np.ndarray:
    """A row per image: the truth, what is known of it (the rest hatched), and the draws. uint8 (H, W, 3)."""
    count, draws, _, height, width = made.shape
    stripes = (torch.arange(height)[:, None] + torch.arange(width)) // max(2, width // 14) % 2
    hatching = torch.tensor(TINTS)[stripes].movedim(-1, 0)
    masked = torch.where(known, truth.expand(-1, 3, -1, -1), hatching)
    rows = torch.cat([truth[:, None].expand(-1, -1, 3, -1, -1), masked[:, None], made.expand(-1, -1, 3, -1, -1)], 1)
    return grid_picture(rows.reshape(count * (draws + 2), 3, height, width), draws + 2)


def report(
    config: CompleteConfig, pipeline: ImagePipeline, known: Tensor, figures: dict[str, float], refusal: str
) -> str:
    """The figures as people read them, with what the draws were conditioned on."""
    keep = pipeline.tokenizer.known_tokens(known[None]).flatten(1).to(pipeline.device)
    hidden = int((~keep).sum())
    share = float((~known).double().mean())
    score = f"not available ({refusal})"
    if not refusal:
        nats = figures["conditional_log_prob"]
        score = f"{nats:.2f} nats, {-nats / hidden / np.log(2):.3f} bits per hidden token (mean of the images)"
    rows = [
        ("hidden", f"{config.mask}: {share:.1%} of the pixels, {hidden} of {keep.numel()} tokens"),
        ("known tokens seen", what_is_seen(pipeline.prior, keep)),
        ("log p of the truth", score),
        (
            "pixel error",
            f"{figures['pixel_error']:.1f} mean, {figures['best_pixel_error']:.1f} best of {config.draws}; what the "
            f"tokenizer alone loses {figures['tokenizer_pixel_error']:.1f} (absolute, of 255, where hidden)",
        ),
        ("sheet", f"{config.out}: truth, what is known, {config.draws} draws"),
    ]
    return table(rows)


def what_is_seen(prior: Prior, keep: Tensor) -> str:
    """Which of the known tokens, bool `keep` `(1, N)`, a hidden one is conditioned on."""
    if not bool(keep.any()):
        return "none: no patch is known whole"
    if not bool(sees_all_known(prior, keep).all()):
        return f"only those before it in {prior.config.order} order"
    return "all of them, in any order" if prior.any_order else f"all of them, first in {prior.config.order} order"


main = partial(run_command, CompleteConfig, run, verb="complete", description=__doc__, defaults=defaults)

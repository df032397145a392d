"""Let a pipeline fill in a part of images, or continue clips, and compare with the originals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from pydantic import Field
from torch import Tensor

from prior import Prior
from tokenizer.spec import ImageSpec, to_float, to_uint8

from ..completion import (
    ConditionError,
    complete,
    conditional_log_prob,
    find_first_frames,
    find_white,
    make_mask,
)
from ..condition_keys import SamplesWithCondition
from ..config import OutputConfig, UserError, run_command, tell, user_errors
from ..config.table import count_of, table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.animations import ANIMATIONS, require_video, write_animation
from ..images.formats import open_image
from ..images.grids import GREY, MIN_WIDTH
from ..images.pictures import PICTURE_SUFFIXES, grid_picture, write_picture
from ..options import ImageChoice, UsesImages, choose_images, require_pictures, split_choice
from ..provenance import defaults

MASK, SHEET = "bottom", "sheet.png"
TINTS = ((0.15, 0.35, 0.65), (-0.2, 0.0, 0.35))  # of the hatching, RGB in [-1, 1]; absent from grey images
ORANGE = (235, 130, 30)  # around sampled frames


class CompleteConfig(SamplesWithCondition, UsesImages, OutputConfig):
    examples = (
        "pipeline=runs/gpt_digits/pipeline mask=bottom draws=4 out=completions.png",
        "pipeline=runs/gpt_digits/pipeline mask=my-mask.png images=my-images",
        "pipeline=runs/clips/pipeline frames=2 images=my-clips out=continued",
    )
    often = (
        "pipeline mask frames images num_images draws labels condition.NAME conditions out overwrite temperature "
        "guidance_scale seed"
    )

    mask: str | None = Field(
        None,
        description="area to fill in: top, bottom (default), left, right, box, scatter:SHARE (of the patches), or a "
        "picture of the images' size, white where to fill in",
    )
    frames: int | None = Field(None, description="of clips: frames to keep from the start")
    images: ImageChoice = Field(
        None, description="image files, folders, or indices of held-out images; default: held-out"
    )
    num_images: int = Field(8, ge=1, le=256, description="number of images of a folder or held out, evenly spread")
    draws: int = Field(4, ge=1, le=64, description="completions per image")
    labels: int | str | list[int | str] | None = Field(None, description="classes, one for all or one per image")
    seed: int = Field(0, ge=0, lt=1 << 63, description="draw d of image k uses seed + k * draws + d")
    out: str = Field(
        "completions.png", description="picture to write; of clips also NAME.gif or NAME.mp4, or a folder of GIF files"
    )
    batch_size: int = Field(64, ge=1, description="completions at a time; does not affect the result")


def run(config: CompleteConfig) -> dict[str, float]:
    """Complete the images, write the sheet, and print and return the figures."""
    files, _ = split_choice(config.images)
    inputs = [config.pipeline, config.mask, None if files else config.data.path, *files]
    out = Output(config.out, inputs, config.overwrite)
    with lock_output(config.out):
        pipeline = config.load_pipeline()
        spec = pipeline.spec
        require_pictures(spec, "complete")
        known = (read_known_pixels if spec.frames == 1 else find_known_frames)(config, out, pipeline)
        images, names = choose_images(
            config.images, config.num_images, spec, lambda: config.load_images(pipeline).held_out
        )
        if files:
            warn_about_resizing(names, spec)
        truth = pipeline.binarize(to_float(images))
        given = config.read_condition(pipeline, len(truth), names).given
        options: dict[str, Any] = {
            "draws": config.draws,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "output_type": "pt",
        }
        options |= config.sampling_settings()
        with user_errors(ValueError, TypeError):
            sampled = complete(pipeline, truth, known, config.labels, condition=given, **options).images.cpu()
        sampled = sampled.reshape(len(truth), config.draws, *spec.shape)
        figures, refusal = pixel_errors(pipeline, truth, sampled, known), ""
        try:
            log_probs = conditional_log_prob(pipeline, truth, known, config.labels, condition=given)
            figures["conditional_log_prob"] = float(log_probs.cpu().double().mean())
        except ConditionError as error:
            refusal = str(error)
        if spec.frames > 1:
            write_clips(out, spec.picture(torch.cat([truth[:, None], sampled], 1)), known)
        else:
            with out.file() as path:
                write_picture(draw_completions(spec.select_shown(truth), spec.select_shown(sampled), known), path)
    print(format_completion(config, pipeline, known, figures, refusal))
    return figures


def warn_about_resizing(names: list[str], spec: ImageSpec) -> None:
    """Print one line if picture files have other sizes than the pipeline's images."""
    other = list[str]()
    for name in names:
        try:
            size = ImageOps.exif_transpose(open_image(Path(name))).size
        except ValueError:  # an array
            continue
        if size != (spec.width, spec.height):
            other.append(f"{name} of {size[0]} x {size[1]}")
    if other:
        tell(
            f"warning: {len(other):,} of {count_of(len(names), 'image')} are not of the pipeline's {spec.width} x "
            f"{spec.height} pixels, and are resized and cropped; the first is {other[0]}"
        )


# What to keep


def read_known_pixels(config: CompleteConfig, out: Output, pipeline: ImagePipeline) -> Tensor:
    """Make or read the mask of images, and return the pixels to keep, bool `(H, W)`. Raises `UserError`."""
    if config.frames is not None:
        raise UserError("frames: this pipeline makes images, not clips; use mask")
    out.check_file(PICTURE_SUFFIXES)
    name = config.mask or MASK
    try:
        if Path(name).suffix.lower() not in PICTURE_SUFFIXES:
            return make_mask(name, pipeline.spec, pipeline.prior.grid.shape)
        hidden = find_white(open_image(Path(name)), None, pipeline.spec.size)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(f"mask: {name}: {getattr(error, 'strerror', None) or error}") from error
    if not bool(hidden.any()):
        raise UserError(f"mask: {name} is empty; paint the area to fill in white")
    return ~hidden


def find_known_frames(config: CompleteConfig, out: Output, pipeline: ImagePipeline) -> Tensor:
    """Return the pixels of clips to keep, bool `(T, H, W)`. Raises `UserError`, also for another kind of output."""
    spec = pipeline.spec
    if config.mask is not None:
        raise UserError("mask: is that of images; of clips, frames gives the part to keep")
    if config.frames is None:
        raise UserError(f"frames: give the number of frames to keep, from 1 to {spec.frames - 1}; these are clips")
    with user_errors(ValueError, TypeError):
        known = find_first_frames(config.frames, torch.empty(1, *spec.shape))[0]
    if not out.path.suffix:
        out.check_files([SHEET])
    else:
        out.check_file((*PICTURE_SUFFIXES, *ANIMATIONS))
    if out.path.suffix.lower() == ".mp4":
        require_video("out")
    return known


# Figures and pictures


def pixel_errors(pipeline: ImagePipeline, truth: Tensor, sampled: Tensor, known: Tensor) -> dict[str, float]:
    """Return the mean absolute error of the hidden pixels of `truth` `(B, ..., C, H, W)`, on a scale of 255: of all
    completions `sampled` `(B, draws, ..., C, H, W)`, of the best one per image, and of the reconstructions."""
    decoded = pipeline.reconstruct(truth, output_type="pt").cpu()

    def error(images: Tensor) -> Tensor:
        off = (images - truth[:, None]).abs().movedim(-3, 2)  # channels before frames
        return off[..., ~known].double().mean((-2, -1)) * 127.5

    each = error(sampled)
    return {
        "pixel_error": float(each.mean()),
        "best_pixel_error": float(each.amin(1).mean()),
        "tokenizer_pixel_error": float(error(decoded[:, None]).mean()),
    }


def draw_completions(truth: Tensor, sampled: Tensor, known: Tensor) -> np.ndarray:
    """Draw a row per grey or RGB image: the original, the masked image (hatched), the completions. Return uint8
    `(H, W, 3)`."""
    _, draws, _, height, width = sampled.shape
    stripes = (torch.arange(height)[:, None] + torch.arange(width)) // max(2, width // 14) % 2
    hatching = torch.tensor(TINTS)[stripes].movedim(-1, 0)
    masked = torch.where(known, truth.expand(-1, 3, -1, -1), hatching)
    rows = torch.cat([truth[:, None].expand(-1, -1, 3, -1, -1), masked[:, None], sampled.expand(-1, -1, 3, -1, -1)], 1)
    return grid_picture(to_uint8(rows.flatten(0, 1)).movedim(1, -1).numpy(), draws + 2)


def write_clips(out: Output, pixels: np.ndarray, known: Tensor) -> None:
    """Write clips, each followed by its completions, uint8 `(B, 1 + draws, T, H, W, C)`: a still sheet with a row for
    each, a moving one, or a folder with the sheet and a GIF file for each completion."""
    count, each, frames = pixels.shape[:3]
    resampled = (np.arange(each)[:, None] > 0) & ~known.flatten(1).all(1).numpy()
    resampled = np.broadcast_to(resampled, (count, each, frames))
    sheet = frame_cells(pixels.reshape(-1, *pixels.shape[2:]), resampled.reshape(-1, frames))
    if not out.path.suffix:
        with out.files() as folder:
            write_picture(sheet, folder / SHEET)
            for clip, draw in np.ndindex(count, each - 1):
                write_animation(pixels[clip, draw + 1], folder / f"{clip:05d}_{draw}.gif")
        return
    with out.file() as path:
        if path.suffix.lower() in ANIMATIONS:
            write_animation(np.stack([frame_cells(pixels[:, :, t], resampled[:, :, t]) for t in range(frames)]), path)
        else:
            write_picture(sheet, path)


def frame_cells(cells: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """Draw uint8 `cells` (rows, columns, H, W, C) in one picture (H, W, 3), with a frame around each: orange for those
    that are `resampled` (rows, columns), grey for the others. Small ones are enlarged."""
    scale = max(1, -(-MIN_WIDTH // cells.shape[3]))
    cells = cells.repeat(scale, 2).repeat(scale, 3)
    rows, columns, height, width, _ = cells.shape
    framed = np.empty((rows, columns, height + 4, width + 4, 3), np.uint8)
    framed[:] = np.where(resampled[..., None], ORANGE, (GREY,) * 3)[:, :, None, None]
    framed[:, :, 2:-2, 2:-2] = cells
    return framed.swapaxes(1, 2).reshape(rows * (height + 4), columns * (width + 4), 3)


def format_completion(
    config: CompleteConfig, pipeline: ImagePipeline, known: Tensor, figures: dict[str, float], refusal: str
) -> str:
    """Format the figures and what the completions were conditioned on. refusal: why log p is not available."""
    keep = pipeline.tokenizer.known_tokens(known[None]).flatten(1).to(pipeline.device)
    hidden, score = int((~keep).sum()), f"not available ({refusal})"
    if not refusal:
        nats = figures["conditional_log_prob"]
        score = f"{nats:.2f} nats, {-nats / hidden / np.log(2):.3f} bits per hidden token (mean over images)"
    if pipeline.frames == 1:
        area, sheet = config.mask or MASK, f"{config.out}: original, masked, {config.draws} completions"
    else:
        area = f"after {config.frames} of {pipeline.frames} frames"
        place = config.out if Path(config.out).suffix else f"{config.out}/{SHEET}"
        sheet = f"{place}: original, {count_of(config.draws, 'completion')} with sampled frames in orange"
    share, best = float((~known).double().mean()), figures["best_pixel_error"]
    rows = [
        ("masked", f"{area}: {share:.1%} of the pixels, {hidden} of {keep.numel()} tokens"),
        ("conditioned on", describe_context(pipeline.prior, keep)),
        ("log p of the original", score),
        ("pixel error", f"{figures['pixel_error']:.1f} of 255 in the masked area, best of {config.draws}: {best:.1f}"),
        ("  reconstruction", f"{figures['tokenizer_pixel_error']:.1f}"),
        ("sheet", sheet),
    ]
    return table(rows)


def describe_context(prior: Prior, keep: Tensor) -> str:
    """Describe which known tokens, bool `keep` `(1, N)`, a hidden token is conditioned on."""
    if not bool(keep.any()):
        return "nothing: no patch is completely known"
    if not bool(prior.sees_all_known(keep).all()):
        return f"the known tokens that come earlier in {prior.config.order} order"
    order = "" if prior.any_order else f" (in {prior.config.order} order they precede the hidden ones)"
    return f"all visible tokens{order}"


main = partial(run_command, CompleteConfig, run, verb="complete", description=__doc__, defaults=defaults)

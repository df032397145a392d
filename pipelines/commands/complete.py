"""Let a pipeline fill in a part of images, or continue clips, and compare with the originals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from pydantic import Field
from torch import Tensor

from prior import Prior
from tokenizer.files import one_line
from tokenizer.spec import ImageSpec, to_float, to_uint8

from ..completion import (
    ConditionError,
    complete,
    conditional_log_prob,
    find_first_frames,
    find_white,
    make_mask,
    sees_all_known,
)
from ..condition_keys import SamplesWithCondition
from ..config import OutputConfig, UserError, run_command, tell
from ..config.table import count_of, table
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.animations import ANIMATIONS, require_video, write_animation
from ..images.formats import open_image
from ..images.grids import GREY, MIN_WIDTH
from ..images.pictures import PICTURE_SUFFIXES, grid_picture, write_picture
from ..options import Named, UsesImages, choose_images, require_pictures, split_named_images
from ..provenance import defaults

MASK, SHEET = "bottom", "sheet.png"
TINTS = ((0.15, 0.35, 0.65), (-0.2, 0.0, 0.35))  # of the hatching, RGB in [-1, 1]; absent from grey images
ORANGE = (235, 130, 30)  # around the frames that are drawn


class CompleteConfig(SamplesWithCondition, UsesImages, OutputConfig):
    """Which images, which mask, and how to sample."""

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
    images: Named = Field(
        None, description="image files, folders, or indices of held-out images; default: held-out images"
    )
    num_images: int = Field(
        8, ge=1, le=256, description="number of images from a folder or the held-out split, evenly spread"
    )
    draws: int = Field(4, ge=1, le=64, description="completions per image")
    labels: int | str | list[int | str] | None = Field(
        None, description="classes (ids or names), one for all or one per image; default: no class"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="draw d of image k uses seed + k * draws + d")
    out: str = Field(
        "completions.png",
        description="the picture to write; of clips also NAME.gif or NAME.mp4, or a folder for GIF files",
    )
    batch_size: int = Field(64, ge=1, description="completions at a time; does not affect the result")


def run(config: CompleteConfig) -> dict[str, float]:
    """Complete the images, write the sheet, and print and return the figures."""
    files, _ = split_named_images(config.images)
    out = Output(
        config.out, [config.pipeline, config.mask, None if files else config.data.path, *files], config.overwrite
    )
    with lock_output(config.out):
        pipeline = config.load_pipeline()
        require_pictures(pipeline.spec, "complete")
        area = (Masked if pipeline.frames == 1 else FirstFrames)(config, out, pipeline)
        known, spec = area.known, pipeline.spec
        images, names = choose_images(
            config.images, config.num_images, spec, lambda: config.load_images(pipeline).held_out
        )
        if files:
            warn_about_sizes(names, spec)
        truth = pipeline.binarize(to_float(images))
        given = config.read_condition(pipeline, len(truth), names).given
        try:
            drawn = complete(
                pipeline,
                truth,
                known,
                config.labels,
                condition=given,
                draws=config.draws,
                seed=config.seed,
                output_type="pt",
                batch_size=config.batch_size,
                **config.sampling_settings(),
            ).images.cpu()
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        drawn = drawn.reshape(len(truth), config.draws, *spec.shape)
        figures, refusal = pixel_errors(pipeline, truth, drawn, known), ""
        try:
            log_probs = conditional_log_prob(pipeline, truth, known, config.labels, condition=given)
            figures["conditional_log_prob"] = float(log_probs.cpu().double().mean())
        except ConditionError as error:
            refusal = str(error)
        area.write(truth, drawn)
    print(format_report(config, pipeline, area, figures, refusal))
    return figures


def warn_about_sizes(names: list[str], spec: ImageSpec) -> None:
    """Print one line if pictures have other sizes than the pipeline's images."""
    other = [(name, size) for name in names if (size := find_size(name)) not in (None, (spec.width, spec.height))]
    if other:
        count, first = f"{len(other):,} of {count_of(len(names), 'image')}", "{0} of {1[0]} x {1[1]}".format(*other[0])
        tell(
            one_line(
                f"warning: {count} are not of the pipeline's {spec.width} x {spec.height} pixels, and are resized and "
                f"cropped; the first is {first}"
            )
        )


def find_size(name: str) -> tuple[int, int] | None:
    """Return the width and height of an upright picture; None for an array."""
    try:
        return ImageOps.exif_transpose(open_image(Path(name))).size
    except ValueError:
        return None


class Masked:
    """The area of images to fill in, and the sheet of its completions. known: the other pixels, bool `(H, W)`. Raises
    `UserError` for settings of clips, and for a mask that cannot be read."""

    def __init__(self, config: CompleteConfig, out: Output, pipeline: ImagePipeline) -> None:
        self.out, self.name = out, config.mask or MASK
        if config.frames is not None:
            raise UserError("frames: this pipeline makes images, not clips; use mask")
        out.check_file(PICTURE_SUFFIXES)
        self.known = read_mask(self.name, pipeline)
        self.sheet = f"{config.out}: original, masked, {config.draws} completions"

    def write(self, truth: Tensor, drawn: Tensor) -> None:
        """Write the sheet of images `(B, C, H, W)` and their completions `(B, draws, C, H, W)`."""
        with self.out.file() as path:
            write_picture(draw_sheet(truth, drawn, self.known), path)


class FirstFrames:
    """The frames of clips to redraw, and the files of their completions. known: the pixels of the others, bool `(T, H,
    W)`. Raises `UserError` for another number of frames, a mask, and an output of another kind."""

    def __init__(self, config: CompleteConfig, out: Output, pipeline: ImagePipeline) -> None:
        self.out, self.spec, self.first = out, pipeline.spec, config.frames
        total = self.spec.frames
        if config.mask is not None:
            raise UserError("mask: is that of images; of clips, frames gives the part to keep")
        if config.frames is None:
            raise UserError(f"frames: give the number of frames to keep, from 1 to {total - 1}; these are clips")
        try:
            self.known = find_first_frames(config.frames, torch.empty(1, *self.spec.shape))[0]
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        if not out.path.suffix:
            out.check_files([SHEET])
        else:
            out.check_file((*PICTURE_SUFFIXES, *ANIMATIONS))
        if out.path.suffix.lower() == ".mp4":
            require_video("out")
        self.name = f"after {config.frames} of {total} frames"
        place = config.out if out.path.suffix else f"{config.out}/{SHEET}"
        self.sheet = f"{place}: original, {count_of(config.draws, 'completion')} with drawn frames in orange"

    def write(self, truth: Tensor, drawn: Tensor) -> None:
        """Write clips `(B, T, C, H, W)` and their completions `(B, draws, T, C, H, W)`: a still sheet with a row for
        each, a moving one, or a folder."""
        pixels = self.spec.picture(torch.cat([truth[:, None], drawn], 1))
        count, each, frames = pixels.shape[:3]
        redrawn = (np.arange(each)[:, None] > 0) & ~self.known.flatten(1).all(1).numpy()
        redrawn = np.broadcast_to(redrawn, (count, each, frames))
        sheet = frame_cells(pixels.reshape(-1, *pixels.shape[2:]), redrawn.reshape(-1, frames))
        if not self.out.path.suffix:
            with self.out.files() as folder:
                write_picture(sheet, folder / SHEET)
                for clip in range(count):
                    for draw in range(1, each):
                        write_animation(pixels[clip, draw], folder / f"{clip:05d}_{draw - 1}.gif")
            return
        with self.out.file() as path:
            if path.suffix.lower() in ANIMATIONS:
                moving = [frame_cells(pixels[:, :, t], redrawn[:, :, t]) for t in range(frames)]
                write_animation(np.stack(moving), path)
            else:
                write_picture(sheet, path)


def read_mask(name: str, pipeline: ImagePipeline) -> Tensor:
    """Make or read a mask, and return the known pixels, bool `(H, W)`. Raises `UserError`."""
    spec, path = pipeline.spec, Path(name)
    try:
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            return make_mask(name, spec, pipeline.prior.grid.shape)
        hidden = find_white(open_image(path), None, spec.size)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(f"mask: {name}: {getattr(error, 'strerror', None) or error}") from error
    if not bool(hidden.any()):
        raise UserError(f"mask: {name} is empty; paint the area to fill in white")
    return ~hidden


def pixel_errors(pipeline: ImagePipeline, truth: Tensor, drawn: Tensor, known: Tensor) -> dict[str, float]:
    """Return the mean absolute error of the hidden pixels against `truth` `(B, ..., C, H, W)`, on a scale of 255: of
    all completions `drawn` `(B, draws, ..., C, H, W)`, of the best completion per image, and of the reconstructions."""
    decoded = pipeline.reconstruct(truth, output_type="pt").cpu()

    def error(images: Tensor) -> Tensor:
        off = (images - truth[:, None]).abs().movedim(-3, 2)  # channels before frames
        return off[..., ~known].double().mean((-2, -1)) * 127.5

    each = error(drawn)
    return {
        "pixel_error": float(each.mean()),
        "best_pixel_error": float(each.amin(1).mean()),
        "tokenizer_pixel_error": float(error(decoded[:, None]).mean()),
    }


def draw_sheet(truth: Tensor, drawn: Tensor, known: Tensor) -> np.ndarray:
    """Draw a row per image: the original, the masked image (hatched), the completions. Return uint8 `(H, W, 3)`."""
    count, draws, _, height, width = drawn.shape
    stripes = (torch.arange(height)[:, None] + torch.arange(width)) // max(2, width // 14) % 2
    hatching = torch.tensor(TINTS)[stripes].movedim(-1, 0)
    masked = torch.where(known, truth.expand(-1, 3, -1, -1), hatching)
    rows = torch.cat([truth[:, None].expand(-1, -1, 3, -1, -1), masked[:, None], drawn.expand(-1, -1, 3, -1, -1)], 1)
    return grid_picture(to_uint8(rows.flatten(0, 1)).movedim(1, -1).numpy(), draws + 2)


def frame_cells(cells: np.ndarray, redrawn: np.ndarray) -> np.ndarray:
    """Draw uint8 `cells` (rows, columns, H, W, C) in one picture (H, W, 3), with a frame around each: orange for those
    that are `redrawn` (rows, columns), grey for the others. Small ones are enlarged."""
    scale = max(1, -(-MIN_WIDTH // cells.shape[3]))
    cells = cells.repeat(scale, 2).repeat(scale, 3)
    rows, columns, height, width, _ = cells.shape
    framed = np.empty((rows, columns, height + 4, width + 4, 3), np.uint8)
    framed[:] = np.where(redrawn[..., None], ORANGE, (GREY,) * 3)[:, :, None, None]
    framed[:, :, 2:-2, 2:-2] = cells
    return framed.swapaxes(1, 2).reshape(rows * (height + 4), columns * (width + 4), 3)


def format_report(
    config: CompleteConfig, pipeline: ImagePipeline, area: Masked | FirstFrames, figures: dict[str, float], refusal: str
) -> str:
    """Format the figures and what the completions were conditioned on. refusal: why log p is not available."""
    keep = pipeline.tokenizer.known_tokens(area.known[None]).flatten(1).to(pipeline.device)
    hidden = int((~keep).sum())
    score = f"not available ({refusal})"
    if not refusal:
        nats = figures["conditional_log_prob"]
        score = f"{nats:.2f} nats, {-nats / hidden / np.log(2):.3f} bits per hidden token (mean over images)"
    share, best = float((~area.known).double().mean()), figures["best_pixel_error"]
    rows = [
        ("masked", f"{area.name}: {share:.1%} of the pixels, {hidden} of {keep.numel()} tokens"),
        ("conditioned on", describe_context(pipeline.prior, keep)),
        ("log p of the original", score),
        ("pixel error", f"{figures['pixel_error']:.1f} of 255 in the masked area, best of {config.draws}: {best:.1f}"),
        ("  reconstruction", f"{figures['tokenizer_pixel_error']:.1f}"),
        ("sheet", area.sheet),
    ]
    return table(rows)


def describe_context(prior: Prior, keep: Tensor) -> str:
    """Describe which known tokens, bool `keep` `(1, N)`, a hidden token is conditioned on."""
    if not bool(keep.any()):
        return "nothing: no patch is completely known"
    if not bool(sees_all_known(prior, keep).all()):
        return f"the known tokens that come earlier in {prior.config.order} order"
    return (
        "all visible tokens"
        if prior.any_order
        else f"all visible tokens (in {prior.config.order} order they precede the hidden ones)"
    )


main = partial(run_command, CompleteConfig, run, verb="complete", description=__doc__, defaults=defaults)

"""Completion: sample the hidden part of an image given the rest, or compute the probability of its true content.

    log p(hidden | known) = log p(hidden, known) - log p(known)

The chain rule gives this exactly if no known token is conditioned on a hidden one. If the prior has a single order, the
mask must fit it, and the result is the conditional of `log_prob`. An any-order prior puts the known tokens first; the
result is the conditional of that order's density, which may differ from `log_prob`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from torch import Tensor

from prior import Prior
from prior.arguments import check_count, to_tensor, whole_number
from prior.canvas import Chain
from prior.given import Given
from prior.options import Order, select_order
from prior.sampling import check_known
from tokenizer.precision import in_finest
from tokenizer.spec import ImageSpec, check_output_type

from .canvas import (
    Wrap,
    decode_canvas_batch,
    encode_large_batch,
    find_known_tokens,
    find_patch,
    make_chain,
    read_canvas_given,
    read_equal,
)
from .images.formats import decode_image
from .images.pictures import LATENT

if TYPE_CHECKING:
    from .image_pipeline import Condition, ImagePipeline, Images, Label, PipelineOutput

Known = Tensor | np.ndarray | None
Mask = Picture | Tensor | np.ndarray | list[Any] | None
WHITE = 128
MASKS = ("top", "bottom", "left", "right", "box")
MASK_SEED = 0  # of scattered masks; independent of the sampling seed, so that draws share a mask


class ConditionError(ValueError):
    """The prior has no exact conditional given these known tokens."""


# Sampling the hidden part


@torch.no_grad()
def complete(
    pipeline: ImagePipeline,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    condition: Condition = None,
    mask: Mask = None,
    frames: int | None = None,
    draws: int = 1,
    order: Order = None,
    seed: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    output_type: str = "pil",
    progress: bool = True,
    size: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
    stride: int | None = None,
    wrap: Wrap = False,
    **settings: Any,
) -> PipelineOutput:
    """Sample the hidden part of images given the known part, or continue clips.

    Give one of `known`, `mask` and `frames`. known: bool `(H, W)` or `(B, H, W)`, a tensor or array, True = keep this
    pixel. mask: the opposite, white = redraw this pixel, as in diffusers and `smalti complete`. It is a PIL image, or
    one per image, of the pipeline's size or of its image's size (then it is resized and cropped like the image); or an
    array or tensor of the same shapes as `known` or `(B, 1, H, W)`: bool, integers from 0 to 255 (128 and above is
    white) or 0 and 1, or floats in [0, 1]. frames: of clips, keep this number of frames from the start and redraw the
    rest. For clips, `known` and `mask` are arrays or tensors `(T, H, W)` or `(B, T, H, W)`.

    Hidden pixels are painted over before encoding, so they cannot leak. A token is known if every pixel of its patch is
    known, and only known tokens are used. If the tokenizer's receptive field is wider than a patch, paint affects known
    tokens near the hole. Any-order priors (`prior.any_order`) condition each new token on all known tokens, under the
    density of the order that starts with them (not `log_prob`'s); other priors condition it on the tokens that precede
    it in their order. Known pixels are returned unchanged.

    size or stride: take images at their own size, all of one size, and complete them as a canvas of `size` (None: their
    own), as `pipe(size=...)` draws one; `mask` or `known` is then of the images' own size. at: the upper left pixel of
    the images on the canvas (None: the middle); what is around them is drawn, and with neither `mask` nor `known`
    nothing else. Needs a prior that conditions on any known tokens.

    draws: completions per image. Draw d of image k uses seed + k * draws + d, in any batch. With several draws, images
    are `(B, draws, C, H, W)` ("pt"), `(B, draws, H, W, C)` ("np") or a list of lists of PIL images ("pil"):
    `out.images[k][d]` is draw d of image k; tokens are `(B, draws, *grid.shape)`. With one draw there is no such axis.
    labels, condition: one for all images, or one per image. order: as in `Prior.sample`, or one per image.

    temperature: below 1 prefers likely ids; 0 takes the likeliest. top_k: sample from the k likeliest ids only. top_p:
    sample from the likeliest ids with this total probability only. guidance_scale: above 1 follows labels and condition
    more closely. None is the pipeline's own setting. settings: other arguments of `ImagePipeline.__call__`. A list of
    generators needs one per completion; `callback_on_step_end` receives the tokens of all completions,
    `(B * draws, *grid.shape)`. Raises `ValueError` for a mask of another shape or arguments out of range, `TypeError`
    unless exactly one of `known`, `mask` and `frames` is given.
    """
    draws = check_count(draws, "draws")
    check_output_type(output_type, LATENT)
    if size is not None or stride is not None:
        if frames is not None:
            raise ValueError("frames: a canvas has none; give known or mask")
        laid, known, chain = lay_out(pipeline, images, known, mask, size, at, stride, wrap, order)
        common: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        common |= {"size": tuple(laid.shape[-2:]), "stride": stride, "wrap": wrap, "order": order, "seed": seed}
        common |= {"batch_size": batch_size, "progress": progress, **settings}
        return complete_canvas(pipeline, laid, known, chain, labels, condition, draws, output_type, common)
    if at is not None or wrap is not False:
        raise ValueError("at and wrap are those of a canvas; give its size, too")
    batch, known, given = read_partly_known(pipeline, images, known, labels, condition, mask, frames)
    count = len(batch)
    tokens, keep = encode_visible(pipeline, batch, known, batch_size)
    made = pipeline(
        count * draws,
        condition=given.repeat(draws),
        order=select_order(order, [row for row in range(count) for _ in range(draws)], count),
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        output_type=LATENT,
        progress=progress,
        tokens=tokens.repeat_interleave(draws, 0),
        known=keep.repeat_interleave(draws, 0),
        **settings,
    )
    lead = (count,) if draws == 1 else (count, draws)
    found = sampled = made.tokens.unflatten(0, lead)
    if output_type != LATENT:
        there, original = (each.repeat_interleave(draws, 0) for each in (known.unsqueeze(-3), batch))
        decoded = pipeline.decode_batch(made.tokens, batch_size=batch_size, progress=progress)
        found = pipeline.convert_images(torch.where(there, original, decoded).unflatten(0, lead), output_type)
    return type(made).of(found, sampled, made.class_names, made.spec)


def lay_out(
    pipeline: ImagePipeline,
    images: Any,
    known: Known,
    mask: Mask,
    size: Sequence[int] | None,
    at: Sequence[int] | None,
    stride: int | None,
    wrap: Wrap,
    order: Any,
) -> tuple[Tensor, Tensor, Chain]:
    """Return images laid on a canvas, `(B, C, H, W)`, 0 elsewhere; which pixels are known, bool `(B, H, W)`; and the
    chain. Raises `ValueError` for images that do not fit."""
    there = torch.stack(read_equal(pipeline.list_images(images)))
    own = tuple(there.shape[-2:])
    chain = make_chain(pipeline, own if size is None else size, stride, wrap, order)
    patch = find_patch(pipeline)
    whole = tuple(side * by for side, by in zip(chain.size, patch, strict=True))
    if known is None and mask is None:
        keep = torch.ones(len(there), *own, dtype=torch.bool)
    else:
        keep = find_known_pixels(known, mask, images, there)
    middle = [(side - inner) // 2 // by * by for side, inner, by in zip(whole, own, patch, strict=True)]
    corner = middle if at is None else list(at)
    if len(corner) != 2 or any(type(one) is not int for one in corner):
        raise ValueError(f"at: expected (top, left) in pixels (got {at!r})")
    if any(not 0 <= first <= side - inner for first, side, inner in zip(corner, whole, own, strict=True)):
        raise ValueError(f"at: images of {own} pixels at {tuple(corner)} do not lie within a canvas of {whole}")
    if bool(keep.all()) and own == whole:
        raise TypeError(
            "give known (True = keep this pixel) or mask (white = redraw it), or a size larger than the images"
        )
    canvas, inside = there.new_zeros(*there.shape[:2], *whole), torch.zeros(len(there), *whole, dtype=torch.bool)
    place = (..., slice(corner[0], corner[0] + own[0]), slice(corner[1], corner[1] + own[1]))
    canvas[place], inside[place] = there, keep.cpu()
    return canvas, inside, chain


def complete_canvas(
    pipeline: ImagePipeline,
    canvas: Tensor,
    known: Tensor,
    chain: Chain,
    labels: Label | Sequence[Label],
    condition: Condition,
    draws: int,
    output_type: str,
    settings: Mapping[str, Any],
) -> PipelineOutput:
    """Complete what `lay_out` returned; see `complete`."""
    tokens = encode_large_batch(pipeline, paint_hidden(canvas, known.unsqueeze(-3)), chain)
    keep = find_known_tokens(chain, known)
    given = read_canvas_given(pipeline, chain, labels, condition, len(canvas))
    rows = torch.arange(len(given)).view(len(canvas), -1).repeat_interleave(draws, 0).flatten()
    made = pipeline(
        len(canvas) * draws,
        condition=given[rows],
        tokens=tokens.repeat_interleave(draws, 0),
        known=keep.repeat_interleave(draws, 0),
        output_type=LATENT,
        **settings,
    )
    lead = (len(canvas),) if draws == 1 else (len(canvas), draws)
    found = sampled = made.tokens.unflatten(0, lead)
    if output_type != LATENT:
        there, original = (each.repeat_interleave(draws, 0) for each in (known.unsqueeze(-3), canvas))
        decoded = decode_canvas_batch(pipeline, made.tokens, chain)
        found = pipeline.convert_images(torch.where(there, original, decoded).unflatten(0, lead), output_type)
    return type(made).of(found, sampled, None, made.spec, made.canvas)


def read_partly_known(
    pipeline: ImagePipeline,
    images: Images,
    known: Known,
    labels: Label | Sequence[Label],
    condition: Condition,
    mask: Mask,
    frames: int | None,
) -> tuple[Tensor, Tensor, Given]:
    """Read what `complete` and `conditional_log_prob` share: the images `(B, *spec.shape)`, which pixels are known,
    bool, the same without channels, and what is given."""
    batch = pipeline.to_images(images)
    known = find_known_pixels(known, mask, images, batch, frames)
    return batch, known, pipeline.read_given(labels, condition, len(batch))


def encode_visible(
    pipeline: ImagePipeline, images: Tensor, known: Tensor, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Return the tokens of `images` and which of them are known, both `(B, *grid.shape)`. Pixels that are not `known`
    `(B, H, W)` are painted over, since they would leak through the encoder's receptive field."""
    painted = paint_hidden(*(each.flatten(0, -4) for each in (images, known.unsqueeze(-3))))
    tokens = pipeline.encode_batch(painted.view(images.shape), batch_size=batch_size)
    return tokens, pipeline.tokenizer.known_tokens(known)


def paint_hidden(images: Tensor, known: Tensor) -> Tensor:
    """Fill `images` `(B, C, H, W)` where `known` `(B, 1, H, W)` is False: from the rim of a hole inwards, each pixel
    becomes the mean of its known or filled neighbours. If nothing is known, all pixels become grey.

    Compared with filling in the mean colour, more known tokens equal those of the whole image (scattered halves of
    digits: 65 % instead of 47 %), and the hidden tokens are more probable.
    """
    paint, filled = torch.where(known, images, 0), known.to(images.dtype)

    def sum_around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=1)

    while bool((rim := (filled == 0) & (sum_around(filled) > 0)).any()):
        paint = torch.where(rim, sum_around(paint) / sum_around(filled).clamp(min=1), paint)
        filled = filled + rim
    return paint


# Scoring the hidden part


@torch.no_grad()
def conditional_log_prob(
    pipeline: ImagePipeline,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    condition: Condition = None,
    mask: Mask = None,
    frames: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return log p of each image's hidden tokens given the known ones, `(B,)` nats. known, mask, frames, labels,
    condition: as for `complete`.

    This is the log-probability that `complete`, at temperature 1 without guidance, draws exactly the image's own
    tokens. For a prior with one order it equals log_prob(all) - log p(known). For an any-order prior it uses the order
    that starts with the known tokens, so log_prob(all) minus the result is not log p(known).

    The known tokens are those that `complete` uses, so hidden pixels do not help to predict themselves. If the
    tokenizer's receptive field is wider than a patch, they may differ from the image's own tokens; unlike
    `region_log_prob`, the result is then not a part of `ImagePipeline.log_prob`. The log-probability of pixels given
    tokens (`Tokenizer.pixel_log_prob`) is not included. Raises `ConditionError` if the prior has no such conditional,
    `ValueError` for a mask of another shape.
    """
    batch, known, given = read_partly_known(pipeline, images, known, labels, condition, mask, frames)
    parts = []
    if given.weights:
        raise ValueError("marginal: a mixture given known tokens is not computed; give the class, or leave it null")
    for rows, part, own in pipeline.batches(batch, given, batch_size):
        visible, keep = encode_visible(pipeline, part, known[rows])
        tokens = torch.where(keep, visible, pipeline.encode_batch(part))
        parts.append(region_log_prob(pipeline.prior, tokens, keep, own))
    return torch.cat(parts)


def region_log_prob(prior: Prior, tokens: Tensor, known: Tensor, given: Given) -> Tensor:
    """Return log p(hidden tokens | known tokens, what is given), `(B,)` nats; exact even if `log_prob` is an estimate.

    tokens: `(B, *grid.shape)`; known: bool, `grid.shape` or `(B, *grid.shape)`. An any-order prior is evaluated in the
    order that `sample` uses: known tokens first, then the rest in the prior's own order and blocks. Raises
    `ConditionError` for a prior with one order in which a known token depends on a hidden one, `ValueError` for
    arguments out of range.
    """
    _, keep = check_known(prior, tokens, known, len(tokens))
    if blocked := int((~prior.sees_all_known(keep)).sum()):
        raise ConditionError(
            f"no exact conditional: this {prior.name} prior has one order, {prior.config.order!r}, and in {blocked} of "
            f"{len(tokens)} images known tokens come after hidden ones; use a mask whose known tokens come first, or "
            "an any-order prior (masked; blocks or gpt with any_order; made with order_agnostic)"
        )
    each = prior.chain_log_probs(tokens, given, known=keep)
    return in_finest(each.flatten(1)).masked_fill(keep, 0).sum(1).float()


# Which pixels are known


def find_known_pixels(known: Any, mask: Any, images: Any, batch: Tensor, frames: int | None = None) -> Tensor:
    """Return the known pixels, bool, of the shape of `batch` without channels. batch: `images` as a tensor. Raises
    `TypeError` unless exactly one of `known`, `mask` and `frames` is given, `ValueError` for another shape or type."""
    areas = (known, mask, frames)
    if [area is None for area in areas].count(False) != 1:
        raise TypeError(
            "give either known (True = keep this pixel), mask (white = redraw it) or, of clips, frames (keep these "
            "from the start)"
        )
    if frames is not None:
        return find_first_frames(frames, batch)
    return check_known_pixels(known, batch) if mask is None else ~find_hidden_pixels(mask, images, batch)


def find_first_frames(frames: Any, batch: Tensor) -> Tensor:
    """Return where clips `batch` `(B, T, C, H, W)` have one of the first `frames`, bool `(B, T, H, W)`."""
    if batch.ndim == 4:
        raise ValueError("frames: this pipeline makes images, not clips; use mask or known")
    first, total = whole_number("frames", frames), batch.shape[1]
    if not 1 <= first < total:
        raise ValueError(f"frames: keep from 1 to {total - 1} of the {total} frames (got {frames})")
    known = torch.zeros_like(batch[:, :, 0], dtype=torch.bool)
    known[:, :first] = True
    return known


def check_known_pixels(known: Any, batch: Tensor) -> Tensor:
    several = known if isinstance(known, (list, tuple)) else [known]
    if any(isinstance(one, Picture) for one in several):
        raise ValueError(
            "known should be a bool tensor or array (True = keep this pixel), not a picture; pass a picture that is "
            "white where pixels are to be redrawn as mask="
        )
    known = to_tensor(known, batch.device)
    shape = tuple(batch.select(-3, 0).shape)
    if known.dtype != torch.bool or tuple(known.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"known should be bool of shape {shape[1:]} or {shape}, got {known.dtype} of {tuple(known.shape)}"
        )
    return known.expand(shape)


def find_hidden_pixels(mask: Any, images: Any, batch: Tensor) -> Tensor:
    count, shape = len(batch), tuple(batch.select(-3, 0).shape)
    several = mask if isinstance(mask, (list, tuple)) else [mask]
    if any(isinstance(one, Picture) for one in several):
        if batch.ndim > 4:
            raise ValueError(f"mask of clips should have shape {shape[1:]} or {shape}, got pictures")
        given = list(images) if isinstance(images, (list, tuple)) else [images] * count
        if len(several) not in (1, count) or not all(isinstance(one, Picture) for one in several):
            raise ValueError(f"mask should be a picture, or a list of {count}, one per image (got {len(several)})")
        each = several * count if len(several) == 1 else several
        parts = [find_white(one, image, (shape[1], shape[2])) for one, image in zip(each, given, strict=True)]
        return torch.stack(parts).to(batch.device)
    mask = to_tensor(mask, batch.device)
    mask = mask.squeeze(-3) if mask.ndim == batch.ndim and mask.shape[-3] == 1 else mask
    if tuple(mask.shape) not in (shape, shape[1:], (1, *shape[1:])):
        raise ValueError(f"mask should have shape {shape[1:]} or {shape}, got {tuple(mask.shape)}")
    return is_white(mask).expand(shape)


def is_white(mask: Tensor) -> Tensor:
    """Return where `mask`, of any shape, is True or in the upper half of its range."""
    if mask.dtype == torch.bool or not mask.numel():
        return mask.bool()
    mask = mask if mask.dtype.is_floating_point else mask.long()  # torch cannot compare most unsigned types
    low, high = (float(value) for value in mask.aminmax())
    if not 0 <= low <= high <= (1 if mask.dtype.is_floating_point else 255):
        raise ValueError(
            f"mask should be bool, integers from 0 to 255, or floats in [0, 1] (got {mask.dtype} from {low} to {high})"
        )
    return mask >= (0.5 if high <= 1 else WHITE)


def find_white(mask: Picture, image: Any, size: tuple[int, int]) -> Tensor:
    """Return where the picture `mask` of `image` is white, bool `(H, W)`."""
    (height, width), mask = size, ImageOps.exif_transpose(mask)
    if mask.mode in ("I", "F"):  # 32-bit pictures have no fixed white level: scale them like arrays
        mask = Image.fromarray(255 * is_white(torch.from_numpy(np.array(mask))).byte().numpy())
    allowed = [(width, height)]
    if isinstance(image, Picture):
        allowed.append(ImageOps.exif_transpose(image).size)
    if mask.size not in allowed:
        sizes = " or ".join(f"{w} x {h}" for w, h in dict.fromkeys(allowed))
        raise ValueError(f"mask has {mask.width} x {mask.height} pixels; it should have {sizes}, like its image")
    return torch.from_numpy(decode_image(mask, ImageSpec(1, height, width))[0] >= WHITE)


# Named masks


def make_mask(name: str, spec: ImageSpec, grid_shape: tuple[int, ...]) -> Tensor:
    """Return the known pixels, bool `(H, W)`, if the area called `name` is hidden.

    name: a half (`top`, `bottom`, `left`, `right`), `box` (the middle half of each side), or `scatter:SHARE`: a fixed
    random share of the patches that become tokens (of the pixels, for a pixel tokenizer). Raises `ValueError` for
    another name, or a share not in (0, 1].
    """
    height, width = spec.size
    kind, colon, share = name.partition(":")
    if kind == "scatter" and colon:
        return scattered(share, height, width, max(1, width // grid_shape[-1]))
    if name not in MASKS:
        raise ValueError(f"unknown mask {name!r}; choose {', '.join(MASKS)} or scatter:SHARE, such as scatter:0.5")
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inner = (rows >= height // 4) & (rows < height - height // 4)
    hidden = {
        "top": rows < height // 2,
        "bottom": rows >= height - height // 2,
        "left": columns < width // 2,
        "right": columns >= width - width // 2,
        "box": inner & (columns >= width // 4) & (columns < width - width // 4),
    }[name]
    return ~hidden.expand(height, width)


def scattered(share: str, height: int, width: int, side: int) -> Tensor:
    """Return known pixels `(height, width)`: this share of the patches of `side` by `side`, at least one, is hidden."""
    try:
        fraction = float(share)
    except ValueError:
        fraction = float("nan")
    if not 0 < fraction <= 1:
        raise ValueError(f"scatter: the hidden share must be above 0 and at most 1 (got {share!r})")
    patches = torch.ones(height // side, width // side, dtype=torch.bool)
    chosen = torch.randperm(patches.numel(), generator=torch.Generator().manual_seed(MASK_SEED))
    patches.view(-1)[chosen[: max(1, round(fraction * patches.numel()))]] = False
    return patches.repeat_interleave(side, 0).repeat_interleave(side, 1)

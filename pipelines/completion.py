"""Completion: the hidden part of an image drawn given the rest of it, and the probability of what is really there.

    log p(hidden | known) = log p(hidden, known) - log p(known)

A chain of conditionals gives this exactly when no known token is conditioned on a hidden one. A prior of a single order
needs a mask that fits its order; the result is then the conditional of `log_prob`. A prior that takes any order takes
the known tokens first: the result is a conditional of that order's density, which differs from `log_prob`'s as far as
the prior's orders disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior import Prior
from prior.orders import select_order
from prior.sampling import Order, check_count, check_known
from tokenizer.base import in_finest

from .images.pictures import check_output_type, convert_images
from .masks import Known, Mask, known_pixels
from .stages.base import Images, Label, Stages
from .stages.output import PipelineOutput
from .stages.sampling import LATENT, sample
from .stages.synonyms import IN_A_COMPLETION, named
from .stages.watching import serialized

MASKS = ("top", "bottom", "left", "right", "box")
MASK_SEED = 0  # of scattered masks: the same ones for every seed of the draws, so that these can be compared


class ConditionError(ValueError):
    """The prior has no exact conditional given these known tokens."""


# Drawing what is hidden


@overload
def complete(
    pipeline: Stages,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    return_dict: Literal[False],
    **settings: Any,
) -> tuple[Any, Tensor]:
    """Images and tokens."""


@overload
def complete(
    pipeline: Stages,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    mask: Mask = None,
    draws: int = 1,
    output_type: str = "pil",
    order: Order = None,
    return_dict: Literal[True] = True,
    **settings: Any,
) -> PipelineOutput:
    """Images and tokens, by name."""


@serialized
@torch.no_grad()
def complete(
    pipeline: Stages,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    mask: Mask = None,
    draws: int = 1,
    output_type: str = "pil",
    order: Order = None,
    return_dict: bool = True,
    **settings: Any,
) -> Any:
    """Fill in what is not known; returns a `PipelineOutput`, or its tuple without `return_dict`.

    Say what is known in one of two ways. known: bool `(H, W)` or `(B, H, W)`, a tensor or array, True = keep this
    pixel. mask (or mask_image): the other way round, white = draw this pixel again, as diffusers and `smalti complete`
    have it: a PIL image, or one for each image, of the pipeline's size or of its image's (then resized and cropped as
    that is); or an array or tensor of these shapes, bool, 0 to 255 (128 and more is white) or floats in [0, 1].

    Hidden pixels are painted over before encoding, so nothing of them leaks. A token is known when every pixel of its
    patch is, and only known tokens are looked at; near the hole, a tokenizer whose receptive field is wider than a
    patch sees paint in them. Any-order priors (`prior.any_order`) condition each new token on all known ones, by the
    density of the order that takes these first (not `log_prob`'s); the others on those before it in their order. Known
    pixels come back as they were.

    draws (or num_images_per_prompt): completions of each image. Draw d of image k uses seed + k * draws + d, whatever
    the batch. With more than one, images are `(B, draws, C, H, W)` ("pt"), `(B, draws, H, W, C)` ("np") or a list of
    lists of PIL images ("pil"): `out.images[k][d]` is draw d of image k; and tokens `(B, draws, *grid.shape)`. With
    one, there is no axis of draws. labels (or class_labels): one for all, or one per image; order: as in
    `Prior.sample`, per image too; a list of generators has one per completion. settings: as for
    `ImagePipeline.__call__`; a `callback_on_step_end` is given the tokens of all completions, `(B * draws,
    *grid.shape)`. Raises `ValueError` for a mask of another shape, or arguments out of range, `TypeError` for both or
    none of `known` and `mask`.
    """
    several = None if type(draws) is int and draws == 1 else draws
    labels, mask, several = named(IN_A_COMPLETION, settings, labels=labels, mask=mask, draws=several)
    draws = 1 if several is None else check_count(several, "draws")
    if own := [name for name in ("num_images", "num_images_per_label", "tokens") if name in settings]:
        raise TypeError(f"{own[0]!r} is no argument of a completion, whose images are those given, `draws` of each")
    check_output_type(output_type, LATENT)
    batch = pipeline.to_images(images)
    known = known_pixels(known, mask, images, batch)
    tokens, keep = visible_tokens(pipeline, batch, known)
    order = select_order(order, [row for row in range(len(batch)) for _ in range(draws)], len(batch))
    made = sample(
        pipeline,
        len(batch) * draws,
        repeated(pipeline, labels, len(batch), draws),
        order=order,
        output_type=LATENT if output_type == LATENT else "pt",
        tokens=tokens.repeat_interleave(draws, 0),
        known=keep.repeat_interleave(draws, 0),
        **settings,
    )
    filled = made.tokens if output_type == LATENT else pasted(made.images, batch, known, draws, output_type)
    made = by_draws(replace(made, images=filled), len(batch), draws)
    return made if return_dict else made.to_tuple()


def pasted(drawn: Tensor, images: Tensor, known: Tensor, draws: int, output_type: str) -> Any:
    """`drawn` `(B * draws, C, H, W)`, where `known` `(B, H, W)` as in `images`; of the output type."""
    mask, given = known[:, None].repeat_interleave(draws, 0), images.repeat_interleave(draws, 0)
    return convert_images(torch.where(mask, given, drawn.to(images.device)), output_type)


def by_draws(made: PipelineOutput, count: int, draws: int) -> PipelineOutput:
    """With an axis of draws, if there are several."""
    if draws == 1:
        return made
    images, tokens = made.images, made.tokens.unflatten(0, (count, draws))
    if isinstance(images, list):
        images = [images[start : start + draws] for start in range(0, len(images), draws)]
    else:
        images = tokens if images is made.tokens else images.reshape(count, draws, *images.shape[1:])
    return replace(made, images=images, tokens=tokens)


def visible_tokens(pipeline: Stages, images: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of `images` with all that is not `known` `(B, H, W)` painted over (or it would leak through the encoder's
    receptive field), and which of them to go by, both `(B, *grid.shape)`."""
    return pipeline.encode_batch(painted(images, known[:, None])), pipeline.tokenizer.known_tokens(known)


def painted(images: Tensor, known: Tensor) -> Tensor:
    """`images` `(B, C, H, W)`, painted over where not `known` `(B, 1, H, W)`: from the rim of a hole inwards, each
    pixel the mean of those next to it that are known or painted; grey where nothing is known.

    Against paint of the mean colour, more of the known tokens stay what they are in the whole image (scattered halves
    of digits: 65 % for 47 %), and the hidden ones are likelier.
    """
    paint, there = torch.where(known, images, 0), known.to(images.dtype)

    def sum_around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=1)

    while bool((rim := (there == 0) & (sum_around(there) > 0)).any()):
        paint = torch.where(rim, sum_around(paint) / sum_around(there).clamp(min=1), paint)
        there = there + rim
    return paint


def repeated(pipeline: Stages, labels: Label | Sequence[Label], count: int, draws: int) -> Any:
    """`labels` of `count` images for `draws` completions of each. Raises `ValueError` as `label_ids` does."""
    values: Any = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
    if not isinstance(values, Iterable) or isinstance(values, str):
        return values
    values = list(values)
    pipeline.label_ids(values, count)  # here, or it would count completions
    return [value for value in values for _ in range(draws)]


# Scoring what is there


@serialized
@torch.no_grad()
def conditional_log_prob(
    pipeline: Stages,
    images: Images,
    known: Known = None,
    labels: Label | Sequence[Label] = None,
    *,
    mask: Mask = None,
    batch_size: int = 256,
) -> Tensor:
    """log p of each image's hidden tokens given the known ones, `(B,)` nats. known, mask: one of them, as for
    `complete`.

    It is the log-probability that `complete`, at temperature 1 and unguided, draws the very tokens that the image has
    there. For a prior of one order it is log_prob(all) - log p(known). For one of any order it belongs to the order
    that takes the known tokens first, so that log_prob(all) minus it is not log p(known).

    The known tokens are those that `complete` sees, so nothing hidden helps to predict the rest. With a tokenizer that
    looks beyond a patch they are not quite the image's own tokens, and the result is not a part of
    `ImagePipeline.log_prob`; `region_log_prob` of tokens is. The pixels' log-probability given the tokens
    (`Tokenizer.pixel_log_prob`), where there is one, is not added. Raises `ConditionError` where the prior has no such
    conditional, `ValueError` for a mask of another shape.
    """
    batch = pipeline.to_images(images)
    known = known_pixels(known, mask, images, batch)
    parts = []
    for rows, part, ids in pipeline.batches(batch, labels, batch_size):
        visible, keep = visible_tokens(pipeline, part, known[rows])
        tokens = torch.where(keep, visible, pipeline.encode_batch(part))
        parts.append(region_log_prob(pipeline.prior, tokens, keep, ids))
    return torch.cat(parts)


def region_log_prob(prior: Prior, tokens: Tensor, known: Tensor, labels: Tensor | None = None) -> Tensor:
    """log p(tokens where not `known` | tokens where `known`, labels), `(B,)` nats; exact even where `log_prob` is an
    estimate.

    tokens: `(B, *grid.shape)`; known: bool, `grid.shape` or `(B, *grid.shape)`. A prior that takes any order is asked
    in the one that `sample` walks: the known tokens first, the rest in the prior's own order and cuts. Raises
    `ConditionError` for a prior of one order in which a known token looks at one that is not, `ValueError` for what is
    out of range.
    """
    _, keep = check_known(prior, tokens, known, len(tokens))
    if blocked := int((~sees_all_known(prior, keep)).sum()):
        raise ConditionError(
            f"no exact conditional: this {prior.name} prior goes in one order, {prior.config.order!r}, and in "
            f"{blocked} of {len(tokens)} images known tokens come after hidden ones; it needs all known tokens first, "
            "or a prior that takes any order (masked, blocks or gpt with any_order, made with order_agnostic)"
        )
    each = prior.chain_log_probs(tokens, labels, known=keep)
    return in_finest(each.flatten(1)).masked_fill(keep, 0).sum(1).float()


def sees_all_known(prior: Prior, keep: Tensor) -> Tensor:
    """Whether hidden tokens are drawn from the exact conditional given all known ones, bool `(B,)`.

    keep: which are known, bool `(B, N)` in raster order. This always holds for a prior of any order. For a prior of one
    order it holds where no known token looks at a hidden one: p(known) is then the product of the known tokens' own
    factors, and p(hidden | known) is what remains of p(tokens).
    """
    if prior.any_order:
        return keep.new_ones(len(keep))
    hidden_seen = (~keep).float() @ prior.receptive_field.to(keep.device).float().t()
    return ~(keep & (hidden_seen > 0)).any(1)


# Masks with names


def make_mask(name: str, image_shape: tuple[int, int, int], grid_shape: tuple[int, ...]) -> Tensor:
    """What is known, bool `(H, W)`, when the part of the image called `name` is hidden.

    name: a half (`top`, `bottom`, `left`, `right`), `box` (the middle half of each side), or `scatter:SHARE`: that
    share of the patches that become the grid's tokens (of the pixels, if these are the tokens), at random but always
    the same. Raises `ValueError` for another name, or a share not in (0, 1].
    """
    _, height, width = image_shape
    kind, colon, share = name.partition(":")
    if kind == "scatter" and colon:
        return scattered(share, height, width, max(1, width // grid_shape[-1]))
    if name not in MASKS:
        raise ValueError(f"no mask is called {name!r}; there are {', '.join(MASKS)} and scatter:SHARE, as scatter:0.5")
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
    """bool `(height, width)`, False in a `share` of the patches of `side` by `side` pixels; at least in one."""
    try:
        fraction = float(share)
    except ValueError:
        fraction = float("nan")
    if not 0 < fraction <= 1:
        raise ValueError(f"scatter: the share that is hidden must be above 0 and at most 1 (got {share!r})")
    patches = torch.ones(height // side, width // side, dtype=torch.bool)
    chosen = torch.randperm(patches.numel(), generator=torch.Generator().manual_seed(MASK_SEED))
    patches.view(-1)[chosen[: max(1, round(fraction * patches.numel()))]] = False
    return patches.repeat_interleave(side, 0).repeat_interleave(side, 1)

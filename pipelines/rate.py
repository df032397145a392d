"""Rate-distortion encoding: ids that are near to an image's vectors and cheap for the prior.

Each id minimises |z - e|^2 + rate * s * -ln p(id | earlier ids, condition), greedily in the prior's order, in one pass
like that of sampling. s is the mean squared distance to the nearest code, a constant of the pipeline, so that an id
does not depend on the other images of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prior.arguments import is_number
from prior.base import evaluation_mode
from prior.given import Given
from tokenizer.precision import at_least_float32

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline


def check_rate(pipeline: ImagePipeline, rate: Any) -> None:
    """Raise `ValueError` for a rate out of range, and for a pipeline that cannot encode with this rate."""
    if not is_number(rate) or not 0 <= rate < math.inf:
        raise ValueError(f"rate must be a finite number >= 0 (got {rate!r})")
    if not rate:
        return
    tokenizer, prior = pipeline.tokenizer, pipeline.prior
    quantizer = getattr(tokenizer, "quantizer", None)
    if quantizer is None or not quantizer.searches_codes:
        kind = tokenizer.name if quantizer is None else quantizer.name
        raise ValueError(f"rate: must be 0 here, because {kind!r} has no nearest codes to choose from")
    if not prior.exact:
        raise ValueError(f"rate: must be 0 here, because this {prior.name!r} prior decides by confidence, in no order")
    if not comes_coarse_first(prior.order, tokenizer.levels):
        raise ValueError("rate: must be 0 here, because the prior's order has fine levels before coarse ones")
    if pipeline.code_distance is None:
        raise ValueError(
            "rate: the mean distance to the nearest code is not known; `smalti calibrate`, or "
            "pipe.measure_code_distance(images) with images that were not trained on, measures it"
        )


def comes_coarse_first(order: Tensor, levels: int) -> bool:
    """Return whether an order has the ids of each position from the coarsest level to the finest."""
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return bool((ranks.view(levels, -1).diff(dim=0) > 0).all())


@torch.no_grad()
def encode_at_rate(pipeline: ImagePipeline, images: Tensor, given: Given, rate: float) -> Tensor:
    """Return tokens `(B, *grid.shape)` of float `images` `(B, *spec.shape)`; see the top of this file."""
    tokenizer: Any = pipeline.tokenizer
    prior, quantizer, distance = pipeline.prior, tokenizer.quantizer, pipeline.code_distance
    assert distance is not None
    vectors, tokens = tokenizer.embed(images), torch.zeros(len(images), len(prior.grid), dtype=torch.long)
    tokens, last, rank = tokens.to(images.device), None, 0
    with evaluation_mode(prior):
        state = prior.start(prior.encode_given(given))
        for size in prior.blocks:
            places = prior.order[rank : rank + size]
            nats = -at_least_float32(prior.next_logits(state, last)).log_softmax(-1)
            last = (quantizer.distances(vectors, tokens, places) + rate * distance * nats).argmin(-1)
            tokens[:, places] = last
            rank += size
    return tokens.unflatten(1, prior.grid.shape)

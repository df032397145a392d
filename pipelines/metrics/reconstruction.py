"""Reconstruction quality of a tokenizer: PSNR, losses, SSIM, codebook usage, and a picture to compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.base import codebook_usage
from tokenizer.losses import pixel_losses, psnr
from tokenizer.spec import ImageSpec, to_float, to_uint8

from ..images import ImageDataset
from ..images.pictures import grid_picture
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread_rows
from .quality import ssim

EVALUATED_PIXELS = 1 << 20  # limit on the pixels reconstructed at a time
PIXEL_BITS = "pixel_bits_per_dim"
CODE_COST = "code_cost"
SOME = 2000  # number of held-out images for slow figures


def images_at_a_time(spec: ImageSpec) -> int:
    """Return the batch size for reconstruction without gradients: 256, or fewer to stay within `EVALUATED_PIXELS`."""
    return max(1, min(256, EVALUATED_PIXELS // (spec.frames * spec.height * spec.width)))


@torch.inference_mode()
def evaluate_reconstruction(
    model: Any, images: ImageDataset, limit: int | None = None, group: ProcessGroup = ALONE, ssim_images: int = 0
) -> dict[str, Any]:
    """Return mean PSNR (dB), l1 and l2, and usage and perplexity of the ids, over `limit` evenly spread images; and the
    mean SSIM over `ssim_images` of them, unless that is 0, with reconstructions of 8-bit images rounded to 8 bits."""
    rows = spread_rows(len(images), limit)
    chosen = spread_rows(len(rows), ssim_images)
    ids = torch.zeros(model.grid.vocab_size, dtype=torch.long, device=model.device)
    size = images_at_a_time(images.spec)

    def measure(start: int) -> tuple[dict[str, float], Tensor]:
        batch = images.batch(rows[start : start + size]).to(model.device)
        tokens = model.encode(batch)
        decoded = model.decode(tokens).float()  # bfloat16 under autocast
        ids.add_(torch.bincount(tokens.flatten(), minlength=model.grid.vocab_size))
        found = {"psnr": psnr(decoded, batch).mean(), **pixel_losses(decoded, batch)}
        here, similar = chosen[(chosen >= start) & (chosen < start + len(batch))] - start, torch.empty(0)
        if len(here):
            some = decoded.cpu()[here]
            similar = ssim(batch.cpu()[here], to_float(to_uint8(some)) if images.spec.is_bytes else some)
        return {name: float(value) * len(batch) for name, value in found.items()}, similar

    parts = group.map(measure, range(0, len(rows), size))
    figures: dict[str, Any] = {name: sum(sums[name] for sums, _ in parts) / len(rows) for name in parts[0][0]}
    figures |= {f"codebook_{name}": float(value) for name, value in codebook_usage(group.total(ids)).items()}
    if ssim_images:
        figures |= {"ssim": float(torch.cat([found for _, found in parts]).double().mean()), "ssim_images": len(chosen)}
    return figures


@torch.inference_mode()
def evaluate_pixel_bits(
    model: Any, images: ImageDataset, limit: int | None = None, group: ProcessGroup = ALONE
) -> dict[str, float]:
    """Return the mean bits of a pixel and channel given the tokens, over `limit` evenly spread images; empty if the
    decoder has no likelihood."""
    if not model.has_likelihood:
        return {}
    rows, size = spread_rows(len(images), limit), images_at_a_time(images.spec)

    def measure(start: int) -> float:
        batch = images.batch(rows[start : start + size]).to(model.device)
        return float(model.pixel_log_prob(batch, model.encode(batch)).double().sum())

    nats = -sum(group.map(measure, range(0, len(rows), size)))
    return {PIXEL_BITS: nats / (len(rows) * math.log(2) * math.prod(images.spec.shape))}


@torch.inference_mode()
def evaluate_code_cost(
    model: Any, images: ImageDataset, limit: int | None = None, group: ProcessGroup = ALONE
) -> dict[str, float]:
    """Return the mean cost of a vector's code, distance and price, over `limit` evenly spread images; empty if codes
    have no price."""
    quantizer = getattr(model, "quantizer", None)
    if quantizer is None or quantizer.price is None:
        return {}
    rows, size = spread_rows(len(images), limit), images_at_a_time(images.spec)

    def measure(start: int) -> float:
        batch = images.batch(rows[start : start + size]).to(model.device)
        return float(quantizer.cost(model.embed(batch))) * len(batch)

    return {CODE_COST: sum(group.map(measure, range(0, len(rows), size))) / len(rows)}


def list_prefix_decoders(model: Any) -> list[Callable[[Tensor], Tensor]]:
    """Return functions that decode a growing prefix of each image's tokens, the last one all tokens: one scale, two
    scales, ...; or 1, 2, 4, ... tokens. Empty if the tokenizer cannot decode a prefix."""
    if model.grid.scales:
        return [partial(model.decode_scales, count=k + 1) for k in range(len(model.grid.scales))]
    return [partial(decode_first, model, count) for count in model.prefixes]


def decode_first(model: Any, count: int, tokens: Tensor) -> Tensor:
    return model.decode(tokens[:, :count])


@torch.inference_mode()
def reconstruction_picture(model: Any, images: ImageDataset, count: int = 32) -> np.ndarray:
    """Return a picture of `count` evenly spread images, each row above the row of its reconstructions, with the rows of
    their `list_prefix_decoders` in between."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    originals = images.batch(chosen)
    parts = originals.split(images_at_a_time(images.spec))
    tokens = [model.encode(part.to(model.device)) for part in parts]
    some = [torch.cat([decode(part).cpu() for part in tokens]) for decode in list_prefix_decoders(model)[:-1]]
    decoded = torch.cat([model.decode(part).cpu() for part in tokens])
    columns = min(16, len(chosen))
    rows = zip(*(version.split(columns) for version in (originals, *some, decoded)), strict=True)
    return grid_picture(images.spec.picture(torch.cat([row for group in rows for row in group])), columns)

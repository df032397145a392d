"""What a tokenizer keeps of images: PSNR, losses, SSIM and codebook figures, and a picture of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.base import codebook_usage
from tokenizer.losses import pixel_losses, psnr

from ..images import ImageDataset, to_float, to_uint8
from ..images.pictures import grid_picture
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread
from .quality import ssim

EVALUATED_PIXELS = 1 << 20  # that an evaluation reconstructs at a time at most
SOME = 2000  # held-out images for the figures that are slow


def images_at_a_time(image_shape: tuple[int, ...]) -> int:
    """Images `(C, H, W)` to reconstruct at a time without gradients: 256, or as many as have `EVALUATED_PIXELS`."""
    return max(1, min(256, EVALUATED_PIXELS // (image_shape[1] * image_shape[2])))


@torch.inference_mode()
def evaluate_reconstruction(
    model: Any, images: ImageDataset, limit: int | None = None, group: ProcessGroup = ALONE, looks: int = 0
) -> dict[str, Any]:
    """Means of PSNR (dB), l1 and l2, and usage and perplexity of the ids, over `limit` images, evenly spread; and the
    mean SSIM of `looks` of these, if any, likewise."""
    rows = spread(len(images), limit)
    looked = spread(len(rows), looks)
    ids = torch.zeros(model.grid.vocab_size, dtype=torch.long, device=model.device)
    size = images_at_a_time(images.image_shape)

    def measure(start: int) -> tuple[dict[str, float], Tensor]:
        batch = images.batch(rows[start : start + size]).to(model.device)
        tokens = model.encode(batch)
        decoded = model.decode(tokens).float()  # bfloat16 under autocast
        ids.add_(torch.bincount(tokens.flatten(), minlength=model.grid.vocab_size))
        found = {"psnr": psnr(decoded, batch).mean(), **pixel_losses(decoded, batch)}
        here = looked[(looked >= start) & (looked < start + len(batch))] - start
        return {name: float(value) * len(batch) for name, value in found.items()}, ssim_in_bytes(decoded, batch, here)

    parts = group.map(measure, range(0, len(rows), size))
    figures: dict[str, Any] = {name: sum(sums[name] for sums, _ in parts) / len(rows) for name in parts[0][0]}
    figures |= {f"codebook_{name}": float(value) for name, value in codebook_usage(group.total(ids)).items()}
    if looks:
        figures |= {"ssim": float(torch.cat([found for _, found in parts]).double().mean()), "ssim_images": len(looked)}
    return figures


def ssim_in_bytes(decoded: Tensor, images: Tensor, rows: np.ndarray) -> Tensor:
    """SSIM `(n,)`, on the CPU, of these rows of a batch and its reconstructions, both of 8 bits."""
    if not len(rows):
        return torch.empty(0)
    return ssim(images.cpu()[rows], to_float(to_uint8(decoded.float().cpu()[rows])))


def drafts(model: Any) -> list[Callable[[Tensor], Tensor]]:
    """What a tokenizer makes of the first of an image's tokens alone, as functions of all tokens, coarse to fine, the
    last of all of them: of one scale, of two, ...; or of 1, 2, 4, ... tokens. Empty where only all decode."""
    if model.grid.scales:
        return [partial(model.decode_scales, count=k + 1) for k in range(len(model.grid.scales))]
    return [partial(decode_first, model, count) for count in model.prefixes]


def decode_first(model: Any, count: int, tokens: Tensor) -> Tensor:
    """Images of the first `count` of `tokens` `(B, N)`."""
    return model.decode(tokens[:, :count])


@torch.inference_mode()
def reconstruction_picture(model: Any, images: ImageDataset, count: int = 32) -> np.ndarray:
    """The first `count` images, evenly spread over the set, each row above the row of its reconstructions; above those
    the rows of their `drafts`, where there are any."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    originals = images.batch(chosen)
    parts = originals.split(images_at_a_time(images.image_shape))
    tokens = [model.encode(part.to(model.device)) for part in parts]
    some = [torch.cat([decode(part).cpu() for part in tokens]) for decode in drafts(model)[:-1]]
    decoded = torch.cat([model.decode(part).cpu() for part in tokens])
    columns = min(16, len(chosen))
    rows = zip(*(version.split(columns) for version in (originals, *some, decoded)), strict=True)
    return grid_picture(torch.cat([row for group in rows for row in group]), columns)

"""What a tokenizer keeps of images: PSNR, losses, SSIM, texture and codebook figures, and a picture of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.base import codebook_usage
from tokenizer.losses import pixel_losses, psnr

from ..images import ImageDataset, to_float, to_uint8
from ..images.pictures import grid_picture
from ..processes.sharing import ALONE, Team
from ..shuffling.epochs import spread
from .quality import shuffled, ssim
from .texture import flat_windows, texture_figures

EVALUATED_PIXELS = 1 << 20  # that an evaluation reconstructs at a time at most
SOME = 2000  # held-out images for the figures that are slow, drawn at random


def images_at_a_time(image_shape: tuple[int, ...]) -> int:
    """Images `(C, H, W)` to reconstruct at a time without gradients: 256, or as many as have `EVALUATED_PIXELS`."""
    return max(1, min(256, EVALUATED_PIXELS // (image_shape[1] * image_shape[2])))


@torch.inference_mode()
def evaluate_reconstruction(
    model: Any, images: ImageDataset, limit: int | None = None, team: Team = ALONE
) -> dict[str, float]:
    """Means of PSNR (dB), l1 and l2, and usage and perplexity of the ids, over `limit` images, evenly spread."""
    rows = spread(len(images), limit)
    sums: dict[str, float] = {}
    ids = torch.zeros(model.grid.vocab_size, dtype=torch.long, device=model.device)
    size = images_at_a_time(images.image_shape)

    def measure(start: int) -> dict[str, float]:
        batch = images.batch(rows[start : start + size]).to(model.device)
        tokens = model.encode(batch)
        decoded = model.decode(tokens).float()  # bfloat16 under autocast
        ids.add_(torch.bincount(tokens.flatten(), minlength=model.grid.vocab_size))
        found = {"psnr": psnr(decoded, batch).mean(), **pixel_losses(decoded, batch)}
        return {name: float(value) * len(batch) for name, value in found.items()}

    for part in team.map(measure, range(0, len(rows), size)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    usage = {f"codebook_{name}": float(value) for name, value in codebook_usage(team.total(ids)).items()}
    return {name: total / len(rows) for name, total in sums.items()} | usage


@torch.inference_mode()
def evaluate_looks(model: Any, images: ImageDataset, limit: int | None = SOME, team: Team = ALONE) -> dict[str, Any]:
    """Mean SSIM of images and their reconstructions, both of 8 bits, and the figures of `texture`, over `limit` images
    drawn at random, or all."""
    some = shuffled(len(images))[:limit]

    def measure(rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = images.batch(rows)
        decoded = model.decode(model.encode(batch.to(model.device))).float().cpu()
        return ssim(batch, to_float(to_uint8(decoded))), flat_windows(decoded, batch)

    parts = team.map(measure, some.split(images_at_a_time(images.image_shape)))
    alike = torch.cat([found for found, _ in parts]).double().mean()
    windows = torch.cat([found for _, found in parts])
    return {"ssim": float(alike), "ssim_images": len(some), **texture_figures(windows)}


@torch.inference_mode()
def reconstruction_picture(model: Any, images: ImageDataset, count: int = 32) -> np.ndarray:
    """The first `count` images, evenly spread over the set, each row above the row of its reconstructions; of a
    tokenizer of scales first from one scale, then from one more in each row."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    originals = images.batch(chosen)
    parts = originals.split(images_at_a_time(images.image_shape))
    tokens = [model.encode(part.to(model.device)) for part in parts]
    counts = range(1, len(model.grid.scales))
    some = [torch.cat([model.decode_scales(part, count).cpu() for part in tokens]) for count in counts]
    decoded = torch.cat([model.decode(part).cpu() for part in tokens])
    columns = min(16, len(chosen))
    rows = zip(*(version.split(columns) for version in (originals, *some, decoded)), strict=True)
    return grid_picture(torch.cat([row for group in rows for row in group]), columns)

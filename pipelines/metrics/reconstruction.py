"""What a tokenizer keeps of images: PSNR, losses, SSIM, texture and codebook figures, and a picture of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .texture import flat_windows, texture_figures

EVALUATED_PIXELS = 1 << 20  # that an evaluation reconstructs at a time at most
SOME = 2000  # held-out images for the figures that are slow
Looks = tuple[Tensor, Tensor]


def images_at_a_time(image_shape: tuple[int, ...]) -> int:
    """Images `(C, H, W)` to reconstruct at a time without gradients: 256, or as many as have `EVALUATED_PIXELS`."""
    return max(1, min(256, EVALUATED_PIXELS // (image_shape[1] * image_shape[2])))


@torch.inference_mode()
def evaluate_reconstruction(
    model: Any, images: ImageDataset, limit: int | None = None, group: ProcessGroup = ALONE, looks: int = 0
) -> dict[str, Any]:
    """Means of PSNR (dB), l1 and l2, and usage and perplexity of the ids, over `limit` images, evenly spread; and over
    `looks` of these, if any, likewise, the figures of `look_figures`."""
    rows = spread(len(images), limit)
    looked = spread(len(rows), looks)
    sums: dict[str, float] = {}
    ids = torch.zeros(model.grid.vocab_size, dtype=torch.long, device=model.device)
    size = images_at_a_time(images.image_shape)

    def measure(start: int) -> tuple[dict[str, float], Looks]:
        batch = images.batch(rows[start : start + size]).to(model.device)
        tokens = model.encode(batch)
        decoded = model.decode(tokens).float()  # bfloat16 under autocast
        ids.add_(torch.bincount(tokens.flatten(), minlength=model.grid.vocab_size))
        found = {"psnr": psnr(decoded, batch).mean(), **pixel_losses(decoded, batch)}
        means = {name: float(value) * len(batch) for name, value in found.items()}
        return means, looks_of(decoded, batch, start, looked)

    parts = group.map(measure, range(0, len(rows), size))
    for part, _ in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    usage = {f"codebook_{name}": float(value) for name, value in codebook_usage(group.total(ids)).items()}
    means = {name: total / len(rows) for name, total in sums.items()} | usage
    return means | look_figures([seen for _, seen in parts]) if looks else means


def looks_of(decoded: Tensor, images: Tensor, start: int, looked: np.ndarray) -> Looks:
    """SSIM of images and reconstructions, both of 8 bits, `(n,)`, and the flat windows of both. The batch begins at
    position `start`; looked: the positions that are looked at."""
    here = torch.from_numpy(looked[(looked >= start) & (looked < start + len(images))] - start)
    if not len(here):
        return torch.empty(0), torch.empty(0, 3, dtype=torch.float64)
    before, after = images.cpu()[here], decoded.float().cpu()[here]
    return ssim(before, to_float(to_uint8(after))), flat_windows(after, before)


def look_figures(parts: Sequence[Looks]) -> dict[str, Any]:
    """The mean SSIM, of how many images it is, and the figures of `texture`."""
    alike, windows = (torch.cat(found) for found in zip(*parts, strict=True))
    return {"ssim": float(alike.double().mean()), "ssim_images": len(alike), **texture_figures(windows)}


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

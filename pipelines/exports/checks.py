"""Whether a file does what the tokenizer does: both get the same images, one at a time and together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer import Tokenizer

from .formats import Run
from .tracing import ExportError

TOLERANCE = 1e-4  # of pixels in [-1, 1], in which a grey level is 0.008
NEARBY = 2**-18  # how far images are moved, as a share of their range, to see which choices are close


class Checked(NamedTuple):
    """What was compared: `images` of them, `tokens` in all, of which so many `close_calls` differ, and how far pixels
    are from each other at most."""

    images: int
    tokens: int
    close_calls: int
    pixel_difference: float


def check(tokenizer: Tokenizer, encode: Run, decode: Run, images: Tensor) -> Checked:
    """Compare a file's `encode` and `decode` with the tokenizer's, on `images` (B, C, H, W) in [-1, 1].

    All tokens have to be the same, but for close calls: where the tokenizer itself gives another id to an image that is
    changed by less than its float32 rounds. Pixels have to be the same to within `TOLERANCE`. Raises `ExportError`.
    """
    with torch.no_grad():
        expected = tokenizer.encode(images)
        pixels = tokenizer.decode(expected)
        close, difference = 0, 0.0
        for size in sorted({1, len(images)}):
            found = torch.cat([encode(part.contiguous()) for part in images.split(size)])
            painted = torch.cat([decode(part.contiguous()) for part in expected.split(size)])
            close = max(close, check_tokens(tokenizer, images, expected, found))
            difference = max(difference, check_pixels(pixels, painted))
    return Checked(len(images), expected.numel(), close, difference)


def check_tokens(tokenizer: Tokenizer, images: Tensor, expected: Tensor, found: Tensor) -> int:
    """The number of close calls that differ. Raises `ExportError` for others."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"its encoder gives {found.dtype} of shape {tuple(found.shape)}, the tokenizer {expected.dtype} of shape "
            f"{tuple(expected.shape)}"
        )
    differs = found != expected
    if not bool(differs.any()):
        return 0
    if wrong := int((differs & ~close_calls(tokenizer, images, expected)).sum()):
        raise ExportError(f"its encoder gives other ids than the tokenizer: {wrong:,} of {expected.numel():,} differ")
    return int(differs.sum())


def close_calls(tokenizer: Tokenizer, images: Tensor, tokens: Tensor) -> Tensor:
    """Which of the `tokens` of `images` are others for images that are hardly different, bool as `tokens`."""
    generator = torch.Generator().manual_seed(0)
    close = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(8):
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype) * 2 - 1
        close |= tokenizer.encode((images + NEARBY * noise).clamp(-1, 1)) != tokens
    return close


def check_pixels(expected: Tensor, found: Tensor) -> float:
    """The largest difference. Raises `ExportError` for more than is allowed, and for NaN."""
    if found.shape != expected.shape:
        raise ExportError(
            f"its decoder gives images of shape {tuple(found.shape)}, the tokenizer {tuple(expected.shape)}"
        )
    largest = float((found - expected).abs().max())
    if not largest <= TOLERANCE:
        raise ExportError(f"its decoder gives other pixels than the tokenizer: up to {largest:.2g} (of 2) apart")
    return largest

"""Convolutional encoder and decoder: a stem folds patches into channels, and residual blocks follow at each resolution.

Weights and images are channels-last; convolutions and `GroupNorm` preserve this layout. `widths` splits the
downsampling between the stem and strided stages. With one width, all layers run at the token resolution (fast for small
images); with one width per factor of two, the network is that of VQGAN (Esser et al. 2021) and LlamaGen (Sun et al.
2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import TokenizerConfig

TAIL = (96, 48, 24)  # channels at 1/8, 1/4 and 1/2 of the image's resolution
# Channels at the image's resolution: for at most 3 output channels, and for a likelihood's parameters. Going from 8 to
# 32 improved p(image | tokens) from 3.199 to 3.174 bits per dim after 300 steps on garments.
LAST, LAST_OF_LIKELIHOOD = 8, 32


class ConvolutionsConfig(TokenizerConfig):
    factor: Literal[2, 4, 8, 16] = Field(4, description="image pixels per token along each side")
    widths: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = Field(
        (128,), min_length=1, description="channels at each resolution, finest first; each more halves the patch"
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=64)], ...] = Field(
        (2,), min_length=1, description="residual blocks at each resolution; a single number applies to all"
    )
    attention: bool = Field(False, description="self-attention at the token resolution")
    local: bool = Field(
        False,
        description="normalise over the channels of each position and repeat pixels at the borders, so that a token "
        "means nearly the same in every crop of a large image; false: normalise over the whole image",
    )
    upsampling: Literal["nearest", "subpixel"] = Field(
        "subpixel",
        description="`subpixel` shuffles channels into pixels (Shi et al. 2016), with narrow convolutions at "
        "each resolution; `nearest` repeats pixels and predicts each patch with one convolution",
    )
    tail: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = Field(
        None,
        description="with `subpixel`, channels at each resolution inside a patch, coarsest first; null: 96 "
        "at 1/8 of the image's resolution, 48 at 1/4, 24 at 1/2, 8 at the whole (32 with more than 3 outputs "
        "per pixel)",
    )

    @property
    def patch(self) -> int:
        """Side in pixels of the squares that the first layer folds into channels."""
        return self.factor // 2 ** (len(self.widths) - 1)

    @property
    def blocks_of_widths(self) -> tuple[int, ...]:
        return self.blocks * len(self.widths) if len(self.blocks) == 1 else self.blocks

    def check(self) -> Iterator[str]:
        yield from super().check()
        if any(side % self.factor for side in self.image_size):
            yield f"factor: {self.factor} does not divide the image size {'x'.join(map(str, self.image_size))}"
        if len(self.blocks) not in (1, len(self.widths)):
            yield f"blocks: needs one number, or one per width (got {len(self.blocks)} for {len(self.widths)} widths)"
        if 2 ** (len(self.widths) - 1) > self.factor:
            yield f"widths: {len(self.widths)} resolutions need a factor of {2 ** (len(self.widths) - 1)} or more"
        if any(width % 8 for width in self.widths):
            yield f"widths: must be multiples of 8 (got {list(self.widths)})"
        if self.tail is not None and self.upsampling != "subpixel":
            yield "tail: needs upsampling=subpixel (or tail=null)"
        elif self.tail is not None and self.patch and 2 ** len(self.tail) != self.patch:
            doublings = self.patch.bit_length() - 1
            yield f"tail: needs {doublings} numbers, one per doubling inside a patch (got {len(self.tail)})"


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions added to their input `(B, width, H, W)` (He et al. 2016, pre-activation)."""

    def __init__(self, width: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class FusedLinear(nn.Linear):
    """Several linear maps of one input as one product; `train.optimizer=muon` updates each of the `parts` by itself."""

    def __init__(self, inputs: int, outputs: int, parts: int, bias: bool = True) -> None:
        super().__init__(inputs, parts * outputs, bias=bias)
        self.parts = parts


class SelfAttention(nn.Module):
    """Single-head attention over all positions, added to the input `(B, width, H, W)`."""

    def __init__(self, width: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        return x + self.project(one_head_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def one_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Apply single-head attention to rows `(B, N, width)`. With a head axis, torch uses its fused kernel, which does
    not store the `(B, N, N)` weights."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018) that preserves channels-last memory and dtype. On a GPU, torch's version
    copies to channels-first and returns float32 under autocast; on a CPU it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (F.group_norm if x.device.type != "cuda" else channels_last_norm)(x, groups, weight, bias, eps)


def channels_last_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Apply `F.group_norm` to `(B, C, ...)` in float32; return a channels-last tensor with the dtype of `x`."""
    maps = x.movedim(1, -1)
    return NormalisedRows.apply(maps.flatten(1, -2), groups, weight, bias, eps).view(maps.shape).movedim(-1, 1)


class NormalisedRows(torch.autograd.Function):
    """Group normalisation of rows `(B, N, C)`; saves the rows and two numbers per group for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # Reduce over rows first, in memory order. A group's variance is the variance within its channels plus that
        # between them.
        within, means = (part.unflatten(1, (groups, -1)) for part in torch.var_mean(rows.float(), 1, correction=0))
        between, mean = torch.var_mean(means, 2, correction=0, keepdim=True)
        inverse = (within.mean(2, keepdim=True) + between + eps).rsqrt()
        ctx.save_for_backward(rows, weight, mean, inverse)
        scale = inverse * weight.float().view(groups, -1)
        shift = bias.float().view(groups, -1) - mean * scale
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        return torch.addcmul(for_rows(shift), rows, for_rows(scale), out=result)  # one kernel, also for mixed dtypes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse = ctx.saved_tensors
        groups = mean.shape[1]
        scale = inverse * weight.float().view(groups, -1)
        sums = grad.sum(1, dtype=torch.float32).unflatten(1, (groups, -1))
        products = (grad.float() * rows).sum(1).unflatten(1, (groups, -1))
        weighted = (products - mean * sums) * inverse  # sums of (gradient * normalised input)
        count = rows.shape[1] * scale.shape[2]
        slope = -inverse * (scale * weighted).sum(2, keepdim=True) / count
        offset = -(scale * sums).sum(2, keepdim=True) / count - slope * mean
        rest = for_rows(offset.expand_as(scale)) + for_rows(slope.expand_as(scale)) * rows
        grad_rows = torch.addcmul(rest, for_rows(scale), grad, out=torch.empty_like(rows))
        grad_weight, grad_bias = (part.sum(0).flatten().to(weight.dtype) for part in (weighted, sums))
        return grad_rows, None, grad_weight, grad_bias, None


def for_rows(values: Tensor) -> Tensor:
    """Reshape per-channel values `(B, groups, C / groups)` to `(B, 1, C)`, to broadcast over rows."""
    return values.flatten(1).unsqueeze(1)


class Unshuffle(nn.PixelUnshuffle):
    """Folds patches of `(B, C, H, W)` into channels, `(B, C f^2, H / f, W / f)`, also of an empty batch."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0]:
            return super().forward(input)
        (_, channels, height, width), factor = input.shape, self.downscale_factor
        return input.reshape(0, channels * factor**2, height // factor, width // factor)


class Upsample(nn.Sequential):
    """Doubles height and width by repeating pixels, then applies a 3x3 convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width_in, width_out, 3, padding=1))


class Shuffle(nn.Sequential):
    """Doubles height and width by a 1x1 convolution and a pixel shuffle (Shi et al. 2016)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(nn.Conv2d(width_in, 4 * width_out, 1), nn.PixelShuffle(2))


class NarrowBlock(nn.Module):
    """Two 3x3 convolutions added to their input `(B, width, H, W)`, without normalisation, because absolute levels
    matter near the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def norm(width: int, groups: int | None = None) -> nn.GroupNorm:
    """Build a group normalisation, by default with eight channels per group."""
    return GroupNorm(groups or width // 8, width, eps=1e-6)


class PositionNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each position of `(B, width, H, W)` (Ba et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


MakeNorm = Callable[[int], nn.Module]


def join_layers(config: ConvolutionsConfig, *layers: nn.Module) -> nn.Sequential:
    """Join layers; if the network is `local`, convolutions see the outermost pixels again beyond the border, not
    zeros."""
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if config.local and isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
            layer.padding_mode = "replicate"
    return network


def find_halo(decoder: nn.Module) -> int | None:
    """Return how many tokens away a pixel of a decoder of convolutions sees at most; None if a layer sees all."""
    reach, scale = 0.0, 1
    for layer in decoder.modules():
        if isinstance(layer, (nn.GroupNorm, SelfAttention)):
            return None
        if isinstance(layer, nn.Conv2d):
            reach += layer.dilation[0] * (layer.kernel_size[0] // 2) / scale
        elif isinstance(layer, nn.PixelShuffle):
            scale *= layer.upscale_factor
        elif isinstance(layer, Upsample):
            scale *= 2
    return math.ceil(reach)


def choose_norm(config: ConvolutionsConfig) -> MakeNorm:
    return PositionNorm if config.local else norm


def build_encoder(config: ConvolutionsConfig, dim: int) -> nn.Sequential:
    """Build a network from `(B, channels, H, W)` to `(B, dim, H / factor, W / factor)`."""
    widths, patch, norm = config.widths, config.patch, choose_norm(config)
    layers: list[nn.Module] = [Unshuffle(patch), nn.Conv2d(config.channels * patch**2, widths[0], 3, padding=1)]
    for level, (width, count) in enumerate(zip(widths, config.blocks_of_widths, strict=True)):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width, norm) for _ in range(count)]
    if config.attention:
        layers += [SelfAttention(widths[-1], norm), ResidualBlock(widths[-1], norm)]
    return join_layers(config, *layers, norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], dim, 1))


def build_decoder(config: ConvolutionsConfig, dim: int, outputs: int) -> nn.Sequential:
    """Build the mirrored network, from `(B, dim, H / factor, W / factor)` to `(B, outputs, H, W)`."""
    widths, subpixel, norm = config.widths, config.upsampling == "subpixel", choose_norm(config)
    upsample = Shuffle if subpixel else Upsample
    layers: list[nn.Module] = [nn.Conv2d(dim, widths[-1], 3, padding=1)]
    if config.attention:
        layers += [ResidualBlock(widths[-1], norm), SelfAttention(widths[-1], norm)]
    for level in reversed(range(len(widths))):
        layers += [ResidualBlock(widths[level], norm) for _ in range(config.blocks_of_widths[level])]
        if level:
            layers.append(upsample(widths[level], widths[level - 1]))
    layers += [norm(widths[0]), nn.SiLU()]
    if not subpixel:
        patch = nn.Conv2d(widths[0], outputs * config.patch**2, 3, padding=1)
        return join_layers(config, *layers, patch, nn.PixelShuffle(config.patch))
    tail = default_tail(outputs, config.patch) if config.tail is None else config.tail
    return join_layers(config, *layers, *upsampling_tail(outputs, widths[0], tail))


def default_tail(outputs: int, patch: int) -> tuple[int, ...]:
    """Return the default channels at each resolution inside a patch, coarsest first, for `outputs` output channels."""
    whole = (*TAIL, LAST if outputs <= 3 else LAST_OF_LIKELIHOOD)
    return whole[len(whole) + 1 - patch.bit_length() :]


def upsampling_tail(outputs: int, width: int, tail: tuple[int, ...]) -> list[nn.Module]:
    """Build layers that double the sides of `(B, width, h, w)` `len(tail)` times, with narrow convolutions."""
    layers: list[nn.Module] = []
    for index, narrow in enumerate(tail):
        layers += [Shuffle(width, narrow), *([NarrowBlock(narrow)] if index < len(tail) - 1 else []), nn.SiLU()]
        width = narrow
    return [*layers, nn.Conv2d(width, outputs, 3, padding=1)]

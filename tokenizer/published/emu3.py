"""Emu3's tokenizer (Wang et al. 2024, arXiv:2409.18869), as it sees an image; the `Emu3VQVAE` of transformers.

It is one of films: VQGAN's network for each frame, and between it and the quantizer causal convolutions over time,
which join `frames` frames to one. An image is a film of that many frames alike. Its decoder makes as many again, of
which the first is the image; as no frame sees a later one, the others need not be made. What normalises the decoder is,
as in MoVQ (Zheng et al. 2022, arXiv:2209.09002), scaled and shifted at each place by the codes there.

Batch normalisation is as it is in use: a scale and a shift for each channel, in which the statistics of the training
are folded. (No image of a batch then depends on the others.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..config import ModelConfig, Node
from ..files import ConfigError
from ..layers import Upsample
from ..quantizers.vq import VQConfig
from ..vqgan import Attention, Block, NetworkConfig, conv3, encoder_layers, levels_of, named, norm
from .layouts import Layout, Shapes, Weights
from .settings import transformers_settings
from .vqgans import FIRST, TAMING_NAMES, network_sizes

BATCH_NORM_EPS = 1e-5


class Emu3Config(NetworkConfig):
    """Sizes of the networks; the defaults are those of Emu3."""

    widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (256, 512, 512, 1024), min_length=1, description="channels at each level, finest first"
    )
    z_channels: int = Field(
        4, ge=1, le=4096, description="channels between the network and the projection to the quantizer"
    )
    frames: Literal[1, 2, 4, 8] = Field(4, description="frames of a film that become one")
    quantizer: Annotated[ModelConfig, Node("tokenizer.quantizers:Quantizer")] = Field(
        VQConfig(codes=32768, dim=4), description="how vectors become ids; as wide as z_channels"
    )

    def check(self) -> Iterator[str]:
        """The network has attention in the middle."""
        yield from super().check()
        if not self.mid_attention:
            yield "mid_attention: this network has it"


class Emu3(Autoencoder, name="emu3"):
    """The published network between an image and its codes."""

    Config = Emu3Config

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config, config.factor)
        dim, width = self.quantizer.dim, config.z_channels
        if dim != width:
            raise ConfigError(f"z_channels: must be the width of the codes, {dim} (got {width})")
        self.encoder = named(
            **encoder_layers(config, config.channels),
            film=Film(config.frames),
            shrink=nn.Sequential(*(Shrink(width) for _ in range(config.frames.bit_length() - 1))),
            stack=nn.Sequential(*(TimeBlock(width) for _ in range(config.blocks))),
            project=CausalConv(width, dim, (3, 1, 1)),
            still=nn.Flatten(1, 2),  # of one frame
        )
        self.decoder = Decoder(config, dim, self.outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # those over time are few channels wide
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Film(nn.Module):
    """An image `(B, C, h, w)` as so many frames `(B, C, T, h, w)`."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, self.frames, -1, -1)


class CausalConv(nn.Conv3d):
    """A convolution of films `(B, C, T, h, w)` that keeps height and width; two frames of zeros come first."""

    def __init__(self, width: int, wide: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1) -> None:
        super().__init__(width, wide, kernel, (stride, 1, 1), (0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0)))


class Shrink(CausalConv):
    """Makes one frame of two."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, (4, 3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Affine(nn.Module):
    """A scale and a shift for each channel of `(B, C, T, h, w)`: batch normalisation with its statistics folded in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


class TimeBlock(nn.Module):
    """Two causal convolutions added to their input `(B, C, T, h, w)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Affine(width), CausalConv(width, width)
        self.norm2, self.conv2 = Affine(width), CausalConv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Decoder(nn.Module):
    """Codes `(B, dim, h, w)` to `(B, outputs, H, W)`."""

    def __init__(self, config: Emu3Config, dim: int, outputs: int) -> None:
        super().__init__()
        width, last, groups = config.widths[-1], len(config.widths) - 1, config.groups
        self.project = CausalConv(dim, config.z_channels, (3, 1, 1))
        self.stack = nn.ModuleList(TimeBlock(dim) for _ in range(config.blocks))
        self.grow = nn.ModuleList(CausalConv(dim, dim) for _ in range(config.frames.bit_length() - 1))
        self.stem = conv3(config.z_channels, width)
        middle = (PlacedBlock(width, width, groups, dim), PlacedAttention(width, groups, dim))
        self.middle = nn.ModuleList([*middle, PlacedBlock(width, width, groups, dim)])
        self.levels = nn.ModuleList()
        for level, wide in reversed(list(enumerate(config.widths))):
            attention = level in levels_of(config.decoder_attention, last + 1)
            self.levels.append(Level(width, wide, config, attention, dim, grows=level > 0))
            width = wide
        self.norm, self.head = PlacedNorm(width, groups, dim), conv3(width, outputs)

    def forward(self, z: Tensor) -> Tensor:
        film = z.unsqueeze(2)
        pair = torch.cat([self.project(film), film])  # what is decoded, and the codes that normalise it
        for block in self.stack:
            pair = block(pair)
        for conv in self.grow:  # which doubles the frames, and sees the first of them alone
            pair = F.silu(conv(pair))
        x, codes = pair.squeeze(2).unflatten(0, (2, z.shape[0]))
        x = self.stem(x)
        for part in (*self.middle, *self.levels):
            x = part(x, codes)
        return self.head(F.silu(self.norm(x, codes)))


class PlacedNorm(nn.Module):
    """Group normalisation of `(B, width, H, W)`, scaled and shifted at each place by the codes there."""

    def __init__(self, width: int, groups: int, dim: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.scale, self.shift = nn.Conv2d(dim, width, 1), nn.Conv2d(dim, width, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """codes: `(B, dim, h, w)`, each for the H / h x W / w places that it lies on."""
        scale, shift = (F.interpolate(layer(codes), size=x.shape[-2:]) for layer in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class PlacedBlock(Block):
    """VQGAN's block, normalised so."""

    def __init__(self, width: int, wide: int, groups: int, dim: int) -> None:
        super().__init__(width, wide, groups)
        self.norm1, self.norm2 = PlacedNorm(width, groups, dim), PlacedNorm(wide, groups, dim)  # type: ignore[assignment]

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        h = self.conv1(F.silu(self.norm1(x, codes)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h, codes)))


class PlacedAttention(Attention):
    """VQGAN's self-attention, normalised so."""

    def __init__(self, width: int, groups: int, dim: int) -> None:
        super().__init__(width, groups)
        self.norm = PlacedNorm(width, groups, dim)  # type: ignore[assignment]

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.attend(self.norm(x, codes))


class Level(nn.Module):
    """Blocks of one width, each followed by attention if wanted, then twice the height and width where it grows."""

    def __init__(self, width: int, wide: int, config: Emu3Config, attention: bool, dim: int, grows: bool) -> None:
        super().__init__()
        count, groups = config.blocks + 1, config.groups
        self.blocks = nn.ModuleList(PlacedBlock(wide if n else width, wide, groups, dim) for n in range(count))
        self.attention = nn.ModuleList(PlacedAttention(wide, groups, dim) for _ in range(count if attention else 0))
        self.resample = Upsample(wide, wide) if grows else nn.Identity()

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, codes)
            if self.attention:
                x = self.attention[index](x, codes)
        return self.resample(x)


# Its weights


def folded(weights: Weights) -> Weights:
    """Batch normalisations as a scale and a shift. One that is not whole is left as it is, and found to be missing."""
    found = dict(weights)
    for name in [name.removesuffix(".running_var") for name in weights if name.endswith(".running_var")]:
        parts = [f"{name}.{part}" for part in ("running_var", "running_mean", "weight", "bias")]
        if all(part in found and found[part].shape == found[parts[0]].shape for part in parts):
            variance, mean, weight, bias = (found[part].float() for part in parts)
            scale = weight * (variance + BATCH_NORM_EPS).rsqrt()
            found |= {parts[2]: scale, parts[3]: bias - mean * scale}
            for part in (*parts[:2], f"{name}.num_batches_tracked"):
                found.pop(part, None)
    return found


def sizes(shapes: Shapes) -> dict[str, Any]:
    """Of an `emu3`."""
    frames = 2 ** shapes.count("encoder.shrink.{}.weight")
    return {**network_sizes(shapes), "frames": frames, "quantizer": shapes.codebook()}


PLACED = (
    (r"^((post_)?quant_conv)\.", r"\1.conv."),
    (r"^(decoder.*)\.norm\.(weight|bias)$", r"\1.norm_layer.\2"),
    (r"^(decoder.*)\.scale\.", r"\1.conv_y."),
    (r"^(decoder.*)\.shift\.", r"\1.conv_b."),
    (r"\.(shrink|grow)\.(\d+)\.", r".time_conv.\2.conv.conv."),
    (r"\.stack\.(\d+)\.(conv\d)\.", r".time_res_stack.\1.\2.conv."),
    (r"\.stack\.", ".time_res_stack."),
)
EMU3 = Layout(
    "transformers Emu3VQVAE",
    Emu3,
    lambda weights: "encoder.down_block.down.0.block.0.conv1.weight" in weights,
    sizes,
    (
        *PLACED,
        (r"\.middle\.0\.", ".middle_block.block_1."),
        (r"\.middle\.2\.", ".middle_block.block_2."),
        (r"\.middle\.1\.norm\.", ".middle_block.attn_norm."),
        (r"\.middle\.1\.", ".middle_block.attn_1."),
        (r"^encoder\.(.*)\.resample\.1\.", r"encoder.\1.downsample.conv."),
        (r"^decoder\.(.*)\.resample\.1\.", r"decoder.\1.upsample.conv."),
        (r"\.attention\.(\d+)\.norm\.", r".attn_norms.\1."),
        (r"\.attention\.", ".attn."),
        (r"(\.attn(_1|\.\d+))\.([qkv]|out)\.", r"\1.\3_proj."),
        (r"^encoder\.levels\.", "encoder.down_block.down."),
        (r"^decoder\.levels\.", "decoder.up_block.up."),
        (r"\.blocks\.", ".block."),
        (r"\.skip\.", ".nin_shortcut."),
        (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    ),
    finest_first=True,
    prepare=folded,
    settings=transformers_settings,
)
EMU3_RELEASED = Layout(
    "BAAI Emu3-VisionTokenizer",
    Emu3,
    lambda weights: {FIRST, "encoder.time_res_stack.0.norm1.weight"} <= set(weights),
    sizes,
    (*PLACED, *TAMING_NAMES),
    finest_first=True,
    prepare=folded,
)

"""How other projects (diffusers, taming-transformers, LlamaGen) name the weights of a VQGAN, and the sizes of the
network that follow from the shapes of the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .files.errors import ConfigError, FormatError, WeightsError


@dataclass(frozen=True)
class Layout:
    """How a project names the weights: the substitutions `names`, one after the other, turn our names into its."""

    title: str
    first_block: str
    names: tuple[tuple[str, str], ...]
    training: str = r"(?!)"
    """Pattern of its weights that only training needs."""
    finest_first: bool = False
    """Whether it numbers the decoder's levels from the finest, that is, against the order in which they run."""
    normalize: bool = False

    def published(self, key: str, levels: int) -> str:
        """Its name for our weight `key`, in a network of `levels` levels."""
        if self.finest_first:
            key = re.sub(r"^(decoder\.levels)\.(\d+)", lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", key)
        for pattern, name in (*SHARED, *self.names):
            key = re.sub(pattern, name, key)
        return key


SHARED = (
    (r"^encoder\.project\.", "quant_conv."),
    (r"^decoder\.project\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),  # GumbelVQ
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.", r"\1.conv_out."),
)
# Our pattern, and the names of diffusers, taming-transformers and LlamaGen.
PARTS = (
    (r"^(encoder|decoder)\.norm\.", r"\1.conv_norm_out.", r"\1.norm_out.", r"\1.norm_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0.", ".mid.block_1.", ".mid.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0.", ".mid.attn_1.", ".mid.1."),
    (r"\.middle\.2\.", ".mid_block.resnets.1.", ".mid.block_2.", ".mid.2."),
    (r"^(encoder.*)\.resample\.1\.", r"\1.downsamplers.0.conv.", r"\1.downsample.conv.", r"\1.downsample.conv."),
    (r"^(decoder.*)\.resample\.1\.", r"\1.upsamplers.0.conv.", r"\1.upsample.conv.", r"\1.upsample.conv."),
    (r"^encoder\.levels\.", "encoder.down_blocks.", "encoder.down.", "encoder.conv_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks.", "decoder.up.", "decoder.conv_blocks."),
    (r"\.blocks\.", ".resnets.", ".block.", ".res."),
    (r"\.attention\.", ".attentions.", ".attn.", ".attn."),
    (r"\.out\.", ".to_out.0.", ".proj_out.", ".proj_out."),
    (r"\.skip\.", ".conv_shortcut.", ".nin_shortcut.", ".nin_shortcut."),
)
DIFFUSERS = Layout(
    "diffusers VQModel",
    "encoder.down_blocks.0.resnets.0.conv1.weight",
    (
        *((ours, name) for ours, name, _, _ in PARTS),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    ),
)
TAMING = Layout(
    "taming-transformers VQGAN",
    "encoder.down.0.block.0.conv1.weight",
    tuple((ours, name) for ours, _, name, _ in PARTS),
    training=r"loss\.|model_ema\.|quantize\.embedding\.(cluster_size|embed_avg)$",
    finest_first=True,
)
LLAMAGEN = Layout(
    "LlamaGen VQ",
    "encoder.conv_blocks.0.res.0.conv1.weight",
    tuple((ours, name) for ours, _, _, name in PARTS),
    training=r"quantize\.codebook_used$",
    normalize=True,
)
LAYOUTS = (DIFFUSERS, TAMING, LLAMAGEN)
# Attention as diffusers named it before version 0.15.
FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def recognise(weights: dict[str, Tensor], path: Path) -> Layout:
    """The layout that the weights have, by their names. Raises `FormatError`."""
    for layout in LAYOUTS:
        if layout.first_block in weights:
            return layout
    titles = ", ".join(layout.title for layout in LAYOUTS)
    found = ", ".join(sorted(weights)[:3]) or "none"
    raise FormatError(f"{path}: the names of the weights are not those of {titles} (found {found[:300]}, ...)")


def modern(key: str) -> str:
    """The name that diffusers gives the weight today."""
    for former, name in FORMER.items():
        key = key.replace(former, name)
    return key


def sizes_of(weights: dict[str, Tensor], layout: Layout, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the network and of the quantizer, from shapes. Raises `WeightsError`."""

    def shape(key: str, axes: int = 4) -> tuple[int, ...]:
        name = layout.published(key, levels)
        found = tuple(weights[name].shape) if name in weights else ()
        if len(found) != axes:
            problem = f"has shape {list(found)}, expected {axes} axes" if name in weights else "is missing"
            raise WeightsError(f"{path}: {name} {problem}")
        return found

    def there(key: str) -> bool:
        return layout.published(key, levels) in weights

    def count(key: str) -> int:
        return next(index for index in range(len(weights) + 1) if not there(key.format(index)))

    levels = 0  # all layouts number the encoder's levels from the finest
    levels = count("encoder.levels.{}.blocks.0.conv1.weight")
    numbers = range(levels)
    attention = {
        "encoder": [level for level in numbers if there(f"encoder.levels.{level}.attention.0.q.weight")],
        "decoder": [level for level in numbers if there(f"decoder.levels.{levels - 1 - level}.attention.0.q.weight")],
    }
    stem, widths = shape("encoder.stem.weight"), [shape(f"encoder.levels.{i}.blocks.0.conv1.weight") for i in numbers]
    gumbel = there("quantizer.proj.weight")
    codes, dim = shape("quantizer.embed.weight" if gumbel else "quantizer.codebook", axes=2)
    sizes = {
        "channels": stem[1],
        "widths": tuple(found[0] for found in widths),
        "stem": None if stem[0] == widths[0][0] else stem[0],
        "blocks": count("encoder.levels.0.blocks.{}.conv1.weight"),
        **{f"{part}_attention": tuple(found) or None for part, found in attention.items()},
        "mid_attention": there("encoder.middle.1.q.weight"),
        "z_channels": shape("encoder.head.weight")[0],
    }
    return sizes, {"kind": "gumbel" if gumbel else "vq", "codes": codes, "dim": dim}


def check_settings(settings: dict[str, Any], sizes: dict[str, Any], path: Path) -> None:
    """Raise `FormatError` or `ConfigError` unless a diffusers `config.json` describes the network that we build, with
    the `sizes` of its weights."""
    name = settings.get("_class_name")
    if name != "VQModel":
        raise FormatError(f"{path}: _class_name: only VQModel is read (found {name!r})")
    allowed = {
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    counted = {
        "in_channels": sizes["channels"],
        "out_channels": sizes["channels"],
        "block_out_channels": list(sizes["widths"]),
        "layers_per_block": sizes["blocks"],
        "latent_channels": sizes["z_channels"],
        "num_vq_embeddings": sizes["codes"],
        "vq_embed_dim": sizes["dim"],
        "mid_block_add_attention": sizes["mid_attention"],
    }
    harmless = {"sample_size", "norm_num_groups", "scaling_factor", "lookup_from_codebook", "force_upcast"}
    for key, value in settings.items():
        if key in allowed:
            wrong = [part for part in (value if isinstance(value, list) else [value]) if part not in allowed[key]]
            if wrong:
                raise ConfigError(f"{path}: {key}: only {', '.join(allowed[key])} can be imported (found {wrong[0]!r})")
        elif key in counted:
            if value not in (counted[key], None):
                raise ConfigError(f"{path}: {key}: says {value!r}, the weights have {counted[key]!r}")
        elif key not in harmless and not key.startswith("_"):
            raise ConfigError(f"{path}: {key}: an unknown setting, which may change what the weights mean")

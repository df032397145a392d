"""Layouts for `vqgan`: diffusers, taming-transformers, LlamaGen, IBQ (SEED-Voken) and transformers' Janus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import ConfigError, FormatError
from ..vqgan import VQGAN
from .layouts import Layout, Shapes, Weights

# Columns: our pattern, then the names in diffusers, taming-transformers and LlamaGen.
LAYER_NAMES = (
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
TAMING_NAMES = tuple((ours, name) for ours, _, name, _ in LAYER_NAMES)
TAMING_FIRST = "encoder.down.0.block.0.conv1.weight"  # present in every layout with taming-transformers' names
# Attention names before diffusers 0.15.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

DIFFUSERS_SIZES = {  # settings that the shapes of the weights determine
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("num_vq_embeddings", "vq_embed_dim", "mid_block_add_attention"),
}


# Weights


def rename_old_attention(weights: Weights) -> Weights:
    renamed = {}
    for key, value in weights.items():
        for old, new in OLD_ATTENTION.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def take_averages(weights: Weights) -> Weights:
    """Use the running means that SEED-Voken evaluates with and stores beside the weights, under names without dots."""
    return {key: weights.get(f"model_ema.{key.replace('.', '')}", value) for key, value in weights.items()}


def network_sizes(shapes: Shapes) -> dict[str, Any]:
    numbers, last = range(shapes.levels), shapes.levels - 1
    encoder = [level for level in numbers if shapes.has(f"encoder.levels.{level}.attention.0.q.weight")]
    decoder = [level for level in numbers if shapes.has(f"decoder.levels.{last - level}.attention.0.q.weight")]
    return {
        **shapes.stem_and_levels(),
        "encoder_attention": tuple(encoder) or None,
        "decoder_attention": tuple(decoder) or None,
        "mid_attention": shapes.has("encoder.middle.1.q.weight"),
        "z_channels": shapes.of("encoder.head.weight")[0],
    }


def vqgan_sizes(shapes: Shapes) -> dict[str, Any]:
    quantizer: dict[str, Any] = {"kind": "gumbel"}
    if shapes.has("quantizer.proj.weight"):
        quantizer["codes"], quantizer["dim"] = shapes.of("quantizer.embed.weight", axes=2)
    else:
        quantizer = shapes.codebook()
    more = dict(shapes.layout.more)
    return {**network_sizes(shapes), "quantizer": {**quantizer, **more.pop("quantizer", {})}, **more}


# The weights' `config.json`


def diffusers_settings(settings: dict[str, Any], sizes: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read the settings of diffusers' `VQModel`. Refuses unknown ones, which might change the model."""
    name = settings.get("_class_name")
    if name != "VQModel":
        raise FormatError(f"{path}: _class_name: must be VQModel (found {name!r})")
    allowed = {
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    require_allowed(settings, allowed, path)
    harmless = {"sample_size", "norm_num_groups", "scaling_factor", "lookup_from_codebook", "force_upcast"}
    for key in settings:
        if key not in allowed.keys() | DIFFUSERS_SIZES | harmless and not key.startswith("_"):
            raise ConfigError(f"{path}: {key}: unknown setting, which might change the model")
    return {"image_size": settings.get("sample_size", 32), "groups": settings.get("norm_num_groups", 32)}


def transformers_settings(settings: dict[str, Any], sizes: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read the settings of transformers' `JanusVQVAE`, or of a model that contains one; ignore those of others."""
    settings = settings.get("vq_config", settings)
    if not isinstance(settings, dict) or settings.get("model_type") != "janus_vqgan":
        return {}
    require_allowed(settings, {"num_attention_heads": (1,), "double_latent": (False,)}, path)
    patches = settings.get("num_patches")
    return {"image_size": patches * 2 ** (len(sizes["widths"]) - 1)} if isinstance(patches, int) else {}


def require_allowed(settings: dict[str, Any], allowed: dict[str, tuple[Any, ...]], path: Path) -> None:
    """Raise `ConfigError` for a setting, or an item of a list, that has another value than those allowed."""
    for key, choices in allowed.items():
        value = settings.get(key, choices[0])
        wrong = [part for part in (value if isinstance(value, list) else [value]) if part not in choices]
        if wrong:
            only = ", ".join(map(str, choices))
            raise ConfigError(f"{path}: {key}: only {only} can be imported (found {wrong[0]!r})")


# Layouts

DIFFUSERS = Layout(
    "diffusers VQModel",
    VQGAN,
    lambda weights: "encoder.down_blocks.0.resnets.0.conv1.weight" in weights,
    vqgan_sizes,
    (
        *((ours, name) for ours, name, _, _ in LAYER_NAMES),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    ),
    prepare=rename_old_attention,
    settings=diffusers_settings,
    needs_settings=True,
)
TAMING = Layout(
    "taming-transformers VQGAN",
    VQGAN,
    lambda weights: TAMING_FIRST in weights,
    vqgan_sizes,
    TAMING_NAMES,
    training=r"loss\.|model_ema\.|quantize\.embedding\.(cluster_size|embed_avg)$",
    finest_first=True,
)
SEED_IBQ = replace(TAMING, title="SEED-Voken IBQ", prepare=take_averages, more={"quantizer": {"kind": "ibq"}})
JANUS = replace(
    TAMING,
    title="transformers JanusVQVAE",
    # The decoder's level 0 is the coarsest: all levels except the finest upsample.
    fits=lambda weights: {TAMING_FIRST, "decoder.up.0.upsample.conv.weight"} <= set(weights),
    finest_first=False,
    settings=transformers_settings,
    more={"unit_codes": True},
)
LLAMAGEN = Layout(
    "LlamaGen VQ",
    VQGAN,
    lambda weights: "encoder.conv_blocks.0.res.0.conv1.weight" in weights,
    vqgan_sizes,
    tuple((ours, name) for ours, _, _, name in LAYER_NAMES),
    training=r"quantize\.codebook_used$",
    more={"quantizer": {"normalize": True}},
)

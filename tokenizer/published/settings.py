"""What a `config.json` beside published weights says, held against the weights: diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import ConfigError, FormatError

Settings = dict[str, Any]
VQ_MODELS = ("chameleon_vqgan", "janus_vqgan", "emu3_vqgan")


def diffusers_settings(settings: Settings, sizes: Settings, path: Path) -> Settings:
    """Of diffusers' `VQModel`: `image_size` and `groups`. Raises `FormatError` or `ConfigError`; a setting that is not
    known may change what the weights mean."""
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
        "num_vq_embeddings": sizes["quantizer"]["codes"],
        "vq_embed_dim": sizes["quantizer"]["dim"],
        "mid_block_add_attention": sizes["mid_attention"],
    }
    harmless = {"sample_size", "norm_num_groups", "scaling_factor", "lookup_from_codebook", "force_upcast"}
    check(settings, allowed, counted, path)
    for key in settings:
        if key not in allowed.keys() | counted.keys() | harmless and not key.startswith("_"):
            raise ConfigError(f"{path}: {key}: an unknown setting, which may change what the weights mean")
    return {"image_size": settings.get("sample_size", 32), "groups": settings.get("norm_num_groups", 32)}


def transformers_settings(settings: Settings, sizes: Settings, path: Path) -> Settings:
    """Of a VQVAE of transformers, or a whole model that has one: `image_size`, where they say it; nothing of other
    models. Raises `ConfigError`."""
    settings = settings.get("vq_config", settings)
    if not isinstance(settings, dict) or settings.get("model_type") not in VQ_MODELS:
        return {}
    quantizer, stem, factor = sizes["quantizer"], sizes["stem"] or sizes["widths"][0], 2 ** (len(sizes["widths"]) - 1)
    counted = {
        "in_channels": sizes["channels"],
        "out_channels": sizes["channels"],
        "base_channels": stem,
        "channel_multiplier": [width // stem for width in sizes["widths"]],
        "num_res_blocks": sizes["blocks"],
        "latent_channels": sizes["z_channels"],
        "num_embeddings": quantizer["codes"],
        "codebook_size": quantizer["codes"],
        "embed_dim": quantizer["dim"],
        "temporal_downsample_factor": sizes.get("frames", 1),
    }
    check(settings, {"num_attention_heads": (1,), "double_latent": (False,)}, counted, path)
    patches, resolution = settings.get("num_patches"), settings.get("resolution")
    size = patches * factor if isinstance(patches, int) else resolution
    return {} if size is None else {"image_size": size}


def check(settings: Settings, allowed: dict[str, tuple[Any, ...]], counted: Settings, path: Path) -> None:
    """Raise `ConfigError` unless each of the settings that is `allowed` some values has one, and those that are
    `counted` are as the weights have it."""
    for key, value in settings.items():
        if key in allowed:
            wrong = [part for part in (value if isinstance(value, list) else [value]) if part not in allowed[key]]
            if wrong:
                choices = ", ".join(map(str, allowed[key]))
                raise ConfigError(f"{path}: {key}: only {choices} can be imported (found {wrong[0]!r})")
        elif key in counted and value not in (counted[key], None):
            raise ConfigError(f"{path}: {key}: says {value!r}, the weights have {counted[key]!r}")

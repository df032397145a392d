"""Whose weights fit `vqgan`: diffusers, taming-transformers, LlamaGen, IBQ (SEED-Voken), Janus of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..vqgan import VQGAN
from .layouts import Layout, Shapes, Weights
from .settings import diffusers_settings, transformers_settings

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
TAMING_NAMES = tuple((ours, name) for ours, _, name, _ in PARTS)
FIRST = "encoder.down.0.block.0.conv1.weight"  # of all that call them as taming-transformers does
# Attention as diffusers named it before version 0.15.
FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def modern(weights: Weights) -> Weights:
    """By the names that diffusers gives them today."""
    found = {}
    for key, value in weights.items():
        for former, name in FORMER.items():
            key = key.replace(former, name)
        found[key] = value
    return found


def averaged(weights: Weights) -> Weights:
    """Each weight as its running mean, where the file has these beside it (SEED-Voken): it is them that are evaluated.
    They have the names of the weights, without dots."""
    return {key: weights.get(f"model_ema.{key.replace('.', '')}", value) for key, value in weights.items()}


def network_sizes(shapes: Shapes) -> dict[str, Any]:
    """Those of a network with attention, but for its quantizer."""
    numbers = range(shapes.levels)
    attention = {
        "encoder": [level for level in numbers if shapes.there(f"encoder.levels.{level}.attention.0.q.weight")],
        "decoder": [
            level
            for level in numbers
            if shapes.there(f"decoder.levels.{shapes.levels - 1 - level}.attention.0.q.weight")
        ],
    }
    return {
        **shapes.stem_and_levels(),
        **{f"{part}_attention": tuple(found) or None for part, found in attention.items()},
        "mid_attention": shapes.there("encoder.middle.1.q.weight"),
        "z_channels": shapes.of("encoder.head.weight")[0],
    }


def sizes(shapes: Shapes) -> dict[str, Any]:
    """Of a `vqgan`."""
    quantizer: dict[str, Any] = {"kind": "gumbel"}
    if shapes.there("quantizer.proj.weight"):
        quantizer["codes"], quantizer["dim"] = shapes.of("quantizer.embed.weight", axes=2)
    else:
        quantizer = shapes.codebook()
    more = dict(shapes.layout.more)
    return {**network_sizes(shapes), "quantizer": {**quantizer, **more.pop("quantizer", {})}, **more}


def numbered_as_run(weights: Weights) -> bool:
    """Whether the decoder's level 0, by taming's names, is the coarsest: it is all but the finest that grow."""
    return FIRST in weights and "decoder.up.0.upsample.conv.weight" in weights


DIFFUSERS = Layout(
    "diffusers VQModel",
    VQGAN,
    lambda weights: "encoder.down_blocks.0.resnets.0.conv1.weight" in weights,
    sizes,
    (
        *((ours, name) for ours, name, _, _ in PARTS),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    ),
    prepare=modern,
    settings=diffusers_settings,
    needs_settings=True,
)
TAMING = Layout(
    "taming-transformers VQGAN",
    VQGAN,
    lambda weights: FIRST in weights,
    sizes,
    TAMING_NAMES,
    training=r"loss\.|model_ema\.|quantize\.embedding\.(cluster_size|embed_avg)$",
    finest_first=True,
    settings=transformers_settings,
)
IBQ = replace(TAMING, title="SEED-Voken IBQ", prepare=averaged, settings=None, more={"quantizer": {"kind": "ibq"}})
JANUS = replace(
    TAMING,
    title="transformers JanusVQVAE",
    fits=numbered_as_run,
    finest_first=False,
    more={"unit_codes": True},
)
LLAMAGEN = Layout(
    "LlamaGen VQ",
    VQGAN,
    lambda weights: "encoder.conv_blocks.0.res.0.conv1.weight" in weights,
    sizes,
    tuple((ours, name) for ours, _, _, name in PARTS),
    training=r"quantize\.codebook_used$",
    more={"quantizer": {"normalize": True}},
)

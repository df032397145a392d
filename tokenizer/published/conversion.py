"""Published weights become a model of ours: whose they are, what is missing, left over or misshapen."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import Autoencoder
from ..files import FormatError, WeightsError
from ..model import build_on_meta
from ..quantizers.vq import VQ
from .cosmos import COSMOS
from .emu3 import EMU3, EMU3_RELEASED
from .layouts import Layout, Weights
from .magvit2 import MAGVIT2
from .maskgit import MASKGIT
from .vqgans import DIFFUSERS, IBQ, JANUS, LLAMAGEN, TAMING

# Those that share names with others come before them; which of two none of the weights tells is said by the user.
LAYOUTS = (DIFFUSERS, LLAMAGEN, EMU3, EMU3_RELEASED, MAGVIT2, MASKGIT, COSMOS, JANUS, TAMING)
TOLD = {"ibq": IBQ}
WITHIN = ("model.vqmodel.", "vqmodel.")
"""Before the names of the tokenizer's weights in a whole model of transformers."""


def recognise(weights: Weights, path: Path, told: str | None = None) -> Layout:
    """The layout that the weights have, by their names; `told`: the one of `TOLD` that it is. Raises `FormatError`."""
    found = next((layout for layout in LAYOUTS if layout.fits(weights)), None)
    if told and found is not TAMING:
        raise FormatError(f"{path}: layout: the names of the weights are not those of {TOLD[told].title}")
    if found is None:
        titles = ", ".join(layout.title for layout in (*LAYOUTS, *TOLD.values()))
        names = ", ".join(sorted(weights)[:3]) or "none"
        raise FormatError(f"{path}: the names of the weights are not those of {titles} (found {names[:300]}, ...)")
    if found is TAMING and not any(name.startswith("decoder.") for name in weights):
        raise FormatError(
            f"{path}: there is no decoder, as in the ChameleonVQVAE of transformers; Chameleon's own release has both "
            "halves in its vqgan.ckpt, which can be imported"
        )
    return TOLD[told] if told else found


def prefix_of(names: Collection[str]) -> str:
    """What the names of the tokenizer's weights begin with in a whole model; nothing, if these are a tokenizer's."""
    return next((prefix for prefix in WITHIN if any(name.startswith(prefix) for name in names)), "")


def build(config: Any, weights: Weights, layout: Layout, path: Path) -> tuple[Autoencoder, list[str]]:
    """The model with its weights in float32, and the names of those that only training needs. Raises `WeightsError`
    naming what is missing, left over, misshapen or not finite, and what `build_on_meta` raises."""
    expected = dict(build_on_meta(lambda: layout.kind(config), path).named_parameters())
    names = {key: layout.published(key, len(config.widths)) for key in expected}
    missing = sorted(name for name in names.values() if name not in weights)
    extra = sorted(set(weights) - set(names.values()))
    unused = [name for name in extra if re.match(layout.training, name)]
    unknown = [name for name in extra if name not in unused]
    if missing or unknown:
        raise WeightsError(f"{path}: missing weights {missing[:5]}, unexpected weights {unknown[:5]}")
    model: Autoencoder = layout.kind(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(fitted(weights[names[key]], parameter, names[key], path))
        start(model)
    return model.eval(), unused


def start(model: Autoencoder) -> None:
    """A codebook is not to be started anew by further training, nor is any of its codes dead yet."""
    buffers = dict(model.quantizer.named_buffers())
    if "started" in buffers:
        buffers["started"].fill_(1)
    if isinstance(model.quantizer, VQ):
        model.quantizer.counts.fill_(1)


def fitted(found: Tensor, expected: Tensor, name: str, path: Path) -> Tensor:
    """`found` in float32, checked. (Some 1x1 convolutions are matrices to others.)"""
    if matrix_shape(found) != matrix_shape(expected):
        raise WeightsError(f"{path}: {name} has shape {list(found.shape)}, expected {list(expected.shape)}")
    if not found.is_floating_point():
        raise WeightsError(f"{path}: {name} has type {found.dtype}, expected a floating-point one")
    if not bool(torch.isfinite(found.float()).all()):
        raise WeightsError(f"{path}: {name} holds a value that is not finite")
    return found.float().reshape(expected.shape)


def matrix_shape(weight: Tensor) -> tuple[int, ...]:
    """Its shape, without the two axes of a 1x1 convolution."""
    return tuple(weight.shape[:2] if weight.shape[2:] == (1, 1) else weight.shape)

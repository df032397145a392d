"""Convert published weights to one of our models: recognise the project, check names and shapes, copy."""

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
from .cosmos import COSMOS
from .layouts import Layout, Weights
from .magvit2 import MAGVIT2
from .maskgit import MASKGIT
from .vqgans import DIFFUSERS, JANUS, LLAMAGEN, SEED_IBQ, TAMING

# The first layout that fits is used. TAMING comes last, because it also fits weights of other projects.
LAYOUTS = (DIFFUSERS, LLAMAGEN, MAGVIT2, MASKGIT, COSMOS, JANUS, TAMING)
TAMING_VARIANTS = {"ibq": SEED_IBQ}  # layouts with the names of TAMING, selected by the option `layout`
PREFIXES = ("model.vqmodel.", "vqmodel.")  # of the tokenizer's weights in a complete transformers model


def recognise(weights: Weights, path: Path, variant: str | None = None) -> Layout:
    """Find the layout of `weights` by names and shapes. variant: a key of `TAMING_VARIANTS`. Raises `FormatError`."""
    layout = next((layout for layout in LAYOUTS if layout.fits(weights)), None)
    if variant and layout is not TAMING:
        title = TAMING_VARIANTS[variant].title
        raise FormatError(f"{path}: layout: the weights do not have the names of {title}")
    if layout is None:
        titles = ", ".join(layout.title for layout in (*LAYOUTS, *TAMING_VARIANTS.values()))
        names = ", ".join(sorted(weights)[:3]) or "none"
        raise FormatError(f"{path}: the weights do not have the names of {titles} (found {names[:300]}, ...)")
    return TAMING_VARIANTS[variant] if variant else layout


def prefix_of(names: Collection[str]) -> str:
    """Return the prefix of the tokenizer's weights in a complete model; empty for a tokenizer's own file."""
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), "")


def build_published(config: Any, weights: Weights, layout: Layout, path: Path) -> tuple[Autoencoder, list[str]]:
    """Return the model with float32 weights, and the names of weights that only training needs. Raises `WeightsError`
    for missing, unexpected, misshapen or non-finite weights, and as `build_on_meta` does."""
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
            parameter.copy_(convert(weights[names[key]], parameter, names[key], path))
        # The codebook is trained: fine-tuning should neither initialize it nor revive its codes at once.
        for name, buffer in model.quantizer.named_buffers():
            if name in ("started", "counts"):
                buffer.fill_(1)
    return model.eval(), unused


def convert(weight: Tensor, expected: Tensor, name: str, path: Path) -> Tensor:
    """Convert `weight` to float32 and the expected shape: some projects store 1x1 convolutions as matrices."""
    if squeezed_shape(weight) != squeezed_shape(expected):
        raise WeightsError(f"{path}: {name} has shape {list(weight.shape)}, expected {list(expected.shape)}")
    if not weight.is_floating_point():
        raise WeightsError(f"{path}: {name} has dtype {weight.dtype}, expected a floating-point one")
    if not bool(torch.isfinite(weight.float()).all()):
        raise WeightsError(f"{path}: {name} holds a value that is not finite")
    return weight.float().reshape(expected.shape)


def squeezed_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape without the two spatial axes of a 1x1 convolution."""
    return tuple(weight.shape[:2] if weight.shape[2:] == (1, 1) else weight.shape)

"""Small pipelines that cover every tokenizer and every prior."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from small import PLACED, PRIORS, TOKENIZERS, make_prior, make_tokenizer, quantizer_of

from pipelines import ImagePipeline
from prior.columns import GridColumn

LABELS = ["cat", "dog", "eel"]
# Every tokenizer with `gpt`, and every prior with `vqvae`: the two only share a grid of ids.
PAIRS = [*((tokenizer, "gpt") for tokenizer in TOKENIZERS), *(("vqvae", prior) for prior in PRIORS if prior != "gpt")]
every_pair = pytest.mark.parametrize(("tokenizer", "prior"), PAIRS)
# For tests of what the prior does: every prior, and two tokenizers; the other tokenizers with -m slow.
USUAL = ("vqvae", "titok")
every_prior_pair = pytest.mark.parametrize(
    ("tokenizer", "prior"), [pytest.param(*pair, marks=() if pair[0] in USUAL else pytest.mark.slow) for pair in PAIRS]
)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)
every_placed_tokenizer = pytest.mark.parametrize("tokenizer", PLACED)


def make_pipeline(
    tokenizer="vqvae", prior="gpt", channels=1, *, size=(8, 12), labels=LABELS, sampler=None, sizes=None, **config
):
    """An untrained pipeline; `sizes`: settings of the tokenizer, `config`: settings of the prior."""
    if prior == "next_scale":
        sizes = {**(sizes or {}), "quantizer": quantizer_of("multiscale", size[0] // 4, size[1] // 4)}
    first = make_tokenizer(tokenizer, size, channels, **(sizes or {})).eval()
    config = {"num_classes": len(labels), "tokenizer": first.fingerprint(), "grid": first.grid, **config}
    second = make_prior(prior, **config)
    return ImagePipeline(first, second, labels=labels, sampler=sampler)


def pixels_for(pipe, count=5):
    """Random uint8 images of the pipeline's shape."""
    return torch.randint(0, 256, (count, *pipe.tokenizer.image_shape), dtype=torch.uint8)


def as_pil(pixels, frames=1):
    """PIL images of pixels `(B, C, H, W)`, or of clips `(B, T, C, H, W)`, a list for each."""
    if frames > 1:
        return [as_pil(clip) for clip in pixels]
    return [Image.fromarray(p[0] if len(p) == 1 else p.transpose(1, 2, 0)) for p in pixels.numpy()]


PARTS = {f"{part}/{name}" for part in ("tokenizer", "prior") for name in ("config.json", "model.safetensors")}
PROVENANCE = {
    "data": {"source": "digits", "image_size": 28},
    "tokenizer": {"steps": 1234, "minutes": 1.5, "evaluation": {"psnr": 21.75, "codebook_usage": 0.875}},
    "prior": {"steps": 5678, "minutes": 2.5, "evaluation": {"bits_per_token": 3.125}},
}


# Conditions

COLUMNS = {
    "view": {"kind": "class", "names": ["frontal", "lateral", "none of both"]},
    "findings": {"kind": "flags", "names": ["bone", "metal", "water"]},
    "age": {"kind": "number", "mean": [50.0], "std": [20.0], "low": [18.0], "high": [90.0]},
    "motion": {"kind": "number", "mean": [0.0, 0.0], "std": [2.0, 1.0], "low": [-4.0, -2.0], "high": [4.0, 2.0]},
    "text": {"kind": "vector", "size": 16, "scale": 0.25, "encoder": "ngrams:16"},
}
GIVEN = {
    "view": "lateral",
    "findings": ["bone", "water"],
    "age": 63,
    "motion": [1.5, -1.0],
    "text": torch.linspace(-0.5, 0.5, 16).tolist(),
}
"""A value of each column in `COLUMNS`."""


def make_conditioned(prior="gpt", columns=COLUMNS, *, outline=True, before=False, **config):
    """An untrained pipeline of grey images with every kind of column: `outline` is a grid of another tokenizer,
    `before` a grid of the pipeline's own."""
    own, other = (make_tokenizer("vqvae", size, 1).eval() for size in ((8, 12), (16, 24)))
    if prior == "next_scale":
        own = make_tokenizer("vqvae", (8, 12), 1, quantizer=quantizer_of("multiscale", 2, 3)).eval()
    grids = {"outline": other} if outline else {}
    sources = [*grids.items(), *[("before", own)] * before]
    made = {name: GridColumn(grid=one.grid, tokenizer=one.fingerprint()) for name, one in sources}
    facts = {"grid": own.grid, "num_classes": len(LABELS), "tokenizer": own.fingerprint()}
    second = make_prior(prior, **{**facts, "conditions": {**columns, **made}, "condition_width": 16, **config})
    return ImagePipeline(own, second, labels=LABELS, condition_tokenizers=grids)

"""Figures drawn by the models themselves: receptive fields, the pixels that one token changes, cells of a codebook.

Weights are random, so a figure shows what the architecture allows, not what a model has learned.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenizer import TokenGrid
from tokenizer.posthoc import Posthoc

SIDE = 9
PIXELS, CHANNELS, DECADES = 64, 3, 3
PLANE = 96
NO_TARGET = -1  # no cell is marked
# Smaller than the defaults, where a model has such a setting.
SMALL: dict[str, Any] = {
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "hidden": 32,
    "skip": 32,
    "first_kernel": 3,
    "max_dilation": 8,
    "widths": (16, 16),
    "blocks": 1,
    "groups": 4,
    "frames": 4,
}
# Settings for a quantizer of two channels; the first that a kind accepts is used.
PLANES: list[dict[str, Any]] = [
    {"dim": 2, "codes": 16},
    {"levels": (5, 4)},
    {"bits": 2},
    {"depth": 2, "book": {"kind": "vq", "codes": 5, "dim": 2}},
]


def draw(folder: str, model: Any) -> str:
    """The figure of a model as HTML; '' if it has no figure."""
    drawers = {
        "priors": prior,
        "heads": head,
        "tokenizers": tokenizer,
        "quantizers": quantizer,
        "likelihoods": likelihood,
    }
    with seeded():
        return drawers[folder](model)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw with a fixed seed on one thread, so that every build has the same figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def smaller(config: Any, **given: Any) -> dict[str, Any] | None:
    """Settings of a small model of this configuration, or None if it does not accept `given`."""
    fields = config.model_fields
    settings = {key: value for key, value in SMALL.items() if key in fields}
    while True:
        try:
            config(**settings, **given)
        except ValueError as error:
            wrong = [key for key in settings if key in str(error)]
            if not wrong:
                return None
            settings.pop(wrong[0])  # use the default where the field has another meaning
        else:
            return {**settings, **given}


def stirred(model: Any) -> Any:
    """The model in float64, with weights so large that every input has an effect."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().double()


def prior(member: Any) -> str:
    """Draw which tokens influence the logits at the middle position."""
    grids = [TokenGrid((SIDE, SIDE), 5), TokenGrid((1 + 4 + 25 + 81,), 5, ((1, 1), (2, 2), (5, 5), (9, 9)))]
    for grid in grids:
        settings = smaller(member.Config, grid=grid)
        if settings is None:
            continue
        model = stirred(member(member.Config(**settings)))
        sides = grid.scales or ((SIDE, SIDE),)
        target = len(grid) - SIDE * SIDE // 2 - 1
        return figure(maps(reach(model, target), sides, target), PRIOR)
    return ""


PRIOR = (
    "What the logits at the orange cell depend on: the darker a cell, the more its token changes them (random "
    "weights, a few layers). Empty cells have no influence."
)


def reach(model: Any, target: int) -> Tensor:
    """The largest change of a logit at `target` when each token changes, `(N,)`."""
    grid = model.grid
    tokens = torch.randint(grid.vocab_size, (1, len(grid)))
    changed = tokens.repeat(len(grid), 1)
    at = torch.arange(len(grid))
    changed[at, at] = (changed[at, at] + 1) % grid.vocab_size
    both = torch.cat([tokens, changed]).view(-1, *grid.shape)
    more: dict[str, Any] = {}
    if model.likelihood_passes > 1:  # one pass per block: use the pass of the target's block
        more = {"known": (model.block_of < model.block_of[target]).expand(len(both), -1)}
    logits = model(both, **more).flatten(1, -2).view(len(both), len(grid), -1)[:, target]
    return (logits[1:] - logits[:1]).abs().amax(1)


def maps(size: Tensor, sides: Any, target: int) -> str:
    """Draw grids side by side as SVG, in a colour that suits light and dark pages."""
    shares, start, left, cell = ink(size), 0, 0, 18
    drawn = []
    height = max(rows for rows, _ in sides) * cell
    for rows, columns in sides:
        for index in range(rows * columns):
            x, y = left + index % columns * cell, height - (rows - index // columns) * cell
            chosen = start + index == target
            fill = 'class="target"' if chosen else f'fill-opacity="{float(shares[start + index]):.2f}"'
            drawn.append(f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" {fill}/>')
        start, left = start + rows * columns, left + (columns + 1) * cell
    return f'<svg viewBox="0 0 {left - cell} {height}" class="cells" role="img">{"".join(drawn)}</svg>'


def ink(size: Tensor, decades: int = 6) -> Tensor:
    """Opacity on a logarithmic scale of `decades`; 0 where nothing changes."""
    seen = size > 1e-12
    depth = (size.clamp(min=1e-30).log10() - size.max().clamp(min=1e-30).log10()) / decades + 1
    return torch.where(seen, depth.clamp(0.12, 1), torch.zeros_like(size))


def head(member: Any) -> str:
    """Draw which ids of a position influence the logits of the others."""
    for grid in (TokenGrid((4 * SIDE, SIDE), 5, levels=4), TokenGrid((3 * SIDE, SIDE), 256, channels=3)):
        config = member.Config()
        if member.problem(config, grid):
            continue
        model = stirred(member(config, grid))
        outputs, ids = torch.randn(1, model.size).double(), torch.randint(grid.vocab_size, (1, grid.ids_per_position))
        size = torch.zeros(grid.ids_per_position, grid.ids_per_position)
        for level in range(grid.ids_per_position):
            changed = ids.clone()
            changed[:, level] = (ids[:, level] + grid.vocab_size // 2) % grid.vocab_size
            size[:, level] = (model.logits(outputs, changed) - model.logits(outputs, ids))[0].abs().amax(-1)
        return figure(maps(size.flatten(), (tuple(size.shape),), NO_TARGET), HEAD)
    return ""


HEAD = (
    "The ids of one position, in the order in which they are sampled: the darker a cell, the more the id of its column "
    "changes the logits of its row (random weights). Empty cells have no influence."
)


def tokenizer(member: Any) -> str:
    """Draw which pixels change with the middle token."""
    settings = smaller(member.Config, image_size=(PIXELS, PIXELS), channels=CHANNELS)
    if settings is None:
        return ""
    model = member(member.Config(**settings)).eval()
    images = torch.rand(1, *model.spec.shape) * 2 - 1
    if isinstance(model, Posthoc):  # starts from a trained VAE
        model.start_from(model.vae)
    model.initialize(images)
    tokens = model.encode(images)
    flat, grid = tokens.flatten(), model.grid
    rows, columns = math.prod(grid.shape[:-1]) // model.levels, grid.shape[-1]
    target = rows // 2 * columns + columns // 2 if len(grid.shape) > 1 else len(grid) // 2
    other = flat.clone()
    other[target] = (other[target] + grid.vocab_size // 2) % grid.vocab_size
    moved = (model.decode(other.view_as(tokens)) - model.decode(tokens)).abs()[0].amax(-3)
    if not float(moved.max()):
        return ""
    shares = ink(moved.flatten(), DECADES).view(PIXELS, PIXELS).numpy()
    picture = Image.fromarray(((1 - shares) * 255).astype(np.uint8)).resize((256, 256), Image.Resampling.NEAREST)
    return figure(png(picture), TOKENIZER.format(place=" in the middle" if len(grid.shape) > 1 else ""))


TOKENIZER = (
    "Which pixels of a 64x64 image change with one token{place}: the darker, the more (random weights, a small model, "
    "logarithmic over three decades)."
)


def quantizer(member: Any) -> str:
    """Draw how a quantizer partitions the plane, or how a multi-scale quantizer adds up its scales."""
    if "scales" in member.Config.model_fields:
        return sums(member)
    for settings in PLANES:
        try:
            model = member(member.Config(**settings))
        except ValueError:
            continue
        if model.dim != 2:
            continue
        model.eval()
        line = torch.linspace(-2, 2, PLANE)
        plane = torch.stack([line.expand(PLANE, -1), -line[:, None].expand(-1, PLANE)])[None]
        tokens = model.quantize(plane).tokens
        levels = tokens.view(-1, PLANE, PLANE)
        ids = sum(level.long() * model.vocab_size**n for n, level in enumerate(levels))
        return figure(png(cells(ids)), QUANTIZER)
    return ""


QUANTIZER = "How two channels, each from -2 to 2, become ids: each colour is one id (a small codebook before training)."


def sums(member: Any) -> str:
    """Draw the partial sums of a multi-scale quantizer from coarse to fine, and their target."""
    model = member(member.Config(scales=SCALES, book={"kind": "ema", "codes": 16, "dim": 1}))
    y, x = torch.meshgrid(torch.linspace(-1, 1, SCALES[-1]), torch.linspace(-1, 1, SCALES[-1]), indexing="ij")
    plane = (2 * (3 * x + y).sin() + (x * x + y * y - 0.5))[None, None]
    model.train().quantize(plane)  # initializes the codes
    model.eval()
    tokens = model.quantize(plane).tokens
    sums_so_far = [model.lookup_scales(tokens, count) for count in range(1, len(SCALES) + 1)]
    low, high = float(plane.min()), float(plane.max())
    row = torch.cat([F.pad(part[0, 0], (0, 1), value=high) for part in (*sums_so_far, plane)], 1)[:, :-1]
    grey = ((row - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(grey).resize((grey.shape[1] * 7, grey.shape[0] * 7), Image.Resampling.NEAREST)
    return figure(png(picture), SUMS.format(scales=", ".join(f"{side}x{side}" for side in SCALES)))


SCALES = (1, 2, 4, 8, 16)
SUMS = (
    "The sum of the codes up to each scale ({scales}), and the target on the right: 16 scalar codes, shared by all "
    "scales, before training."
)


def cells(ids: Any) -> Image.Image:
    """A picture of ids, one colour each."""
    names, index = np.unique(ids.numpy(), return_inverse=True)
    index = index.reshape(ids.shape)
    hues = np.linspace(0, 255, len(names), endpoint=False)[np.argsort(np.random.default_rng(3).random(len(names)))]
    colours = np.stack([hues, np.full_like(hues, 90), np.full_like(hues, 235)], 1).astype(np.uint8)
    hsv = Image.fromarray(colours[index], "HSV")
    return hsv.convert("RGB").resize((288, 288), Image.Resampling.NEAREST)


def likelihood(member: Any) -> str:
    """Draw P(value) of one pixel for three random outputs of a decoder."""
    model = member(member.Config(), 1)
    values = torch.zeros(3, 1, 1, 1, dtype=torch.long)
    logs = model.table(torch.randn(3, model.num_parameters, 1, 1), values, 0)[:, :, 0, 0].double()
    shares = logs.exp() / logs.exp().max()
    paths = []
    for row in shares:
        points = " ".join(f"{x * 2:.0f},{118 - 110 * float(y):.1f}" for x, y in enumerate(row))
        paths.append(f'<polyline points="{points}"/>')
    axis = '<line x1="0" y1="119" x2="511" y2="119"/>'
    svg = f'<svg viewBox="0 0 512 120" class="lines" role="img">{axis}{"".join(paths)}</svg>'
    return figure(svg, "P(value) of a pixel's 256 values, black to white, for three random outputs of a decoder.")


def figure(drawn: str, caption: str) -> str:
    """Wrap a figure with its caption."""
    return f'<figure class="drawn">{drawn}<figcaption>{caption}</figcaption></figure>'


def png(picture: Image.Image) -> str:
    """Embed a picture in the page."""
    file = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(file, "PNG", optimize=True)
    side = math.ceil(picture.width)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" width="{side}" height="{picture.height}" src="data:image/png;base64,{data}">'

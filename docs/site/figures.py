"""Figures that a model draws of itself: what it sees, what one token changes, how it cuts a plane.

Of random weights: what is shown is what the architecture allows.
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
NO_TARGET = -1  # none of the cells is one of which the others are seen
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
}
# Ways to be a quantizer of a plane, of which the first is taken that a kind allows.
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
    """The same figure in every build, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def smaller(config: Any, **given: Any) -> dict[str, Any] | None:
    """Settings of a small model of this configuration, or None if it takes none of those given."""
    fields = config.model_fields
    settings = {key: value for key, value in SMALL.items() if key in fields}
    while True:
        try:
            config(**settings, **given)
        except ValueError as error:
            wrong = [key for key in settings if key in str(error)]
            if not wrong:
                return None
            settings.pop(wrong[0])  # it is not a number there, or means something else: the default will do
        else:
            return {**settings, **given}


def stirred(model: Any) -> Any:
    """The model with weights large enough that every input matters, as float64."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().double()


def prior(member: Any) -> str:
    """Which tokens reach the logits of the one in the middle."""
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
    "What the logits at the orange cell see: the darker a cell, the more they move when its token changes (random "
    "weights, a few layers). Empty cells are not seen."
)


def reach(model: Any, target: int) -> Tensor:
    """How far the logits at `target` move when a token changes, `(N,)`."""
    grid = model.grid
    tokens = torch.randint(grid.vocab_size, (1, len(grid)))
    changed = tokens.repeat(len(grid), 1)
    at = torch.arange(len(grid))
    changed[at, at] = (changed[at, at] + 1) % grid.vocab_size
    both = torch.cat([tokens, changed]).view(-1, *grid.shape)
    more: dict[str, Any] = {}
    if model.likelihood_passes > 1:  # of a pass for each block, that of the target
        more = {"known": (model.block_of < model.block_of[target]).expand(len(both), -1)}
    logits = model(both, **more).flatten(1, -2).view(len(both), len(grid), -1)[:, target]
    return (logits[1:] - logits[:1]).abs().amax(1)


def maps(size: Tensor, sides: Any, target: int) -> str:
    """Cells side by side as SVG; their ink follows the text's colour, so that it suits a dark page."""
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
    """Shares of ink, logarithmic over so many decades; nothing where nothing moves."""
    seen = size > 1e-12
    depth = (size.clamp(min=1e-30).log10() - size.max().clamp(min=1e-30).log10()) / decades + 1
    return torch.where(seen, depth.clamp(0.12, 1), torch.zeros_like(size))


def head(member: Any) -> str:
    """Which ids of a position reach the logits of which."""
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
    "Row by row the ids of one position, in the order in which they are drawn: the darker a cell, the more its "
    "column's id moves the logits of its row's (random weights). Empty cells are not seen."
)


def tokenizer(member: Any) -> str:
    """Which pixels change with the token in the middle."""
    settings = smaller(member.Config, image_size=(PIXELS, PIXELS), channels=CHANNELS)
    if settings is None:
        return ""
    model = member(member.Config(**settings)).eval()
    images = torch.rand(1, CHANNELS, PIXELS, PIXELS) * 2 - 1
    if isinstance(model, Posthoc):  # which starts from what another run has trained
        model.start_from(model.vae)
    model.initialize(images)
    tokens = model.encode(images)
    flat, grid = tokens.flatten(), model.grid
    rows, columns = grid.shape[0] // model.levels, grid.shape[-1]
    target = rows // 2 * columns + columns // 2 if len(grid.shape) > 1 else len(grid) // 2
    other = flat.clone()
    other[target] = (other[target] + grid.vocab_size // 2) % grid.vocab_size
    moved = (model.decode(other.view_as(tokens)) - model.decode(tokens)).abs()[0].amax(0)
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
    """How a quantizer of two channels cuts the plane, or how one of several scales adds them up."""
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


QUANTIZER = (
    "How two channels, each from -2 to 2, become ids: a colour is an id (a quantizer of few codes as it is before "
    "training)."
)


def sums(member: Any) -> str:
    """A plane of one channel, and what the scales make of it, coarse to fine."""
    model = member(member.Config(scales=SCALES, book={"kind": "ema", "codes": 16, "dim": 1}))
    y, x = torch.meshgrid(torch.linspace(-1, 1, SCALES[-1]), torch.linspace(-1, 1, SCALES[-1]), indexing="ij")
    plane = (2 * (3 * x + y).sin() + (x * x + y * y - 0.5))[None, None]
    model.train().quantize(plane)  # which starts the codes
    model.eval()
    tokens = model.quantize(plane).tokens
    shown = [model.lookup_scales(tokens, count) for count in range(1, len(SCALES) + 1)]
    low, high = float(plane.min()), float(plane.max())
    row = torch.cat([F.pad(part[0, 0], (0, 1), value=high) for part in (*shown, plane)], 1)[:, :-1]
    grey = ((row - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(grey).resize((grey.shape[1] * 7, grey.shape[0] * 7), Image.Resampling.NEAREST)
    return figure(png(picture), SUMS.format(scales=", ".join(f"{side}x{side}" for side in SCALES)))


SCALES = (1, 2, 4, 8, 16)
SUMS = (
    "The sum of the codes up to each scale ({scales}), and on the right the plane itself: 16 codes of one number, "
    "which all scales share, as they start."
)


def cells(ids: Any) -> Image.Image:
    """A picture of ids, each a colour of its own, with lines where they change."""
    names, index = np.unique(ids.numpy(), return_inverse=True)
    index = index.reshape(ids.shape)
    hues = np.linspace(0, 255, len(names), endpoint=False)[np.argsort(np.random.default_rng(3).random(len(names)))]
    colours = np.stack([hues, np.full_like(hues, 90), np.full_like(hues, 235)], 1).astype(np.uint8)
    hsv = Image.fromarray(colours[index], "HSV")
    return hsv.convert("RGB").resize((288, 288), Image.Resampling.NEAREST)


def likelihood(member: Any) -> str:
    """P(v) of one pixel for three draws of the decoder's output."""
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
    """A figure with its caption."""
    return f'<figure class="drawn">{drawn}<figcaption>{caption}</figcaption></figure>'


def png(picture: Image.Image) -> str:
    """A picture within the page."""
    file = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(file, "PNG", optimize=True)
    side = math.ceil(picture.width)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" width="{side}" height="{picture.height}" src="data:image/png;base64,{data}">'

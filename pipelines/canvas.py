"""Images larger than the model: drawn, continued, scored and decoded as a canvas of tokens, over which a window slides
(`prior.canvas`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prior.arguments import to_tensor, whole_number
from prior.canvas import Canvas, Chain, canvas_log_probs, draw_canvas
from prior.columns import LABEL, Column
from prior.given import Given
from prior.noise import Generators, draw_keys
from prior.options import DecodingOptions, SamplingOptions
from prior.sampling import OnStep
from tokenizer.base import read_grid
from tokenizer.spec import to_float

from .files import replace_file
from .images.pictures import find_user_stacklevel
from .images.views import LazyImages, View, decode_large, list_images, list_place_columns
from .provenance import trained_data

if TYPE_CHECKING:
    from .image_pipeline import Condition, ImagePipeline, Label

Wrap = bool | Literal["x", "y"]
WRAPS: dict[Any, tuple[bool, bool]] = {
    False: (False, False),
    True: (True, True),
    "x": (False, True),
    "y": (True, False),
}
FORMAT_VERSION = 1  # of a canvas's file
LARGEST_WHOLE = 1 << 22  # pixels that a decoder decodes at once if it sees the whole image; larger ones are blended
PART = 64  # tokens on a side of the parts of any other decoder of convolutions


# The chain ----------------------------------------------------------------------------------------


def make_chain(
    pipeline: ImagePipeline,
    size: Sequence[int],
    stride: int | None = None,
    wrap: Wrap = False,
    order: Any = None,
) -> Chain:
    """Return the chain of canvases of `size` (H, W) pixels. stride: pixels between windows; None: half a window. order:
    the name of the order in each window. Raises `ValueError` for what does not fit the tokens."""
    if not pipeline.tokenizer.placed or pipeline.spec.frames > 1:
        what = "clips" if pipeline.spec.frames > 1 else f"tokens of a {pipeline.tokenizer.name!r} tokenizer"
        raise ValueError(
            f"size: {what} have no places on a canvas; it needs a grid of tokens, one for each square of pixels"
        )
    if isinstance(wrap, (Tensor, np.ndarray)) or wrap not in WRAPS:
        raise ValueError(f"wrap must be True, False, 'x' (left to right) or 'y' (top to bottom) (got {wrap!r})")
    if order is not None and not isinstance(order, str):
        raise ValueError("order: give a canvas the name of an order, such as 'hilbert', which is stored with it")
    if isinstance(size, (str, int)) or len(size) != 2:
        raise ValueError(f"size: expected (height, width) in pixels (got {size!r})")
    size, patch, window = [whole_number("size", side) for side in size], find_patch(pipeline), pipeline.spec.size
    nearest = [max(least, round(side / by) * by) for side, by, least in zip(size, patch, window, strict=True)]
    if [*size] != nearest:
        why = f"does not fit tokens of {show(patch)} pixels"
        if any(side < least for side, least in zip(size, window, strict=True)):
            why = f"is smaller than the model's {show(window)}"
        raise ValueError(f"size: {show(size)} {why}; the nearest that does is {show(nearest)}")
    for side, least, wraps in zip(size, window, WRAPS[wrap], strict=True):
        if wraps and side == least:
            raise ValueError(f"wrap: {show(size)} must be larger than the model's {show(window)} where it wraps")
    grid, least = pipeline.prior.grid, min(window)
    if stride is None:
        steps = [max(1, side // by // 2) for side, by in zip(window, patch, strict=True)]
    else:
        stride = whole_number("stride", stride)
        if not 1 <= stride <= least or any(stride % by for by in patch):
            raise ValueError(
                f"stride: must be a multiple of the {show(patch)} pixels of a token, up to {least} (got {stride})"
            )
        steps = [stride // by for by in patch]
    rows, columns = (side // by for side, by in zip(size, patch, strict=True))
    return Chain(grid, (rows, columns), (steps[0], steps[1]), WRAPS[wrap], order)


def show(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def find_patch(pipeline: ImagePipeline) -> tuple[int, int]:
    """Return the pixels, down and right, of a position."""
    down, right = (
        side // count for side, count in zip(pipeline.spec.size, pipeline.prior.grid.positions.shape, strict=True)
    )
    return down, right


def warn_of_whole_images(pipeline: ImagePipeline) -> None:
    """Warn if the models were trained on whole images, in which each place has its own content."""
    data = trained_data(pipeline.provenance)
    if data is not None and data.crop is None:
        warnings.warn(
            "size: this pipeline was trained on whole images; parts of a canvas will look like whole ones side by side "
            "unless these were crops; train with data.crop=random",
            stacklevel=find_user_stacklevel(),
        )


# What is given ------------------------------------------------------------------------------------


def read_canvas_given(
    pipeline: ImagePipeline, chain: Chain, labels: Any = None, condition: Condition = None, count: int | None = None
) -> Given:
    """Read what is given of each window of `count` canvases (None: as many as there are values), the windows of one
    after those of another.

    A value is for all canvases, or one for each, as in `read_given`; or one for each window, an array (count, rows,
    columns, ...). Grids take images of the canvas's size in the column's own scale, which are cut like the canvas. A
    column of places is that of each window. A `Given` has a row for each canvas, or for each window. Raises
    `ValueError` for a map of another shape."""
    windows = len(chain.starts[0]), len(chain.starts[1])
    number, columns = windows[0] * windows[1], pipeline.columns
    if isinstance(condition, Given) and count is not None and len(condition) == count * number:
        return condition.to(pipeline.device)  # which was read for each window
    if isinstance(condition, Given):
        given = pipeline.read_given(labels, condition, count)
        maps, plain = dict[str, Any](), dict[str, Any]()
    else:
        if not isinstance(condition, (Mapping, type(None))):
            grids = [name for name, column in columns.items() if column.is_map]
            condition = {grids[0]: condition} if len(grids) == 1 else condition
        values = dict(condition or {}) if isinstance(condition, (Mapping, type(None))) else {"": condition}
        if labels is not None and is_per_window(labels, columns.get(LABEL)):
            values[LABEL], labels = labels, None
        maps = {name: value for name, value in values.items() if value is not None and takes_map(columns, name, value)}
        plain = {name: value for name, value in values.items() if name not in maps}
        several = {name: read_map(pipeline, chain, name, value) for name, value in maps.items()}
        counts = {len(each) // number for each in several.values()}
        count = max(counts) if count is None and counts and max(counts) > 1 else count
        given = pipeline.read_given(labels, plain, count)
        maps = {
            name: each.repeat(len(given), *[1] * (each.ndim - 1)) if len(each) == number else each
            for name, each in several.items()
        }
    rows = given.repeat(number)
    for name, each in maps.items():
        if len(each) != len(rows):
            raise ValueError(f"condition: {name}: has maps for {len(each) // number} canvases, not for {len(given)}")
    if taken := [name for name in list_place_columns(columns) if name in rows.rows or name in maps]:
        raise ValueError(f"condition: {taken[0]}: is the place of each window and found from it; leave it out")
    view = View(chain.window, chain.stride)
    centres = torch.tensor([view.centre(corner, chain.size) for corner in chain.corners]).repeat(len(given), 1)
    maps = {**maps, **dict.fromkeys(list_place_columns(columns), centres)}
    return rows.with_rows(**{name: each.to(pipeline.device) for name, each in maps.items()})


def takes_map(columns: Mapping[str, Column], name: str, value: Any) -> bool:
    column = columns.get(name)
    return column is not None and (column.is_map or is_per_window(value, column))


def is_per_window(value: Any, column: Column | None) -> bool:
    """Return whether a value has three axes more than one of the column: canvases, and rows and columns of windows."""
    return column is not None and len(axes_of(value)) == 3 + column.axes


def axes_of(value: Any) -> tuple[int, ...]:
    """Return the lengths of the axes of an array or of nested lists."""
    if hasattr(value, "shape"):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)) and value:
        return (len(value), *axes_of(value[0]))
    return ()


def read_map(pipeline: ImagePipeline, chain: Chain, name: str, value: Any) -> Tensor:
    """Return the raw rows of the windows of one or several canvases; see `read_canvas_given`."""
    column, windows = pipeline.columns[name], (len(chain.starts[0]), len(chain.starts[1]))
    if column.is_map:
        value = cut_map(pipeline, chain, name, value)
    else:
        found = axes_of(value)
        if found[1:3] != windows:
            raise ValueError(
                f"condition: {name}: a value for each window is an array (count, {windows[0]}, {windows[1]}) here "
                f"(got {found})"
            )
        value = value.reshape(-1, *column.shape) if isinstance(value, Tensor) else flatten(value)
    raw: Tensor = pipeline.read_given(condition={name: value}, count=len(value)).raw(name, pipeline.device)
    return raw


def flatten(value: Any) -> list[Any]:
    """Return the values of all windows, in a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [one for canvas in value for row in canvas for one in row]


def cut_map(pipeline: ImagePipeline, chain: Chain, name: str, images: Any) -> Tensor:
    """Cut images that lie over a canvas, for the grid column `name`, like the canvas: `(count * windows, C, h, w)`."""
    tokenizer = pipeline.condition_tokenizers.get(name)
    if tokenizer is None or tokenizer.spec.frames > 1:
        raise ValueError(f"condition: {name}: has no tokenizer of images, which a canvas needs")
    spec = tokenizer.spec
    pitches = [side / window for side, window in zip(spec.size, chain.window, strict=True)]
    if any(start * pitch % 1 for starts, pitch in zip(chain.starts, pitches, strict=True) for start in starts):
        raise ValueError(
            f"condition: {name}: has too few pixels, {show(spec.size)}, for windows that begin at any token"
        )
    size = tuple(int(pitch * side) for pitch, side in zip(pitches, chain.size, strict=True))
    several, tiles = list_images(images, spec), list[Tensor]()
    for number in range(len(several)):
        image = several.read(number)
        if tuple(image.shape[-2:]) != size:
            got = show(image.shape[-2:])
            raise ValueError(f"condition: {name}: a map of this canvas has {show(size)} pixels (got {got})")
        for top, left in chain.corners:
            rows = (int(top * pitches[0]) + torch.arange(spec.height)) % size[0]
            tiles.append(image[..., rows, :][..., (int(left * pitches[1]) + torch.arange(spec.width)) % size[1]])
    return torch.stack(tiles)


# Drawing and scoring ------------------------------------------------------------------------------


def sample_canvas(
    pipeline: ImagePipeline,
    chain: Chain,
    given: Given,
    *,
    sampling: SamplingOptions,
    decoding: DecodingOptions,
    generator: Generators = None,
    tokens: Any = None,
    known: Any = None,
    batch_size: int = 64,
    progress: bool | Mapping[str, Any] = False,
    on_step: OnStep | None = None,
) -> Canvas:
    """Draw canvases; see `ImagePipeline.__call__`. given: from `read_canvas_given`."""
    warn_of_whole_images(pipeline)
    prior, count = pipeline.prior, len(given) // len(chain.corners)
    if decoding.num_orders > 1:
        raise ValueError("num_orders: a canvas has one chain; leave it out")
    tokens, known = read_known(chain, tokens, known, count)
    drawn = draw_canvas(
        prior,
        chain,
        given,
        draw_keys(generator, count),
        tokens,
        known,
        sampling,
        decoding,
        batch_size=batch_size,
        progress=progress,
        on_step=on_step,
    )
    return Canvas(drawn, chain, known, prior.fingerprint())


def read_known(chain: Chain, tokens: Any, known: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return the known tokens of `count` canvases, 0 elsewhere, and bool `known`. Raises `ValueError`."""
    shape = chain.canvas.shape
    if (tokens is None) != (known is None):
        raise ValueError("give `tokens` and `known` together: `known` marks the tokens to keep")
    if tokens is None:
        return torch.zeros(count, *shape, dtype=torch.long), torch.zeros(count, *shape, dtype=torch.bool)
    tokens, known = to_tensor(tokens).cpu(), to_tensor(known).cpu()
    for name, each, right in (
        ("tokens", tokens, not tokens.is_floating_point()),
        ("known", known, known.dtype == torch.bool),
    ):
        if not right or tuple(each.shape) not in (shape, (count, *shape)):
            raise ValueError(
                f"{name} of a canvas should have shape {shape} or {(count, *shape)} (got {tuple(each.shape)})"
            )
    known = known.expand(count, *shape)
    tokens = torch.where(known, tokens.long(), 0)
    chain.canvas.check(tokens)
    return tokens, known.clone()


@torch.no_grad()
def canvas_log_prob(
    pipeline: ImagePipeline,
    canvas: Canvas,
    labels: Label | Sequence[Label] = None,
    *,
    condition: Condition = None,
    batch_size: int = 256,
) -> Tensor:
    """Return log p of the tokens of canvases that were not known before they were drawn, `(B,)` nats, given the known
    ones: the density of `canvas.chain`, from which `pipe(size=...)` draws at temperature 1 without guidance.

    canvas: `out.canvas` of a call, or from `encode_canvas`. labels, condition: as for the call. It is the density of
    the chain, not that of a model of whole canvases: other strides and orders give other values. Raises `ValueError`
    for a canvas of another pipeline."""
    canvas.require(pipeline.prior)
    given = read_canvas_given(pipeline, canvas.chain, labels, condition, len(canvas))
    nats = canvas_log_probs(pipeline.prior, canvas.chain, given, canvas.tokens, canvas.known, batch_size=batch_size)
    return nats.flatten(1).sum(1).float()


# Between images and canvases ----------------------------------------------------------------------


def encode_canvas(
    pipeline: ImagePipeline,
    images: Any,
    *,
    stride: int | None = None,
    wrap: Wrap = False,
    order: str | None = None,
    batch_size: int = 256,
) -> Canvas:
    """Encode large images of one size to a canvas. Windows at half their size are encoded, and each token is that of
    the window in which it is farthest from the border. stride, wrap, order: of the chain, as in `__call__`. Raises
    `ValueError` for images of several sizes."""
    several = pipeline.list_images(images)
    batch = torch.stack(read_equal(several))
    chain = make_chain(pipeline, tuple(batch.shape[-2:]), stride, wrap, order)
    tokens = encode_large_batch(pipeline, batch, chain, batch_size)
    return Canvas(tokens, chain, torch.zeros_like(tokens, dtype=torch.bool), pipeline.prior.fingerprint())


def read_equal(images: LazyImages) -> list[Tensor]:
    """Return images `(C, H, W)`. Raises `ValueError` unless they have one size."""
    every = [to_float(images.read(number)) for number in range(len(images))]
    for name, image in zip(images.names, every, strict=True):
        if image.shape != every[0].shape:
            sizes = " and ".join(show(each.shape[-2:]) for each in (every[0], image))
            raise ValueError(f"{name}: images of one call must have one size (got {sizes} pixels)")
    return every


def encode_large_batch(pipeline: ImagePipeline, images: Tensor, chain: Chain, batch_size: int = 256) -> Tensor:
    """Encode float images `(B, C, H, W)` to tokens `(B, *chain.canvas.shape)`, on the CPU; see `encode_canvas`."""
    half = replace(chain, stride=chain.half)
    patch, spec = find_patch(pipeline), pipeline.spec
    windows = list[Tensor]()
    for top, left in half.corners:
        rows = (top * patch[0] + torch.arange(spec.height)) % images.shape[-2]
        windows.append(images[..., rows, :][..., (left * patch[1] + torch.arange(spec.width)) % images.shape[-1]])
    every = torch.cat(windows)
    tokens = torch.cat([pipeline.encode_batch(part).cpu() for part in every.split(batch_size)])
    return merge_windows(half, tokens.long().unflatten(0, (len(windows), len(images))).transpose(0, 1))


def merge_windows(chain: Chain, values: Tensor) -> Tensor:
    """Return values of the tokens of each window, `(B, windows, *grid.shape)`, on the canvas,
    `(B, *chain.canvas.shape)`: those of the window in which a token is farthest from the border."""
    best = torch.full((len(chain.canvas),), -1)
    values, found = values.flatten(2), values.new_zeros(len(values), len(chain.canvas))
    for number, corner in enumerate(chain.corners):
        depth, at = depths(chain, corner), chain.indices[number]
        better = depth > best[at]
        best[at[better]] = depth[better]
        found[:, at[better]] = values[:, number, better]
    return found.unflatten(1, chain.canvas.shape)


def find_known_tokens(chain: Chain, known: Tensor) -> Tensor:
    """Return which tokens are known, `(B, *chain.canvas.shape)`: those of squares in which all pixels are, bool
    `(B, H, W)`."""
    rows, columns = chain.size
    squares = known.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).all(4).all(2).flatten(1)
    found = torch.zeros(len(known), len(chain.canvas), dtype=torch.bool)
    for ids in chain.canvas.cells.t():
        found[:, ids] = squares.cpu()
    return found.unflatten(1, chain.canvas.shape)


def depths(chain: Chain, corner: tuple[int, int]) -> Tensor:
    """Return how many positions each token of a window is from the window's borders within the canvas, `(N,)`."""
    sides = []
    for start, window, side, wraps in zip(corner, chain.window, chain.size, chain.wrap, strict=True):
        place, far = torch.arange(window), max(chain.size)
        before = place if wraps or start else torch.full_like(place, far)
        after = place.flip(0) if wraps or start + window < side else torch.full_like(place, far)
        sides.append(torch.minimum(before, after))
    each = torch.minimum(sides[0][:, None], sides[1]).view(-1, 1).expand(-1, chain.grid.ids_per_position)
    return torch.empty(len(chain.grid), dtype=torch.long).scatter_(0, chain.grid.cells.flatten(), each.flatten())


def decode_canvas(
    pipeline: ImagePipeline, canvas: Canvas, *, output_type: str = "pil", batch_size: int = 64, progress: bool = True
) -> Any:
    """Decode a canvas to images at its own size. A decoder of convolutions decodes it whole: in parts with a halo,
    which are equal, if no layer sees the whole image (`tokenizer.halo`). Any other decoder, and a canvas of more than 4
    million pixels for one with such layers, decodes windows, which are blended."""
    return pipeline.convert_images(decode_canvas_batch(pipeline, canvas.tokens, canvas.chain, batch_size), output_type)


@torch.no_grad()
def decode_canvas_batch(
    pipeline: ImagePipeline, tokens: Tensor, chain: Chain, batch_size: int = 64, *, whole: bool = True
) -> Tensor:
    """Like `decode_canvas`, for tokens `(B, *chain.canvas.shape)`; return float images `(B, C, H, W)`, on the CPU.
    whole: False decodes window by window in any case."""
    patch, halo = find_patch(pipeline), pipeline.tokenizer.halo
    pads = [max(window, halo or 0) if wraps else 0 for window, wraps in zip(chain.window, chain.wrap, strict=True)]
    rows, columns = (torch.arange(-pad, side + pad) for pad, side in zip(pads, chain.size, strict=True))
    padded = Chain(chain.grid, (len(rows), len(columns)), chain.half)
    there = tokens.flatten(1).cpu()[:, chain.select(rows, columns)]
    size = padded.size[0] * patch[0], padded.size[1] * patch[1]
    fits = size[0] * size[1] <= LARGEST_WHOLE
    large = pipeline.tokenizer.resize(*size) if whole and fits and halo is None else None
    images = list[Tensor]()
    for one in there:
        if whole and halo is not None:
            image = decode_parts(pipeline, one, padded, halo)
        elif large is not None:
            image = large.decode(one.view(1, *padded.canvas.shape).to(pipeline.device))[0].cpu()
        else:
            view = View(pipeline.spec.size, (padded.stride[0] * patch[0], padded.stride[1] * patch[1]))
            windows = one[padded.indices].view(*map(len, padded.starts), *chain.grid.shape).to(pipeline.device)
            image = decode_large(pipeline.tokenizer, windows, size, view, batch_size).cpu()
        top, left = pads[0] * patch[0], pads[1] * patch[1]
        images.append(image[..., top : size[0] - top, left : size[1] - left])
    return torch.stack(images)


def decode_parts(pipeline: ImagePipeline, tokens: Tensor, chain: Chain, halo: int) -> Tensor:
    """Decode the tokens of a canvas, `(len(chain.canvas),)`, in parts, each with `halo` tokens around it."""
    (high, wide), (rows, columns) = find_patch(pipeline), chain.size
    image = torch.empty(pipeline.spec.channels, rows * high, columns * wide)
    for top in range(0, rows, PART):
        for left in range(0, columns, PART):
            down = torch.arange(max(0, top - halo), min(rows, top + PART + halo))
            right = torch.arange(max(0, left - halo), min(columns, left + PART + halo))
            large = pipeline.tokenizer.resize(len(down) * high, len(right) * wide)
            assert large is not None  # a decoder with a halo is one of convolutions
            part = tokens[chain.select(down, right)].view(1, *large.grid.shape).to(pipeline.device)
            place = image[:, top * high : (top + PART) * high, left * wide : (left + PART) * wide]
            y, x = (top - int(down[0])) * high, (left - int(right[0])) * wide
            place.copy_(large.decode(part)[0, :, y : y + place.shape[1], x : x + place.shape[2]])
    return image


# Storing ------------------------------------------------------------------------------------------


def save_canvas(canvas: Canvas, path: str | Path) -> None:
    """Write a canvas, with its chain and the fingerprint of its prior, to one safetensors file."""
    chain = canvas.chain
    facts = {
        "format_version": FORMAT_VERSION,
        "prior": canvas.prior,
        "grid": {
            "shape": chain.grid.shape,
            "vocab_size": chain.grid.vocab_size,
            "levels": chain.grid.levels,
            "channels": chain.grid.channels,
        },
        "size": chain.size,
        "stride": chain.stride,
        "wrap": chain.wrap,
        "order": chain.order,
    }
    parts = {"tokens": canvas.tokens.cpu().int().contiguous(), "known": canvas.known.cpu().contiguous()}
    replace_file(Path(path), save(parts, {"canvas": json.dumps(facts)}))


def load_canvas(path: str | Path) -> Canvas:
    """Read what `save_canvas` wrote. Raises `ValueError` for anything else."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["canvas"])
            tokens, known = file.get_tensor("tokens").long(), file.get_tensor("known")
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version: is {facts['format_version']}, should be {FORMAT_VERSION}")
        (rows, columns), (down, right), (y, x) = facts["size"], facts["stride"], facts["wrap"]
        chain = Chain(read_grid(facts["grid"]), (rows, columns), (down, right), (y, x), facts["order"])
        read_known(chain, tokens, known, len(tokens))
        return Canvas(tokens, chain, known, str(facts["prior"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a canvas ({error})") from error

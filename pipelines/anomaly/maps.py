"""Maps of where an image is anomalous, beyond the bits of its tokens, and the scores that they give images.

What tells whole images apart is the surprisal of hidden tokens (see `hidden`). It is blunt about places, for which the
distance from normal filter responses (see `filters`) is better; the two together are the best map. Both are
standardized by their mean and deviation over pixels of normal images.

A defect that covers half of an image is not above its median, but filter responses change at its border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prior.given import Given
from tokenizer import Tokenizer
from tokenizer.spec import to_float

from ..images.tiles import LazyImages, Place, as_lazy, cut_tiles, give_places, load_image, stitch_maps
from ..shuffling import spread
from .calibration import MapReference, require_calibration
from .conformal import Floats
from .distances import CalibrationError, round_digits
from .filters import filter_responses, largest_changes, nearest_distances, smooth, spread_cells
from .hidden import can_hide, hidden_bits, mean_of_codes

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

MAPS = {
    "bits": "bits of each token, spread over its pixels",
    "hidden": "bits of each token while its block of the grid is hidden, less the mean of its id",
    "combined": "`hidden` and the distance from normal filter responses, both standardized",
}
TITLES = {"bits": "bits per pixel", "hidden": "hidden tokens", "combined": "combined map"}
"""Titles of the maps in pictures."""
NEEDED = (
    "tokens with a place in the image and, without tiles, a prior that hides blocks: `masked`, or `blocks` of any order"
)
MAX_TILES = 10_000
"""Tiles from which the mean bits of each id are computed."""
MAX_POINTS, MAX_MEMORY, MAX_SCALED = 4000, 96, 32
"""Cells that serve as neighbours, and images that give them; images that give mean and deviation of pixels."""
MAX_MEASURED = 48
"""Images that give mean and deviation of what the score of an image is made of."""
HANDICAP = 0.7
"""Deviations that a change loses against a peak, because most images have some change: small defects stay visible."""
TOPS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the pixels whose means make up the score of an image: a defect may be small or large."""


class ImageMaps(NamedTuple):
    """The maps of image `number`, each `(H, W)` at its size, and the scores of the image by method."""

    number: int
    hidden: Tensor
    combined: Tensor
    scores: dict[str, float]


def peak_of(heat: Tensor) -> float:
    """Return the mean over `TOPS` of the mean of the highest values of a map, less its median."""
    values = heat.flatten().double().sort(descending=True).values
    tops = [values[: max(1, round(share * len(values)))].mean() for share in TOPS]
    return float(torch.stack(tops).mean() - values.median())


def has_maps(pipeline: ImagePipeline, stride: int | None) -> bool:
    """Whether a calibration fits these maps: for tiles, and for whole images if the prior can hide blocks."""
    return pipeline.tokenizer.placed and (stride is not None or can_hide(pipeline.prior))


def read_images(pipeline: ImagePipeline, images: Any, stride: int | None) -> LazyImages:
    """Read images for tiles or, without a stride, of the model's size. Raises `ValueError`."""
    if stride is None:
        return as_lazy(pipeline.to_images(images))
    return pipeline.list_images(images)


def map_calibrated(
    pipeline: ImagePipeline, images: LazyImages, given: Given, stride: int | None, batch_size: int = 256
) -> Iterator[ImageMaps]:
    """Yield the maps of each image by the calibration of the pipeline. Raises `CalibrationError` unless it has maps,
    and for another stride or other columns."""
    calibration = require_calibration(pipeline.calibration)
    calibration.check_tiles(() if stride is None else pipeline.tokenizer.image_shape[1:], stride)
    calibration.check_given((*given.names, *calibration.mixture))  # hidden tokens have none
    if calibration.maps is None:
        raise CalibrationError(f"the pipeline was calibrated without maps, which need {NEEDED}; or calibrate again")
    return map_images(pipeline, calibration.maps, images, range(len(images)), given, stride, batch_size)


@torch.no_grad()
def map_images(
    pipeline: ImagePipeline,
    reference: MapReference,
    images: LazyImages,
    numbers: Sequence[int],
    given: Given,
    stride: int | None,
    batch_size: int = 256,
) -> Iterator[ImageMaps]:
    """Yield the maps of the images `numbers`. stride: of their tiles; None for images of the model's size. Raises
    `CalibrationError` for another vocabulary than the calibrated one."""
    if len(reference.codes) != pipeline.prior.grid.vocab_size:
        raise CalibrationError(
            f"calibrated with {len(reference.codes)} ids, this pipeline has {pipeline.prior.grid.vocab_size}: "
            "run `smalti calibrate` again"
        )
    for number, image, surprisal in map_surprisal(
        pipeline, reference.codes, images, numbers, given, stride, batch_size
    ):
        cells = standard_cells(reference, image)
        both = measure_pixels(pipeline, reference, image, cells, surprisal)
        mean, deviation = as_tensor(reference.pixel_mean, both), as_tensor(reference.pixel_deviation, both)
        combined = ((both - mean[:, None, None]) / deviation[:, None, None]).mean(0)
        scores = {"hidden": score_image(reference, surprisal, cells), "map": float(combined.max())}
        yield ImageMaps(number, both[0], combined, scores)


def score_image(reference: MapReference, surprisal: Tensor, cells: Tensor) -> float:
    """Return the peak of the surprisal or the largest change of cells, whichever is more unusual, in deviations. Cells
    are compared down or across, whichever changes less in normal images: a texture may have a direction."""
    unusual = (measure_image(surprisal, cells) - reference.image_mean) / reference.image_deviation
    return float(max(unusual[0], unusual[1 + int(reference.image_mean[1:].argmin())] - HANDICAP))


def measure_image(surprisal: Tensor, cells: Tensor) -> Floats:
    """Return the peak of the surprisal and the logarithms of the largest changes of cells down and across, `(3,)`."""
    return np.array([peak_of(surprisal), *(largest_changes(cells) + 1e-3).log().tolist()])


def map_surprisal(
    pipeline: ImagePipeline,
    codes: Floats,
    images: LazyImages,
    numbers: Sequence[int],
    given: Given,
    stride: int | None,
    batch_size: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the number of each image, the image `(C, H, W)` in [-1, 1] and its surprisal, `(H, W)`: the bits of each
    token while its block is hidden, less the mean of its id, spread over its pixels and stitched."""
    shape, usual = pipeline.tokenizer.image_shape, torch.from_numpy(codes).to(pipeline.device)
    rows, columns = find_patches(pipeline.tokenizer)
    at_once = 1 if stride is not None else batch_size
    for start in range(0, len(numbers), at_once):
        some = list(numbers[start : start + at_once])
        loaded = [load_image(images, number, shape) for number in some]

        def map_tiles(tiles: Tensor, places: list[Place], some: list[int] = some) -> Tensor:
            bits, tokens = measure_hidden(
                pipeline, tiles, given, [place._replace(image=some[place.image]) for place in places]
            )
            above = (bits - usual[tokens].to(bits)).flatten(1)
            return (above[:, None] * rows.to(above)) @ columns.to(above).T  # (B, H, N) @ (N, W)

        parts = LazyImages(len(some), loaded.__getitem__)
        maps = stitch_maps(parts, map_tiles, shape, stride or min(shape[1:]), batch_size, pipeline.device)
        for number, image, heat in zip(some, loaded, maps, strict=True):
            pixels = to_float(image)
            yield number, pixels.to(pipeline.device), heat


def measure_hidden(pipeline: ImagePipeline, tiles: Tensor, given: Given, places: list[Place]) -> tuple[Tensor, Tensor]:
    """Return the bits of the tokens of tiles `(B, C, H, W)` while they are hidden, and the tokens, each `(B,
    *grid.shape)`."""
    tokens = pipeline.encode_batch(tiles)
    return hidden_bits(pipeline.prior, tokens, give_places(given, places)), tokens


def standard_cells(reference: MapReference, image: Tensor) -> Tensor:
    """Return the standardized filter responses `(rows, columns, d)` of an image `(C, H, W)` in [-1, 1]."""
    found = filter_responses(image)
    return (found - as_tensor(reference.response_mean, found)) / as_tensor(reference.response_deviation, found)


@torch.no_grad()
def fit_maps(
    pipeline: ImagePipeline,
    images: LazyImages,
    numbers: Sequence[int],
    given: Given,
    stride: int | None,
    seed: int,
    batch_size: int,
) -> MapReference:
    """Fit to normal images `numbers`, in the random order of their objects. The last quarter of them gives mean and
    deviation of pixels, because an image is not its own neighbour."""
    shape, chance = pipeline.tokenizer.image_shape, np.random.default_rng(seed)

    def load(some: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        return ((number, load_image(images, number, shape)) for number in some)

    most, step = max(1, MAX_TILES // len(numbers)), stride or min(shape[1:])
    cut = cut_tiles(load(numbers), shape, step, batch_size, most)
    found = [measure_hidden(pipeline, tiles.to(pipeline.device), given, places) for tiles, places in cut]
    bits, tokens = (torch.cat(each) for each in zip(*found, strict=True))
    codes = mean_of_codes(bits, tokens, pipeline.prior.grid.vocab_size)
    memory, scaled = np.split(np.array(numbers), [max(1, 3 * len(numbers) // 4)])
    memory, scaled = (part[spread(len(part), most)] for part, most in ((memory, MAX_MEMORY), (scaled, MAX_SCALED)))
    cells = []
    for _, image in load(memory.tolist()):
        rows = filter_responses(to_float(image)).flatten(0, 1).cpu().numpy()
        cells.append(rows[chance.permutation(len(rows))[: MAX_POINTS // len(memory)]])
    points = np.concatenate(cells).astype(np.float64)
    mean, deviation = points.mean(0), np.maximum(points.std(0), 1e-6)
    fitted = {"codes": codes, "response_mean": round_digits(mean), "response_deviation": round_digits(deviation)}
    fitted["points"] = np.round((points - mean) / deviation, 3)
    first = MapReference(
        **fitted, pixel_mean=np.zeros(2), pixel_deviation=np.ones(2), image_mean=np.zeros(3), image_deviation=np.ones(3)
    )
    measured, several = [], np.array(numbers)[spread(len(numbers), MAX_MEASURED)]
    for _, image, surprisal in map_surprisal(pipeline, codes, images, several.tolist(), given, stride, batch_size):
        measured.append(measure_image(surprisal, standard_cells(first, image)))
    moments = []
    for _, image, surprisal in map_surprisal(pipeline, codes, images, scaled.tolist(), given, stride, batch_size):
        both = measure_pixels(pipeline, first, image, standard_cells(first, image), surprisal).flatten(1).double()
        moments.append(torch.stack([both.mean(1), both.square().mean(1)]).cpu().numpy())
    centre, squares = np.mean(moments, 0)
    spread_of = np.sqrt(np.maximum(squares - centre**2, 1e-12))
    fitted = {"pixel_mean": centre, "pixel_deviation": spread_of, "image_mean": np.mean(measured, 0)}
    fitted["image_deviation"] = np.maximum(np.std(measured, 0), 1e-6)
    return first.model_copy(update={name: round_digits(values) for name, values in fitted.items()})


def find_patches(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the weights that spread a token's bits over the rows `(H, N)`, of clips `(T * H, N)`, and columns `(W, N)`
    of the image, each summing to one per token. The pixels of a token are those that `known_tokens` requires for it.
    Raises `ValueError` unless tokens are `placed`."""
    spec = tokenizer.spec
    height, width = spec.frames * spec.height, spec.width
    along_rows = ~torch.eye(height, dtype=torch.bool)[:, :, None].expand(-1, -1, width)
    along_columns = ~torch.eye(width, dtype=torch.bool)[:, None, :].expand(-1, height, -1)
    masks = (each.reshape(-1, *spec.shape[:-3], *spec.size) for each in (along_rows, along_columns))
    rows, columns = ((~tokenizer.known_tokens(known)).flatten(1).float() for known in masks)
    return (rows / rows.sum(0)).to(tokenizer.device), (columns / columns.sum(0)).to(tokenizer.device)


def measure_pixels(
    pipeline: ImagePipeline, reference: MapReference, image: Tensor, cells: Tensor, surprisal: Tensor
) -> Tensor:
    """Return the surprisal and the distance from normal filter responses of each pixel, `(2, H, W)`, both blurred by
    half the side of a token. cells: from `standard_cells`."""
    sigma = max(pipeline.tokenizer.image_shape[1:]) / max(pipeline.prior.grid.shape) / 2
    far = nearest_distances(cells.flatten(0, 1), as_tensor(reference.points, cells)).reshape(cells.shape[:2])
    both = surprisal, spread_cells(far, (image.shape[1], image.shape[2]))
    return torch.stack([smooth(each, sigma) for each in both])


def as_tensor(values: NDArray[np.float64], like: Tensor) -> Tensor:
    """Convert to a tensor of the type and device of another."""
    return torch.from_numpy(values).to(like)

"""Maps of where an image is anomalous, beyond the bits of its tokens, and the scores that they give images.

What tells whole images apart is the surprisal of hidden tokens (see `hidden`). It is blunt about places, for which the
distance from normal filter responses (see `filters`) is better; the two together are the best map. Both are
standardized by their mean and deviation over pixels of normal images.

A defect that covers half of an image is not above its median, but filter responses change at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..images.views import View
from ..shuffling import spread_rows
from .calibration import MapReference
from .conformal import Floats
from .distances import CalibrationError, round_digits
from .examine import Evidence, Examination
from .filters import largest_changes, nearest_distances, smooth, spread_cells
from .hidden import can_hide

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
MAPPED = ("hidden", "responses")
"""The evidence of maps; see `Evidence`."""
Examine = Callable[[Sequence[int]], Iterator[Evidence]]
MAX_POINTS, MAX_MEMORY, MAX_SCALED = 4000, 96, 32
"""Cells that serve as neighbours, and images that give them; images that give mean and deviation of pixels."""
MAX_MEASURED = 48
"""Images that give mean and deviation of what the score of an image is made of."""
HANDICAP = 0.7
"""Deviations that a change loses against a peak, because most images have some change: small defects stay visible."""
TOPS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the pixels whose means make up the score of an image: a defect may be small or large."""


class ImageMaps(NamedTuple):
    """The maps of an image, each `(H, W)` at its size and the mean of those by each of K references, and the scores of
    the image by each, `(K,)`, by method."""

    hidden: Tensor
    combined: Tensor
    scores: dict[str, Floats]


def has_maps(pipeline: ImagePipeline, view: View) -> bool:
    """Whether a calibration fits these maps: for tiles, and for whole images if the prior can hide blocks."""
    return pipeline.tokenizer.placed and (view.is_tiled or can_hide(pipeline.prior))


@torch.no_grad()
def map_image(examination: Examination, references: Sequence[MapReference], evidence: Evidence) -> ImageMaps:
    """Return the maps of an image by evidence of `MAPPED`. Raises `CalibrationError` for another vocabulary than the
    calibrated one."""
    vocab_size = examination.pipeline.prior.grid.vocab_size
    if len(references[0].codes) != vocab_size:
        raise CalibrationError(
            f"calibrated with {len(references[0].codes)} ids, this pipeline has {vocab_size}: run `smalti calibrate` "
            "again"
        )
    hidden, combined, scores = list[Tensor](), list[Tensor](), dict[str, list[float]](hidden=[], map=[])
    for reference in references:
        surprisal, cells = map_hidden(examination, reference.codes, evidence), standard_cells(reference, evidence)
        both = measure_pixels(examination, reference, cells, surprisal)
        mean, deviation = as_tensor(reference.pixel_mean, both), as_tensor(reference.pixel_deviation, both)
        hidden.append(both[0])
        combined.append(((both - mean[:, None, None]) / deviation[:, None, None]).mean(0))
        scores["hidden"].append(score_image(reference, surprisal, cells))
        scores["map"].append(float(combined[-1].max()))
    by_name = {name: np.array(each) for name, each in scores.items()}
    return ImageMaps(torch.stack(hidden).mean(0), torch.stack(combined).mean(0), by_name)


def map_hidden(examination: Examination, codes: Floats, evidence: Evidence) -> Tensor:
    """Return the surprisal of an image, `(H, W)`: the bits of each token while its block is hidden, less the mean of
    its id, spread over its pixels."""
    bits = evidence.rows["hidden"]
    above = (bits - torch.from_numpy(codes)[evidence.rows["tokens"]].to(bits)).flatten(1)
    return examination.spread(above, evidence.size)


def standard_cells(reference: MapReference, evidence: Evidence) -> Tensor:
    """Return the standardized filter responses of an image, `(rows, columns, d)`."""
    found = evidence.responses
    return (found - as_tensor(reference.response_mean, found)) / as_tensor(reference.response_deviation, found)


def measure_pixels(examination: Examination, reference: MapReference, cells: Tensor, surprisal: Tensor) -> Tensor:
    """Return the surprisal `(H, W)` and the distance from normal filter responses of each pixel, `(2, H, W)`, both
    blurred by half the side of a token. cells: from `standard_cells`."""
    sigma = max(examination.view.size) / max(examination.pipeline.prior.grid.shape) / 2
    cells = cells.to(surprisal.device)
    far = nearest_distances(cells.flatten(0, 1), as_tensor(reference.points, cells)).reshape(cells.shape[:2])
    both = surprisal, spread_cells(far, (surprisal.shape[0], surprisal.shape[1]))
    return torch.stack([smooth(each, sigma) for each in both])


def score_image(reference: MapReference, surprisal: Tensor, cells: Tensor) -> float:
    """Return the peak of the surprisal or the largest change of cells, whichever is more unusual, in deviations. Cells
    are compared down or across, whichever changes less in normal images: a texture may have a direction."""
    unusual = (measure_image(surprisal, cells) - reference.image_mean) / reference.image_deviation
    return float(max(unusual[0], unusual[1 + int(reference.image_mean[1:].argmin())] - HANDICAP))


def measure_image(surprisal: Tensor, cells: Tensor) -> Floats:
    """Return the peak of the surprisal and the logarithms of the largest changes of cells down and across, `(3,)`."""
    return np.array([peak_of(surprisal), *(largest_changes(cells) + 1e-3).log().tolist()])


def peak_of(heat: Tensor) -> float:
    """Return the mean over `TOPS` of the mean of the highest values of a map, less its median."""
    values = heat.flatten().double().sort(descending=True).values
    tops = [values[: max(1, round(share * len(values)))].mean() for share in TOPS]
    return float(torch.stack(tops).mean() - values.median())


class Roles(NamedTuple):
    """Which normal images give the cells that serve as neighbours, which the mean and deviation of pixels (others,
    because an image is not its own neighbour), and which those of the score of an image."""

    memory: list[int]
    scaled: list[int]
    measured: list[int]

    @classmethod
    def choose(cls, numbers: Sequence[int]) -> Roles:
        """Divide the images `numbers`, in the random order of their objects."""
        every = np.array(numbers)
        memory, scaled = np.split(every, [max(1, 3 * len(every) // 4)])
        chosen = ((memory, MAX_MEMORY), (scaled, MAX_SCALED), (every, MAX_MEASURED))
        return cls(*(some[spread_rows(len(some), most)].tolist() for some, most in chosen))


@torch.no_grad()
def fit_maps(
    examination: Examination, examine: Examine, codes: Floats, roles: Roles, seed: int, max_points: int = MAX_POINTS
) -> MapReference:
    """Fit to normal images. examine: yields the evidence of `MAPPED` of images by their numbers. codes: the mean bits
    of each id. max_points: number of cells that serve as neighbours."""
    cells = dict[int, Floats]()
    for evidence in examine(roles.memory):
        rows, chance = evidence.responses.flatten(0, 1).double().numpy(), np.random.default_rng((seed, evidence.number))
        cells[evidence.number] = rows[chance.permutation(len(rows))[: max(1, max_points // len(roles.memory))]]
    points = np.concatenate([cells[number] for number in roles.memory])
    mean, deviation = points.mean(0), np.maximum(points.std(0), 1e-6)
    fitted = {"codes": codes, "response_mean": round_digits(mean), "response_deviation": round_digits(deviation)}
    fitted["points"] = np.round((points - mean) / deviation, 3)
    pixel, image = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0] * 3, [1.0] * 3])
    plain = MapReference(**fitted, pixel_mean=pixel[0], pixel_deviation=pixel[1], image_mean=image[0],
                         image_deviation=image[1])  # fmt: skip
    measured, moments = list[Floats](), list[Floats]()
    for evidence in examine(sorted({*roles.measured, *roles.scaled})):
        surprisal, own = map_hidden(examination, codes, evidence), standard_cells(plain, evidence)
        if evidence.number in roles.measured:
            measured.append(measure_image(surprisal, own))
        if evidence.number in roles.scaled:
            both = measure_pixels(examination, plain, own, surprisal).flatten(1).double()
            moments.append(torch.stack([both.mean(1), both.square().mean(1)]).cpu().numpy())
    centre, squares = np.mean(moments, 0)
    fitted = {"pixel_mean": centre, "pixel_deviation": np.sqrt(np.maximum(squares - centre**2, 1e-12))}
    fitted |= {"image_mean": np.mean(measured, 0), "image_deviation": np.maximum(np.std(measured, 0), 1e-6)}
    return plain.model_copy(update={name: round_digits(values) for name, values in fitted.items()})


def as_tensor(values: NDArray[np.float64], like: Tensor) -> Tensor:
    """Convert to a tensor of the type and device of another."""
    return torch.from_numpy(values).to(like)

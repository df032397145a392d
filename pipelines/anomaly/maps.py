"""Maps of where an image is anomalous, beyond the bits of its tokens, and the scores that they give images.

What tells whole images apart is the surprisal of hidden tokens (see `hidden`). It is blunt about places, for which the
distance from normal filter responses (see `filters`) is better; the two together are the best map. Both are
standardized by their mean and deviation over pixels of normal images.

A defect that covers half of an image is not above its median, but filter responses change at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.views import View, check_places
from ..shuffling import spread_rows
from .calibration import MapReference, require_calibration
from .conformal import Floats
from .distances import CalibrationError, round_digits
from .examine import Evidence, Examination
from .filters import largest_changes, nearest_distances, smooth, spread_cells
from .hidden import can_hide

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

MAPS = {
    "bits": "bits of each token, spread over its pixels",
    "hidden": "bits of each token while its block of the grid is hidden, less the mean of its id",
    "combined": "`hidden` and the distance from normal filter responses, both standardized",
}
TITLES = {"bits": "bits per pixel", "hidden": "hidden tokens", "combined": "combined map"}
"""Titles of the maps in pictures."""
NEEDED = (  # by the maps of hidden tokens
    "tokens with a place in the image and, without tiles, a prior that hides blocks: `masked`, or `blocks` of any order"
)
MAPPED = ("hidden", "responses")
"""The evidence of maps; see `Evidence`."""
Examine = Callable[[Sequence[int]], Iterator[Evidence]]
MAX_POINTS, MAX_MEMORY = 4000, 96
"""Cells that serve as neighbours, and images that give them."""
MAX_OF_PIXELS, MAX_OF_IMAGES = 32, 48
"""Images that give mean and deviation over pixels, and over images."""
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


def anomaly_map(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    method: str = "bits",
    condition: Condition = None,
    stride: int | None = None,
    batch_size: int = 256,
) -> Any:
    """Return the bits of each pixel, `(B, H, W)`: the bits of a token are spread evenly over its patch, plus the bits
    of the pixel given the tokens if the tokenizer has a likelihood. They sum to the bits of the image. labels,
    condition: what the bits are conditioned on; a `condition` that is computed from the image, such as its outline,
    hides what it shows. Raises `ValueError` for tokens without a position in the image: those of scales and of
    `titok`. Of clips, the maps are `(B, T, H, W)`.

    stride: take images of any size from the model's size on, also of different sizes in one list, and return a list of
    maps, each `(H, W)` at the size of its image: the average over tiles of the model's size at every `stride` pixels
    and at the borders. An image of the model's size is one tile. Raises `ValueError` for a stride that is larger than a
    tile, and for an image that is smaller.

    method: `bits`; `hidden`, the bits of tokens while their block is hidden, less the mean of their id (see `hidden`);
    or `combined`, these and the distance from normal filter responses, which finds places best. The latter two are
    blurred and need a calibration with the same stride and condition, else raise `CalibrationError`."""
    if method not in MAPS:
        raise ValueError(f"method: unknown map {method!r}; choose one of {', '.join(MAPS)}")
    examination = Examination.open(pipeline, images, labels, condition, stride, batch_size)
    if method != "bits":
        check_places(examination.given)
    maps = [found[method] for _, found in map_images(examination, [method])]
    if examination.view.is_tiled:
        return maps
    return torch.stack(maps) if maps else torch.empty(0, *pipeline.spec.shape[:-3], *pipeline.spec.size)


def map_images(examination: Examination, methods: Collection[str]) -> Iterator[tuple[Evidence, dict[str, Tensor]]]:
    """Yield the evidence and the maps `(H, W)` of each image by methods of `MAPS`. Raises `ValueError` if there are
    none, `CalibrationError` without a calibration for them."""
    references = [] if {*methods} == {"bits"} else require_maps(examination)
    examination.patches  # noqa: B018 - raises for tokens without a place
    want = [*(MAPPED if references else ()), *(["bits"] if "bits" in methods else [])]
    for evidence in examination.examine(want):
        found = {"bits": examination.map_bits(evidence)} if "bits" in methods else {}
        if references:
            maps = map_image(examination, references, evidence)
            found |= {"hidden": maps.hidden, "combined": maps.combined}
        yield evidence, found


def require_maps(examination: Examination) -> list[MapReference]:
    """Return the references for the maps of these images, else raise `CalibrationError`."""
    calibration = require_calibration(examination.pipeline.calibration)
    calibration.check_view(examination.view)
    calibration.check_given((*examination.given.names, *calibration.mixture))  # hidden tokens have no mixture
    if not calibration.has_maps:
        raise CalibrationError(f"the pipeline was calibrated without maps, which need {NEEDED}; or calibrate again")
    return [each.maps for each in calibration.references if each.maps]


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
        both = blur_maps(examination, reference, cells, surprisal)
        mean, deviation = tensor_like(reference.pixel_mean, both), tensor_like(reference.pixel_deviation, both)
        hidden.append(both[0])
        combined.append(((both - mean[:, None, None]) / deviation[:, None, None]).mean(0))
        scores["hidden"].append(score_map(reference, surprisal, cells))
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
    return (found - tensor_like(reference.response_mean, found)) / tensor_like(reference.response_deviation, found)


def blur_maps(examination: Examination, reference: MapReference, cells: Tensor, surprisal: Tensor) -> Tensor:
    """Return the surprisal `(H, W)` and the distance of cells from normal filter responses, `(2, H, W)`, both blurred
    by half the side of a token. cells: from `standard_cells`."""
    sigma = max(examination.view.size) / max(examination.pipeline.prior.grid.shape) / 2
    cells = cells.to(surprisal.device)
    far = nearest_distances(cells.flatten(0, 1), tensor_like(reference.points, cells)).reshape(cells.shape[:2])
    both = surprisal, spread_cells(far, (surprisal.shape[0], surprisal.shape[1]))
    return torch.stack([smooth(each, sigma) for each in both])


def score_map(reference: MapReference, surprisal: Tensor, cells: Tensor) -> float:
    """Return the peak of the surprisal or the largest change of cells, whichever is more unusual, in deviations. Cells
    are compared down or across, whichever changes less in normal images: a texture may have a direction."""
    unusual = (peak_and_changes(surprisal, cells) - reference.image_mean) / reference.image_deviation
    return float(max(unusual[0], unusual[1 + int(reference.image_mean[1:].argmin())] - HANDICAP))


def peak_and_changes(surprisal: Tensor, cells: Tensor) -> Floats:
    """Return the peak of the surprisal and the logarithms of the largest changes of cells down and across, `(3,)`."""
    return np.array([peak_of(surprisal), *(largest_changes(cells) + 1e-3).log().tolist()])


def peak_of(heat: Tensor) -> float:
    """Return the mean over `TOPS` of the mean of the highest values of a map, less its median."""
    values = heat.flatten().double().sort(descending=True).values
    tops = [values[: max(1, round(share * len(values)))].mean() for share in TOPS]
    return float(torch.stack(tops).mean() - values.median())


class Roles(NamedTuple):
    """Which normal images give the cells that serve as neighbours (`memory`), which the mean and deviation over pixels
    (others, because an image is not its own neighbour), and which those over images."""

    memory: list[int]
    of_pixels: list[int]
    of_images: list[int]

    @classmethod
    def choose(cls, numbers: Sequence[int]) -> Roles:
        """Divide the images `numbers`, in the random order of their objects."""
        every = np.array(numbers)
        memory, others = np.split(every, [max(1, 3 * len(every) // 4)])
        chosen = ((memory, MAX_MEMORY), (others, MAX_OF_PIXELS), (every, MAX_OF_IMAGES))
        return cls(*(some[spread_rows(len(some), most)].tolist() for some, most in chosen))


@torch.no_grad()
def fit_map_reference(
    examination: Examination, examine: Examine, codes: Floats, roles: Roles, seed: int, max_points: int = MAX_POINTS
) -> MapReference:
    """Fit to normal images: first the responses of filters, then what these and `codes` make of further images.
    examine: yields the evidence of `MAPPED` of images by their numbers. codes: the mean bits of each id."""
    cells = sample_cells(examine(roles.memory), max_points // len(roles.memory), seed)
    points = np.concatenate([cells[number] for number in roles.memory])
    mean, deviation = points.mean(0), np.maximum(points.std(0), 1e-6)
    fitted = {"codes": codes, "response_mean": round_digits(mean), "response_deviation": round_digits(deviation)}
    fitted["points"] = np.round((points - mean) / deviation, 3)
    responses = MapReference.model_construct(None, **fitted)  # enough for `standard_cells` and `blur_maps`
    of_images, moments = list[Floats](), list[Floats]()
    for evidence in examine(sorted({*roles.of_images, *roles.of_pixels})):
        surprisal, own = map_hidden(examination, codes, evidence), standard_cells(responses, evidence)
        if evidence.number in roles.of_images:
            of_images.append(peak_and_changes(surprisal, own))
        if evidence.number in roles.of_pixels:
            both = blur_maps(examination, responses, own, surprisal).flatten(1).double()
            moments.append(torch.stack([both.mean(1), both.square().mean(1)]).cpu().numpy())
    centre, squares = np.mean(moments, 0)
    return MapReference(
        **fitted,
        pixel_mean=round_digits(centre),
        pixel_deviation=round_digits(np.sqrt(np.maximum(squares - centre**2, 1e-12))),
        image_mean=round_digits(np.mean(of_images, 0)),
        image_deviation=round_digits(np.maximum(np.std(of_images, 0), 1e-6)),
    )


def sample_cells(every: Iterator[Evidence], most: int, seed: int) -> dict[int, Floats]:
    """Return the filter responses of at most `most` random cells of each image, `(n, d)`, by its number."""
    cells = dict[int, Floats]()
    for evidence in every:
        rows, chance = evidence.responses.flatten(0, 1).double().numpy(), np.random.default_rng((seed, evidence.number))
        cells[evidence.number] = rows[chance.permutation(len(rows))[: max(1, most)]]
    return cells


def tensor_like(values: Floats, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like)

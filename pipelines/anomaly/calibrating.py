"""Calibrate the anomaly scores of a pipeline on normal images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prior.arguments import whole_number
from prior.columns import LABEL

from ..images.views import Size, check_places
from ..shuffling import spread_rows
from .calibration import (
    LEVELS,
    MAX_FOLDED,
    MAX_FOLDS,
    MAX_IMAGES,
    Calibration,
    Fitted,
    NormalScores,
    NormalStatistics,
    digest_name,
)
from .conformal import Floats, least_scores, round_scores, round_to, threshold
from .distances import Distance, round_digits
from .examine import STATISTICS, Evidence, Examination
from .hidden import mean_of_codes
from .maps import MAPPED, MAX_POINTS, Roles, fit_map_reference, has_maps
from .scores import TOGETHER, list_methods, log_statistics, score_images, total_bits

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

MAX_SCORES, MAX_NEIGHBOURS, MAX_POSITIONS = 2000, 1000, 4096  # bounds on the size of the file
MAX_TILES, MAX_MEASURED = 10_000, 2_000
"""Tiles that give the mean bits of each id, and of these, tiles that give statistics; all images have at least one."""
MAX_HELD = 256 << 20  # bytes of evidence; images beyond are examined again for each use


def calibrate(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    *,
    false_alarms: float = 0.05,
    condition: Condition = None,
    groups: Sequence[str] | None = None,
    confidence: float | None = None,
    folds: int = 1,
    seed: int = 0,
    stride: int | None = None,
    marginal: str | None = None,
    batch_size: int = 256,
) -> Calibration:
    """Calibrate on normal images that were not used in training; set and return `pipeline.calibration`.

    condition: values of columns, one for all images or one per image; the same columns must then be given for scores.
    marginal: as in `anomaly_score`, and the same for scores.
    groups: the name of the object that each image shows, `(B,)`. Images of one object are not independent: they stay
    in the same half or fold, and only the highest score of each object counts, so that p-values and thresholds hold for
    objects.

    One half, chosen by `seed`, is used for fitting; the other half gives the scores for p-values and thresholds. On
    average over calibrations, at most a share `false_alarms` of new normal images exceeds a threshold; for about half
    of the calibrations the share is slightly larger. `confidence=0.9` raises the thresholds so that the bound holds for
    90 % of calibrations; p-values do not change.

    folds: for few images or objects, 5 fits once without each fifth of them, so that all of them give scores. The share
    with p-values of at most `false_alarms` then varies less between calibrations, and is about `false_alarms` or less;
    but only `Calibration.bound` is guaranteed, which is larger (25 % for 49 objects at 5 %). There are no thresholds,
    neither of images nor of regions.

    stride: take images of any size, as `anomaly_map` does. Their tiles are used for fitting (evenly spread ones, at
    most 2,000 for scores and 10,000 for maps), and the score of an image is the maximum of those of its tiles.

    An image is examined once, while the evidence that is used again takes at most 256 MB; with folds, all is used
    again. Raises `ValueError` for too few images, and for more than 50,000 (with folds 10,000).
    """
    folds = whole_number("folds", folds)
    examination = Examination.open(pipeline, images, labels, condition, stride, batch_size, marginal)
    view, given, count = examination.view, examination.given, len(examination)
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: expected one for each of {count} images (got {len(groups)})")
    numbers = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    objects = len(np.unique(numbers))
    check_promise(count, false_alarms, confidence, None if groups is None else objects, folds)
    mapped = has_maps(pipeline, view)
    if mapped:
        check_places(given)
    parts = divide_objects(numbers, objects, seed, folds)
    normal = NormalImages(examination, parts, mapped, seed)
    fitted = [normal.fit(part, len(parts)) for part in parts]
    references = [normal.score(part, each) for part, each in zip(parts, fitted, strict=True)]
    scores, is_crossed = dict[str, NormalScores](), folds > 1
    for method in references[0].scores:
        if is_crossed and method == "map":
            continue
        values, tie = round_scores(np.concatenate([each.scores[method] for each in references]))
        limit = None if is_crossed else threshold(values, tie, false_alarms, confidence)
        scores[method] = NormalScores(values=values, tie=tie, threshold=limit)
    crossed = [
        each.model_copy(update={"scores": {name: round_to(each.scores[name], scores[name].tie) for name in scores}})
        for each in references
    ]
    normal.identify_others()
    digests, sizes = zip(*normal.known.values(), strict=True)
    # Quantiles at each position, or over all positions if there are very many.
    surprise = torch.cat([each["surprise"] for each in normal.rows.values()]).double().numpy()
    surprise = surprise if surprise.shape[1] <= MAX_POSITIONS else surprise.reshape(-1, 1)
    pipeline.calibration = Calibration(
        count=count,
        objects=None if groups is None else objects,
        labels=LABEL in given.names,
        columns=sorted({*given.names} - {LABEL}),
        marginal=next(iter(given.weights), None),
        tile=[*view.size] if view.is_tiled else None,
        stride=None if view.stride is None else view.stride[0],
        sizes=[*np.min(sizes, 0).tolist(), *np.max(sizes, 0).tolist()] if view.is_tiled else None,
        false_alarms=float(false_alarms),
        confidence=None if confidence is None else float(confidence),
        fitted=None if is_crossed else references[0].fitted,
        scores=scores,
        folds=crossed if is_crossed else None,
        surprise=round_digits(np.quantile(surprise, LEVELS, axis=0)),
        error=round_digits((normal.error / normal.num_tiles).numpy()),
        maps=None if is_crossed else references[0].maps,
        digests=sorted({*digests}),
        object_digests=None if groups is None else sorted({digest_name(str(name)) for name in groups}),
    )
    return pipeline.calibration


def check_promise(
    count: int, false_alarms: float, confidence: float | None, objects: int | None = None, folds: int = 1
) -> None:
    """Raise `ValueError` for a guarantee that cannot be given, or too many images to store. objects: their number, if
    each has one score."""
    for name, share in (("false_alarms", false_alarms), ("confidence", confidence)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} should be between 0 and 1 (got {share})")
    if not 1 <= folds <= MAX_FOLDS:
        raise ValueError(f"folds: must be from 1 to {MAX_FOLDS} (got {folds})")
    if folds > 1 and confidence is not None:
        raise ValueError(f"confidence: can be promised with folds=1 only (got confidence={confidence} folds={folds})")
    units, noun = (count, "images") if objects is None else (objects, "objects")
    if units < (least := least_units(false_alarms, confidence, folds)):
        promise = f"a false alarm rate of {false_alarms:g}"
        promise += "" if confidence is None else f" with a confidence of {confidence:g}"
        raise ValueError(f"a calibration for {promise} needs at least {least} {noun} (got {units})")
    if count > (most := MAX_IMAGES if folds == 1 else MAX_FOLDED):
        how = "" if folds == 1 else " with folds"
        raise ValueError(f"a calibration{how} can use at most {most:,} images (got {count:,})")


def least_units(false_alarms: float, confidence: float | None, folds: int = 1) -> int:
    """Return the smallest number of images, or of objects, with the guarantee."""
    return max(10, (2 if folds == 1 else 1) * least_scores(false_alarms, confidence))


def least_false_alarms(units: int, confidence: float | None, folds: int = 1) -> float | None:
    """Return the smallest rate of false alarms, in hundredths, that this number of images or objects can promise; None
    for fewer than 10."""
    return next((k / 100 for k in range(1, 100) if units >= least_units(k / 100, confidence, folds)), None)


class FittingPart(NamedTuple):
    """Images to fit to, images to score, in the random order of their objects, and the number of each scored image's
    object, ascending."""

    fitting: list[int]
    scoring: list[int]
    owners: NDArray[np.int64]


def divide_objects(numbers: NDArray[np.int64], objects: int, seed: int, folds: int = 1) -> list[FittingPart]:
    """Divide the objects at random into a half to fit to and a half to score; or into folds, each of which is scored by
    the others. At most 2,000 objects are scored. numbers: the object of each image, `(n,)`."""
    rank = np.argsort(np.random.default_rng(seed).permutation(objects))[numbers]
    order = np.argsort(rank, kind="stable")
    edges = [objects // 2, objects] if folds == 1 else [objects * k // folds for k in range(folds + 1)]
    parts = list[FittingPart]()
    for first, stop in zip(edges, edges[1:], strict=False):
        own = (rank[order] >= first) & (rank[order] < stop)
        scored = own & (rank[order] < first + MAX_SCORES // folds)
        parts.append(FittingPart(order[~own].tolist(), order[scored].tolist(), rank[order[scored]]))
    return parts


def worst_of_objects(scores: Floats, owners: NDArray[np.int64]) -> Floats:
    """Return the highest of the scores `(n,)` of each object's images."""
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    highest: Floats = np.maximum.reduceat(scores, first)
    return highest


class NormalImages:
    """The evidence of normal images: the `rows` of the tiles that are used for fitting by the number of their image,
    the sum of their error maps, what is `known` of all images (digest and size), and whatever is used again."""

    def __init__(self, examination: Examination, parts: Sequence[FittingPart], mapped: bool, seed: int) -> None:
        self._examination, self._seed, self._mapped = examination, seed, mapped
        self._want = ["digest", "statistics", "error", *(MAPPED if mapped else ())]
        self.known = dict[int, tuple[str, Size]]()
        self.rows, self.error, self.num_tiles = dict[int, dict[str, Tensor]](), torch.zeros(()), 0
        every = sorted({number for part in parts for number in part.fitting})
        most, measured = (max(1, limit // len(every)) for limit in (MAX_TILES, MAX_MEASURED))
        is_crossed = len(parts) > 1
        self._again = set(every if is_crossed else [])
        if mapped:
            self._again |= {number for part in parts for role in Roles.choose(part.fitting) for number in role}
        self._held, self._room = dict[int, Evidence](), MAX_HELD
        self._collect(self.examine(sorted(self._again), None if is_crossed else measured), most, measured)
        if others := sorted({*every} - self._again):
            want = [each for each in self._want if each != "responses"]
            self._collect(examination.examine(want, others, most, measured), most, measured)

    def _collect(self, several: Iterable[Evidence], most: int, measured: int) -> None:
        for evidence in several:
            self.known[evidence.number] = evidence.digest, evidence.size
            own = self.rows[evidence.number] = dict[str, Tensor]()
            for name, rows in evidence.rows.items():
                limit = most if name in ("hidden", "tokens") else measured
                if name != "errors" and (self._mapped or name != "tokens"):
                    own[name] = rows if len(rows) <= limit else rows[torch.from_numpy(spread_rows(len(rows), limit))]
            count = len(own["error"])
            self.error = self.error + count * (evidence.rows["errors"][0] / len(evidence.rows["error"]))
            self.num_tiles += count

    def examine(self, numbers: Sequence[int], measured: int | None = None) -> Iterator[Evidence]:
        """Yield the evidence of all tiles of the images `numbers`, first of those that are held. measured: number of
        tiles that have statistics, if it is not held."""
        missing = [number for number in numbers if number not in self._held]
        yield from [self._held[number] for number in numbers if number in self._held]
        for evidence in self._examination.examine(self._want, missing, measured=measured) if missing else ():
            if evidence.number in self._again and evidence.nbytes <= self._room:
                self._room -= evidence.nbytes
                self._held[evidence.number] = evidence
            yield evidence

    def fit(self, part: FittingPart, parts: int) -> NormalStatistics:
        """Fit scores and maps to the images of a part. parts: their number; each has a share of the stored points."""
        some = [self.rows[number] for number in part.fitting]
        chance = np.random.default_rng(self._seed)
        place = np.concatenate([chance.permutation(len(rows["error"])) for rows in some])
        mixed = torch.from_numpy(np.argsort(place, kind="stable"))  # so that the first ones are of all images
        found = {name: torch.cat([rows[name] for rows in some]) for name in some[0]}
        measured = {name: rows[mixed] for name, rows in found.items() if name in STATISTICS}
        fitted = fit_reference(measured, MAX_NEIGHBOURS // parts)
        if not self._mapped:
            return NormalStatistics(fitted=fitted, scores={})
        codes = mean_of_codes(found["hidden"], found["tokens"], self._examination.pipeline.prior.grid.vocab_size)
        roles = Roles.choose(part.fitting)
        examine = partial(self.examine, measured=1)  # maps need no statistics
        maps = fit_map_reference(self._examination, examine, codes, roles, self._seed, MAX_POINTS // parts)
        return NormalStatistics(fitted=fitted, maps=maps, scores={})

    def score(self, part: FittingPart, reference: NormalStatistics) -> NormalStatistics:
        """Add the highest score of each object of a part, by method, to the reference."""
        methods, found = list_methods(self._examination.pipeline), dict[int, dict[str, Floats]]()
        for each in score_images(self._examination, self.examine(part.scoring), methods, [reference]):
            found[each.evidence.number] = each.scores
            self.known[each.evidence.number] = each.evidence.digest, each.evidence.size
        scores = dict[str, Floats]()
        for method in found[part.scoring[0]]:
            of_images = np.concatenate([found[number][method] for number in part.scoring])
            scores[method] = worst_of_objects(of_images, part.owners)
        return reference.model_copy(update={"scores": scores})

    def identify_others(self) -> None:
        """Read the images that were neither fitted to nor scored."""
        for number in sorted({*range(len(self._examination))} - self.known.keys()):
            image = self._examination.read(number)
            (digest,) = self._examination.digest(image[None])
            self.known[number] = digest, (image.shape[-2], image.shape[-1])


def fit_reference(found: dict[str, Tensor], neighbours: int) -> Fitted:
    """Fit to the statistics of normal images or tiles. At most half of them serve as neighbours, and no more than
    `neighbours`."""
    bits, features = total_bits(found), None
    if "features" in found:
        features = Distance.fit(found["features"].numpy(), min(neighbours, len(bits) // 2))
    names = [name for name in TOGETHER if name in found]
    statistics = Distance.fit(log_statistics(found, names))
    return Fitted(
        typical_bits=float(f"{bits.mean().item():.6g}"), statistics=statistics, features=features, names=names
    )

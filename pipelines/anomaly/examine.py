"""The evidence that anomaly scores, maps and calibrations read: the one place where they run the models of a pipeline.

A whole image is one tile. One pass over a source and a view yields what is found in each image: statistics of its
tiles, the surprise of their tokens, filter responses, and a digest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.given import Given
from tokenizer.spec import to_float, to_uint8

from ..images.views import LazyImages, Size, Tile, View, as_lazy, check_places, cut, give_places, paste, read_large
from ..shuffling import spread_rows
from .calibration import digest_image
from .filters import filter_responses
from .hidden import hidden_bits

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline, Label

MAX_FEATURES, MAX_SIDE = 128, 64
TOP_SHARE = 0.05  # of the tokens, whose bits `top_bits` averages
STATISTICS = ("token_bits", "error", "top_bits", "pixel_bits", "background_bits", "features")


@dataclass
class Evidence:
    """What was found in image `number`, of `size` (H, W).

    `rows` has a row for each of the n tiles, on the CPU: always `tokens`, `(n, *grid.shape)`, and as wanted (statistics
    and surprise perhaps of fewer tiles)
    - statistics, float64 `(n,)`: `token_bits` under the prior, given what is given; `top_bits`, the mean bits of the
      most surprising 5 % of the tokens, if the density is exact; `pixel_bits` given the tokens, if the tokenizer has a
      likelihood; `error`, the mean over pixels of |x - decode(encode(x))|, from 0 to 2; `background_bits`, token bits
      under the background prior, if any; `features` `(n, d)`, the prior's middle layer averaged over positions (at most
      128 evenly spaced channels), if the prior has layers;
    - `surprise`, the bits of each token, `(n, N)`, which comes with statistics and bits, too;
    - bits: if the tokenizer has a likelihood also `pixels`, the base-2 logarithms of the probabilities of pixels given
      the tokens, `(n, h, w)`;
    - hidden: the bits of each token while its block is hidden, `(n, *grid.shape)`;
    - error: `errors`, the sum over tiles of the error of each pixel, `(1, h, w)`, reduced to at most 64 a side.
    `responses` are those of filters, `(rows, columns, d)`. These and `digest` are empty unless wanted.
    """

    number: int
    size: Size
    digest: str
    responses: Tensor
    tiles: list[Tile] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> None:
        if name == "errors":
            self.rows[name] = self.rows.get(name, 0) + rows.sum(0, keepdim=True)
        else:
            self.rows[name] = torch.cat([self.rows[name], rows]) if name in self.rows else rows

    @property
    def statistics(self) -> dict[str, Tensor]:
        return {name: self.rows[name] for name in STATISTICS if name in self.rows}

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.rows.values(), self.responses))


@dataclass(frozen=True)
class Examination:
    """The images of a source, what is given of them, and the view by which the models of a pipeline see them."""

    pipeline: ImagePipeline
    source: LazyImages
    given: Given
    view: View
    batch_size: int = 256

    @classmethod
    def open(
        cls,
        pipeline: ImagePipeline,
        images: Any,
        labels: Label | Sequence[Label] = None,
        condition: Condition = None,
        stride: int | None = None,
        batch_size: int = 256,
        marginal: str | None = None,
    ) -> Examination:
        """Read the arguments of a public method. Raises `ValueError`."""
        view = View.of(pipeline.spec, stride)
        source = pipeline.list_images(images) if view.is_tiled else as_lazy(pipeline.to_images(images))
        given = pipeline.read_given(labels, condition, len(source), marginal=marginal)
        return cls(pipeline, source, check_places(given) if view.is_tiled else given, view, batch_size)

    def __len__(self) -> int:
        return len(self.source)

    def select(self, rows: Sequence[int]) -> Examination:
        return Examination(self.pipeline, self.source.select(rows), self.given[rows], self.view, self.batch_size)

    def read(self, number: int) -> Tensor:
        """Read an image `(C, H, W)`, uint8 or float in [-1, 1]. Raises `ValueError` for one smaller than a tile."""
        return read_large(self.source, number, self.view)

    def digest(self, images: Tensor) -> list[str]:
        """Identify images `(B, C, H, W)` of one size, as calibrations do: as the models see them, so after `binarize`.
        Whole ones have the type of the pipeline's images, tiled ones always 8 bits."""
        if self.view.is_tiled:
            pixels = images if images.dtype == torch.uint8 else to_uint8(images)
            return [digest_image(image) for image in pixels.movedim(1, -1).cpu().numpy()]
        return [digest_image(image) for image in self.pipeline.convert_images(to_float(images), "np")]

    def examine(
        self,
        want: Collection[str],
        numbers: Sequence[int] | None = None,
        most: int | None = None,
        measured: int | None = None,
    ) -> Iterator[Evidence]:
        """Yield the evidence of all images, or of those in `numbers`. want: some of `digest`, `statistics`, `error`,
        `surprise`, `bits`, `hidden` and `responses`. most: use at most this many tiles of each image, evenly spread.
        measured: of these, use at most this many for statistics, which take far longer than the bits of hidden
        tokens."""
        some, own = (self, range(len(self))) if numbers is None else (self.select(numbers), numbers)
        bar = self.pipeline.with_bar(own, "scoring", "image")
        for number, evidence in zip(bar, some._examine_all(want, most, measured), strict=True):
            evidence.number = number
            yield evidence

    def _examine_all(self, want: Collection[str], most: int | None, measured: int | None) -> Iterator[Evidence]:
        found, few = dict[int, Evidence](), set[Tile]()

        def read(number: int) -> Tensor:
            image, responses = self.source.read(number), torch.empty(0)
            size = (image.shape[-2], image.shape[-1])
            if "responses" in want:
                responses = filter_responses(to_float(image).to(self.pipeline.device)).cpu()
            if measured is not None:
                tiles = self.view.tiles(number, size)
                used = spread_rows(len(tiles), most)
                few.update(tiles[row] for row in used[spread_rows(len(used), measured)])
            found[number] = Evidence(number, size, "", responses)
            if "digest" in want and self.view.is_tiled:
                (found[number].digest,) = self.digest(image[None])
            return image

        mixed = "hidden" not in want or "statistics" in want or not self.view.is_tiled  # as in 0.3, to the bit
        source = LazyImages(self.source.names, read)
        for batch, tiles in cut(source, self.view, self.batch_size, most=most, mixed=mixed):
            owners = [tile.image for tile in tiles]
            if "digest" in want and not self.view.is_tiled:
                for number, digest in zip(owners, self.digest(batch), strict=True):
                    found[number].digest = digest
            for tile in tiles:
                found[tile.image].tiles.append(tile)
            chosen = [row for row, tile in enumerate(tiles) if measured is None or tile in few]
            every, some = self.run_models(batch.to(self.pipeline.device), tiles, want, chosen)
            for rows, of in ((every, owners), (some, [owners[row] for row in chosen])):
                counts = Counter(of)
                for name, values in rows.items():
                    for number, part in zip(counts, values.split([*counts.values()]), strict=True):
                        found[number].add(name, part)
            for number in [number for number in found if number < owners[-1]]:
                yield found.pop(number)
        yield from found.values()

    @torch.no_grad()
    def run_models(
        self, batch: Tensor, tiles: Sequence[Tile], want: Collection[str], chosen: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rows of `Evidence`, on the CPU, of tiles `(B, C, h, w)` in [-1, 1]: of every one, and of the
        `chosen` ones."""
        pipeline, prior, every, few = self.pipeline, self.pipeline.prior, dict[str, Tensor](), dict[str, Tensor]()
        placed = give_places(self.given, tiles)
        own = placed if self.view.is_tiled else self.given[torch.tensor([tile.image for tile in tiles])]
        every["tokens"] = tokens = pipeline.encode_batch(batch)
        if "hidden" in want:
            every["hidden"] = hidden_bits(prior, tokens, placed)
        if "bits" in want and pipeline.tokenizer.has_likelihood:
            every["pixels"] = pipeline.tokenizer.pixel_log_probs(batch, tokens).sum(-3) / math.log(2)
        if 0 < len(chosen) < len(tiles):
            batch, tokens, own = batch[chosen], tokens[chosen], own[chosen]
        if chosen and {"statistics", "bits", "surprise"} & {*want}:
            log_probs = prior.token_log_probs(tokens, condition=own).flatten(1)
            few["surprise"] = -log_probs / math.log(2)
        if chosen and "statistics" in want:
            few |= self.compute_statistics(batch, tokens, log_probs, own)
            errors = (pipeline.decode_batch(tokens) - batch).abs().mean(-3).cpu().double()
            few["error"] = errors.flatten(1).mean(1)
            if "error" in want:
                strips = errors.flatten(1, -2)  # the frames of clips below one another
                height, width = (min(side, MAX_SIDE) for side in strips.shape[1:])
                few["errors"] = F.adaptive_avg_pool2d(strips, (height, width))
        every, few = ({name: rows.cpu() for name, rows in each.items()} for each in (every, few))
        return every, few

    def compute_statistics(self, batch: Tensor, tokens: Tensor, log_probs: Tensor, given: Given) -> dict[str, Tensor]:
        """Return the statistics of tiles except `error`; see `Evidence`. log_probs: of tokens, `(B, N)`."""
        pipeline = self.pipeline
        token_bits = bits(log_probs)
        found = {"token_bits": token_bits.sum(1)}
        if pipeline.prior.exact:
            found["top_bits"] = token_bits.topk(max(1, round(TOP_SHARE * token_bits.shape[1])), 1).values.mean(1)
        if (pixels := pipeline.tokenizer.pixel_log_prob(batch, tokens)) is not None:
            found["pixel_bits"] = bits(pixels)
        if (background := pipeline.background) is not None:
            less = given.without(set(given.columns) - background.columns.keys())
            found["background_bits"] = bits(background.token_log_probs(tokens, condition=less).flatten(1)).sum(1)
        if pipeline.prior.feature_layers:
            features = pipeline.prior.features(tokens, condition=given).mean(1).cpu().double()
            found["features"] = features[:, :: -(-features.shape[1] // MAX_FEATURES)]
        return found

    # Maps

    @cached_property
    def patches(self) -> tuple[Tensor, Tensor]:
        """The weights that spread a token's bits over the rows `(h, N)`, of clips `(T * h, N)`, and columns `(w, N)` of
        a tile, each summing to one per token. The pixels of a token are those that `known_tokens` requires for it.
        Raises `ValueError` unless tokens are `placed`."""
        tokenizer, spec = self.pipeline.tokenizer, self.pipeline.spec
        height, width = spec.frames * spec.height, spec.width
        along_rows = ~torch.eye(height, dtype=torch.bool)[:, :, None].expand(-1, -1, width)
        along_columns = ~torch.eye(width, dtype=torch.bool)[:, None, :].expand(-1, height, -1)
        masks = (each.reshape(-1, *spec.shape[:-3], *spec.size) for each in (along_rows, along_columns))
        rows, columns = ((~tokenizer.known_tokens(known)).flatten(1).float() for known in masks)
        return (rows / rows.sum(0)).to(tokenizer.device), (columns / columns.sum(0)).to(tokenizer.device)

    def spread(self, values: Tensor, size: Size, pixels: Tensor | None = None) -> Tensor:
        """Spread a value of each token of the tiles of an image, `(n, N)`, evenly over its pixels, and return the map
        `(H, W)`, of clips `(T, H, W)`, in which a pixel has the mean of its tiles. pixels: to subtract, `(n, h, w)`."""
        (rows, columns), spec = self.patches, self.pipeline.spec

        def parts() -> Iterator[Tensor]:
            for number, part in enumerate(values.to(rows.device).split(self.batch_size)):
                heat = (part[:, None] * rows.to(part)) @ columns.to(part).T  # (B, h, N) @ (N, w)
                heat = heat.view(-1, *spec.shape[:-3], *spec.size)
                if pixels is not None:
                    heat = heat - pixels[number * self.batch_size :][: len(part)].to(heat.device)
                yield heat

        (found,) = paste(parts(), [size], self.view, "mean")
        return found

    def map_bits(self, evidence: Evidence) -> Tensor:
        """Return the bits of each pixel, `(H, W)`, of evidence with `bits`."""
        return self.spread(evidence.rows["surprise"], evidence.size, evidence.rows.get("pixels"))


def bits(nats: Tensor) -> Tensor:
    """Convert log-probabilities to bits, float64 on the CPU."""
    return -nats.cpu().double() / math.log(2)

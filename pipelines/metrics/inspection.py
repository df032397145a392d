"""What a report on a tokenizer shows: how its codes are used, what each code draws, how well images come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.base import codebook_usage
from tokenizer.losses import pixel_losses, psnr

from ..images import ImageDataset
from ..shuffling import spread
from .codebook import MISSED, RARE, code_distances, count_tokens, part_names
from .reconstruction import SOME, drafts, ssim_in_bytes

UNUSED_SHOWN = 23  # codes that occur nowhere, of those shown: a row
PLACES = 64  # at most so many of a code's places are looked at
PIXELS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Findings:
    """What there is to draw. `names` of the levels or scales, `uses` (them, V), `psnr` (n,) dB, `shown` (k,) ids of the
    first; `alone` (k, C, h, w), each on all positions, or None where there are no positions; `in_place` (k, C, h, w),
    the mean of what is decoded around its places, or None."""

    figures: dict[str, Any]
    names: list[str]
    uses: Tensor
    psnr: Tensor
    distances: dict[str, np.ndarray]
    shown: Tensor
    alone: Tensor | None
    in_place: Tensor | None
    word: str


@torch.inference_mode()
def examine(tokenizer: Any, images: ImageDataset, num_codes: int) -> Findings:
    """Encode and decode all `images`, and decode codes one by one."""
    vocab = tokenizer.grid.vocab_size
    parts = np.array_split(np.arange(len(images)), -(-len(images) // batch_size(tokenizer)))
    tokens = torch.cat([tokenizer.encode(images.batch(part).to(tokenizer.device)).int().cpu() for part in parts])
    uses = count_tokens(tokens, tokenizer.parts, vocab)
    shown = uses[0].argsort(descending=True, stable=True)[: min(num_codes, int((uses[0] > 0).sum()) + UNUSED_SHOWN)]
    around = Surroundings.of(tokenizer, tokens.chunk(tokenizer.levels, dim=1)[0], shown)
    errors, alike, sums = [], [], dict.fromkeys(("l1", "l2"), 0.0)
    looked = spread(len(images), SOME)
    for part in parts:
        batch = images.batch(part).to(tokenizer.device)
        decoded = tokenizer.decode(tokens[part].long().to(tokenizer.device))
        errors.append(psnr(decoded, batch).cpu())
        alike.append(ssim_in_bytes(decoded, batch, np.intersect1d(looked, part) - int(part[0])))
        sums = {name: sums[name] + len(part) * float(value) for name, value in pixel_losses(decoded, batch).items()}
        if around is not None:
            around.add(decoded.cpu(), int(part[0]))
    decibels = torch.cat(errors)
    some = np.linspace(0, len(images) - 1, min(len(images), batch_size(tokenizer))).astype(np.int64)
    distances = code_distances(tokenizer, images.batch(some).to(tokenizer.device))
    word = "dead" if RARE * float(uses.double().mean()) >= MISSED else "unused"
    similar = {"ssim": float(torch.cat(alike).double().mean()), "ssim_images": len(looked)}
    means = {name: total / len(images) for name, total in sums.items()}
    return Findings(
        figures_of(uses, decibels, distances) | means | similar | draft_figures(tokenizer, images, tokens),
        part_names(tokenizer),
        uses,
        decibels,
        distances,
        shown,
        alone(tokenizer, shown, uses) if tokenizer.placed or tokenizer.grid.scales else None,
        around.means() if around is not None else None,
        word,
    )


def batch_size(tokenizer: Any) -> int:
    """Images decoded at a time."""
    _, height, width = tokenizer.image_shape
    return max(1, min(256, PIXELS_AT_ONCE // (height * width)))


def figures_of(uses: Tensor, decibels: Tensor, distances: dict[str, np.ndarray]) -> dict[str, Any]:
    """JSON values: PSNR in dB, usage and perplexity of all levels' ids together as `smalti reconstruct` gives them, the
    unused ids of each level, and medians of distances."""
    together = {name: float(value) for name, value in codebook_usage(uses.sum(0)).items()}
    return {
        "psnr": float(decibels.double().mean()),
        "psnr_worst": float(decibels.min()),
        "psnr_best": float(decibels.max()),
        **{f"codebook_{name}": value for name, value in together.items()},
        "levels": [{name: float(v) for name, v in codebook_usage(level).items()} for level in uses],
        "unused_codes": [(level == 0).nonzero().flatten().tolist() for level in uses],
        **{name.replace(" ", "_"): float(np.median(values)) for name, values in distances.items() if len(values)},
    }


def draft_figures(tokenizer: Any, images: ImageDataset, tokens: Tensor) -> dict[str, Any]:
    """The PSNR in dB of the `drafts` of `images`, whose `tokens` (n, N) are given: under `scales` for each scale, with
    the share of the latents' variance that it left over in training; under `prefixes` for each number of first tokens.
    Nothing for other tokenizers."""
    found: list[dict[str, float]] = []
    for decode in drafts(tokenizer):
        errors = []
        for part in torch.arange(len(images)).split(batch_size(tokenizer)):
            decoded = decode(tokens[part].long().to(tokenizer.device))
            errors.append(psnr(decoded.cpu(), images.batch(part.numpy())))
        found.append({"psnr": float(torch.cat(errors).double().mean())})
    if tokenizer.grid.scales:
        left = tokenizer.quantizer.left.tolist()
        return {"scales": [{**one, "left": share} for one, share in zip(found, left, strict=True)]}
    counts = zip(tokenizer.prefixes, found, strict=True)
    return {"prefixes": [{"tokens": count, **one} for count, one in counts]} if found else {}


@dataclass(frozen=True)
class Surroundings:
    """Gathers what is decoded around the places of some codes: three by three patches with the code in the middle."""

    patch: tuple[int, int]
    places: Tensor
    """(m, 4): image, row and column of the token, and which of the codes it is."""
    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, tokenizer: Any, tokens: Tensor, codes: Tensor) -> Surroundings | None:
        """For `codes` (k,) at some of their places in `tokens` (n, rows, columns); None where a token is no patch of
        several pixels."""
        channels, height, width = tokenizer.image_shape
        if tokens.ndim != 3 or height % tokens.shape[1] or width % tokens.shape[2]:
            return None
        patch = (height // tokens.shape[1], width // tokens.shape[2])
        if patch == (1, 1):
            return None
        ordered, found = tokens.flatten().sort(stable=True)
        wanted = codes.to(ordered.dtype)
        first, last = torch.searchsorted(ordered, wanted), torch.searchsorted(ordered, wanted, right=True)
        places = []
        for n, (start, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            count = min(stop - start, PLACES)
            where = found[start + torch.arange(count) * (stop - start) // max(1, count)]
            image, row, column = torch.unravel_index(where, tokens.shape)
            places.append(torch.stack([image, row, column, torch.full_like(image, n)], 1))
        size = (len(codes), channels, 3 * patch[0], 3 * patch[1])
        return cls(patch, torch.cat(places), torch.zeros(size), torch.zeros(len(codes)))

    def add(self, decoded: Tensor, start: int) -> None:
        """Take in images `start`, `start` + 1, ... of the data set as they were decoded, `(B, C, H, W)`."""
        height, width = self.patch
        padded = F.pad(decoded, (width, width, height, height), mode="replicate")
        here = self.places[(self.places[:, 0] >= start) & (self.places[:, 0] < start + len(decoded))]
        image, row, column, code = here.unbind(1)
        rows = (row * height)[:, None, None] + torch.arange(3 * height)[:, None]
        columns = (column * width)[:, None, None] + torch.arange(3 * width)
        crops = padded.movedim(1, -1)[(image - start)[:, None, None], rows, columns].movedim(-1, 1)
        self.sums.index_add_(0, code, crops)
        self.counts.index_add_(0, code, torch.ones(len(code)))

    def means(self) -> Tensor:
        """`(k, C, 3 h, 3 w)` in [-1, 1]; NaN for a code without a place."""
        return self.sums / self.counts[:, None, None, None]


def alone(tokenizer: Any, codes: Tensor, uses: Tensor) -> Tensor:
    """Each of `codes` (k,) of level 1 (or the first scale) decoded from all its positions, the other levels at their
    commonest id: the middle three by three patches, where no border is seen. `(k, C, h, w)` in [-1, 1]."""
    shape, first = tokenizer.grid.shape, tokenizer.parts[0]
    base = uses.argmax(1).repeat_interleave(torch.tensor(tokenizer.parts))
    cut = middle(tokenizer.image_shape, (shape[0] // tokenizer.levels, *shape[1:]))
    pictures = []
    for part in codes.split(batch_size(tokenizer)):
        tokens = base.repeat(len(part), 1)
        tokens[:, :first] = part[:, None]
        decoded = tokenizer.decode(tokens.reshape(-1, *shape).to(tokenizer.device))
        pictures.append(decoded.cpu()[..., cut[0], cut[1]].clone())
    return torch.cat(pictures)


def middle(image_shape: tuple[int, int, int], grid: tuple[int, ...]) -> tuple[slice, slice]:
    """The part of an image that three by three tokens in its middle draw; all of it where tokens are not patches."""
    _, height, width = image_shape
    if len(grid) != 2 or height % grid[0] or width % grid[1]:
        return slice(None), slice(None)
    starts = [max(0, count // 2 - 1) * (side // count) for side, count in zip((height, width), grid, strict=True)]
    return slice(starts[0], starts[0] + 3 * (height // grid[0])), slice(starts[1], starts[1] + 3 * (width // grid[1]))

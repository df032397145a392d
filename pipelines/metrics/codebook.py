"""What a codebook does while it is trained: how often and how lately its codes are used, and how far apart they lie.

A codebook collapses when fewer and fewer codes are nearest to any vector: an unused code gets no gradient and no mean
to follow, so it stays unused (Kaiser et al. 2018, section 3; Dhariwal et al. 2020, Jukebox, section 3.2). The number of
dead codes and the perplexity show it long before the reconstructions do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.quantizers.codebook import Codebook, rows_of, uses
from tokenizer.quantizers.updates import sum_over_ranks

from .charts import GAP, RED, bars, charts_in_row, curves, histogram, legend, three_digits
from .pages import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECAY = 0.99  # of the running counts, at each batch
WINDOW = 100  # batches that these counts amount to, 1 / (1 - DECAY)
RARE, MISSED = 0.05, 3.0  # a code of so small a share of the mean use would have been seen so many times
LEAST = 10  # batches without it, for a code to count as dead
SEARCHED, HELD = 1 << 25, 1 << 20  # distances computed at most, to the nearest other codes, and of these at a time
WIDTH, HEIGHT = 400, 270  # of a chart, in pixels


class CodebookUse(nn.Module):
    """Counts of the tokens of all ranks. All state is in buffers, equal on all ranks; it is saved with a run's state so
    that a resumed run goes on counting. A batch is what one call of `count` is given.

    A part is a level or a scale; `parts` is the number of tokens of each.
    uses: `(parts, vocab_size)`, how often each id occurred, decayed by 0.99 at each batch: mostly the last 100.
    last_used: `(parts, vocab_size)`, the number of the batch, from 1, in which an id last occurred; 0 for none.
    steps: how many batches were counted.
    """

    uses: Tensor
    last_used: Tensor
    steps: Tensor

    def __init__(self, vocab_size: int, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.parts, shape = parts, (len(parts), vocab_size)
        self.register_buffer("uses", torch.zeros(shape))  # float32: some devices have no doubles
        self.register_buffer("last_used", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def count(self, tokens: Tensor) -> Tensor:
        """Count this rank's `tokens` (B, *grid), part after part; all ranks have to call it. Returns how often each id
        occurs in the batch of all ranks, `(parts, vocab_size)` int64."""
        counts = sum_over_ranks(count_tokens(tokens, self.parts, self.uses.shape[1]))
        here = counts.to(self.uses.device)
        self.steps += 1
        self.uses.mul_(DECAY).add_(here)
        self.last_used.masked_fill_(here > 0, self.steps)
        return counts

    def ages(self) -> Tensor:
        """Batches since each code was last used, `(parts, vocab_size)`; all batches for one that never was."""
        return self.steps - self.last_used

    def patience(self) -> Tensor:
        """The number of batches after which an unused code counts as dead, of each part `(parts, 1)`. In that
        time, a code that is used a 20th as often as the mean would be expected 3 times, so 1 in 20 of such rare codes
        is wrongly called dead, and no commoner one. At least 10 batches, as the tokens of one batch are alike. Infinite
        before the first batch."""
        mean = self.uses.mean(1, keepdim=True) * (1 - DECAY) / (1 - torch.pow(DECAY, self.steps.float()))
        return (MISSED / (RARE * mean)).nan_to_num(nan=torch.inf, posinf=torch.inf).floor().clamp(min=LEAST)

    def dead(self) -> Tensor:
        """Which codes are dead, bool `(parts, vocab_size)`."""
        return self.ages() > self.patience()

    def figures(self) -> dict[str, float]:
        """`usage`, the share of codes used in the last 100 batches; `perplexity` of their decayed counts, the mean over
        parts; `dead`, the number of dead codes; `oldest`, the number of batches since the code that has been unused
        for longest was used."""
        used = self.last_used > (self.steps - WINDOW).clamp(min=0)
        p = self.uses.cpu().double()
        p = p / p.sum(1, keepdim=True).clamp(min=1e-300)
        entropy = -torch.special.xlogy(p, p).sum(1)
        return {
            "usage": float(used.cpu().double().mean()),
            "perplexity": float(entropy.exp().mean()),
            "dead": float(self.dead().sum()),
            "oldest": float(self.ages().max()),
        }

    @torch.no_grad()
    def picture(self, tokenizer: Any, images: Tensor | None = None) -> np.ndarray:
        """One picture, uint8 (H, W, 3): use, ages, and for a learned codebook distances; those of vectors to their code
        too where a batch of `images` (B, C, H, W) is given."""
        figures, uses = self.figures(), self.uses.cpu().double()
        dead = self.dead().cpu()
        alive = (uses / uses.mean(1, keepdim=True).clamp(min=1e-9)).masked_fill(dead, 0).numpy()
        usage = partial(draw_usage, uses=alive, useless=int(dead.sum()), low=1e-3, unit="x mean use", word="dead")
        charts = [
            partial(usage, names=part_names(tokenizer)),
            partial(draw_ages, ages=self.ages().cpu(), patience=self.patience().cpu()),
        ]
        if distances := code_distances(tokenizer, images):
            charts.append(partial(draw_distances, distances=distances))
        title = f"Codebook after {int(self.steps):,} batches"
        lines = [
            f"{figures['usage']:.1%} of {self.uses.numel():,} codes used in the last {WINDOW} batches, "
            f"perplexity {figures['perplexity']:.1f}, {figures['dead']:,.0f} dead"
        ]
        width = len(charts) * (WIDTH + GAP) - GAP
        return page(title, lines, [charts_in_row(charts, width, HEIGHT)])


def count_tokens(tokens: Tensor, parts: tuple[int, ...], vocab_size: int) -> Tensor:
    """How often each id occurs in each part, int64 `(parts, vocab_size)`, in `tokens` (B, *grid), whose parts of so
    many tokens follow each other."""
    shape = (len(parts), vocab_size)
    each = tokens.long().flatten(1).split(parts, 1)
    ids = torch.cat([(part + number * vocab_size).flatten() for number, part in enumerate(each)])
    return uses(ids, math.prod(shape)).reshape(shape)


def part_names(tokenizer: Any) -> list[str]:
    """What the parts of a tokenizer's tokens are called: level 1, level 2, ...; or 1x1, 2x2, ..."""
    scales = tokenizer.grid.scales
    return [f"{height}x{width}" for height, width in scales] or [f"level {n + 1}" for n in range(tokenizer.levels)]


# distances ----------------------------------------------------------------------------------------


def code_distances(tokenizer: Any, images: Tensor | None) -> dict[str, np.ndarray]:
    """Distances for `draw_distances`: of codes to the nearest other code, and of the vectors of `images` to their code
    (not in training mode, where quantizing moves the codebook). Empty for tokenizers without one learned codebook."""
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, Codebook):
        return {}
    table = quantizer.table().detach().float()
    found = {"code to nearest code": nearest_other(table).cpu().numpy()}
    if images is not None and not quantizer.training:
        z = tokenizer.encoder(images.to(next(tokenizer.encoder.parameters()))).float()
        rows, codes = quantizer.comparable(rows_of(z)), table[quantizer.quantize(z).tokens.flatten()]
        found = {"vector to its code": (rows - codes).norm(dim=1).cpu().numpy(), **found}
    return found


def nearest_other(codes: Tensor) -> Tensor:
    """Distance of codes `(V, D)` to the nearest other one: of all where this is cheap, else of evenly spaced ones."""
    count = len(codes)
    wanted = min(count, max(128, SEARCHED // count))
    chosen = torch.arange(wanted, device=codes.device) * count // wanted
    squares, found = codes.square().sum(1), []
    for ids in chosen.split(max(1, HELD // count)):
        scores = torch.addmm(squares, codes[ids], codes.t(), alpha=-2)
        scores[torch.arange(len(ids), device=codes.device), ids] = torch.inf
        # The scores of codes that nearly coincide are all rounding, so their distance is taken from the difference.
        found.append((codes[ids] - codes[scores.argmin(1)]).norm(dim=1))
    return torch.cat(found)


# charts -------------------------------------------------------------------------------------------


def draw_usage(
    axes: Axes, uses: np.ndarray, useless: int, *, names: list[str], low: float, unit: str, word: str
) -> None:
    """Codes sorted by use, `uses` (parts, V), on a logarithmic axis from `low`; the `useless` ones are a red field."""
    ordered, mean = -np.sort(-uses, axis=1), float(uses.mean())
    curves(
        axes,
        "How often each code is used",
        dict(zip(names, ordered, strict=True)),
        labels=("codes, most used first", unit),
        low=low,
        level=(mean, "mean") if mean > low else None,
    )
    if len(uses) == 1 and useless:
        axes.axvspan(uses.size - useless, uses.size, color=RED, alpha=0.19, linewidth=0)
        legend(axes, {f"{useless:,} of {uses.size:,} {word}": RED})


def draw_ages(axes: Axes, ages: Tensor, patience: Tensor) -> None:
    """Codes by the batches since they were last used, `ages` (parts, V), in ranges that double; those that a part's
    `patience` (parts, 1) has run out with are red."""
    last = int(ages.max()).bit_length()
    ranges = torch.frexp(ages.double()).exponent.long()  # binary digits: age 0; 1; 2 to 3; 4 to 7; ...
    names = ["0", "1", *(f"{three_digits(2**n)}+" for n in range(1, last))][: last + 1]
    all_of, dead_of = (
        torch.bincount(part.flatten(), minlength=last + 1).tolist() for part in (ranges, ranges[ages > patience])
    )
    values = dict(zip(names, map(float, all_of), strict=False))
    marked = dict(zip(names, map(float, dead_of), strict=False))
    bars(axes, "How long ago each code was used", values, labels=("batches since then", "codes"), marked=marked)
    low, high = patience.min(), patience.max()
    if bool(torch.isfinite(high)):
        most = f" to {high:,.0f}" if high > low else ""
        legend(axes, {f"dead: over {low:,.0f}{most} batches": RED})


def draw_distances(axes: Axes, distances: dict[str, np.ndarray]) -> None:
    """Histograms of distances by name."""
    title = "How far apart vectors and codes lie" if len(distances) > 1 else "How far apart codes lie"
    label = "Euclidean distance" if len(distances) > 1 else "distance to the nearest other code"
    histogram(axes, title, distances, label=label)

"""Output heads: p(the ids of a position | the network's outputs there), one id at a time.

    p(ids | outputs) = prod_l p(ids[l] | ids[:l], outputs)

A network sees positions with one id each or, if the head draws several ids per position, with the ids of a grid's
levels or a pixel's channels. It outputs `size` numbers per position, which the head maps to logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizer.base import TokenGrid
from tokenizer.config import ModelConfig
from tokenizer.layers import FusedLinear
from tokenizer.model import Registered
from tokenizer.precision import at_least_float32

from .attention import EPS
from .objectives import mean_nats, token_nats


class Head(Registered, nn.Module, family="prior.heads"):
    """The distribution of a position's ids, each given those before it."""

    size: int  # number of network outputs per position

    def __init__(self, config: Any, grid: TokenGrid) -> None:
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.ids_per_position = config, grid.vocab_size, grid.ids_per_position

    @classmethod
    def problem(cls, config: Any, grid: TokenGrid) -> str | None:
        """Return why this head does not fit the grid, in one line, or None."""
        return None

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Return logits `(..., vocab_size)` of the next id at positions with `outputs` `(..., size)` of the network,
        whose first `ids` `(..., l)` are known, l >= 0."""
        raise NotImplementedError

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Return logits `(..., ids_per_position, vocab_size)` of all `ids` `(..., ids_per_position)` of positions."""
        return torch.stack([self.next_logits(outputs, ids[..., :level]) for level in range(self.ids_per_position)], -2)

    def log_probs(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Return log p of each id of positions, `(..., ids_per_position)` nats, at least in float32."""
        found = at_least_float32(self.logits(outputs, ids)).log_softmax(-1)
        return found.gather(-1, ids[..., None])[..., 0]

    def nats(self, outputs: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return -log p of each id, float32 `(B, P, ids_per_position)`, for outputs `(B, P, size)` of any type.
        label_smoothing: the share of the target spread over all ids; only a softmax supports it."""
        return -self.log_probs(outputs, ids).float()

    def mean_nats(self, outputs: Tensor, ids: Tensor) -> Tensor:
        return self.nats(outputs, ids).mean()


class Softmax(Head):
    """The default head: the network outputs one logit per id, and a position has one id."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__(ModelConfig(), grid)
        self.size, self.ids_per_position = grid.vocab_size, 1

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        return outputs

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        return outputs.unsqueeze(-2)

    def nats(self, outputs: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return token_nats(outputs, ids[..., 0], label_smoothing)[..., None]

    def mean_nats(self, outputs: Tensor, ids: Tensor) -> Tensor:
        return mean_nats(outputs, ids)


def head_problem(config: Any) -> str | None:
    """Return why a configuration's output head is not supported, or None."""
    if config.head is None:
        return None
    if not config.takes_heads:
        return f"{config.kind} supports no output head; leave it null (got {config.head.kind!r})"
    if problem := Head.find(config.head.kind).problem(config.head, config.grid):
        return problem
    if (several := config.grid.ids_per_position) > 1 and not config.takes_positions:
        return f"{config.kind} supports one id per position, and this grid has {several}"
    return None


def make_head(config: Any) -> Head:
    return Softmax(config.grid) if config.head is None else Head.find(config.head.kind)(config.head, config.grid)


class IdEmbedding(nn.Embedding):
    """Sums the embeddings of a position's ids, with one table per level (Lee et al. 2022, RQ-Transformer)."""

    offsets: Tensor

    def __init__(self, grid: TokenGrid, ids_per_position: int, dim: int) -> None:
        super().__init__(ids_per_position * grid.vocab_size, dim)
        self.ids_per_position = ids_per_position
        offsets = torch.arange(ids_per_position, device="cpu") * grid.vocab_size
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.ids_per_position == 1:
            return super().forward(ids[..., 0])
        return super().forward(ids + self.offsets).sum(-2)

    def embed_rows(self, ids: Tensor) -> Tensor:
        """Embed one position of each image, `(B,)` or `(B, ids_per_position)`, in fewer operations; no gradient."""
        table = self.weight.detach()
        if self.ids_per_position == 1:
            return table.index_select(0, ids)
        return table.index_select(0, (ids + self.offsets).flatten()).unflatten(0, ids.shape).sum(1)


class PositionSteps:
    """Decodes single ids with a network that advances one position per step.

    cache: its `step` maps the ids of the last position, `(B,)` or `(B, ids_per_position)`, to the outputs at the next,
    `(B, size)`; for a model that supports blocks, `(B, n)` or `(B, n, ids_per_position)` to `(B, m, size)`."""

    def __init__(self, head: Head, cache: Any, takes_blocks: bool) -> None:
        self.head, self.cache, self.takes_blocks = head, cache, takes_blocks
        self.ids: list[Tensor] = []  # of the current positions, `(B, n)` each
        self.outputs: Tensor | None = None

    def step(self, tokens: Tensor | None) -> Tensor:
        """Return logits `(B, n, vocab_size)` of the next ids, given the last ids `tokens` `(B, m)`."""
        self.ids += [] if tokens is None else [tokens]
        if self.outputs is None or len(self.ids) == self.head.ids_per_position:
            last = None
            if self.ids:
                last = self.ids[0] if self.head.ids_per_position == 1 else torch.stack(self.ids, -1)
            if self.takes_blocks:
                self.outputs = self.cache.step(last)
            else:
                self.outputs = self.cache.step(None if last is None else last[:, 0])[:, None]
            self.ids = []
        known = torch.stack(self.ids, -1) if self.ids else self.outputs.new_zeros(*self.outputs.shape[:-1], 0).long()
        return self.head.next_logits(self.outputs, known)


# Depth


class DepthConfig(ModelConfig):
    dim: int = Field(128, ge=1, le=16384, description="width of the head's network")
    layers: int = Field(2, ge=1, le=64, description="number of gated layers")
    hidden: int | None = Field(None, ge=1, le=65536, description="width inside a layer; null: twice dim")


class GatedLayer(nn.Module):
    """A pre-normalised residual SwiGLU layer on a stream `(..., dim)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.gate_up = FusedLinear(dim, hidden, parts=2, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Depth(Head, name="depth"):
    """Draws the ids of a position from coarse to fine with a small network on top of the large one.

    RQ-Transformer (Lee et al. 2022, arXiv:2203.01941, section 3.2.2): the large network sees a position as the sum of
    its ids' embeddings and runs once per position; a small network draws the ids one at a time. Its input at a level is
    the large network's output plus the summed embeddings of the ids drawn so far. In the paper, the large network's
    output enters only at the first level, and the small network attends to earlier levels; here it enters at every
    level, so neither attention nor a cache is needed.

    All levels share one network and its last layer; a level embedding tells them apart."""

    Config = DepthConfig

    def __init__(self, config: DepthConfig, grid: TokenGrid) -> None:
        super().__init__(config, grid)
        self.size = dim = config.dim
        self.id_embeddings: Any = nn.ParameterList(
            torch.empty(grid.vocab_size, dim).normal_(std=0.1) for _ in range(self.ids_per_position - 1)
        )
        self.level_embedding = nn.Parameter(torch.empty(self.ids_per_position, dim).normal_(std=0.1))
        self.layers: Any = nn.ModuleList(GatedLayer(dim, config.hidden or 2 * dim) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(dim, eps=EPS), nn.Linear(dim, grid.vocab_size, bias=False)

    @classmethod
    def problem(cls, config: DepthConfig, grid: TokenGrid) -> str | None:
        if grid.ids_per_position > 1:
            return None
        return (
            "depth is for grids of several ids at a position (rvq, klvae, posthoc, lfq and bsq of several levels, "
            "pixels in colour), but this grid has one"
        )

    def logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        before = [torch.zeros_like(outputs)]
        for table, level in zip(self.id_embeddings, ids.unbind(-1), strict=False):
            before.append(before[-1] + F.embedding(level, table))
        return self.read_logits(outputs.unsqueeze(-2) + torch.stack(before, -2) + self.level_embedding)

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        before = torch.zeros_like(outputs)
        for table, level in zip(self.id_embeddings, ids.unbind(-1), strict=False):
            before = before + F.embedding(level, table)
        return self.read_logits(outputs + before + self.level_embedding[ids.shape[-1]])

    def read_logits(self, x: Tensor) -> Tensor:
        """Return logits `(..., vocab_size)` for the sum of all inputs, `(..., dim)`."""
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# Logistic mixture


FEWEST = 16  # values per channel; below it a softmax is hardly larger
FLOOR = 2.0**-16  # probability mass that is mixed in uniformly
NARROWEST = 16.0  # h / s of the narrowest logistic, which puts all but 3e-7 of its mass on one value
WIDEST = -7.0  # log(1 / s) of the widest logistic, which is flat
AT_ONCE = 1 << 16  # table entries computed at a time, about, to fit a CPU's cache
ON_A_GPU = 256  # the factor by which there are more on a GPU


class LogisticConfig(ModelConfig):
    components: int = Field(5, ge=1, le=64, description="number of logistics in the mixture (the paper: 10)")


class Mixture(NamedTuple):
    """One channel's mixture given the channels before it: log weights, means and inverse scales `(..., K)`."""

    weights: Tensor
    means: Tensor
    inverse: Tensor


class Logistic(Head, name="logistic"):
    """A mixture of discretised logistics for ids that are intensities, with far fewer outputs than one logit per value.

    PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517, sections 2.1 and 2.2): P(v) is the mass between the midpoints to
    the neighbouring values; the darkest and brightest values include the tails. All channels of a pixel share mixture
    weights, so the red value informs about the component of green and blue; their means depend linearly on the true
    preceding channels. Unlike in the paper, 2^-16 of the mass is uniform, so no value costs more than log2(V) + 16
    bits.

    With u = exp((h - |x - mean|) / s) and q = exp(-2 h / s), where h is half the distance between two values, a value's
    probability under one logistic is u (1 - q) / ((1 + u) (1 + u q)), which is free of cancellation both in the tails
    and near the mean.

    The network outputs K weights shared by all channels, K means and scales per channel, and K coefficients per pair of
    channels."""

    Config = LogisticConfig
    spread: Tensor

    def __init__(self, config: LogisticConfig, grid: TokenGrid) -> None:
        super().__init__(config, grid)
        count, channels = config.components, self.ids_per_position
        self.size = count * (1 + 2 * channels + channels * (channels - 1) // 2)
        self.h = 1 / (grid.vocab_size - 1)  # half the distance between two values in [-1, 1]
        spread = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
        self.register_buffer("spread", spread, persistent=False)

    @classmethod
    def problem(cls, config: LogisticConfig, grid: TokenGrid) -> str | None:
        if not grid.channels:
            return "logistic is for pixels, whose ids are intensities, but this grid's ids are codes"
        if grid.vocab_size < FEWEST:
            return f"logistic is for pixels of at least {FEWEST} levels, but this grid has {grid.vocab_size}"
        return None

    def next_logits(self, outputs: Tensor, ids: Tensor) -> Tensor:
        rows = outputs.flatten(0, -2)
        numbers = AT_ONCE * (ON_A_GPU if outputs.is_cuda else 1)
        at_once = max(1, numbers // (self.vocab_size * self.config.components))
        parts = zip(rows.split(at_once), ids.reshape(len(rows), ids.shape[-1]).split(at_once), strict=True)
        return torch.cat([self.value_log_probs(some, known) for some, known in parts]).unflatten(0, outputs.shape[:-1])

    def value_log_probs(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """Return log P of values of the next channel, `(rows, V)`. ids: `(rows, l)`, of the channels before it."""
        _, mixture = self.condition(outputs, ids)
        every = self.intensities(torch.arange(self.vocab_size, device=outputs.device), mixture.means.dtype)
        means, inverse = mixture.means[..., None], mixture.inverse[..., None]  # of (rows, K, V)
        u = ((self.h - (every - means).abs()) * inverse).exp()
        scale, shrunk = -torch.expm1(-2 * self.h * inverse), (-2 * self.h * inverse).exp()
        shares = u * scale / ((1 + u) * (1 + u * shrunk))
        darkest = ((every[:1] + self.h - means) * inverse).sigmoid()
        brightest = ((means - every[-1:] + self.h) * inverse).sigmoid()
        shares = torch.cat([darkest, shares[..., 1:-1], brightest], -1)
        total = (mixture.weights.exp()[..., None] * shares).sum(1)
        return (total * (1 - FLOOR) + FLOOR / self.vocab_size).log()

    def log_probs(self, outputs: Tensor, ids: Tensor) -> Tensor:
        found, _ = self.condition(outputs, ids)
        least = torch.full_like(found[0], math.log(FLOOR / self.vocab_size))
        return torch.stack([torch.logaddexp(each + math.log1p(-FLOOR), least) for each in found], -1)

    def condition(self, outputs: Tensor, ids: Tensor) -> tuple[list[Tensor], Mixture]:
        """Return log P, before the floor, of the `ids` `(..., l)` of the first l channels, `(...)` each; and the
        mixture of the next channel (or of the last one, if all are known)."""
        count, channels = self.config.components, self.ids_per_position
        numbers = at_least_float32(outputs).unflatten(-1, (-1, count))
        weights, means, scales, coefficients = numbers.split(
            [1, channels, channels, numbers.shape[-2] - 1 - 2 * channels], -2
        )
        means, log_weights = means + self.spread.to(means.dtype), weights[..., 0, :].log_softmax(-1)
        inverse = (2 - scales).clamp(WIDEST, math.log(NARROWEST / self.h)).exp()
        slopes = iter(coefficients.tanh().unbind(-2))
        x = self.intensities(ids, means.dtype)[..., None]
        found: list[Tensor] = []
        for channel in range(channels):
            mean = means[..., channel, :]
            for earlier in range(channel):
                mean = mean + next(slopes) * x[..., earlier, :]
            mixture = Mixture(log_weights, mean, inverse[..., channel, :])
            if channel == ids.shape[-1]:
                break
            joint = log_weights + self.component_log_probs(mixture, ids[..., channel, None])
            found.append(joint.logsumexp(-1))
            log_weights = joint - found[-1][..., None]
        return found, mixture

    def component_log_probs(self, mixture: Mixture, ids: Tensor) -> Tensor:
        """Return log P of `ids` `(..., 1)` under each of a mixture's logistics, `(..., K)`."""
        away = self.intensities(ids, mixture.means.dtype) - mixture.means
        upper = F.logsigmoid((away + self.h) * mixture.inverse)  # log of the mass below the bin's upper end
        lower = F.logsigmoid((self.h - away) * mixture.inverse)  # log of the mass above its lower end
        inside = upper + lower + (-torch.expm1(-2 * self.h * mixture.inverse)).log()
        return torch.where(ids == 0, upper, torch.where(ids == self.vocab_size - 1, lower, inside))

    def intensities(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return ids.to(dtype) * (2 * self.h) - 1

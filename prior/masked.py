"""A bidirectional transformer that fills in masked tokens: any order of them, or many at once.

MaskGIT (Chang et al. 2022), which trains BERT's objective at every share of masked tokens. With the shares drawn evenly
and an image's loss averaged over its masked tokens it is an order-agnostic model (Uria et al. 2014; ARDM, Hoogeboom et
al. 2021): the same network gives p(a token | any others), hence a density along each order, for a pass per token.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.pretrained import setting

from .base import FEW_ROWS, Prior, PriorConfig, State, _progress
from .gpt import EPS, MAX_ROTATIONS, rotate, unit
from .requests import Order, Rows, check_labels, known_tokens
from .sampling import Generators, GumbelNoise, Sampler, gumbel, image_generators

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (u * (math.pi / 2)).cos(),
    "arccos": lambda u: u.acos() * (2 / math.pi),
    "square": lambda u: 1 - u**2,
}
"""The share of tokens that is masked, from 1 at u = 0 to 0 at u = 1. All are concave, so that K steps of sampling
reveal a token each."""
CPU_TOKENS = 1 << 13  # of one pass on a CPU, in whose cache its activations then fit
GPU_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(PriorConfig):
    """Sizes of the transformer, and how it is masked and scored."""

    dim: int = setting(128, "width of the residual stream", ge=8, le=16384)
    depth: int = setting(4, "number of transformer blocks", ge=1, le=256)
    heads: int = setting(4, "attention heads; they divide dim", ge=1, le=256)
    hidden: int | None = setting(None, "width of the SwiGLU layer; default 8/3 dim, rounded up to 32", ge=8, le=65536)
    dropout: float = setting(0.0, "dropout on the embeddings and on each residual branch", ge=0, lt=1)
    attention_dropout: float = setting(0.0, "dropout on the attention weights", ge=0, lt=1)
    rope_base: float = setting(100.0, "longest wavelength of the rotary positions, in units of 2 pi cells", gt=1)
    schedule: str = setting("linear", "how the masked share is drawn in training: linear (all alike) maximises the "
                            "likelihood; cosine, arccos and square mask more", choices=tuple(SCHEDULES))  # fmt: skip
    label_smoothing: float = setting(0.0, "share of a target's mass that is spread over all ids in training", ge=0,
                                     lt=1)  # fmt: skip
    exact: bool = setting(True, "log_prob is exact along `order`, a pass per token; false: a bound over all orders")
    bound_passes: int = setting(8, "passes of that bound; more is closer to its expectation", ge=1, le=65536)

    def check(self) -> Iterator[str]:
        """Heads have to be of an even width, and the order has to exist."""
        yield from super().check()
        if self.dim % (2 * self.heads):
            yield f"heads: dim must be a multiple of 2 * heads (got dim {self.dim}, heads {self.heads})"
        elif len(self.grid) * self.dim // self.heads > MAX_ROTATIONS:
            yield f"heads: a grid of {len(self.grid)} tokens and heads of width {self.dim // self.heads} are too large"


class Block(nn.Module):
    """Attention of all to all and SwiGLU, each normalised before and added to the residual stream `(B, N, dim)`."""

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # how sharp a head may attend
        self.project = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:  # (B, N, dim), (N, dim / heads / 2, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, width)
        q, k = rotate(unit(q) * self.gain, rotations).to(v.dtype), rotate(unit(k), rotations).to(v.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class Masked(Prior, name="masked"):
    """Every masked token from all visible ones. `exact` says what `log_prob` is, and may be set at any time."""

    Config = MaskedConfig
    any_order = True
    coordinates: Tensor
    rotations: Tensor

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        self.exact, self.mask = config.exact, config.grid.vocab_size
        self.token_embedding = nn.Embedding(config.grid.vocab_size + 1, config.dim)  # the last is the mask
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)  # the last is the null class
        tables = (nn.Parameter(torch.empty(size, config.dim)) for size in config.grid.shape)
        self.axis_embeddings: Any = nn.ParameterList(tables)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.head = nn.Linear(config.dim, config.grid.vocab_size, bias=False)
        coordinates = torch.unravel_index(torch.arange(len(config.grid), device="cpu"), config.grid.shape)
        self.register_buffer("coordinates", torch.stack(coordinates), persistent=False)
        self.register_buffer("rotations", self._rotations(), persistent=False)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 2 and parameter.shape[1] > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # branches start small, so that depth does not blow the residual stream up (GPT-2)
            for layer in (block.project, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def _rotations(self) -> Tensor:
        """cos and sin per position `(N, width / 2, 2)`, the pairs of a head shared out among the axes (2-D RoPE)."""
        axes, pairs = len(self.grid.shape), self.config.dim // self.config.heads // 2
        at = torch.arange(pairs, device="cpu")
        frequency = self.config.rope_base ** (-(at // axes) / max(1, -(-pairs // axes)))
        angles = self.coordinates.t()[:, at % axes] * frequency
        return torch.stack([angles.cos(), angles.sin()], -1)

    def predict(self, ids: Tensor, labels: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits `(B, N, V)` from one pass over `ids` (B, N), where `self.mask` is a masked token; with `at` (B,) those
        of one raster index per row, `(B, V)`."""
        places = sum(table[index] for table, index in zip(self.axis_embeddings, self.coordinates, strict=True))
        x = self.dropout(self.token_embedding(ids) + self.class_embedding(labels)[:, None] + places)
        for block in self.blocks:
            x = block(x, self.rotations)
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at]
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None,
                known: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits `(B, N, V)`, raster order. With bool `known`, `(B, N)` or `(B, *grid.shape)`: one pass that sees the
        tokens where it holds, and nothing of the others. Without: teacher-forced, `logits[:, i]` sees only tokens
        ranked before i in `order` (`(N,)` or `(B, N)`; None is the model's own), which takes N passes."""
        tokens, (count, size) = tokens.flatten(1).long(), (len(tokens), len(self.grid))
        if labels is None:
            labels = torch.full((count,), self.num_classes, device=tokens.device)
        if known is not None:
            return self.predict(torch.where(known.flatten(1), tokens, self.mask), labels)
        path = (self.order if order is None else order).expand(count, size)
        ranks, parts = path.argsort(1), []
        for part in torch.arange(size, device=path.device).split(max(1, self.rows_of_a_pass() // count)):
            ids = torch.where(ranks < part[:, None, None], tokens, self.mask).flatten(0, 1)  # a row per pass and image
            logits = self.predict(ids, labels.repeat(len(part)), path[:, part].t().flatten())
            parts.append(logits.unflatten(0, (len(part), count)))
        return torch.cat(parts)[ranks, torch.arange(count, device=ranks.device)[:, None]]

    def rows_of_a_pass(self) -> int:
        """How many rows go through the network together in N passes, and in sampling on a CPU."""
        return max(1, (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS) // len(self.grid))

    # Training

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """`known` `(B, N)`: per image a share of tokens, drawn by the schedule, is masked; at least one token is."""
        count, size = len(tokens), len(self.grid)
        masked = (SCHEDULES[self.config.schedule](torch.rand(count, 1)) * size).ceil().clamp(1, size)
        ranks = torch.rand(count, size).argsort(1).argsort(1)
        return {"known": (ranks >= masked).to(tokens.device)}

    def loss(self, logits: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
        """Cross-entropy over the masked positions (not `known`), in nats per token.

        Under the linear schedule the mean over each image's own, which is ARDM's objective: its expectation is the
        negative bound on the log-likelihood per token. Any other schedule gives up likelihood for samples, as MaskGIT
        does, and takes its mean over all of the batch: fewer masked tokens, less weight.
        """
        masked = ~inputs["known"].flatten(1)
        nats = F.cross_entropy(logits.float().transpose(1, 2), tokens.flatten(1), reduction="none",
                               label_smoothing=self.config.label_smoothing)  # fmt: skip
        counts = masked.sum(1, keepdim=True) if self.config.schedule == "linear" else masked.sum() / len(masked)
        return (nats * masked / counts).sum(1).mean()

    # Likelihood

    def token_log_probs(self, tokens: Tensor, labels: Tensor | None = None, order: Order = None) -> Tensor:
        """As in `Prior` where `exact`. Else each token's share of a bound in `bound_passes` passes, `(B, *grid.shape)`.

        It sums to an unbiased estimate of E_order log p(tokens | order) <= log E_order p(tokens | order) (ARDM, eq. 4):
        passes with n tokens visible, n spread evenly over 0 to N - 1, weigh each masked token N / (N - n). The masks
        follow from the image's tokens: its value is always the same, and errors average out over a data set. Raises
        `ValueError` for an order, as the bound is over all of them.
        """
        if self.exact:
            return super().token_log_probs(tokens, labels, order)
        if order is not None:
            raise ValueError("order: without `exact`, log_prob bounds the mean over all orders; no order can be given")
        self.grid.check(tokens)
        labels, ids = check_labels(self, labels, len(tokens)), tokens.flatten(1).long()
        total = torch.zeros(ids.shape, device=ids.device)
        for known in bound_masks(ids, self.config.bound_passes):
            log_probs = self(tokens, labels, known=known).float().log_softmax(-1)
            weights = ~known / (~known).float().mean(1, keepdim=True) / self.config.bound_passes
            total += log_probs.gather(-1, ids[..., None])[..., 0] * weights
        return total.reshape(tokens.shape)

    # Sampling

    def rows_at_once(self) -> int | None:
        """On a CPU, as many rows as have their activations in its cache."""
        return self.rows_of_a_pass() if self.device.type == "cpu" else None

    def start(self, num_images: int, labels: Tensor | None, order: Tensor | None = None) -> State:
        """All tokens masked. Each step is a pass over the whole grid: what all see of each other can not be cached."""
        state = self.start_slow(num_images, labels, order)
        state.tokens.fill_(self.mask)
        return state

    def next_logits(self, state: State, token: Tensor | None) -> Tensor:
        """Reveal the last position's token, and predict the next."""
        path = (self.order if state.order is None else state.order).expand(state.tokens.shape)
        if token is not None:
            state.tokens.scatter_(1, path[:, state.rank - 1, None], token[:, None])
        state.rank += 1
        return self.predict(state.tokens, state.labels, path[:, state.rank - 1])

    def sample(self, num_images: int, labels: Tensor | None = None, *, steps: int | None = None,
               confidence_temperature: float = 4.5, schedule: str = "cosine", order: Order = None, num_orders: int = 1,
               cache: bool = True, parallel: bool = False, **settings: Any) -> Tensor:  # fmt: skip
        """Draw tokens as `Prior.sample` does, a token per pass; or with `steps` many at a time, as MaskGIT does.

        steps: each pass draws all unknown tokens and keeps the most confident ones, by log p plus Gumbel noise times
        `confidence_temperature`, which falls to 0; `schedule` says how many stay masked. Known tokens stay as they are
        and are seen by all others. **This is not exact**: tokens of a step are independent of each other given those
        before, and what is kept depends on what was drawn, so that the samples' distribution is not that of `log_prob`;
        more steps, and a higher `confidence_temperature` (random orders), come closer. A position has one draw of
        noise for all steps, so where the tokens are independent the distribution is right for any number of steps.
        Raises `ValueError` for arguments out of range, and for those that `steps` does not go with.
        """
        if steps is None:
            return super().sample(num_images, labels, order=order, num_orders=num_orders, cache=cache,
                                  parallel=parallel, **settings)  # fmt: skip
        if order is not None or num_orders != 1 or parallel or not cache:
            raise ValueError("steps finds an order of its own: order, num_orders, parallel and cache=False do not go "
                             "with it")  # fmt: skip
        if type(steps) is not int or not 1 <= steps <= len(self.grid):
            raise ValueError(f"steps must be a whole number from 1 to {len(self.grid)} (got {steps})")
        if not 0 <= confidence_temperature < float("inf"):
            raise ValueError(f"confidence_temperature must be a finite number >= 0 (got {confidence_temperature})")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} (got {schedule!r})")
        share = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        masked, noise = SCHEDULES[schedule](share).tolist(), (confidence_temperature * (1 - share)).tolist()
        return self._sample_in_steps(num_images, labels, list(zip(masked, noise, strict=True)), **settings)

    def _sample_in_steps(self, num_images: int, labels: Tensor | None, steps: list[tuple[float, float]], *,
                         generator: Generators = None, tokens: Tensor | None = None, known: Tensor | None = None,
                         progress: bool = False, **filters: Any) -> Tensor:  # fmt: skip
        """What `Prior.sample` checks and cuts up, for `_fill_in`."""
        sampler = Sampler(**filters)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1 (got {num_images})")
        labels = check_labels(self, labels, num_images)
        if sampler.guidance_scale != 1 and (labels is None or bool((labels == self.num_classes).all())):
            raise ValueError("guidance_scale other than 1 needs labels to guide towards")
        if labels is None:
            labels = torch.full((num_images,), self.num_classes, device=self.device)
        given, keep = known_tokens(self, tokens, known, num_images)
        raster = torch.arange(len(self.grid), device=self.device)
        rows = Rows(labels, image_generators(generator, num_images), given, keep, raster, raster)
        images = max(FEW_ROWS, min(self.rows_at_once() or num_images, self.parallel_rows()) // sampler.copies)
        with torch.inference_mode(), self._evaluating():
            cuts = range(0, num_images, images)
            drawn = torch.cat([self._fill_in(rows[at : at + images], sampler, steps, progress) for at in cuts])
        return drawn.reshape(num_images, *self.grid.shape).clone()

    def _fill_in(self, rows: Rows, sampler: Sampler, steps: list[tuple[float, float]], progress: bool) -> Tensor:
        """Tokens `(B, N)` in as many passes as there are steps, each the share of the unknown that stays masked, and
        how much the noise counts against confidence."""
        count, size = rows.given.shape
        if count * size < FEW_ROWS:  # so that an image's last bits do not depend on how many others there are
            return self._fill_in(rows.padded(FEW_ROWS), sampler, steps, progress)[:count]
        labels = sampler.doubled(rows.labels, self.num_classes)
        noise = GumbelNoise(rows.generators, size, self.mask, self.device).whole()
        ids = torch.where(rows.keep, rows.given, self.mask)
        left = unknown = (~rows.keep).sum(1)
        for step in _progress(len(steps), progress):
            share, temperature = steps[step]
            logits = sampler.guide(self.predict(sampler.doubled(ids), labels).float())
            drawn, _ = sampler.choose(logits, noise)
            confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            jitter = torch.stack([gumbel((size,), generator) for generator in rows.generators]).to(self.device)
            confidence = (confidence + temperature * jitter).masked_fill(ids != self.mask, torch.inf)
            # 1e-9: a whole number may come out a hair below. At least one token is revealed, until none is left.
            left = torch.minimum(left - 1, (unknown * share + 1e-9).long()).clamp(min=0)
            ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
            ids = torch.where((ids == self.mask) & (ranks < (size - left)[:, None]), drawn, ids)
        return ids


def bound_masks(ids: Tensor, passes: int) -> Tensor:
    """What is known in each pass of the bound for `ids` (B, N), bool `(passes, B, N)`: counts spread evenly over 0 to
    N - 1 from a random start (stratified, and their mean unbiased), positions at random. An image's own tokens seed
    its masks: with the same ones for all, the mean over a data set was off by 4 % in 8 passes."""
    size, masks = ids.shape[1], []
    for row in ids.cpu().numpy():
        generator = torch.Generator().manual_seed(zlib.crc32(row.tobytes()))
        start = torch.rand((), generator=generator, dtype=torch.float64)
        visible = ((torch.arange(passes) + start) * size / passes).long().clamp(max=size - 1)
        ranks = torch.rand(passes, size, generator=generator).argsort(1).argsort(1)
        masks.append(ranks < visible[:, None])
    return torch.stack(masks, 1).to(ids.device)

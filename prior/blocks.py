"""The transformer that takes any ordered partition of the grid: several tokens per pass, exactly.

Tokens stay in raster order, and only masks depend on the partition. Queries, one for each position, hold no token: a
mask embedding and a place. They attend to the tokens of earlier blocks, so the tokens of a block do not see each other
(ARPG, Li et al. 2025; LPD, Zhang et al. 2025; RandAR, Pang et al. 2024). The partition belongs to the model, so that
parallel decoding is no approximation: p(a block | those before it) is a product over its tokens by definition.

Kept of two forms. In the other there was one stream, whose keys and values were those of the stream plus the token's
embedding: as good, but with a cache that needs every layer's stream, and without a layer that has read the tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prior
from .masks import Window
from .orders import Partition, block_numbers, growing
from .transformer import EPS, OrderedConfig, Rotations, coordinates, deep_rounding, reset, rotate, unit

COUNTS = 16  # about how many numbers of blocks training with any_order draws from


class BlocksConfig(OrderedConfig):
    """Sizes of the transformer, the partitions it is trained in, and how far it sees."""

    takes_blocks = True


class Layer(nn.Module):
    """Attention from queries `(B, n, dim)` to keys and values of other rows, and SwiGLU, each normalised before and
    added to the queries."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden or -(-config.dim * 8 // 96) * 32
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.2))  # how sharp a head may attend
        self.project = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, rows: Tensor, turns: Tensor) -> Tensor:
        """Of rows `(B, m, dim)` whose places are turned by `([B,] m, width / 2, 2)`: `(2, B, m, heads, width)`."""
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.kv(self.attention_norm(rows)).chunk(2, -1))
        return torch.stack([rotate(unit(k), turns.unsqueeze(-3)).to(v.dtype), v])

    def forward(self, x: Tensor, turns: Tensor, keys_values: Tensor, sees: Tensor | Window | None = None) -> Tensor:
        """`(B, n, dim)` to the same. sees: bool `([B, 1,] n, m)`, True may attend, or a window; None is all."""
        keys, values = keys_values
        queries = self.q(self.attention_norm(x)).unflatten(-1, (self.heads, -1))
        queries = rotate(unit(queries), turns.unsqueeze(-3) * self.gain.unsqueeze(-1)).to(x.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        if isinstance(sees, Window):
            attended = sees.attend(queries, keys, values, dropout)
        else:
            queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, dropout_p=dropout)
            attended = attended.transpose(1, 2)
        x = x + self.dropout(self.project(attended.flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class Blocks(Prior, name="blocks"):
    """The first half of the layers reads the tokens, each with those of its own and earlier blocks; the others answer
    the queries from what has been read. A start row, which all see, holds the class."""

    Config = BlocksConfig
    cells: Tensor
    """(1 + N, axes): where the start row and the tokens stand."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.grid.shape
        self.any_order = config.any_order
        self.rounding = deep_rounding(config.depth)
        self.token_embedding = nn.Embedding(config.grid.vocab_size, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.query_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings: Any = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, config.grid.vocab_size, bias=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.register_buffer("cells", torch.cat([start, coordinates(shape)]), persistent=False)
        self.rotations = Rotations(config, self.cells)
        rows = torch.arange(1 + len(self.grid), device="cpu")
        windows = self.windows_of(rows, reads=True) + self.windows_of(rows[1:], reads=False)
        self.windows: Any = nn.ModuleList(windows)
        reset(self.parameters(), self.layers)

    @property
    def readers(self) -> int:
        """The number of layers that read the tokens."""
        return self.config.depth // 2

    def windows_of(self, at: Tensor, *, reads: bool) -> list[Window]:
        """Of the layers that read, or of those that answer, for the rows `at` (n,) of `cells`; none without a window.
        A reader sees its own block, too."""
        if self.config.window is None:
            return []
        dilations = self.config.dilations[: self.readers] if reads else self.config.dilations[self.readers :]
        when = F.pad(self.block_of, (1, 0), value=-1)[:, None]  # the start row comes before all
        sources = torch.cat([when, self.cells], 1)
        targets = sources[at]
        targets[:, 0] += int(reads)
        targets = targets.clamp(min=0)  # the start row has no place of its own
        made = {dilation: Window(targets, sources, self.config.window, dilation) for dilation in set(dilations)}
        return [made[dilation] for dilation in dilations]

    @property
    def stepwise_windows(self) -> list[list[Window]]:
        """Of each block, those of the layers that read its tokens and of those that answer its queries; made once."""
        if not len(self.windows):
            return []
        if self.__dict__.get("windows_on") != self.device:
            with torch.inference_mode(False):
                rows = [at + 1 for at in self.order.split(self.blocks)]
                self.block_windows = [self.windows_of(at, reads=True) + self.windows_of(at, reads=False) for at in rows]
            self.windows_on = self.device
        return self.block_windows

    @property
    def places(self) -> Tensor:
        """`(N, dim)`: the sum of each position's embedding along every axis."""
        axes = zip(self.axis_embeddings, self.cells[1:].t(), strict=True)
        return torch.stack([table[at] for table, at in axes]).sum(0)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None, block_of: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits `(B, N, vocab_size)`, raster order; `logits[:, i]` sees only tokens of earlier blocks:
        the model's own, those that it cuts an `order` into, or given by number, `block_of` each token; `(N,)` or
        `(B, N)`, both."""
        if block_of is None:
            block_of = self.block_of if order is None else block_numbers(order, self.blocks)
        label = self.class_embedding(self.class_ids(labels, len(tokens)))[:, None]
        placed, turns = self.places + label, self.rotations.table
        content = torch.cat([self.start_embedding + label, self.token_embedding(tokens.flatten(1).long()) + placed], 1)
        content, x = self.dropout(content), self.dropout(self.query_embedding + placed)
        for layer, sees in zip(self.layers[: self.readers], self.sights(block_of, reads=True), strict=True):
            content = layer(content, turns, layer.keys_values(content, turns), sees)
        for layer, sees in zip(self.layers[self.readers :], self.sights(block_of, reads=False), strict=True):
            x = layer(x, turns[1:], layer.keys_values(content, turns), sees)
        return self.head(self.norm(x))

    def sights(self, block_of: Tensor, *, reads: bool) -> list[Any]:
        """What each layer that reads, or that answers, sees: a window, or bool `([B, 1,] queries, 1 + N)`."""
        if len(self.windows):
            return list(self.windows[: self.readers] if reads else self.windows[self.readers :])
        numbers = F.pad(block_of, (1, 0), value=-2)  # the start row comes before all, known tokens (-1) included
        numbers = numbers if block_of.ndim == 1 else numbers[:, None]
        keys, queries = numbers[..., None, :], numbers[..., :, None]
        sees = keys <= queries if reads else keys < queries[..., 1:, :]
        return [sees] * (self.readers if reads else len(self.layers) - self.readers)

    @property
    def receptive_field(self) -> Tensor:
        """As in `Prior`. With windows: what is near, what is near that, and so on for each layer."""
        if not len(self.windows):
            return super().receptive_field
        size = len(self.grid)
        field = F.pad(torch.eye(size, dtype=torch.bool, device=self.device), (0, 0, 1, 0))  # what each row holds
        for window in self.windows[: self.readers]:
            field = window.spread(field)
        found = torch.zeros_like(field[1:])
        for window in self.windows[self.readers :]:
            found = found | window.seen(field)
        return found

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The layers: of the first half the tokens' stream, of the others the queries', `(B, N, dim)`."""
        return list(self.layers)

    def arrange(self, output: Any) -> Tensor:
        """Raster order, without the start row."""
        return output[:, -len(self.grid) :]

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, a partition per image: a random order in growing blocks, any number of them; or, in ever
        more images, the model's own."""
        if not self.any_order:
            return {}
        count, size = len(tokens), len(self.grid)
        numbers = growing_numbers(size)
        shuffled = torch.empty(count, size, dtype=torch.long)
        shuffled.scatter_(1, torch.rand(count, size).argsort(1), numbers[torch.randint(len(numbers), (count,))])
        random = torch.rand(count, 1) < self.config.random_share_at(progress)
        return {"block_of": torch.where(random.to(tokens.device), shuffled.to(tokens.device), self.block_of)}

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """Keys and values of the tokens so far."""
        return Cache(self, labels, walk or Partition(self.order, self.blocks))


@cache
def growing_numbers(size: int) -> Tensor:
    """The number of the block at each rank, `(k, size)`, for k numbers of growing blocks, from 1 to `size`, each about
    as many times the one before."""
    counts = sorted({round(size ** (step / COUNTS)) for step in range(COUNTS + 1)})
    sizes = [torch.tensor(growing(size, count), device="cpu") for count in counts]
    return torch.stack([torch.arange(len(each), device="cpu").repeat_interleave(each) for each in sizes])


class Cache:
    """What sampling remembers: keys and values of each layer, allocated once, and how many there are.

    Tokens stand there in the order of the walk; with windows in raster order, where these look for them.
    """

    def __init__(self, model: Blocks, labels: Tensor, walk: Partition) -> None:
        self.model, self.label = model, model.class_embedding(labels)[:, None]
        self.places, self.turns = model.places, model.rotations.table
        shape = (2, len(labels), 1 + len(model.grid), model.config.heads, model.config.dim // model.config.heads)
        # Zeros: windows gather what is not there yet, and mask it.
        self.keys_values = [self.label.new_zeros(shape) for _ in model.layers]
        self.at = list(walk.order.view(-1, len(model.grid)).split(walk.blocks, 1))  # of each block, (1, n) or (B, n)
        self.windows = model.stepwise_windows
        self.block = self.length = 0

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits `(B, n, vocab_size)` of the next block, given the last one's `tokens` `(B, m)`."""
        self.read(tokens)
        model, at = self.model, self.at[self.block]
        x, turns = model.query_embedding + self.places[at] + self.label, self.turns[at + 1]
        for index in range(model.readers, len(model.layers)):
            x = model.layers[index](x, turns, self.kept(index), self.window(self.block, index))
        self.block += 1
        return model.head(model.norm(x))

    def read(self, tokens: Tensor | None) -> None:
        """Let the readers read the last block's `tokens` `(B, m)`, or the start row, and keep what is looked for."""
        model = self.model
        if tokens is None:
            content, rows = model.start_embedding + self.label, torch.zeros_like(self.at[0][:1, :1])
        else:
            at = self.at[self.block - 1]
            content, rows = model.token_embedding(tokens) + self.places[at] + self.label, at + 1
        begin, self.length = self.length, self.length + rows.shape[1]
        turns = self.turns[rows]
        places = rows[0] if self.windows else slice(begin, self.length)
        for index, layer in enumerate(model.layers):
            self.keys_values[index][:, :, places] = layer.keys_values(content, turns)
            if index < model.readers:
                sees = self.window(self.block - 1, index) if self.block else None
                content = layer(content, turns, self.kept(index), sees)

    def kept(self, index: int) -> Tensor:
        """A layer's keys and values that are there, `(2, B, m, heads, width)`; with windows, of all rows."""
        return self.keys_values[index] if self.windows and self.block else self.keys_values[index][:, :, : self.length]

    def window(self, block: int, index: int) -> Window | None:
        """Of a layer, for the tokens or the queries of a block."""
        return self.windows[block][index] if self.windows else None

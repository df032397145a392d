"""The transformer that takes any ordered partition of the grid: several tokens per pass, exactly.

Everything stays in raster order, and only a mask depends on the partition. The stream at a position starts from a mask
embedding and the place, and never gets the position's own token; keys and values are those of the stream plus the
token's embedding, and are seen from later blocks alone. So the tokens of a block do not see each other, as in the
parallel decoding of RandAR (Pang et al. 2024), ARPG (Li et al. 2025) and LPD (Zhang et al. 2025). Here the partition
belongs to the model: p(a block | those before it) is a product over its tokens by definition, and no approximation.

Kept of two forms. In the other (ARPG's) half of the layers read the tokens, and the other half answered queries from
what had been read: as good at 49 tokens, slower to learn at 256 (docs/orders.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prior
from .drawing import sent
from .heads import IdEmbedding
from .masks import Window
from .orders import Partition, block_numbers, growing
from .transformer import EPS, OrderedConfig, Rotations, coordinates, deep_rounding, reset, rotate, unit

COUNTS = 16  # about how many numbers of blocks training with any_order draws from


class BlocksConfig(OrderedConfig):
    """Sizes of the transformer, the partitions it is trained in, and how far it sees."""

    takes_blocks = True


class Layer(nn.Module):
    """Attention from a stream `(B, n, dim)` to keys and values of rows, and SwiGLU, each normalised before and added to
    the stream."""

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

    def forward(self, x: Tensor, rows: Tensor, turns: Tensor, sees: Tensor | Window) -> Tensor:
        """`answer` of a stream `(B, N, dim)` to rows `(B, 1 + N, dim)`, turned by `(1 + N, width / 2, 2)`: all of a
        layer, so that it can be compiled, checkpointed and sharded."""
        return self.answer(x, turns[1:], self.keys_values(rows, turns), sees)

    def answer(self, x: Tensor, turns: Tensor, keys_values: Tensor, sees: Tensor | Window | None = None) -> Tensor:
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
    """One stream, masked attention, and a start row that all see, with the class. Positions are 1 to N below, row 0 is
    the start."""

    Config = BlocksConfig
    cells: Tensor
    """(1 + N, axes): where the start row and the tokens stand."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.positions.shape
        self.any_order = config.any_order
        self.rounding = deep_rounding(config.depth)
        self.token_embedding = IdEmbedding(config.grid, self.readout.together, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.query_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings: Any = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.readout.size, bias=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.register_buffer("cells", torch.cat([start, coordinates(shape)]), persistent=False)
        self.rotations = Rotations(config, self.cells)
        self.windows: Any = nn.ModuleList(self.windows_of(torch.arange(len(self.position_order), device="cpu")))
        self.block_windows: list[list[Window]] = []
        self.windows_on: torch.device | None = None  # for which these were made
        reset(self.parameters(), self.layers)

    def windows_of(self, at: Tensor) -> list[Window]:
        """Of each layer, for the queries at raster indices `at` (n,); none without a window."""
        if self.config.window is None:
            return []
        when = F.pad(self.position_block_of, (1, 0), value=-1)[:, None]  # the start row comes before all
        sources = torch.cat([when, self.cells], 1)
        home = sources.device
        if home.type == "cuda":  # they are cut up on the CPU
            sources, at = sources.cpu(), at.cpu()
        targets, dilations = sources[at + 1], set(self.config.dilations)
        made = {d: Window(targets, sources, self.config.window, d).to(home) for d in dilations}
        return [made[dilation] for dilation in self.config.dilations]

    @property
    def stepwise_windows(self) -> list[list[Window]]:
        """Of each block, those of its queries; made once. Empty without a window."""
        if not len(self.windows):
            return []
        if self.windows_on != self.device:
            with torch.inference_mode(False):
                self.block_windows = [self.windows_of(at) for at in self.position_order.split(self.position_blocks)]
            self.windows_on = self.device
        return self.block_windows

    @property
    def places(self) -> Tensor:
        """`(N, dim)`: the sum of each position's embedding along every axis."""
        axes = zip(self.axis_embeddings, self.cells[1:].t(), strict=True)
        return torch.stack([table[at] for table, at in axes]).sum(0)

    def outputs(
        self, tokens: Tensor, labels: Tensor | None = None, order: Tensor | None = None, block_of: Tensor | None = None
    ) -> Tensor:
        """As in `Prior`. The blocks are the model's own, those that it cuts an `order` into, or given by number,
        `block_of` each token; `(N,)` or `(B, N)`, both."""
        if block_of is None:
            block_of = self.position_block_of if order is None else block_numbers(order, self.blocks)
        label = self.class_embedding(self.class_ids(labels, len(tokens)))[:, None]
        start, ids = self.start_embedding + label, self.token_embedding(self.ids_of(tokens))
        x, turns = self.dropout(self.query_embedding + self.places + label), self.rotations.table
        for layer, sees in zip(self.layers, self.sights(block_of), strict=True):
            x = layer(x, torch.cat([start, x + ids], 1), turns, sees)
        return self.head(self.norm(x))

    def sights(self, block_of: Tensor) -> list[Any]:
        """What each layer sees: a window, or bool `([B, 1,] N, 1 + N)`."""
        if len(self.windows):
            return list(self.windows)
        earlier = F.pad(block_of[..., None, :] < block_of[..., :, None], (1, 0), value=True)
        return [earlier if block_of.ndim == 1 else earlier[:, None]] * len(self.layers)

    @property
    def position_field(self) -> Tensor:
        """As in `Prior`. With windows: what is near, what is near that, and so on for each layer."""
        if not len(self.windows):
            return super().position_field
        own = torch.eye(len(self.position_order), dtype=torch.bool, device=self.device)
        field = torch.zeros_like(own)  # what is in the stream at each position
        for window in self.windows:
            field = field | window.seen(F.pad(field | own, (0, 0, 1, 0)))
        return field

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The layers: the stream, `(B, N, dim)`."""
        return list(self.layers)

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
        return {"block_of": torch.where(sent(random, tokens.device), sent(shuffled, tokens.device), self.block_of)}

    def make_cache(self, labels: Tensor, walk: Partition | None) -> Cache:
        """Keys and values of the tokens so far."""
        return Cache(self, labels, walk or Partition(self.position_order, self.position_blocks))


@cache
def growing_numbers(size: int) -> Tensor:
    """The number of the block at each rank, `(k, size)`, for k numbers of growing blocks, from 1 to `size`, each about
    as many times the one before."""
    counts = sorted({round(size ** (step / COUNTS)) for step in range(COUNTS + 1)})
    sizes = [torch.tensor(growing(size, count), device="cpu") for count in counts]
    return torch.stack([torch.arange(len(each), device="cpu").repeat_interleave(each) for each in sizes])


class Cache:
    """What sampling remembers: keys and values of each layer, allocated once; and what each layer was given for the
    last block, to which its tokens are added when they are known.

    Rows stand there in the order of the walk; with windows in raster order, where these look for them.
    """

    def __init__(self, model: Blocks, labels: Tensor, walk: Partition) -> None:
        self.model, self.label = model, model.class_embedding(labels)[:, None]
        self.places, self.turns, self.windows = model.places, model.rotations.table, model.stepwise_windows
        cells = walk.order.shape[-1]
        shape = (2, len(labels), 1 + cells, model.config.heads, model.config.dim // model.config.heads)
        # Zeros: windows gather what is not there yet, and mask it.
        self.keys_values = [self.label.new_zeros(shape) for _ in model.layers]
        self.at = list(walk.order.view(-1, cells).split(walk.blocks, 1))  # of each block, (1, n) or (B, n)
        self.streams = [model.start_embedding + self.label] * len(model.layers)
        self.rows = torch.zeros_like(self.at[0][:, :1])  # where the streams belong: the start row
        self.block = self.length = 0

    def step(self, tokens: Tensor | None) -> Tensor:
        """What is put out at the next block's positions, `(B, n, size)`, given the last ones' `tokens`, `(B, m)` or
        `(B, m, together)`."""
        model, at = self.model, self.at[self.block]
        together = model.readout.together
        ids = 0 if tokens is None else model.token_embedding(tokens[..., None] if together == 1 else tokens)
        begin, self.length = self.length, self.length + self.rows.shape[1]
        written = self.rows[0] if self.windows else slice(begin, self.length)
        there = slice(None) if self.windows else slice(self.length)
        windows = self.windows[self.block] if self.windows else [None] * len(model.layers)
        x, turns = model.query_embedding + self.places[at] + self.label, self.turns[at + 1]
        streams = []
        for layer, kept, stream, window in zip(model.layers, self.keys_values, self.streams, windows, strict=True):
            kept[:, :, written] = layer.keys_values(stream + ids, self.turns[self.rows])
            streams.append(x)
            x = layer.answer(x, turns, kept[:, :, there], window)
        self.streams, self.rows = streams, at + 1
        self.block += 1
        return model.head(model.norm(x))

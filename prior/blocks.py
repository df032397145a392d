"""A transformer for any ordered partition of the grid, with several tokens per pass and an exact density.

Tensors stay in raster order, and only a mask depends on the partition. The stream at a position starts from a query
embedding and its coordinates, and never receives the position's own token. Keys and values are computed from the stream
plus the token's embedding, and are visible only to later blocks. The tokens of a block therefore do not see each other,
as in the parallel decoding of RandAR (Pang et al. 2024), ARPG (Li et al. 2025) and LPD (Zhang et al. 2025). Here the
partition belongs to the model: p(a block | earlier blocks) is a product over its tokens by definition, not an
approximation.

In ARPG half of the layers process the tokens and the other half the queries; this was equally good at 49 tokens and
learned more slowly at 256 (docs/lab.md)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.layers import FusedLinear

from .attention import EPS, ResidualBranches, Rotations, coordinates, rotate, unit
from .base import Prior, to_device_async
from .condition_encoder import ConditionEmbedding, Encoded
from .heads import IdEmbedding
from .masks import AttentionWindow
from .orders import Partition, block_numbers, growing
from .transformer import OrderedConfig, reset

COUNTS = 16  # with any_order, training chooses among about this many block counts


class BlocksConfig(OrderedConfig):
    takes_blocks = True


class Layer(ResidualBranches):
    """A transformer block that attends from a stream `(B, n, dim)` to keys and values of other rows."""

    q: nn.Linear
    kv: FusedLinear

    def __init__(self, config: BlocksConfig) -> None:
        dim = config.dim
        super().__init__(config, q=nn.Linear(dim, dim, bias=False), kv=FusedLinear(dim, dim, parts=2, bias=False))

    def keys_values(self, rows: Tensor, rotations: Tensor) -> Tensor:
        """Return keys, values `(2, B, m, heads, width)`. rows: `(B, m, dim)`; rotations: `([B,] m, width / 2, 2)`."""
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.kv(self.attention_norm(rows)).chunk(2, -1))
        return torch.stack([rotate(unit(k), rotations.unsqueeze(-3)).to(v.dtype), v])

    def forward(self, x: Tensor, rows: Tensor, rotations: Tensor, sees: Tensor | AttentionWindow) -> Tensor:
        """Attend from a stream `(B, N, dim)` to rows `(B, 1 + N, dim)` with rotations `(1 + N, width / 2, 2)`: this is
        the whole layer in one call, so it can be compiled, checkpointed and sharded."""
        return self.attend(x, rotations[1:], self.keys_values(rows, rotations), sees)

    def attend(
        self, x: Tensor, rotations: Tensor, keys_values: Tensor, sees: Tensor | AttentionWindow | None = None
    ) -> Tensor:
        """Map `(B, n, dim)` to the same shape. sees: bool `([B, 1,] n, m)`, True where allowed; a window; None: all."""
        keys, values = keys_values
        queries = self.q(self.attention_norm(x)).unflatten(-1, (self.heads, -1))
        queries = rotate(unit(queries), rotations.unsqueeze(-3) * self.gain.unsqueeze(-1)).to(x.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        if isinstance(sees, AttentionWindow):
            attended = sees.attend(queries, keys, values, dropout)
        else:
            queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, dropout_p=dropout)
            attended = attended.transpose(1, 2)
        return self.add_branches(x, attended)


class Blocks(Prior, name="blocks"):
    """One stream with masked attention. Row 0, a start row, holds the class and is visible to all positions."""

    Config = BlocksConfig
    cells: Tensor  # (1 + P, axes): coordinates of the start row and the positions

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        dim, shape = config.dim, config.positions.shape
        self.any_order = config.any_order
        self.token_embedding = IdEmbedding(config.grid, self.output_head.ids_per_position, dim)
        self.class_embedding = ConditionEmbedding(config, dim)
        self.start_embedding = nn.Parameter(torch.empty(1, dim))
        self.query_embedding = nn.Parameter(torch.empty(1, dim))
        self.axis_embeddings: Any = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in shape)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, self.output_head.size, bias=False)
        start = torch.full((1, len(shape)), -1, device="cpu")
        self.register_buffer("cells", torch.cat([start, coordinates(shape)]), persistent=False)
        self.rotations = Rotations(config, self.cells)
        self.windows: Any = nn.ModuleList(self.make_windows(torch.arange(len(self.position_order), device="cpu")))
        self.block_windows: list[list[AttentionWindow]] = []
        self.windows_on: torch.device | None = None  # the device that `block_windows` are on
        reset(self, self.layers)

    def make_windows(self, at: Tensor) -> list[AttentionWindow]:
        """Make each layer's window for the queries at raster indices `at` (n,); none without windows."""
        if self.config.window is None:
            return []
        when = F.pad(self.position_block_of, (1, 0), value=-1)[:, None]  # the start row precedes all others
        sources = torch.cat([when, self.cells], 1)
        home = sources.device
        if home.type == "cuda":  # tiles are made on the CPU
            sources, at = sources.cpu(), at.cpu()
        targets, dilations = sources[at + 1], set(self.config.dilations)
        made = {d: AttentionWindow(targets, sources, self.config.window, d).to(home) for d in dilations}
        return [made[dilation] for dilation in self.config.dilations]

    @property
    def stepwise_windows(self) -> list[list[AttentionWindow]]:
        """The windows of each block's queries, created once per device; empty without a window."""
        if not len(self.windows):
            return []
        if self.windows_on != self.device:
            with torch.inference_mode(False):
                self.block_windows = [self.make_windows(at) for at in self.position_order.split(self.position_blocks)]
            self.windows_on = self.device
        return self.block_windows

    @property
    def position_embeddings(self) -> Tensor:
        axes = zip(self.axis_embeddings, self.cells[1:].t(), strict=True)
        return torch.stack([table[at] for table, at in axes]).sum(0)

    def outputs(
        self, tokens: Tensor, encoded: Encoded, order: Tensor | None = None, block_of: Tensor | None = None
    ) -> Tensor:
        """See `Prior.outputs`. order: `(N,)` or `(B, N)`, cut into the model's own blocks; block_of: the block number
        of each token, `(N,)` or `(B, N)`. By default the model's own partition is used."""
        if block_of is None:
            block_of = self.position_block_of if order is None else block_numbers(order, self.blocks)
        ids = self.token_embedding(self.position_ids(tokens))
        start = self.start_embedding + self.class_embedding(encoded)[:, None]
        label = self.class_embedding.at_positions(encoded)
        x, rotations = self.dropout(self.query_embedding + self.position_embeddings + label), self.rotations.table
        for layer, sees in zip(self.layers, self.visibility(block_of), strict=True):
            x = layer(x, torch.cat([start, x + ids], 1), rotations, sees)
        return self.head(self.norm(x))

    def visibility(self, block_of: Tensor) -> list[Any]:
        """Return each layer's visibility: a window, or bool `([B, 1,] P, 1 + P)`."""
        if len(self.windows):
            return list(self.windows)
        earlier = F.pad(block_of[..., None, :] < block_of[..., :, None], (1, 0), value=True)
        return [earlier if block_of.ndim == 1 else earlier[:, None]] * len(self.layers)

    @property
    def position_field(self) -> Tensor:
        """With windows: all positions reachable through a chain of windows, one per layer."""
        if not len(self.windows):
            return super().position_field
        own = torch.eye(len(self.position_order), dtype=torch.bool, device=self.device)
        field = torch.zeros_like(own)  # the tokens that reach the stream at each position
        for window in self.windows:
            field = field | window.seen(F.pad(field | own, (0, 0, 1, 0)))
        return field

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.layers)

    def training_inputs(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """With `any_order`, draw a partition for each image: a random order cut into a random number of growing blocks
        or, for a growing share of images, the model's own."""
        if not self.any_order:
            return {}
        (count, size), numbers = (len(tokens), len(self.grid)), growing_numbers(len(self.grid))
        shuffled = torch.empty(count, size, dtype=torch.long)
        shuffled.scatter_(1, torch.rand(count, size).argsort(1), numbers[torch.randint(len(numbers), (count,))])
        random = torch.rand(count, 1) < self.config.random_share_at(progress)
        random, shuffled = (to_device_async(each, tokens.device) for each in (random, shuffled))
        return {"block_of": torch.where(random, shuffled, self.block_of)}

    def make_cache(self, encoded: Encoded, partition: Partition | None) -> Cache:
        return Cache(self, encoded, partition or Partition(self.position_order, self.position_blocks))


@cache
def growing_numbers(size: int) -> Tensor:
    """Return the block number of each rank, `(k, size)`, for k numbers of growing blocks from 1 to `size`."""
    counts = sorted({round(size ** (step / COUNTS)) for step in range(COUNTS + 1)})
    sizes = [torch.tensor(growing(size, count), device="cpu") for count in counts]
    return torch.stack([torch.arange(len(each), device="cpu").repeat_interleave(each) for each in sizes])


class Cache:
    """Keys and values of each layer, allocated once, and each layer's stream at the last block, to which the block's
    tokens are added once they are known.

    Rows are in decoding order, or in raster order with windows, which gather them by cell."""

    def __init__(self, model: Blocks, encoded: Encoded, partition: Partition) -> None:
        self.model, label = model, model.class_embedding(encoded)[:, None]
        self.embeddings, self.rotations = model.position_embeddings, model.rotations.table
        self.windows = model.stepwise_windows
        cells = partition.order.shape[-1]
        shape = (2, len(encoded), 1 + cells, model.config.heads, model.config.dim // model.config.heads)
        # Zeros, because windows gather (and mask) rows before they are written.
        self.keys_values = [label.new_zeros(shape) for _ in model.layers]
        self.at = list(partition.order.view(-1, cells).split(partition.blocks, 1))  # of each block, (1, n) or (B, n)
        every = model.class_embedding.at_positions(encoded, partition.order).expand(-1, cells, -1)
        self.labels = every.split(partition.blocks, 1)
        self.streams = [model.start_embedding + label] * len(model.layers)
        self.rows = torch.zeros_like(self.at[0][:, :1])  # of the streams: the start row
        self.block = self.length = 0

    def step(self, tokens: Tensor | None) -> Tensor:
        """Return the outputs of the next block, `(B, n, size)`. tokens: `(B, m)` or `(B, m, ids_per_position)`."""
        model, at = self.model, self.at[self.block]
        if tokens is not None and model.output_head.ids_per_position == 1:
            tokens = tokens[..., None]
        ids = 0 if tokens is None else model.token_embedding(tokens)
        begin, self.length = self.length, self.length + self.rows.shape[1]
        written = self.rows[0] if self.windows else slice(begin, self.length)
        seen = slice(None) if self.windows else slice(self.length)
        windows = self.windows[self.block] if self.windows else [None] * len(model.layers)
        x, rotations = model.query_embedding + self.embeddings[at] + self.labels[self.block], self.rotations[at + 1]
        streams = []
        for layer, cached, stream, window in zip(model.layers, self.keys_values, self.streams, windows, strict=True):
            cached[:, :, written] = layer.keys_values(stream + ids, self.rotations[self.rows])
            streams.append(x)
            x = layer.attend(x, rotations, cached[:, :, seen], window)
        self.streams, self.rows = streams, at + 1
        self.block += 1
        return model.head(model.norm(x))

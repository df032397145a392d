"""Causal convolutions over a grid in raster order, and row caches for sampling.

Maps are channels last, `(B, H, W, C)`, so a 1x1 convolution is an `nn.Linear`. A k x k kernel (k odd, r = k // 2) reads
r rows above and, in its own row, r columns to the left. Van den Oord et al. 2016 ("Pixel Recurrent Neural Networks",
fig. 2) multiply the rest by zero. Here the kernel omits the rows below, and only the end of its last row is masked.

Sampling computes one position at a time. For a 5 x 5 kernel at position x, the two rows above are complete before its
own row begins, and in its own row everything to the left of x (type B: and x itself) is known:

    a a a a a      a: `RowCache.start_row` multiplies these for all columns of the row at once, and stores the sums in
    a a a a a         `above[column]`
    w w x - -      w: `RowCache.read` multiplies these, the `window` of x, and adds `above[column]`
                   -: masked; not stored anywhere

`MapRows` is a ring buffer of the rows that a kernel reads, with zero columns at both ends: `next_row` turns the oldest
row into the current row, which is then overwritten from left to right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .config import PriorConfig

Pair = tuple[int, int]
FEW_ROWS = 4  # with fewer, reading the weights bounds a matrix product, so caches store weights row-major


class RasterConfig(PriorConfig):
    """Requirements of causal convolutions on the grid."""

    takes_heads = takes_positions = takes_conditions = True
    kernels: ClassVar[tuple[str, ...]] = ()  # the fields that are sides of convolutions, which must be odd

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.order != "raster":
            yield f"order: {self.kind} takes raster order only (got {self.order!r})"
        if len(self.grid.shape) != 2:
            yield f"grid: {self.kind} needs a grid of two axes (got {self.grid.shape})"
        for name in self.kernels:
            if getattr(self, name) % 2 == 0:
                yield f"{name}: must be odd (got {getattr(self, name)})"


class RowsConfig(RasterConfig):
    """Settings of convolutions, with an optional bias that tells rows apart."""

    row_embedding: bool = Field(
        True, description="add a learned bias for each row to every layer, for grids whose rows are channels or levels"
    )


class RowBias(nn.Module):
    """A learned vector for each row of the grid, `(H, channels)`, initially zero; zeros without `row_embedding`."""

    weight: Tensor

    def __init__(self, config: RowsConfig, channels: int) -> None:
        super().__init__()
        rows = torch.zeros(config.positions.shape[0], channels)
        if config.row_embedding:
            self.weight = nn.Parameter(rows)
        else:
            self.register_buffer("weight", rows, persistent=False)

    def forward(self, bias: Tensor) -> Tensor:
        """Add the row biases to per-image biases `(B, 1 or H, 1 or W, channels)`: `(B, H, 1 or W, channels)`."""
        return bias + self.weight[:, None]


class CausalConv2d(nn.Module):
    """A convolution whose kernel covers `rows` and `columns`, each (first, last) offsets from the output's position.

    Maps `(B, H, W, inputs)` to `(B, H, W, outputs)`, with zeros outside the grid. The last `masked` columns of the
    kernel's last row are multiplied by zero."""

    mask: Tensor | None

    def __init__(self, inputs: int, outputs: int, rows: Pair, columns: Pair, masked: int = 0, stride: int = 1) -> None:
        super().__init__()
        self.rows, self.columns, self.stride = rows, columns, stride
        mask = torch.ones(rows[1] - rows[0] + 1, columns[1] - columns[0] + 1)
        mask[-1, mask.shape[1] - masked :] = 0
        self.register_buffer("mask", mask if masked else None, persistent=False)
        bound = (inputs * max(1, mask.numel() - masked)) ** -0.5  # as in nn.Linear, counting visible inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *mask.shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))
        offsets = [(row, column) for row in range(rows[0], rows[1] + 1) for column in range(columns[0], columns[1] + 1)]
        self.taps = offsets[: len(offsets) - masked]  # the offsets (row, column) that the kernel covers

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.rows, self.columns
        padded = F.pad(x, (0, 0, -left, right, -top, bottom))  # a negative `bottom` crops the last rows
        weight = self.weight if self.mask is None else self.weight * self.mask
        return F.conv2d(padded.movedim(-1, 1), weight, self.bias, self.stride).movedim(1, -1)


class MaskedConv(CausalConv2d):
    """PixelCNN's masked k x k convolution: type A, or with `sees_itself` type B, which also sees its own position."""

    def __init__(self, inputs: int, outputs: int, size: int, *, sees_itself: bool) -> None:
        self_and_right = size // 2 + 1
        reach = (-(size // 2), size // 2)
        super().__init__(inputs, outputs, (reach[0], 0), reach, masked=self_and_right - sees_itself)


def pack(weight: Tensor, rows: int) -> Tensor:
    """Return the weights of an `nn.Linear` `(outputs, inputs)`, or a kernel `(outputs, inputs, rows, columns)`, as a
    matrix `(taps * inputs, outputs)` in the layout that is fastest for `rows` rows: row-major for few, else
    column-major."""
    matrix = weight.detach()
    if matrix.ndim == 4:
        matrix = matrix.flatten(2).transpose(1, 2).flatten(1)
    return matrix.t().contiguous() if rows < FEW_ROWS else matrix.contiguous().t()


class ClosingLayers:
    """The last two layers of a model, for one position at a time: `head(activate(hidden(activate(x))))`."""

    def __init__(self, hidden: nn.Linear, head: nn.Linear, rows: int, activate_: Callable[[Tensor], Tensor]) -> None:
        """activate_: the activation, in place."""
        self.activate_ = activate_
        self.hidden = pack(hidden.weight, rows)
        self.hidden_bias = hidden.bias.detach()
        self.head = pack(head.weight, rows)
        self.head_bias = head.bias.detach()

    def outputs(self, x: Tensor) -> Tensor:
        """Map `(B, dim)`, which is overwritten, to `(B, size)`."""
        hidden = torch.addmm(self.hidden_bias, self.activate_(x), self.hidden)
        return torch.addmm(self.head_bias, self.activate_(hidden), self.head)


class MapRows:
    """The last `count` rows of a map `(B, H, W, C)`, zero outside the grid; allocated once, written in place.

    The caller writes the current row through `row`, `(W, B, C)`, or its column j through `cells[j]`, `(B, C)`.
    `windows[j]`, `(B, taps * C)`, are the `taps` columns starting at j * stride - left. All are views. Columns that
    have not been written still hold an older row and must not be read."""

    def __init__(self, like: Tensor, count: int, width: int, reach: Pair, taps: int, stride: int = 1) -> None:
        """like: `(B, C)` zeros; reach: first and last column of the kernel, as offsets; stride: of its outputs."""
        (batch, channels), (left, right) = like.shape, (-reach[0], reach[1])
        self.size = left + 1 + right
        stored = like.new_zeros(count, batch, left + width + right, channels)
        self.rows = [row[:, left : left + width].transpose(0, 1) for row in stored]
        self.row_cells = [row.unbind(0) for row in self.rows]
        self.row_windows = [row.flatten(1).unfold(1, taps * channels, stride * channels).unbind(1) for row in stored]
        self.row_patches = [row.unfold(1, self.size, stride).permute(1, 0, 3, 2) for row in stored]  # (W, B, size, C)
        self.patch = like.new_empty(len(self.row_patches[0]), batch, count, self.size, channels)
        self.current = count - 1
        self.next_row()

    def next_row(self) -> None:
        self.current = (self.current + 1) % len(self.rows)
        self.row = self.rows[self.current]
        self.cells = self.row_cells[self.current]
        self.windows = self.row_windows[self.current]

    def patches(self) -> Tensor:
        """Return the inputs of a `count`-row kernel at each column, oldest row first: `(W * B, count * size * C)`."""
        oldest = self.current + 1
        torch.stack(self.row_patches[oldest:] + self.row_patches[:oldest], 2, out=self.patch)
        return self.patch.view(-1, self.patch[0, 0].numel())


def bias_by_row(bias: Tensor, own: Tensor, row_bias: Tensor | None = None) -> Iterator[Tensor]:
    """Iterate over the rows of a bias, each `(1 or W, B, C)`: the sum of per-image biases, `(B, C)` or
    `(B, 1 or H, 1 or W, C)`, a convolution's `own`, `(C,)`, and `row_bias`, `(H, C)`."""
    bias = bias[:, None, None] if bias.ndim == 2 else bias
    rows = (bias + own).detach().permute(1, 2, 0, 3)
    return cycle(rows if row_bias is None else rows + row_bias.detach()[:, None, None])


class RowCache:
    """Evaluates a `MaskedConv` one position at a time, in raster order, with as many multiplications as one `forward`.

    `start_row` computes the contribution of the rows above for a whole row with one matrix product. Each position then
    needs only one product with the columns to its left.

        cache.start_row()               # before each row, the first included
        cache.cells[column].copy_(x)    # the input `(B, inputs)`: type B before read, type A after it
        cache.read(column)              # the output `(B, outputs)`

    With a stride, `start_row` and `read` refer to the output's rows and columns, and the kernel may have only one row
    above the current one."""

    def __init__(self, conv: CausalConv2d, width: int, bias: Tensor, row_bias: Tensor | None = None) -> None:
        """bias, row_bias: added to the convolution's own; see `bias_by_row`."""
        batch, inputs, outputs = len(bias), conv.weight.shape[1], len(conv.weight)
        above = sum(row < 0 for row, _ in conv.taps)
        taps = len(conv.taps) - above
        self.biases = bias_by_row(bias, conv.bias, row_bias)
        self.weight_above = pack(conv.weight[:, :, :-1], width * batch)
        self.weight = pack(conv.weight[:, :, -1:, :taps], batch)
        self.map = MapRows(bias.new_zeros(batch, inputs), -conv.rows[0], width, conv.columns, taps, conv.stride)
        self.sums_above = bias.new_empty(len(self.map.patch), batch, outputs)
        self.above = self.sums_above.unbind(0)

    def start_row(self) -> None:
        torch.mm(self.map.patches(), self.weight_above, out=self.sums_above.flatten(0, 1))
        self.sums_above += next(self.biases)
        self.map.next_row()
        self.cells = self.map.cells

    def read(self, column: int, out: Tensor | None = None) -> Tensor:
        """Return the output `(B, outputs)` at a column of the current row, written to `out` if given."""
        return torch.addmm(self.above[column], self.map.windows[column], self.weight, out=out)


class WholeRows:
    """Evaluates a `CausalConv2d` with two kernel rows, one row at a time."""

    def __init__(self, conv: CausalConv2d, width: int, bias: Tensor) -> None:
        self.biases = bias_by_row(bias, conv.bias)
        like = bias.new_zeros(len(bias), conv.weight.shape[1])
        self.map = MapRows(like, 2, width, conv.columns, 1, conv.stride)
        self.weight = pack(conv.weight, width * len(bias))

    def next_row(self) -> Tensor:
        """Begin the next row and return it, `(W, B, inputs)`, for the caller to write."""
        self.map.next_row()
        return self.map.row

    def read(self) -> Tensor:
        bias = next(self.biases)
        return torch.mm(self.map.patches(), self.weight).view(-1, *bias.shape[1:]).add_(bias)


def see(field: Tensor, taps: Iterable[Pair]) -> Tensor:
    """Propagate receptive fields through a convolution: which tokens reach each cell, bool `(H, W, N)`."""
    height, width = field.shape[:2]
    seen = torch.zeros_like(field)
    for row, column in taps:
        top, left = max(0, -row), max(0, -column)
        bottom, right = height - max(0, row), width - max(0, column)
        if top < bottom and left < right:
            seen[top:bottom, left:right] |= field[top + row : bottom + row, left + column : right + column]
    return seen

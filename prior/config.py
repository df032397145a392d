"""`PriorConfig`: the settings shared by all priors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tokenizer.base import Grid, TokenGrid
from tokenizer.config import Fact, ModelConfig, Node
from tokenizer.model import Registered

from .columns import AnyColumn, names_problem
from .heads import head_problem
from .orders import Partition, blocks_problem, make_partition, order_problem


class PriorConfig(ModelConfig):
    """Settings shared by all priors."""

    grid: Fact[Grid] = Field(description="shape and vocabulary size of the tokens")
    num_classes: Fact[int] = Field(0, ge=0, le=1 << 20, description="number of classes; 0 is unconditional")
    tokenizer: Fact[str] = Field("", description="fingerprint of the tokenizer that produced the training tokens")
    conditions: Fact[dict[str, AnyColumn]] = Field({}, description="columns that images are conditioned on, by name")
    condition_width: int = Field(
        64, ge=8, le=4096, multiple_of=8, description="width of encoded columns, if the data have any"
    )
    order: str = Field(
        "raster",
        description="order in which tokens are drawn: raster, column, snake, spiral_in, spiral_out, z_curve, hilbert, "
        "subsample, halton, spread or random:SEED; several tokens at once, if the model supports blocks: diagonal, "
        "wave:S, rows, dyadic, regions:K, halton:K, spread:K, random:SEED:K (K blocks) or NAME/K (blocks of K)",
    )
    blocks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="block sizes into which the order is cut; a block is drawn at once; null: the order's own blocks",
    )
    head: Annotated[ModelConfig | None, Node("prior.heads:Head")] = Field(
        None,
        description="output head; null: one logit per id; depth: for grids with levels, draws a position's ids one "
        "after another from a single pass; logistic: for pixels",
    )

    # What the model supports:
    takes_blocks: ClassVar[bool] = False  # blocks of several tokens
    takes_heads: ClassVar[bool] = False  # `outputs`, which an output head maps to logits
    takes_conditions: ClassVar[bool] = False  # columns other than the class
    takes_positions: ClassVar[bool] = False  # positions with several ids, which an output head draws

    def check(self) -> Iterator[str]:
        """Check that the head and order fit the grid, that the blocks sum to its size, and the columns."""
        for found in names_problem(self.conditions):
            yield f"conditions: {found}"
        if self.conditions and not self.takes_conditions:
            yield f"conditions: {self.kind} is conditioned on classes only (got {', '.join(self.conditions)})"
        if problem := head_problem(self):
            yield f"head: {problem}"
        elif problem := order_problem(self.order, self.positions.shape):
            yield f"order: {problem}"
        elif self.blocks is not None and (problem := blocks_problem(self.blocks, len(self.positions))):
            yield problem
        elif max(self.partition().blocks) > 1 and not self.takes_blocks:
            family: Any = Registered.families["prior"]
            takers = ", ".join(name for name in family.available() if family.find(name).Config.takes_blocks)
            key = "order" if self.blocks is None else "blocks"
            yield f"{key}: this kind draws one token at a time; kinds that support larger blocks: {takers}"

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values, without the settings of conditions if there are none."""
        found = super().to_dict()
        if not self.conditions:
            del found["conditions"], found["condition_width"]
        return found

    @property
    def positions(self) -> TokenGrid:
        """The grid that the network sees: a cell per position if the head draws several ids, else one per token."""
        return self.grid if self.head is None or self.grid.ids_per_position == 1 else self.grid.positions

    def partition(self) -> Partition:
        """The ordered partition of `positions` that `order` and `blocks` specify."""
        partition = make_partition(self.order, self.positions.shape)
        return partition if self.blocks is None else Partition(partition.order, self.blocks)

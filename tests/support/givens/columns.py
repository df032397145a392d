"""Columns of every kind, and small priors that are conditioned on them."""

import math

import torch
from givens.headed import HEADED, make_model

from prior.columns import AngleColumn, ClassColumn, FlagsColumn, GridColumn, NumberColumn, VectorColumn
from tokenizer import TokenGrid

VIEW = ClassColumn(names=["frontal", "lateral", "oblique"])
TAGS = FlagsColumn(names=["red", "old", "wet", "loud"])
AGE = NumberColumn(mean=[40.0], std=[15.0], low=[0.0], high=[99.0])
SPEED = NumberColumn(mean=[0.0, 2.0], std=[3.0, 1.0], low=[-9.0, 0.0], high=[9.0, 4.0])
WIND = AngleColumn()
POSE = AngleColumn(size=3)
TEXT = VectorColumn(size=6, scale=0.5, encoder="ngrams:6")


def scaled(*sides):
    """A grid of scales."""
    return TokenGrid((sum(math.prod(each) for each in sides),), 3, tuple(sides))


GRIDS = {
    "same": lambda height, width: TokenGrid((height, width), 3),
    "multiple": lambda height, width: TokenGrid((2 * height, 3 * width), 3),
    "other": lambda height, width: TokenGrid((height + 2, max(1, width - 1)), 4),
    "sequence": lambda height, width: TokenGrid((7,), 3),
    "levels": lambda height, width: TokenGrid((2 * height, width), 3, levels=2),
    "scales": lambda height, width: scaled((1, 1), (2, 2), (max(2, height), max(2, width))),
}
"""Grids of a condition for a prior over positions `(height, width)`."""
VECTORS = {"view": VIEW, "tags": TAGS, "age": AGE, "speed": SPEED, "wind": WIND, "pose": POSE, "text": TEXT}
OUTLINE = GridColumn(grid=TokenGrid((2, 3), 4))
COLUMNS = {**VECTORS, "outline": OUTLINE}
ONE = {
    "class": VIEW,
    "flags": TAGS,
    "number": AGE,
    "numbers": SPEED,
    "angle": WIND,
    "angles": POSE,
    "vector": TEXT,
}
KINDS = [*ONE, *(f"grid {name}" for name in GRIDS), "all", "some null"]


def columns_of(kind, shape):
    """The columns of one of `KINDS`, by name, for a prior over positions of this shape."""
    if kind in ("all", "some null"):
        return VECTORS | {"outline": GridColumn(grid=GRIDS["multiple"](*shape))}
    if kind.startswith("grid"):
        return {"outline": GridColumn(grid=GRIDS[kind.removeprefix("grid ")](*shape))}
    return {"given": ONE[kind]}


def make_conditioned(name, kind, order="raster", tiny=False, **config):
    """A small prior of `givens.headed.MODELS` in float64, conditioned on columns of this kind as well as on classes.
    tiny: on a grid whose values can be enumerated."""
    head = HEADED[name][1] if name in HEADED else None
    shape = {None: (3, 4)}.get(head, (2, 3))
    vocab_size = {}
    if tiny:
        shape = {None: (2, 2) if name == "next_scale" else (2, 3), "depth": (1, 2), "logistic": (1, 1)}[head]
        vocab_size = {"vocab_size": {None: 2, "depth": 2, "logistic": 16}[head]}
    sizes = {"positions" if head else "shape": shape, **vocab_size}
    conditions = columns_of(kind, shape)
    return make_model(name, order, conditions=conditions, condition_width=8, **sizes, **config).double()


def draw_values(column, count):
    """Random raw values of a column."""
    if column.kind == "number":
        return torch.tensor(column.mean) + torch.tensor(column.std) * torch.randn(count, *column.shape)
    if column.kind == "angle":
        return 360 * torch.rand(count, *column.shape)
    if column.kind == "vector":
        return column.scale * torch.randn(count, *column.shape)
    return column.draw(count)


def draw_given(model, count, kind, labels=None):
    """Random rows of all columns, and of the class as `labels` say. If some are null, each column is null in half of
    the images (of one image, every other column is null), and so are some cells of grids."""
    found = {name: draw_values(column, count) for name, column in model.config.conditions.items()}
    if kind == "some null":
        for number, name in enumerate(found):
            column, null = model.columns[name], (torch.randperm(count) + number) % 2 == 0
            found[name][null] = column.null(int(null.sum()))
            if column.is_map:
                found[name][torch.rand(found[name].shape) < 0.3] = -1
    return model.read_given(labels, found, count)


def equal(one, other):
    """Whether two tensors have the same type and values, or are null in the same places."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))

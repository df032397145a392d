"""Start a prior from the weights of another prior of the same kind and size, which may have other classes and other
columns of conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prior import Prior
from prior.condition_encoder import ClassEmbedding, FloatEmbedding, GridEncoder
from prior.conditions import ClassColumn, Column, describe_names


@torch.no_grad()
def transfer_weights(prior: Prior, names: Sequence[str], other: Prior, other_names: Sequence[str]) -> tuple[str, ...]:
    """Copy all weights of `other` that fit into `prior`. Return a line about each group of weights that do not.

    names, other_names: the classes. Their weights are matched by name. New classes start as the null class. New columns
    start without effect, so that log p given the other conditions stays the same.
    """
    state, found = other.state_dict(), prior.state_dict()
    tables, rows = find_class_tables(other), match_rows(names, other_names)
    for name, weight in found.items():
        if not name.startswith("condition_encoder."):
            weight.copy_((state[name][rows] if name in tables else state[name]) if name in state else torch.tensor(0.0))
    for name in tables - set(found):  # MADE without classes has a single bias, which is then that of the null class
        found[name.removesuffix("own") + "shared"] += state[name][-1]
    new, old = prior.conditions, other.conditions
    fitting = {name for name, column in new.items() if name in old and fits(column, old[name])}
    for name, module in column_modules(prior).items():
        if name in fitting:
            weights, column, former = column_modules(other)[name].state_dict(), new[name], old[name]
            if isinstance(column, ClassColumn) and isinstance(former, ClassColumn):
                weights["weight"] = weights["weight"][match_rows(column.names, former.names)]
            module.load_state_dict(weights)
        elif old:  # their sum is projected by trained weights; without old columns, the projection is zero
            remove_effect(module)
    lines = {
        "new classes, which start as the null class": [name for name in names if name not in other_names],
        "classes left out": [name for name in other_names if name not in names],
        "new columns, which start without effect": [name for name in new if name not in old],
        "changed columns, which start anew, so that log p changes": [
            name for name in new if name in old and name not in fitting
        ],
        "columns left out, so that log p changes": [name for name in old if name not in new],
        "columns of another mean and scale, so that their values mean others": [
            name for name in new if name in fitting and scale_of(new[name]) != scale_of(old[name])
        ],
    }
    return tuple(f"init: {text}: {describe_names(found)}" for text, found in lines.items() if found)


def find_class_tables(prior: Prior) -> set[str]:
    """Return the names of the weights that have a row for each class and a last one for the null class: those that are
    longer in a prior with one class more."""
    with torch.device("meta"):
        larger = type(prior)(prior.config.model_copy(update={"num_classes": prior.num_classes + 1}))
    sizes = {name: weight.shape for name, weight in larger.named_parameters()}
    return {name for name, weight in prior.named_parameters() if sizes[name] != weight.shape}


def match_rows(names: Sequence[str], others: Sequence[str]) -> Tensor:
    """Return for each name, and the null class, its row in a table of `others`: the last one for a new name."""
    places = {name: row for row, name in enumerate(others)}
    return torch.tensor([*(places.get(name, len(others)) for name in names), len(others)])


def fits(column: Column, other: Column) -> bool:
    """Return whether weights of the column `other` suit `column`. Classes are matched by name."""
    if type(column) is not type(other) or isinstance(column, ClassColumn):
        return type(column) is type(other)
    meaning = {"flags": ["names"], "vector": ["encoder"], "grid": ["grid", "tokenizer"]}.get(column.kind, [])
    return column.shape == other.shape and all(getattr(column, key) == getattr(other, key) for key in meaning)


def scale_of(column: Column) -> Any:
    """Return the constants by which a column's numbers are standardised."""
    return [getattr(column, name, None) for name in ("mean", "std", "scale")]


def column_modules(prior: Prior) -> Mapping[str, nn.Module]:
    """Return the module that encodes each column, by the column's name."""
    encoder = prior.condition_encoder
    parts = {} if encoder is None else {**encoder.vectors, **encoder.grids}
    return {name.removeprefix("column_"): module for name, module in parts.items()}


def remove_effect(module: nn.Module) -> None:
    """Set the last weights of a column's module to zero."""
    last = {ClassEmbedding: "", FloatEmbedding: "second", GridEncoder: "norm"}[type(module)]
    for weight in module.get_submodule(last).parameters():
        nn.init.zeros_(weight)

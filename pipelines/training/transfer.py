"""Start a prior from the weights of another prior of the same kind and size, which may have other classes and other
columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from prior import Prior
from prior.columns import LABEL, ClassColumn, Column, describe_names


@torch.no_grad()
def transfer_weights(
    prior: Prior, columns: Mapping[str, Column], other: Prior, other_columns: Mapping[str, Column]
) -> tuple[str, ...]:
    """Copy all weights of `other` that fit into `prior`. Return a line about each group of weights that do not.

    columns, other_columns: what each may be given, with the names of the classes, by which their weights are matched.
    New classes start as the null class. New columns start without effect, so that log p given the other columns stays
    the same.
    """
    new, old = dict(columns), dict(other_columns)
    label, other_label = (cast(ClassColumn, some.pop(LABEL, ClassColumn.numbered(0))) for some in (new, old))
    state, found = other.state_dict(), prior.state_dict()
    tables, rows = find_class_tables(other), label.match_rows(other_label)
    for name, weight in found.items():
        if not name.startswith("condition_encoder."):
            weight.copy_((state[name][rows] if name in tables else state[name]) if name in state else torch.tensor(0.0))
    for name in tables - set(found):  # MADE without classes has a single bias, which is then that of the null class
        found[name.removesuffix("own") + "shared"] += state[name][-1]
    networks, others = (
        dict[str, nn.Module]() if each.condition_encoder is None else each.condition_encoder.networks()
        for each in (prior, other)
    )
    fitting = {name for name, column in new.items() if name in old and column.suits(old[name])}
    for name, network in networks.items():
        if name in fitting:
            network.load_state_dict(new[name].adapt_weights(others[name].state_dict(), old[name]))
        elif old:  # their sum is projected by trained weights; without old columns, the projection is zero
            network.remove_effect()  # type: ignore[operator]
    lines = {
        "new classes, which start as the null class": [name for name in label.names if name not in other_label.names],
        "classes left out": [name for name in other_label.names if name not in label.names],
        "new columns, which start without effect": [name for name in new if name not in old],
        "changed columns, which start anew, so that log p changes": [
            name for name in new if name in old and name not in fitting
        ],
        "columns left out, so that log p changes": [name for name in old if name not in new],
        "columns of another mean and scale, so that their values mean others": [
            name for name in new if name in fitting and new[name].scales != old[name].scales
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

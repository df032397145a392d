"""What layers put out: which are asked for, and how outputs of each shape are arranged."""

from __future__ import annotations

import pytest
import torch
from prior.features import Features, check_layers, outputs_of
from small import draw_tokens, make_prior
from torch import nn


def test_every_layer_may_be_asked_for_and_no_other():
    check_layers("gpt", [0, 1, 2], 3)
    for wrong in (-1, 3, True, 1.0):
        with pytest.raises(ValueError, match=r"^layer must be a whole number from 0 to 2 of this gpt \(got "):
            check_layers("gpt", [0, wrong], 3)
    with pytest.raises(ValueError, match="^layer: a marginal prior has no layers, hence no features$"):
        check_layers("marginal", [0], 0)


@pytest.mark.parametrize(
    ("shape", "arranged"),
    [((2, 5), (2, 1, 5)), ((2, 3, 5), (2, 3, 5)), ((2, 3, 4, 5), (2, 12, 5)), ((2, 2, 3, 4, 5), (2, 24, 5))],
)
def test_positions_are_in_raster_order(shape, arranged):
    output = torch.rand(shape)
    found = Features().arrange(output)
    assert found.shape == arranged and torch.equal(found.flatten(), output.flatten())


def test_a_module_that_is_called_twice_counts_twice():
    double, triple = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    double.weight.data.fill_(2.0)
    triple.weight.data.fill_(3.0)
    seen = []

    def arrange(output):
        seen.append(output.item())
        return output

    def run():
        triple(double(double(torch.ones(1, 1))))

    found = outputs_of([double, double, triple], [2, 0], arrange, run)
    assert [output.item() for output in found] == [12.0, 2.0] and seen == [2.0, 12.0]
    run()
    assert len(seen) == 2, "a hook is left"


def test_the_first_layer_and_the_middle_one():
    model = make_prior("gpt", depth=3)
    tokens = draw_tokens(model, 2)
    first, middle, last = (model.features(tokens, layer=layer) for layer in range(3))
    assert torch.equal(model.features(tokens), middle)
    assert not torch.equal(first, middle) and not torch.equal(middle, last)

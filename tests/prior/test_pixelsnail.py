"""What PixelSNAIL promises beyond its family: attention that reaches everything, and what a step costs."""

import pytest
import torch
from costs import all_steps
from small import logits_of, make_prior

from prior.condition_encoder import Encoded


@pytest.mark.parametrize("sizes", [{"heads": 1, "key": 4, "value": 4}, {"heads": 3, "key": 2, "value": 5}])
def test_attention_by_definition(sizes):
    """Position by position and head by head: a softmax over the slots of earlier tokens, and "nothing"."""
    model = make_prior("pixelsnail", **sizes).double()
    attention, background = model.layers[0].attention, model.background
    embedded, x = torch.randn(1, 12, 5).double(), torch.randn(1, 12, 8).double()
    found = attention(embedded, x, background)
    heads, key, value = sizes["heads"], sizes["key"], sizes["value"]
    slots = [attention.nothing]
    for t in range(11):
        slots.append(attention.slot(torch.cat([embedded[0, t], x[0, t]])) + attention.slot_at(background[t]))
    for t in range(12):
        query = (attention.query(x[0, t]) + attention.query_at(background[t])).view(heads, key)
        for head in range(heads):
            pairs = torch.stack(slots[: t + 1]).view(t + 1, heads, key + value)[:, head]
            weights = (pairs[:, :key] @ query[head] / key**0.5).softmax(0)
            expected = weights @ pairs[:, key:]
            assert (found[0, t, head * value : (head + 1) * value] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", [3, 5])
def test_residual_layer_by_definition(kernel):
    """Tap by tap: rows above in full, the own row up to and with the own position, a sigmoid gate with the class."""
    residual, reach = make_prior("pixelsnail", kernel=kernel).double().layers[0].residuals[0], kernel // 2

    def convolved(conv, x):
        y = torch.zeros(3, 4, len(conv.bias)).double() + conv.bias
        for row in range(-reach, 1):
            for column in range(-reach, (reach if row else 0) + 1):
                for i in range(3):
                    for j in range(4):
                        if i + row >= 0 and 0 <= j + column < 4:
                            y[i, j] += conv.weight[:, :, row + reach, column + reach] @ x[i + row, j + column]
        return y

    x, elu = torch.randn(3, 4, 8).double(), torch.nn.functional.elu
    inner = elu(convolved(residual.first, elu(x)))
    content, gate = (convolved(residual.second, inner) + residual.label.weight[1]).chunk(2, -1)
    found = residual(x[None], Encoded(torch.tensor([1])))[0]
    assert (found - (x + content * gate.sigmoid())).abs().max() < 1e-12


SIZES = [{}, {"residual": 1, "kernel": 5}, {"residual": 3, "heads": 1, "key": 8, "depth": 1}]


@pytest.mark.sparse
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("shape", [(5, 3), (2, 7), (6, 1), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_with_any_number_of_rows_and_sizes(rows, shape, sizes):
    """Weights are laid out by the number of rows; labels and the null class matter."""
    model = make_prior("pixelsnail", shape=shape, **sizes).double()
    tokens, labels = torch.randint(5, (rows, *shape)), torch.arange(rows) % 4
    for given in (labels, None):
        steps = all_steps(model, tokens, given)  # with gradients on: a step is no part of training
        assert not steps.requires_grad and (steps - logits_of(model, tokens, given)[:, model.order]).abs().max() < 1e-9

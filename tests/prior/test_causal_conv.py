"""What the causal convolutions promise beyond their family: how far they see, and what a step costs."""

import pytest
import torch
from small import ORDERS, draw_tokens, logits_of, make_prior, moved_by


@pytest.mark.sparse
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("sizes", "reach"),
    [
        ({"depth": 1}, 2),
        ({"depth": 3, "max_dilation": 2}, 1 + 1 + 2 + 1),
        ({"depth": 2, "max_dilation": 1, "kernel": 3}, 1 + 2 + 2),
        ({"depth": 2, "max_dilation": 2, "kernel": 4}, 1 + 3 + 6),
    ],
)
def test_it_sees_as_far_as_its_dilations_reach(sizes, reach, order):
    model = make_prior("causal_conv", order=order, **sizes).double()
    ranks = torch.argsort(model.order)
    expected = torch.tensor([[0 < i - j <= reach for j in ranks.tolist()] for i in ranks.tolist()])
    assert model.reach == reach and torch.equal(model.receptive_field, expected)
    assert torch.equal(moved_by(model, draw_tokens(model, 1)), expected)


def test_forward_is_wavenet_by_definition():
    """Rank by rank and tap by tap, from the equations of the paper."""
    model = make_prior("causal_conv", order="snake", depth=3, max_dilation=2, kernel=3).double()
    tokens, label, walk = torch.randint(5, (1, 3, 4)), 2, model.order.tolist()
    x = []
    for rank, at in enumerate(walk):
        token = model.token_embedding.weight[tokens.flatten()[walk[rank - 1]]] if rank else model.start_embedding[0]
        x.append(token + model.axis_embeddings[0][at // 4] + model.axis_embeddings[1][at % 4])
    skips = [model.skip_bias] * 12
    for block, dilation, term in zip(
        model.layers, (1, 2, 1), model.class_embedding.weight[label].chunk(3), strict=True
    ):
        width = 16 if block is not model.layers[-1] else 0
        gates = []
        for rank in range(12):
            total = block.gated.bias + term
            for tap in range(3):  # the last tap is the current rank's
                back = rank - (2 - tap) * dilation
                total = total + (block.gated.weight[:, :, tap] @ x[back] if back >= 0 else 0)
            gates.append(torch.tanh(total[:16]) * torch.sigmoid(total[16:]))
        skips = [skip + block.out.weight[width:, :, 0] @ gate for skip, gate in zip(skips, gates, strict=True)]
        x = [h + block.out.weight[:width, :, 0] @ gate for h, gate in zip(x, gates, strict=True)] if width else x
    expected = torch.stack([model.head(torch.relu(model.hidden(torch.relu(skip)))) for skip in skips])
    assert (logits_of(model, tokens, torch.tensor([label]))[0, walk] - expected).abs().max() < 1e-12

"""PixelCNN++: its streams against an independent reference, its receptive field, its steps at all resolutions."""

import pytest
import torch
import torch.nn.functional as F
from costs import all_steps
from givens.headed import make_headed
from small import draw_tokens, encode, logits_of, make_prior, moved_by
from torch import nn

from prior.condition_encoder import Encoded

KIND = "pixelcnn_pp"
every_stages = pytest.mark.parametrize("stages", [1, 2, 3])
SHAPES = [(5, 3), (3, 4), (7, 9), (1, 5), (6, 1)]


# The reference: maps (B, C, H, W), shifts as the paper draws them, lists of maps that are popped on the way up


def down(x):
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def right(x):
    return F.pad(x, (1, 0))[..., :-1]


def both_signs(x):
    return torch.cat([F.elu(x), F.elu(-x)], 1)


def convolved(conv, x, sides, stride=1):
    """A kernel of two rows, padded on top and on the sides (left, right), no more."""
    return F.conv2d(F.pad(x, (*sides, 1, 0)), conv.weight, conv.bias, stride=stride)


def gated(block, x, label, sides, *others):
    inner = convolved(block.first, both_signs(x), sides)
    for linear, other in zip(block.beside, others, strict=True):
        inner = inner + torch.einsum("oc,bchw->bohw", linear.weight, both_signs(other))
    bias = block.label(Encoded(label))[:, :, None, None]
    a, b = (convolved(block.second, both_signs(inner), sides) + bias).chunk(2, 1)
    return x + a * torch.sigmoid(b)


def grown(grow, x, size):
    """Each position adds its kernel to where it belongs: rows 2r and 2r + 1, columns from 2c - right on."""
    (height, width), kernel = size, grow.conv.weight
    out = x.new_zeros(len(x), kernel.shape[1], 2 * x.shape[2], 2 * x.shape[3] + 2) + grow.conv.bias[:, None, None]
    for row in range(2):
        for column in range(kernel.shape[3]):
            part = torch.einsum("io,bihw->bohw", kernel[:, :, row, column], x)
            out[:, :, row::2, column : column + 2 * x.shape[3] : 2] += part
    first = kernel.shape[3] - 2  # of three columns, the left one lies outside
    return out[:, :, :height, first : first + width]


def reference(model, tokens, labels):
    """Logits `(B, N, size)` of a model over codes."""
    x = model.embedding.weight[tokens].movedim(-1, 1)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    above_row, left_row = (rows.weight.t()[:, :, None] for rows in (model.above_row, model.left_row))
    above = convolved(model.first_above, down(x), (1, 1)) + above_row
    over = F.conv2d(F.pad(down(x), (1, 1, 0, 0)), model.first_over.weight, model.first_over.bias)
    us, uls = [above], [over + convolved(model.first_left, right(x), (0, 0)) + left_row]
    stages, stage = [], model.stage
    while True:
        stages.append(stage)
        for block in stage.down:
            us.append(gated(block.vertical, us[-1], labels, (1, 1)))
            uls.append(gated(block.horizontal, uls[-1], labels, (1, 0), us[-1]))
        if stage.coarser is None:
            break
        us.append(convolved(stage.coarser.shrink_above, us[-1], (1, 1), 2))
        uls.append(convolved(stage.coarser.shrink_left, uls[-1], (1, 0), 2))
        stage = stage.coarser.stage
    u, ul = us.pop(), uls.pop()
    while True:
        for block in stages.pop().up:
            u = gated(block.vertical, u, labels, (1, 1), us.pop())
            ul = gated(block.horizontal, ul, labels, (1, 0), u, uls.pop())
        if not stages:
            break
        u, ul = (
            grown(grow, x, us[-1].shape[2:])
            for grow, x in zip((stages[-1].coarser.grow_above, stages[-1].coarser.grow_left), (u, ul), strict=True)
        )
    assert not us and not uls
    return model.head(F.elu(ul).movedim(1, -1)).flatten(1, 2)


@pytest.mark.sparse
@every_stages
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_streams_are_those_of_the_paper(stages, shape, depth):
    model = make_prior(KIND, shape, stages=stages, depth=depth).double()
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    expected = reference(model, tokens, labels)
    assert torch.allclose(logits_of(model, tokens, labels), expected, rtol=1e-9, atol=1e-9) and expected.std() > 0.1


def test_intensities_are_put_in_and_the_border_is_told_from_any():
    model = make_headed(KIND, "logistic", {"channels": 3}).double()
    ids = torch.tensor([[0, 15, 5], [7, 8, 10]])
    expected = torch.tensor([[-1, 1, -1 / 3, 1], [-1 / 15, 1 / 15, 1 / 3, 1]]).double()
    assert torch.allclose(model.embed(ids), expected, atol=1e-7) and model.embed(ids).dtype == torch.float64
    assert model.embedding is None and model.first_above.weight.shape[1] == 4
    one_id = make_prior(KIND, vocab_size=1).double()
    nn.init.zeros_(one_id.embedding.weight)
    first = one_id.first_above(one_id.embed(torch.zeros(1, 3, 4, 1, dtype=torch.long)))[0]
    assert torch.equal(first[0], one_id.first_above.bias.expand(4, -1)) and not torch.equal(first[2], first[0])


@pytest.mark.sparse
@every_stages
@pytest.mark.parametrize("shape", SHAPES)
def test_receptive_field_is_what_moves(stages, shape):
    model = make_prior(KIND, shape, stages=stages).double()
    assert torch.equal(moved_by(model, draw_tokens(model, 12), least=1e-13), model.receptive_field)


@pytest.mark.sparse
@every_stages
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", [*SHAPES, (13, 6), (1, 1)])
def test_steps_are_the_forward_pass(stages, rows, shape):
    """On more rows than any cache holds; two states do not share their caches."""
    model = make_prior(KIND, shape, stages=stages, depth=2).double()
    tokens, labels = draw_tokens(model, rows), torch.arange(rows) % 4
    with torch.inference_mode():
        whole, other = logits_of(model, tokens, labels), model.start(encode(model, rows, labels))
        bound = 1e-12 * whole.abs().max()
        assert (all_steps(model, tokens, labels) - whole).abs().max() < bound
        assert (all_steps(model, tokens) - model(tokens)).abs().max() < 1e-12 * model(tokens).abs().max()
        assert (model.next_logits(other, None) - whole[:, :1]).abs().max() < bound


# The parts

"""PixelCNN, its blind spot, and the gated one that has none; their causal convolutions and row caches."""

import pytest
import torch
import torch.nn.functional as F
from costs import all_steps
from small import encode, logits_of, make_prior
from torch import nn

from prior.layers import MaskedConv

BOTH = ("pixelcnn", "gated_pixelcnn")
both = pytest.mark.parametrize("name", BOTH)


def positive(model):
    """All weights small and above zero: no unit is dead or saturated and nothing cancels, so gradients are paths."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.02, 0.05)
    return model.double()


def seen_by_gradients(model):
    """bool `(N, N)`: which token's embedding has a gradient of which position's logits."""
    height, width = model.grid.shape
    kept = []
    hook = model.embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = model(torch.zeros(1, height, width, dtype=torch.long))[0].sum(-1)
    hook.remove()
    rows = [torch.autograd.grad(logit, kept[0], retain_graph=True)[0] for logit in logits]
    return torch.stack([row[0].sum(-1).flatten() != 0 for row in rows])


def offsets(height, width):
    """How many rows token j lies above position i, and how many columns to its right: two `(N, N)`."""
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    return rows[:, None] - rows, columns - columns[:, None]


@both
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7, 8), (3, 11), (6, 1)])
def test_receptive_field_is_what_gradients_reach(name, depth, shape):
    """With 3x3 kernels, n convolutions see n rows up and n columns aside, and PixelCNN nothing that lies further to the
    right than up: its blind spot, exactly."""
    model = positive(make_prior(name, shape=shape, depth=depth))
    above, right = offsets(*shape)
    box = (above >= 0) & (above <= depth + 1) & (right.abs() <= depth + 1) & ((above > 0) | (right < 0))
    expected = box & (right <= above) if name == "pixelcnn" else box
    assert torch.equal(seen_by_gradients(model), expected)
    assert torch.equal(model.receptive_field, expected)


@pytest.mark.parametrize("sees_itself", [False, True])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_masked_conv_is_the_published_one(size, sees_itself):
    """A k x k kernel multiplied with a mask that is zero from the middle of its middle row on."""
    conv, half = MaskedConv(2, 3, size, sees_itself=sees_itself).double(), size // 2
    nn.init.normal_(conv.bias)
    whole, mask = torch.randn(3, 2, size, size).double(), torch.zeros(size, size)
    whole[:, :, : half + 1] = conv.weight.detach()
    mask.view(-1)[: size * half + half + sees_itself] = 1
    x = torch.randn(2, 5, 6, 2).double()
    expected = F.conv2d(x.movedim(-1, 1), whole * mask, conv.bias, padding=half).movedim(1, -1)
    assert torch.allclose(conv(x), expected, atol=1e-12)
    assert len(conv.taps) == int(mask.sum())


@both
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 3), (7, 5), (5, 7)])
def test_steps_are_the_forward_pass_for_all_kernels(name, rows, first_kernel, kernel):
    """On more rows than any cache holds; two passes at once do not meet."""
    model = make_prior(name, shape=(11, 6), first_kernel=first_kernel, kernel=kernel).double()
    tokens, labels = torch.randint(5, (rows, 11, 6)), torch.arange(rows) % 4
    other = model.start(encode(model, rows, labels))
    assert (all_steps(model, tokens, labels) - logits_of(model, tokens, labels)).abs().max() < 1e-9
    assert (all_steps(model, tokens, None) - model(tokens)).abs().max() < 1e-9
    assert (model.next_logits(other, None) - logits_of(model, tokens, labels)[:, :1]).abs().max() < 1e-9


# Configurations

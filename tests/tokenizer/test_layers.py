"""Our channels-last group normalisation, which GPUs use, against torch's on a CPU."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from small import make_tokenizer
from torch import Tensor, nn

from tokenizer.layers import GroupNorm, channels_last_norm

SHAPES = [(3, 32, 6, 5), (1, 8, 1, 1), (2, 24, 7, 4)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Channels-last maps with a mean other than zero, a weight and a bias."""
    torch.manual_seed(0)
    x = (2 * torch.randn(shape) + 3).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1])
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(shape, dtype):
    """To 1e-5 of the largest in float32. bfloat16 maps are computed in float32 and rounded once."""
    x, weight, bias = inputs(shape, dtype)
    found, expected = channels_last_norm(x, 4, weight, bias, 1e-6), F.group_norm(x.float(), 4, weight, bias, 1e-6)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channels_last_norm(x.contiguous(), 4, weight, bias, 1e-6), found)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    up = torch.randn(shape)
    gradients = [torch.autograd.grad(made, (x, weight, bias), up.to(made.dtype)) for made in (found, expected)]
    for name, ours, theirs in zip(("x", "weight", "bias"), *gradients, strict=True):
        rounded = tolerance if shape[2] > 1 else 4 * tolerance  # of one pixel: differences of nearly equal numbers
        assert (ours - theirs).abs().max() <= rounded * theirs.abs().max().clamp(min=1), name
    assert gradients[0][0].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_finite_differences():
    x, weight, bias = (part.detach().double().requires_grad_() for part in inputs((2, 8, 3, 2)))
    with patch.object(Tensor, "float", lambda tensor: tensor):  # stay in float64
        assert torch.autograd.gradcheck(lambda *parts: channels_last_norm(parts[0], 4, *parts[1:]), (x, weight, bias))


def test_only_the_input_is_saved_for_the_backward_pass():
    """Beside the weight and two numbers per image and group; the input is not copied."""
    x, weight, bias = inputs((2, 32, 8, 8), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        channels_last_norm(x, 4, weight, bias)
    assert sorted(t.numel() for t in kept) == [8, 8, 32, x.numel()]
    assert {t.untyped_storage().data_ptr() for t in kept if t.numel() >= 32} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("name", ["vqvae", "vqgan"])
def test_tokenizers_stay_channels_last_with_it(name, monkeypatch):
    torch.manual_seed(0)
    model = make_tokenizer(name, (16, 16)).eval()
    images, formats = torch.rand(2, 3, 16, 16) * 2 - 1, []
    with torch.no_grad():
        before = model(images).images

        def as_on_a_gpu(self, x):
            made = channels_last_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            formats.extend(part.is_contiguous(memory_format=torch.channels_last) for part in (x, made))
            return made

        monkeypatch.setattr(GroupNorm, "forward", as_on_a_gpu)
        after = model(images).images
    assert formats and all(formats) and 0 < (after - before).abs().max() < 1e-4
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == len(formats) // 2 and {type(module) for module in norms} == {GroupNorm}

"""Every model on the card against the same one on the CPU, in float32 and without TF32.

Tolerances are relative to the largest number of a tensor: sums of a few hundred products in another order differ by
1e-6, a few layers of them by 1e-5; ten times that is allowed forward, and a hundred times backward.
"""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from small import (
    PRIORS,
    QUANTIZERS,
    TOKENIZERS,
    draw_tokens,
    latents,
    make_prior,
    make_quantizer,
    make_tokenizer,
)
from torch import Tensor, nn

from tokenizer.base import full_float32
from tokenizer.files import ConfigError
from tokenizer.losses import total_loss

pytestmark = pytest.mark.gpu
FORWARD, BACKWARD = 1e-4, 1e-3
TURNED = 0.005  # share of ids that may turn, as two codes are as near to a vector


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def worst_gradient(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of any parameter's gradient."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max((off(a.grad, b.grad) for a, b in pairs if b.grad is not None), default=0.0)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_the_same_forward_and_backward(name, device):
    here = make_prior(name)
    there = copy.deepcopy(here).to(device)
    tokens, labels = draw_tokens(here, 6), torch.arange(6) % 4
    with full_float32():
        expected, found = here(tokens, labels), there(tokens.to(device), labels.to(device))
        here.loss_from_outputs(expected, tokens).backward() if name != "masked" else expected.square().mean().backward()
        there.loss_from_outputs(
            found, tokens.to(device)
        ).backward() if name != "masked" else found.square().mean().backward()
    assert found.device.type == device.type and off(found, expected) < FORWARD
    assert worst_gradient(there, here) < BACKWARD


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_the_same_forward_and_backward(name, device):
    here = make_tokenizer(name)
    images = torch.rand(4, *here.image_shape) * 2 - 1
    with suppress(ConfigError):  # one that needs another's weights stays as it is made
        here.initialize(images)
    there = copy.deepcopy(here).to(device)
    with full_float32():
        tokens, again = here.encode(images), there.encode(images.to(device)).cpu()
        decoded, shown = here.decode(tokens), there.decode(tokens.to(device))
    assert float((tokens != again).double().mean()) <= TURNED
    assert off(shown, decoded) < FORWARD
    if not torch.equal(tokens, again) or not any(p.requires_grad for p in here.parameters()):
        return
    for model, batch in ((here, images), (there, images.to(device))):
        model.train()
        torch.manual_seed(0)
        with full_float32():
            loss, _ = total_loss(model(batch), batch, {"l1": 1.0, "l2": 1.0, **model.loss_weights})
        loss.backward()
    assert worst_gradient(there, here) < 10 * BACKWARD


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_is_the_same(name, device):
    here = make_quantizer(name).eval()
    there = copy.deepcopy(here).to(device)
    z = latents(here, 8, 6, 5)
    expected, found = here.quantize(z), there.quantize(z.to(device))
    same = found.tokens.cpu() == expected.tokens
    assert float((~same).double().mean()) <= TURNED
    assert off(there.lookup(expected.tokens.to(device)), here.lookup(expected.tokens)) < FORWARD

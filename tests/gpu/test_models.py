"""Every model on the GPU equals the same model on the CPU, in float32 without TF32.

Tolerances are relative to the largest value of a tensor. Reordered sums of a few hundred products differ by 1e-6, and
a few layers by 1e-5; the tests allow ten times that forward, and a hundred times backward.
"""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from small import (
    PRIORS,
    QUANTIZERS,
    TOKENIZERS,
    VARIANTS,
    draw_tokens,
    latents,
    logits_of,
    make_prior,
    make_quantizer,
    make_tokenizer,
)
from torch import Tensor, nn

from prior import masks
from prior.compiling import can_compile
from tokenizer.files import ConfigError
from tokenizer.losses import total_loss
from tokenizer.precision import full_float32

pytestmark = pytest.mark.gpu
FORWARD, BACKWARD = 1e-4, 1e-3
MAX_CHANGED = 0.005  # share of ids that may change where two codes are almost equally close
SMALLEST = 1e-4  # of the largest gradient; below it is rounding, such as the zero gradient of key biases


def difference(found: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """The largest difference, relative to the largest value, or to `least`."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=least))


def gradient_difference(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference of any parameter's gradient."""
    pairs = [(a.grad, b.grad) for a, b in zip(found.parameters(), expected.parameters(), strict=True)]
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    largest = max((float(b.abs().max()) for _, b in pairs if b is not None), default=0.0)
    return max((difference(a, b, max(SMALLEST * largest, 1e-12)) for a, b in pairs if b is not None), default=0.0)


@pytest.mark.parametrize(
    ("name", "training"), [*((name, False) for name in PRIORS), *((name, True) for name in VARIANTS)]
)
def test_a_prior_agrees_with_the_cpu_forward_and_backward(name, training, device, elsewhere, compiler, monkeypatch):
    """Windows in training are computed by FlexAttention on a GPU, by tiles on the CPU."""
    flexed, flex = [], masks.AttentionWindow.flex
    monkeypatch.setattr(masks.AttentionWindow, "flex", lambda *given: flexed.append(1) or flex(*given))
    expected, tokens, labels = make_prior(name), draw_tokens(make_prior(name), 6), torch.arange(6) % 4
    found = copy.deepcopy(expected.train(training)).to(device)

    def compute(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(model, tokens, labels)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return logits

    with full_float32():
        here = compute(expected, tokens, labels)
        with elsewhere():
            there = compute(found, tokens.to(device), labels.to(device))
    assert there.device.type == device.type and difference(there, here) < FORWARD
    assert gradient_difference(found, expected) < BACKWARD
    assert bool(flexed) == (training and can_compile(device))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_agrees_with_the_cpu_forward_and_backward(name, device, elsewhere):
    """In eval mode, as training noise differs between devices."""
    expected = make_tokenizer(name)
    images = torch.rand(4, *expected.image_shape) * 2 - 1
    with suppress(ConfigError):  # some are initialized from another model only
        expected.initialize(images)
    found = copy.deepcopy(expected.eval()).to(device)

    def compute(model: nn.Module, images: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Its tokens, and the images decoded from `tokens` (default: its own)."""
        output = model(images)
        loss, _ = total_loss(output, images, {"l1": 1.0, "l2": 1.0, **model.loss_weights})
        if loss.requires_grad:
            loss.backward()
        with torch.no_grad():
            return output.tokens, model.decode(output.tokens if tokens is None else tokens.to(device))

    with full_float32():
        tokens, decoded = compute(expected, images)
        with elsewhere():
            again, there = compute(found, images.to(device), tokens)
    assert there.device.type == device.type and difference(there, decoded) < FORWARD
    changed = float((again.cpu() != tokens).double().mean())
    assert changed <= MAX_CHANGED and (changed or gradient_difference(found, expected) < 10 * BACKWARD)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_agrees_with_the_cpu(name, device):
    expected = make_quantizer(name).eval()
    found, z = copy.deepcopy(expected).to(device), latents(expected, 8, 6, 5)
    here, there = expected.quantize(z), found.quantize(z.to(device))
    assert float((there.tokens.cpu() != here.tokens).double().mean()) <= MAX_CHANGED
    assert difference(found.lookup(here.tokens.to(device)), expected.lookup(here.tokens)) < FORWARD

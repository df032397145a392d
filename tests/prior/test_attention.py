"""What attention is written for besides being right: few passes over memory, and little kept for the backward one.

Covers: prior/transformer.py.
"""

import pytest
import torch
from costs import saved_elements
from small import make_prior

from prior import transformer
from tokenizer.layers import SelfAttention, one_head_attention
from tokenizer.vqgan import Attention


@pytest.mark.parametrize("layer", [lambda: SelfAttention(16), lambda: Attention(16, 4)], ids=["vqvae", "vqgan"])
def test_no_weights_of_attention_are_kept(layer):
    """Memory grows with the positions, not with their square."""
    positions = 32 * 32
    layer, x = (it.to(memory_format=torch.channels_last) for it in (layer(), torch.randn(1, 16, 32, 32)))
    kept = saved_elements(lambda: layer(x.requires_grad_()))
    assert kept < positions**2 / 4


def test_one_head_attends_by_the_formula():
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    weights = (q @ k.transpose(1, 2) / 4**0.5).softmax(-1)
    torch.testing.assert_close(one_head_attention(q, k, v), weights @ v)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt", {}),
        ("gpt", {"order": torch.tensor([[1, 0, 2, 3], [3, 2, 1, 0]])}),
        ("masked", {"known": torch.eye(2, 4) > 0}),
    ],
)
def test_compiled_models_turn_queries_and_keys_alike(monkeypatch, kind, more):
    """The compiler is given real numbers, where torch itself multiplies complex ones: logits and gradients agree."""
    model = make_prior(kind, (2, 2)).double().train()
    tokens = torch.randint(5, (2, 2, 2))

    def outputs():
        model.zero_grad()
        logits = model(tokens, None, **more)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    eager = outputs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(outputs(), eager)


def test_a_turn_is_a_rotation_times_the_gain():
    """By its matrix, pair by pair."""
    x, angles, gains = torch.randn(2, 3, 2, 6), torch.randn(3, 1, 3), torch.tensor([0.5, 2.0])[:, None]
    turns = torch.stack([angles.cos(), angles.sin()], -1) * gains[..., None]
    matrix = torch.stack(
        [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)], -2
    )
    expected = gains[..., None] * (matrix @ x.unflatten(-1, (3, 2))[..., None])[..., 0]
    torch.testing.assert_close(transformer.rotate(x, turns), expected.flatten(-2))

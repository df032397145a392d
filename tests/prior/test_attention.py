"""The transformer's parts by their definitions, and the memory that attention takes."""

from types import SimpleNamespace

import pytest
import torch
from small import draw_tokens, make_prior

from prior import attention
from tokenizer.layers import one_head_attention


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
def test_compiled_models_rotate_queries_and_keys_by_the_same_angles(monkeypatch, kind, more):
    """The compiler is given real numbers, where torch itself multiplies complex ones: logits and gradients agree."""
    model = make_prior(kind, (2, 2)).double().train()
    tokens = torch.randint(5, (2, 2, 2))

    def outputs():
        model.zero_grad()
        logits = model(tokens, **more)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    eager = outputs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(outputs(), eager)


def test_rotate_is_a_rotation_times_the_gain():
    """By its matrix, pair by pair."""
    x, angles, gains = torch.randn(2, 3, 2, 6), torch.randn(3, 1, 3), torch.tensor([0.5, 2.0])[:, None]
    rotations = torch.stack([angles.cos(), angles.sin()], -1) * gains[..., None]
    matrix = torch.stack(
        [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)], -2
    )
    expected = gains[..., None] * (matrix @ x.unflatten(-1, (3, 2))[..., None])[..., 0]
    torch.testing.assert_close(attention.rotate(x, rotations), expected.flatten(-2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pairs_of_a_head_rotate_by_each_axis_ever_more_slowly(axes):
    """Angle = coordinate * base^(-k/K) for the k-th of the K pairs of its axis."""
    config = SimpleNamespace(dim=24, heads=2, rope_base=50.0)
    cells = attention.coordinates((2, 3, 4)[:axes])
    table = attention.Rotations(config, cells).table.double()
    assert table.shape == (len(cells), 6, 2)
    for pair in range(6):
        axis, number = pair % axes, pair // axes
        angle = cells[:, axis].double() * 50.0 ** (-number / -(-6 // axes))
        torch.testing.assert_close(table[:, pair], torch.stack([angle.cos(), angle.sin()], -1), atol=1e-6, rtol=0)


def test_a_table_of_rotations_is_never_below_float32():
    made = attention.Rotations(SimpleNamespace(dim=8, heads=1, rope_base=50.0), attention.coordinates((3, 4)))
    before = made.table.clone()
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert made.to(dtype) is made and made.table.dtype == kept and torch.equal(made.table.float(), before)
    assert made.to("meta").table.is_meta and made.to(torch.float16).table.is_meta and not made.state_dict()


@pytest.mark.parametrize("name", ["gpt", "blocks", "masked"])
def test_each_axis_has_its_own_positions(name):
    """Cells that differ along one axis alone have different learned embeddings and rotations."""
    model = make_prior(name, (3, 2, 3), vocab_size=1)
    assert [len(table) for table in model.axis_embeddings] == [3, 2, 3]
    table = model.rotations.table[-18:] if name == "blocks" else model.rotations.table[:18]
    assert len(table.flatten(1).unique(dim=0)) == 18
    with torch.no_grad():
        for axis, embedding in enumerate(model.axis_embeddings):
            before = model.outputs(draw_tokens(model, 1), model.encode_nothing(1))
            embedding[1] += 1
            assert not torch.equal(model.outputs(draw_tokens(model, 1), model.encode_nothing(1)), before), axis

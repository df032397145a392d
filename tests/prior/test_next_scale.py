"""What next-scale promises beyond the family: the receptive field, the inputs and the cost of a scale."""

from __future__ import annotations

import pytest
import torch
from costs import all_steps, flops
from small import draw_tokens, logits_of, moved_by

from prior import Prior
from tokenizer import TokenGrid
from tokenizer.scales import Resize

KINDS = [{}, {"attention": "markov"}, {"adaln": True}, {"attention": "markov", "adaln": True}]
every_kind = pytest.mark.parametrize("config", KINDS)
SCALES = ((1, 1), (2, 2), (3, 4))


def of_scales(scales=SCALES, vocab_size=5, **config):
    """A small one over such a grid, with weights large enough that every input matters."""
    length = sum(height * width for height, width in scales)
    sizes = {"num_classes": 3, "dim": 32, "depth": 2, "heads": 2, "channels": 8}
    model = Prior.create("next_scale", grid=TokenGrid((length,), vocab_size, scales), **{**sizes, **config})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@every_kind
def test_a_scale_sees_all_coarser_ones_and_nothing_else(config):
    """Logits of a token's own scale and of coarser ones stay what they are to the bit; all finer ones move."""
    model = of_scales(**config)
    tokens, labels = draw_tokens(model, 16), torch.arange(16) % 4
    assert model.blocks == (1, 4, 12) and logits_of(model, tokens, labels).shape == (16, 17, 5)
    moved = moved_by(model, tokens, labels, least=0.0)
    scale_of = torch.tensor([0] + [1] * 4 + [2] * 12)
    assert moved.equal(scale_of < scale_of[:, None]) and moved.equal(model.receptive_field)
    other = logits_of(model, tokens, (labels + 1) % 4)
    assert (logits_of(model, tokens, labels) - other).abs().amax((0, 2)).min() > 1e-3


@every_kind
def test_a_pass_for_each_scale_gives_the_logits_of_the_whole_at_its_cost(config):
    model = of_scales(((1, 1), (1, 2), (3, 3), (4, 4)), **config).double()
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    assert (all_steps(model, tokens, labels) - logits_of(model, tokens, labels)).abs().max() < 1e-12
    assert flops(lambda: all_steps(model, tokens)) <= 1.05 * flops(lambda: model(tokens))


def test_the_input_of_a_scale_is_what_the_earlier_ones_add_up_to():
    model, resize = of_scales(), Resize(SCALES)
    tokens = draw_tokens(model, 2)
    one, two, _ = resize.split(tokens)
    canvas = sum(resize.up(model.token_embedding(ids).movedim(-1, 1), k) for k, ids in enumerate((one, two)))
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(tokens)
    plain = seen[0] - model.positions - model.class_embedding.weight[-1]
    assert torch.allclose(plain[:, :1], model.start_embedding.expand(2, 1, -1), atol=1e-5)
    small = torch.nn.functional.interpolate(model.token_embedding(one).movedim(-1, 1), size=(2, 2))  # of one value
    expected = model.lift(small.flatten(2).transpose(1, 2))
    assert torch.allclose(plain[:, 1:5], expected, atol=1e-4)
    assert torch.allclose(plain[:, 5:], model.lift(canvas.flatten(2).transpose(1, 2)), atol=1e-4)


def test_full_attention_includes_coarser_scales_and_markov_does_not():
    q, k, v = torch.randn(3, 1, 2, 4, 16)
    k[:, :, 0], v[:, :, 0] = 9.0, 9.0  # of the first scale
    models = of_scales(), of_scales(attention="markov")
    found = [model.layers[0].attend_scales(q, k, v, [(0, 1), (1, 4)], None) for model in models]
    own = torch.nn.functional.scaled_dot_product_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
    assert not torch.allclose(found[0][:, :, 1:], own) and torch.allclose(found[1][:, :, 1:], own)


def test_adaln_begins_as_a_block_without_it():
    torch.manual_seed(0)
    grid = TokenGrid((21,), 5, ((1, 1), (2, 2), (4, 4)))
    sizes = {"grid": grid, "num_classes": 3, "dim": 32, "depth": 2, "heads": 2}
    with_it, without = (Prior.create("next_scale", adaln=adaln, **sizes) for adaln in (True, False))
    without.load_state_dict({name: value for name, value in with_it.state_dict().items() if "modulate" not in name})
    tokens = draw_tokens(without, 3)
    assert torch.equal(with_it(tokens), without(tokens))

"""Several guesses at once: the same tokens, from fewer passes."""

from types import SimpleNamespace

import pytest
import torch
from small import draw_known, draw_tokens, generators, make_prior

from prior import parallel
from prior.sampling.guesses import AT_ONCE, FREE, alternatives, guesses_at_once


@pytest.mark.sparse
@pytest.mark.parametrize("width", [2, 8, 100])
@pytest.mark.parametrize(
    "name_and_order", [("gpt", "hilbert"), ("blocks", "halton:4"), ("marginal", "raster"), ("next_scale", "raster")]
)
def test_more_guesses_change_no_token(name_and_order, width, monkeypatch):
    name, order = name_and_order
    model = make_prior(name, order=order)
    monkeypatch.setattr("prior.drawing.settled", lambda prior, row, sampler, tokens, close: tokens)
    labels, tokens, known = torch.arange(5) % 4, draw_tokens(model, 5), draw_known(model, 5, 0.4)
    for settings in (
        {},
        {"guidance_scale": 2.0, "top_k": 3, "temperature": 0.7},
        {"guidance_end": 3.0},
        {"temperature": 0.0},
        {"tokens": tokens, "known": known},
    ):
        expected = model.double().sample(5, labels, generator=generators(5), **settings)
        with monkeypatch.context() as patched:
            patched.setattr(parallel, "guesses_at_once", lambda prior, images: width)
            drawn = model.sample(5, labels, generator=generators(5), parallel=True, **settings)
        assert torch.equal(drawn, expected), settings


def test_more_guesses_take_fewer_passes(monkeypatch):
    model, real, passes = make_prior("gpt", shape=(6, 6), vocab_size=7), parallel.sample_parallel, {}
    model.head.weight.data *= 5  # tokens depend on each other
    for width in (1, 8):
        found = []
        monkeypatch.setattr(parallel, "guesses_at_once", lambda prior, images, width=width: width)
        monkeypatch.setattr("prior.drawing.sample_parallel", lambda *given, f=found: f.append(real(*given)) or f[-1])
        model.sample(32, generator=generators(32), parallel=True)
        passes[width] = found[0].passes.double().mean()
    assert passes[8] < 0.9 * passes[1]


def test_alternatives_are_the_likeliest_first_mistakes():
    scores = torch.tensor([[[9.0, 8.5, 0.0], [5.0, 4.9, 0.0], [7.0, 0.0, -9.0], [5.0, 4.0, 4.9]]])
    drawn, free = scores.argmax(-1), torch.tensor([[False, True, True, True]])
    assert alternatives(drawn, scores, free, 3).tolist() == [[[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 2]]]
    assert alternatives(drawn, scores, torch.zeros_like(free), 3).tolist() == [[[0, 0, 0, 0]] * 3]


def test_a_guess_for_each_image_where_a_pass_costs_more():
    """On a CPU, and for so many images or so large a model that a GPU has no time to spare."""
    model = make_prior("gpt")
    assert guesses_at_once(model, 1) == 1
    on_gpu = SimpleNamespace(device=torch.device("cuda"), grid=model.grid, parameters=model.parameters)
    size = sum(parameter.numel() for parameter in model.parameters())
    images = int(FREE / (2 * size * 12 * AT_ONCE))
    assert [guesses_at_once(on_gpu, count) for count in (1, images, images + 1)] == [AT_ONCE, AT_ONCE, 1]

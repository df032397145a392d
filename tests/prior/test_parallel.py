"""Parallel sampling takes few passes over few images; test_family.py shows that its tokens are the sequential ones."""

import pytest
import torch
from small import generators, make_prior

from prior import base, parallel


def drawn_in_parallel(model, count, monkeypatch, **settings):
    """Tokens, passes per image, and the rows of each forward pass."""
    passes, rows = [], []
    real, forward = parallel.sample_parallel, type(model).forward

    def sample(*given):
        tokens, each = real(*given)
        passes.append(each)
        return tokens, each

    monkeypatch.setattr(base, "sample_parallel", sample)
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, tokens, *rest, **more: rows.append(len(tokens)) or forward(self, tokens, *rest, **more),
    )
    tokens = model.sample(count, generator=generators(count), parallel=True, **settings)
    monkeypatch.undo()
    return tokens, torch.cat(passes), rows


def test_a_pass_finishes_at_least_one_token_and_finished_images_leave(monkeypatch):
    model = make_prior("gpt", shape=(6, 6), vocab_size=7)
    _, passes, rows = drawn_in_parallel(model, 16, monkeypatch)
    assert 1 <= passes.min() < passes.max() <= 36
    assert len(rows) == passes.max()
    assert rows == [int((passes > step).sum()) for step in range(len(rows))]


def test_a_model_that_looks_at_no_token_needs_two_passes(monkeypatch):
    _, passes, _ = drawn_in_parallel(make_prior("marginal", shape=(5, 5)), 8, monkeypatch)
    assert passes.max() <= 2


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_large_batches_are_cut(scale, monkeypatch):
    """Guided rows are counted twice."""
    model, settings = make_prior("gpt"), {"labels": torch.arange(11) % 3, "guidance_scale": scale}
    expected = model.sample(11, generator=generators(11), **settings)
    monkeypatch.setattr("prior.parallel.LOGITS_ON_CPU", 6 * 12 * 5)
    tokens, _, rows = drawn_in_parallel(model, 11, monkeypatch, **settings)
    assert torch.equal(tokens, expected) and max(rows) == 6

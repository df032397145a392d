"""Settings of sampling and how they choose a token."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import tqdm
from frequencies import as_frequent
from hypothesis import given, settings
from hypothesis import strategies as st
from small import ANY_ORDER, draw_tokens, generators, make_prior
from torch import Tensor

from prior.masked import MaskedOptions
from prior.noise import TOKEN_NOISE, draw_keys, gumbel_noise
from prior.options import DecodingOptions, SamplingOptions, likeliest
from prior.sampling import show_progress

examples = settings(deadline=None, max_examples=100, derandomize=True)


def gumbel(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise of this shape."""
    keys = draw_keys(torch.Generator().manual_seed(seed), 1)
    return gumbel_noise(keys, TOKEN_NOISE, 0, math.prod(shape)).view(shape)


def test_numbers_of_numpy_and_torch_are_plain_numbers_in_settings():
    """So that a pipeline can hold them as its defaults, and save them."""
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": torch.tensor(0.75)}
    options = MaskedOptions(**given, steps=np.int64(2))
    assert options == MaskedOptions(0.5, 3, 0.75, steps=2)
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()
    model, plain = make_prior("gpt"), {"temperature": 0.5, "top_k": 3, "top_p": 0.75}
    drawn = model.sample(2, generator=generators(2), **plain)
    for count in (np.int64(2), torch.tensor(2)):
        assert torch.equal(model.sample(count, generator=generators(2), **given), drawn)


REQUESTS = [
    ("gpt", {"guidance_scale": 2.0, "guidance_end": 3.0}, {"parallel": True}),
    ("gpt", {"top_p": 0.8}, {"num_orders": 3}),
    ("masked", {"steps": 3, "confidence_temperature": 2.0}, {}),
    ("made", {"num_masks": 3}, {"order": "snake"}),
]


@pytest.mark.parametrize(("kind", "settings", "decoding"), REQUESTS, ids=str)
def test_settings_are_given_as_values_or_as_keywords(kind, settings, decoding):
    model = make_prior(kind, **({"connectivity_agnostic": True} if kind == "made" else {}), **ANY_ORDER[kind])

    def draw(**given):
        return model.sample(4, [0, 1, 2, 0], generator=generators(4), **given)

    expected, (how, path) = draw(**settings, **decoding), (model.Sampling(**settings), DecodingOptions(**decoding))
    assert torch.equal(draw(sampling=how, decoding=path), expected)
    assert torch.equal(draw(sampling=how, **decoding), expected), "one of them as a value"
    assert torch.equal(draw(**settings, decoding=path), expected)
    for both in ({"sampling": how, **settings}, {"decoding": path, "cache": True}):
        with pytest.raises(TypeError, match="not both"):
            draw(**both)
    with pytest.raises(TypeError, match=f"a {kind} prior takes"):
        draw(sampling=path)


numbers = st.floats(0, 8)
powers = st.none() | st.floats(0.25, 200)


@examples
@given(numbers, numbers, powers, st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_guidance_goes_one_way_from_its_scale_to_its_end(start, end, power, blocks):
    """The two ends to the last bit; between them by the share of tokens that are decided before a block."""
    options = SamplingOptions(guidance_scale=start, guidance_end=end, guidance_power=power)
    scales = options.scale_by_block(blocks)
    assert (scales[0], scales[-1]) == (start, end) and options.scale_by_block([7]) == [start]
    assert scales == pytest.approx(sorted(scales, reverse=end < start))
    for block, scale in enumerate(scales):
        t = sum(blocks[:block]) / sum(blocks[:-1])
        weight = t if power is None else (1 - math.cos(math.pi * t**power)) / 2
        assert scale == pytest.approx((1 - weight) * start + weight * end, abs=1e-9)
    by_rank = options.scale_by_rank(tuple(blocks), torch.device("cpu"))
    if start == end:  # a number, so that the kernels are the same, to the last bit
        assert by_rank == start and options.rows_per_image == (1 if start == 1 else 2)
    else:
        expected = torch.tensor(scales).repeat_interleave(torch.tensor(blocks))
        torch.testing.assert_close(by_rank, expected)
        assert options.rows_per_image == 2


def test_the_likeliest_ids_at_ties():
    assert likeliest(torch.zeros(3), 0.5).tolist() == [True, True, False], "of equal ones the first"
    assert likeliest(torch.tensor([0.0, -torch.inf, 0.0]), 1.0).tolist() == [True, False, True]


def flat(vocab_size):
    """A prior that thinks all ids equally likely, with and without a class."""
    model = make_prior("marginal", shape=(2, 3), vocab_size=vocab_size)
    torch.nn.init.constant_(model.table, 0.7)
    return model


PATHS = [{}, {"cache": False}, {"parallel": True}]


@pytest.mark.sparse
@pytest.mark.parametrize("vocab_size", [2, 33, 600])
@pytest.mark.parametrize("temperature", [0.0, 1e-7])
def test_the_first_of_equal_ids_is_taken(vocab_size, temperature):
    model, labels = flat(vocab_size), torch.arange(5) % 3
    for path, more in itertools.product(PATHS, ({}, {"guidance_scale": 2.0}, {"top_k": 2}, {"top_p": 0.5})):
        drawn = model.sample(5, labels, temperature=temperature, generator=generators(5), **path, **more)
        assert not drawn.any(), (path, more)


RULED_OUT = [
    {},
    {"guidance_scale": 0.5},
    {"guidance_scale": 2.0, "temperature": 0.0},
    {"guidance_end": 3.0, "top_k": 4, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", RULED_OUT, ids=str)
def test_an_id_whose_logit_is_minus_infinity_is_never_drawn(settings):
    """4 with and without the class, 3 with it, 2 without it: guidance draws none of these."""
    model, count = make_prior("marginal", shape=(1, 1), vocab_size=6), 4000
    with torch.no_grad():
        model.table[..., 4] = model.table[1, :, 3] = model.table[-1, :, 2] = -torch.inf
    table, scale = model.table.detach()[:, 0], settings.get("guidance_scale", 1.0)
    guided = table[1] if scale == 1 else table[-1] + scale * (table[1] - table[-1])
    allowed = [0, 1, 5] if "guidance_scale" in settings or "guidance_end" in settings else [0, 1, 2, 5]
    expected = torch.zeros(6).index_add(0, torch.tensor(allowed), guided[allowed].softmax(0))
    for path in PATHS:
        drawn = model.sample(
            count, torch.ones(count).long(), generator=torch.Generator().manual_seed(0), **settings, **path
        )
        assert set(drawn.unique().tolist()) <= set(allowed)
        assert "temperature" in settings or "top_k" in settings or as_frequent(drawn.flatten(), expected)


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_steps_whose_tokens_are_all_known_need_no_pass(kind, monkeypatch):
    """A model with a cache has to see them; after the last unknown token nothing is left to do."""
    model, known = make_prior(kind), torch.zeros(3, 4, dtype=torch.bool)
    known.view(-1)[torch.tensor([2, 3, 4, 10, 11])] = True
    calls, real = [], type(model).next_logits
    monkeypatch.setattr(type(model), "next_logits", lambda self, *given: calls.append(1) or real(self, *given))
    tokens = draw_tokens(model, 2)
    plain = model.sample(2, generator=generators(2), tokens=tokens, known=known, order=None)
    assert len(calls) == (10 if kind == "gpt" else 7) and torch.equal(plain[:, known], tokens[:, known])


def test_a_bar_has_the_arguments_of_the_caller(monkeypatch):
    bars = []
    monkeypatch.setattr(tqdm, "tqdm", lambda steps, **arguments: bars.append(arguments) or steps)
    steps = [1, 2, 3]
    assert show_progress(steps, False) is steps and bars == []
    assert show_progress(steps, True) == show_progress(steps, {"desc": "digits", "ncols": 3}, unit="pass") == steps
    assert bars[0]["unit"] == "token" and bars[0]["leave"] is False
    assert bars[1] == {**bars[0], "desc": "digits", "ncols": 3, "unit": "pass"}

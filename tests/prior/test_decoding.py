"""Steps of decoding as `on_step` sees them; modes, precision, parts of a batch, and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ANY_ORDER, PRIORS, VARIANTS, draw_known, draw_tokens, generators, make_prior

from prior.base import evaluation_mode

PATHS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"cache": False},
    "parallel": {"parallel": True},
    "guided": {"guidance_scale": 2.0},
}
every_prior = pytest.mark.parametrize("name", [*PRIORS, *VARIANTS])


def watched(model, count=5, **settings):
    """Tokens of `count` images, and of each step its number, rank, tokens and which are known."""
    seen = []

    def look(step):
        seen.append((step.number, step.rank, step.tokens, step.known))

    return model.sample(count, torch.arange(count) % 3, generator=generators(count), on_step=look, **settings), seen


def check(model, drawn, seen, given=None):
    """What holds of every path: decided tokens stay, there are more and more of them, and they become the images."""
    numbers, ranks, tokens, known = zip(*seen, strict=True)
    assert numbers == tuple(range(len(seen)))
    assert tokens[-1].equal(drawn) and known[-1].all()
    before = torch.zeros_like(known[0]) if given is None else given
    for rank, ids, there in zip(ranks, tokens, known, strict=True):
        assert ids.shape == there.shape == drawn.shape and there.dtype == torch.bool
        assert not (before & ~there).any() and (there.sum() > before.sum())
        assert ids[there].equal(drawn[there]) and not ids[~there].any()
        assert 0 < rank <= len(model.grid)
        before = there


@pytest.mark.sparse
@every_prior
@pytest.mark.parametrize("path", PATHS)
def test_each_step_shows_what_is_drawn(name, path):
    model = make_prior(name)
    drawn, seen = watched(model, **PATHS[path])
    check(model, drawn, seen)
    plain = model.sample(5, torch.arange(5) % 3, generator=generators(5), **PATHS[path])
    assert plain.equal(drawn), "watching changes what is drawn"
    if path != "parallel":
        ends = torch.tensor(model.blocks).cumsum(0).tolist()
        assert [rank for _, rank, *_ in seen] == ends * (len(seen) // len(ends))


OTHER_WAYS = [(name, ANY_ORDER[name], {"order": "random:3"}) for name in ANY_ORDER]
OTHER_WAYS += [("gpt", ANY_ORDER["gpt"], {"num_orders": 3}), ("masked", {}, {"steps": 4})]
OTHER_WAYS += [("made", {"connectivity_agnostic": True}, {"num_masks": 3})]


@pytest.mark.parametrize(("name", "config", "settings"), OTHER_WAYS, ids=str)
def test_steps_in_other_orders_and_with_known_tokens(name, config, settings):
    model = make_prior(name, **config)
    tokens, known = draw_tokens(model, 5), draw_known(model, 5, 0.4)
    known.flatten(1)[:, 0] = False
    drawn, seen = watched(model, tokens=tokens, known=known, **settings)
    assert drawn[known].equal(tokens[known])
    grown = [step for step in seen if step[3].sum() > known.sum()]  # known tokens come first, step by step
    if "num_masks" not in settings:
        check(model, drawn, [(number, *step[1:]) for number, step in enumerate(grown)], known)
    assert "steps" not in settings or len(seen) == 4


@pytest.mark.parametrize(("guidance", "rows"), [({}, 2), ({"guidance_scale": 2.0}, 4)])
def test_parts_of_as_many_rows_as_the_prior_says_count_on(guidance, rows, monkeypatch):
    """With guidance half as many images; what was drawn before is in each report."""
    model = make_prior("gpt")
    plain, _ = watched(model, 5, **guidance)
    monkeypatch.setattr(type(model), "rows_at_once", lambda self: rows)
    drawn, seen = watched(model, 5, **guidance)
    check(model, drawn, seen)
    assert torch.equal(drawn, plain) and len(seen) == 3 * 12
    assert seen[12][3].flatten(1).sum(1).tolist() == [12, 12, 1, 1, 0]


@pytest.mark.parametrize("path", PATHS)
def test_an_error_of_the_caller_ends_sampling_and_the_next_call_is_whole(path):
    model, taken = make_prior("gpt"), []
    expected, _ = watched(model, **PATHS[path])

    def fail(step):
        taken.append(step.number)
        if step.number == 1:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        model.sample(5, torch.arange(5) % 3, generator=generators(5), on_step=fail, **PATHS[path])
    assert taken == [0, 1] and expected.equal(watched(model, **PATHS[path])[0])


@pytest.mark.parametrize("precision", [False, True])
def test_a_prior_is_in_eval_mode_while_it_is_sampled_and_then_as_it_was(precision):
    """Each of its modules: a part may be trained alone. In full precision, however the caller is."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # which threads of another test may have left off
    model = make_prior("gpt").train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    with torch.autocast("cpu", torch.bfloat16, enabled=precision), evaluation_mode(model), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_autocast_enabled("cpu") and not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("name", PRIORS)
def test_features_are_those_of_each_layer_and_no_hook_is_left(name):
    model = make_prior(name)
    tokens, labels = draw_tokens(model, 2), torch.tensor([0, 3])
    if not model.feature_layers:
        return
    every = model.layer_features(tokens, model.read_given(labels, None, 2), range(model.feature_layers))
    assert torch.equal(model.features(tokens, labels), every[model.feature_layers // 2]), "the middle one by default"
    for layer, expected in enumerate(every):
        assert torch.equal(model.features(tokens, labels, layer), expected)
        assert expected.ndim == 3 and expected.shape[:2] in ((2, 1), (2, len(model.grid)))
    assert not any(module._forward_hooks for module in model.modules())

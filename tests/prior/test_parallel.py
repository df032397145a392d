"""Parallel sampling gives the tokens of sequential sampling, in fewer passes.

Covers: prior/drawing.py.
"""

import pytest
import torch
from small import PRIORS, PRIORS_IN_SOME_ORDERS, VARIANTS, draw_known, draw_tokens, generators, make_prior

from prior import drawing, parallel

EXACT_IN_ORDERS = [(name, order) for name, order in PRIORS_IN_SOME_ORDERS if make_prior(name).exact]
every_order = pytest.mark.parametrize(("name", "order"), EXACT_IN_ORDERS)
every_prior = pytest.mark.parametrize("name", sorted({name for name, _ in EXACT_IN_ORDERS}))


def test_all_exact_priors_are_tested():
    assert {"blocks", "gpt", "marginal"} <= {name for name, _ in EXACT_IN_ORDERS} <= {*PRIORS, *VARIANTS}
    assert {"raster", "hilbert", "random:3"} <= {order for name, order in EXACT_IN_ORDERS if name == "gpt"}
    assert {"diagonal", "halton:4"} <= {order for name, order in EXACT_IN_ORDERS if name == "blocks"}


@pytest.mark.sparse
@every_order
def test_parallel_equals_sequential(name, order):
    model = make_prior(name, order=order)
    labels, tokens, known = torch.arange(9) % 4, draw_tokens(model, 9), draw_known(model, 9, 0.4)
    for settings in (
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"guidance_scale": 2.0, "top_k": 3},
        {"guidance_end": 3.0, "guidance_power": 1.5, "tokens": tokens, "known": known},
        {"temperature": 0.0},
        {"tokens": tokens, "known": known},
    ):
        one, other = (
            model.sample(9, labels, generator=generators(9), parallel=parallel, **settings)
            for parallel in (False, True)
        )
        assert torch.equal(one, other), settings


@every_prior
def test_an_image_does_not_depend_on_its_batch(name):
    model = make_prior(name, shape=(4, 4), vocab_size=17)
    together = model.sample(9, generator=generators(9), parallel=True)
    assert torch.equal(together, model.sample(9, generator=generators(9)))
    for size in (1, 2, 5):
        parts = [
            model.sample(len(at), generator=[generators(9)[k] for k in at], parallel=True)
            for at in torch.arange(9).split(size)
        ]
        assert torch.equal(torch.cat(parts), together), f"batches of {size}"


def drawn_in_parallel(model, count, monkeypatch, count_forward=True, **settings):
    """Tokens, passes per image, and the rows of each forward pass."""
    results, rows = [], []
    real, forward = parallel.sample_parallel, type(model).forward
    monkeypatch.setattr("prior.drawing.sample_parallel", lambda *given: results.append(real(*given)) or results[-1])
    if count_forward:
        monkeypatch.setattr(
            type(model),
            "forward",
            lambda self, tokens, *rest, **more: rows.append(len(tokens)) or forward(self, tokens, *rest, **more),
        )
    tokens = model.sample(count, generator=generators(count), parallel=True, **settings)
    monkeypatch.undo()
    return tokens, torch.cat([r.passes for r in results]), rows


def test_a_pass_finishes_at_least_one_token_and_finished_images_leave(monkeypatch):
    model = make_prior("gpt", shape=(6, 6), vocab_size=7)
    _, passes, rows = drawn_in_parallel(model, 16, monkeypatch)
    assert 1 <= passes.min() < passes.max() <= 36
    assert len(rows) == passes.max()
    assert rows == [int((passes > step).sum()) for step in range(len(rows))]


def test_a_model_that_looks_at_no_token_needs_two_passes(monkeypatch):
    _, passes, _ = drawn_in_parallel(make_prior("marginal", shape=(5, 5)), 8, monkeypatch)
    assert passes.max() <= 2


def test_known_tokens_need_no_pass(monkeypatch):
    model = make_prior("gpt", shape=(6, 6), vocab_size=7)
    tokens, known = torch.randint(7, (6, 6)), torch.ones(6, 6, dtype=torch.bool)
    known[5, 5] = False
    _, passes, _ = drawn_in_parallel(model, 5, monkeypatch, tokens=tokens, known=known)
    assert passes.max() <= 2


def test_a_decision_that_turns_out_otherwise_turns_the_rest(monkeypatch):
    """All decisions on wrong tokens are called close: what comes out is what step by step is drawn."""
    model = make_prior("gpt")
    expected, settled = model.sample(6, generator=generators(6)), []

    def wrong(prior, rows, sampler, guess, progress):
        for generator in rows.generators:
            torch.rand(7, generator=generator)
        return parallel.Parallel(torch.zeros_like(rows.given), torch.ones_like(rows.keep), torch.zeros(6))

    monkeypatch.setattr("prior.drawing.sample_parallel", wrong)
    monkeypatch.setattr(
        "prior.drawing.settled", lambda *given: settled.append(len(given[1])) or parallel.settled(*given)
    )
    assert torch.equal(model.sample(6, generator=generators(6), parallel=True), expected) and settled == [1] * 6


def test_close_are_those_of_the_decisions_that_stand(monkeypatch):
    """Step by step and in parallel: where the lead is within twice `rounding` of the image's largest |logit| so far."""
    model, found = make_prior("gpt", shape=(6, 6), vocab_size=7), []
    real, steps = parallel.sample_parallel, drawing.step_by_step
    monkeypatch.setattr(model, "rounding", 0.01)
    monkeypatch.setattr("prior.drawing.sample_parallel", lambda *given: found.append(real(*given)) or found[-1])
    monkeypatch.setattr("prior.drawing.step_by_step", lambda *given: found.append(steps(*given)) or found[-1])
    for way in (True, False):
        tokens = model.sample(8, generator=generators(8), parallel=way)
        for k in range(8):
            noise = -(-torch.rand(36, 7, generator=generators(8)[k], dtype=torch.float64).log()).float().log()
            logits = model(tokens[k : k + 1]).detach()[0]
            best = (logits + noise).topk(2).values
            allowed = 2 * 0.01 * logits.abs().amax(1).cummax(0).values.clamp(min=1)
            lead = best[:, 0] - best[:, 1]
            surely = (lead - allowed).abs() > 1e-4
            assert torch.equal(found[-1][1][k][surely], (lead <= allowed)[surely]) and surely.sum() > 30
        assert 0 < found[-1][1].float().mean() < 0.3


@every_prior
def test_a_guess_changes_passes_but_no_token(name):
    """Whatever the second prior is: one that looks at nothing, one in another order, the model itself."""
    model = make_prior(name, shape=(3, 4), vocab_size=7)
    labels, tokens, known = torch.arange(6) % 4, draw_tokens(model, 6), draw_known(model, 6, 0.3)
    other = "spiral_in" if len(model.grid.shape) == 2 else "random:1"
    stranger = make_prior("gpt", grid=model.grid, order=other, dropout=0.5)
    guesses = [make_prior("marginal", grid=model.grid).train(), stranger.train(), model]
    for settings in (
        {},
        {"guidance_scale": 2.0, "top_k": 5, "temperature": 0.8, "guidance_end": 0.5},
        {"tokens": tokens, "known": known},
    ):
        expected = model.sample(6, labels, generator=generators(6), **settings)
        for guess in guesses:
            drawn = model.sample(6, labels, generator=generators(6), parallel=True, guess=guess, **settings)
            assert torch.equal(drawn, expected), (settings, guess.name)
    assert guesses[0].training and guesses[1].training


def test_a_good_guess_saves_passes(monkeypatch):
    """The model as its own guess knows all; a copy with noise on its weights knows much; a stranger nothing."""
    model = make_prior("gpt", shape=(6, 6), vocab_size=7)
    near = make_prior("gpt", shape=(6, 6), vocab_size=7)
    near.load_state_dict(
        {name: weight + 0.02 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    )
    mean = {}
    for name, guess in (("none", None), ("itself", model), ("near", near)):
        _, passes, _ = drawn_in_parallel(model, 32, monkeypatch, guess=guess, count_forward=False)
        mean[name] = float(passes.double().mean())
    assert mean["itself"] < mean["near"] < 0.8 * mean["none"], mean


def test_a_guess_may_be_what_compile_has_wrapped():
    model, guess = make_prior("gpt"), torch.compile(make_prior("marginal"), backend="eager")
    drawn = model.sample(2, generator=generators(2), parallel=True, guess=guess)
    assert torch.equal(drawn, model.sample(2, generator=generators(2)))


def test_a_guess_over_other_tokens_is_refused():
    model = make_prior("gpt")
    for guess in (make_prior("gpt", shape=(4, 4)), make_prior("gpt", vocab_size=6), make_prior("gpt", num_classes=2)):
        with pytest.raises(ValueError, match="same grid and classes"):
            model.sample(2, parallel=True, guess=guess)
    with pytest.raises(ValueError, match="parallel=True"):
        model.sample(2, guess=model)


def test_large_batches_are_cut(monkeypatch):
    model = make_prior("gpt")
    expected = model.sample(11, generator=generators(11))
    monkeypatch.setattr("prior.parallel.NUMBERS", 5 * 12 * 5)
    tokens, _, rows = drawn_in_parallel(model, 11, monkeypatch)
    assert torch.equal(tokens, expected) and max(rows) <= 5


def test_a_gpu_takes_eight_times_as_many_rows():
    grid = make_prior("gpt").grid
    cpu, gpu = (parallel.parallel_rows(grid, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert cpu == parallel.NUMBERS // 60 and gpu == 8 * parallel.NUMBERS // 60

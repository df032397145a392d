"""Promises of every prior with a head: those of the family, over grids whose positions have one id or several.

Covers: prior/heads/positions.py, prior/heads/tokens.py.
"""

import itertools

import pytest
import torch
from costs import all_steps, flops
from frequencies import as_frequent
from givens.headed import CASES, HEADS, TOGETHER, VOCAB, grid_with, make_headed
from small import PRIORS, draw_tokens, generators, moved_by

from prior import Prior
from prior.heads import Head, IdEmbedding
from tokenizer import TokenGrid
from tokenizer.files import ConfigError

every_case = pytest.mark.parametrize(("kind", "head", "facts", "order"), CASES)
raster_cases = pytest.mark.parametrize(("kind", "head", "facts"), [case[:3] for case in CASES if case[3] == "raster"])


def test_every_head_is_found():
    assert Head.available() == ["depth", "logistic"] == sorted(HEADS)
    taken = {kind for kind in PRIORS if Prior.find(kind).Config.takes_positions}
    assert taken >= set(TOGETHER)


@pytest.mark.sparse
@every_case
def test_logits_see_what_the_receptive_field_says_and_that_comes_earlier(kind, head, facts, order):
    model = make_headed(kind, head, facts, order).double()
    tokens, labels = draw_tokens(model, 24), torch.arange(24) % 4
    assert model(tokens, labels).shape == (24, len(model.grid), VOCAB[head])
    field = model.receptive_field
    assert moved_by(model, tokens, labels, least=1e-13).equal(field)
    earlier = torch.zeros(len(model.grid), dtype=torch.bool)
    for block in model.order.split(model.blocks):
        assert not field[block][:, ~earlier].any()
        earlier[block] = True
    assert earlier.all() and sum(model.blocks) == len(model.grid)


@pytest.mark.sparse
@every_case
def test_a_position_sees_its_own_ids_before_each_and_nobody_else_of_its_block(kind, head, facts, order):
    model = make_headed(kind, head, facts, order)
    cells, field = model.grid.cells, model.receptive_field
    for level, (one, *others) in enumerate(zip(cells[:, 0], *cells.t()[1:], strict=True)):
        mine = torch.stack([one, *others])
        assert field[mine][:, mine].equal(torch.ones(len(mine), len(mine)).tril(-1).bool())
        for at in mine[1:]:  # as far as others are concerned, all ids of a position are seen at once, or none is
            assert field[at][torch.isin(torch.arange(len(field)), mine).logical_not()].equal(
                field[mine[0]][torch.isin(torch.arange(len(field)), mine).logical_not()]
            ), level


@pytest.mark.sparse
@every_case
@pytest.mark.parametrize("label", [None, 1])
def test_probabilities_sum_to_one(kind, head, facts, order, label):
    positions, vocab = ((1, 2), 2) if head == "depth" else ((1, 1 if facts["channels"] == 3 else 2), 16)
    order = "raster" if order.startswith(("halton", "raster/")) else order
    model = make_headed(kind, head, facts, order, positions, vocab).double()
    size = len(model.grid)
    grids = torch.tensor(list(itertools.product(range(vocab), repeat=size))).reshape(-1, *model.grid.shape)
    labels = None if label is None else torch.full((len(grids),), label)
    with torch.no_grad():
        total = model.log_prob(grids, labels).exp().sum()
    assert abs(float(total) - 1) < 1e-9


@pytest.mark.sparse
@every_case
def test_the_logits_and_the_likelihood_agree(kind, head, facts, order):
    model = make_headed(kind, head, facts, order).double()
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    expected = model(tokens, labels).log_softmax(-1).gather(-1, tokens.flatten(1)[..., None]).view(tokens.shape)
    assert (model.token_log_probs(tokens, labels) - expected).abs().max() < 1e-12
    if model.exact and kind != "masked":
        loss = model.loss(tokens, labels)
        assert abs(float(loss.detach() + expected.mean().detach())) < 1e-5


@pytest.mark.sparse
@every_case
def test_steps_give_the_logits_of_whole_passes(kind, head, facts, order):
    model = make_headed(kind, head, facts, order).double()
    tokens, labels = draw_tokens(model, 4), torch.arange(4) % 4
    with torch.no_grad():
        whole = model(tokens, labels)[:, model.order]
        assert (all_steps(model, tokens, labels) - whole).abs().max() < 1e-9


@pytest.mark.sparse
@every_case
def test_all_ways_of_sampling_draw_the_same(kind, head, facts, order):
    model, labels = make_headed(kind, head, facts, order), torch.arange(5) % 4
    drawn = model.sample(5, labels, generator=generators(5))
    assert drawn.unique().numel() > 2
    for options in ({"cache": False}, {"parallel": True}):
        assert torch.equal(model.sample(5, labels, generator=generators(5), **options), drawn)
    one = model.sample(1, labels[3:4], generator=generators(5)[3:4])
    assert torch.equal(one, drawn[3:4])
    known = torch.rand(5, *model.grid.shape) < 0.4
    kept = model.sample(5, labels, generator=generators(5), tokens=drawn, known=known, top_k=3, temperature=0.8)
    assert torch.equal(kept[known], drawn[known])
    assert torch.equal(model.sample(5, labels, generator=generators(5), guidance_scale=1.0), drawn)


@pytest.mark.parametrize(
    ("kind", "head", "facts"), [("gpt", "depth", {"levels": 2}), ("blocks", "depth", {"levels": 2})]
)
def test_frequencies_match_log_prob(kind, head, facts):
    model = make_headed(kind, head, facts, positions=(1, 2), vocab_size=2, std=0.5)
    count, size = 6000, len(model.grid)
    drawn = model.sample(count, torch.full((count,), 1), generator=torch.Generator().manual_seed(5)).flatten(1)
    grids = torch.tensor(list(itertools.product(range(2), repeat=size)))
    expected = model.log_prob(grids.reshape(-1, *model.grid.shape), torch.full((2**size,), 1)).exp()
    assert as_frequent((drawn * 2 ** torch.arange(size).flip(0)).sum(1), expected)


@pytest.mark.sparse
@raster_cases
def test_sampling_takes_the_flops_of_one_pass(kind, head, facts):
    if kind == "masked":
        pytest.skip("a pass per token, by its nature")
    model = make_headed(kind, head, facts, positions=(3, 4))
    one_pass = flops(lambda: model(draw_tokens(model, 2)))
    sampled = flops(lambda: model.sample(2, generator=generators(2), capture=False))
    assert sampled <= 1.1 * one_pass


@pytest.mark.sparse
@raster_cases
def test_a_gradient_reaches_every_weight_and_training_helps(kind, head, facts):
    torch.manual_seed(0)
    model = make_headed(kind, head, facts, std=0.1).train()
    tokens, labels = draw_tokens(model, 16), torch.arange(16) % 4
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for step in range(15):
        loss = model.loss(tokens, labels, progress=0.5)
        optimizer.zero_grad()
        loss.backward()
        if not step:
            still = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
            assert [name for name in still if "nothing" not in name] == []
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.sparse
@raster_cases
def test_a_saved_prior_comes_back(kind, head, facts, tmp_path):
    model, tokens = make_headed(kind, head, facts), None
    model.save_pretrained(tmp_path / "prior")
    found = Prior.from_pretrained(tmp_path / "prior")
    tokens = draw_tokens(model, 2)
    assert found.fingerprint() == model.fingerprint() and torch.equal(found(tokens), model(tokens))
    assert found.grid.levels == model.grid.levels and found.grid.channels == model.grid.channels


@pytest.mark.parametrize("together", [1, 3])
def test_an_embedding_of_rows_is_the_sum_of_the_levels_tables(together):
    grid = TokenGrid((3, 2), 4, levels=together)
    table, ids = IdEmbedding(grid, together, 5), torch.randint(4, (6, together))
    expected = sum(table.weight[level * 4 + ids[:, level]] for level in range(together))
    assert torch.allclose(table(ids), expected)
    assert torch.allclose(table.of_rows(ids if together > 1 else ids[:, 0]), expected)


CODES, LEVELS = TokenGrid((4, 3), 32), TokenGrid((6, 3), 32, levels=3)


@pytest.mark.parametrize(
    ("kind", "grid", "settings", "message"),
    [
        ("gpt", CODES, {"head": "depth"}, "head: depth is for grids of several ids at a position"),
        ("gpt", CODES, {"head": "logistic"}, "head: logistic is for grids of pixels, .* this grid's are codes"),
        ("gpt", grid_with({"channels": 1}, (2, 2), 8), {"head": "logistic"}, "at least 16 levels, and this grid has 8"),
        ("gpt", LEVELS, {"head": "softmax"}, "head.kind: no Head is called 'softmax'; there are depth, logistic"),
        ("gpt", LEVELS, {"head": "depth", "any_order": True}, "any_order: does not go with head 'depth'"),
        ("made", LEVELS, {"head": "depth"}, "head: made takes none for several ids at a position, .* has 3"),
        ("marginal", LEVELS, {"head": "depth"}, "head: marginal has none but a logit for each id"),
        ("gpt", LEVELS, {"head": "depth", "order": "regions:5"}, "no 5 regions fit a grid of 2x3"),
        ("gpt", LEVELS, {"head": "depth", "blocks": (6, 12)}, "blocks: sizes sum to 18, the grid has 6 tokens"),
        (
            "masked",
            grid_with({"channels": 1}, (2, 2), 16),
            {"head": "logistic", "label_smoothing": 0.1},
            "label_smoothing: must be 0 with head 'logistic'",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused_in_one_line(kind, grid, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Prior.create(kind, grid=grid, **settings)
    assert "\n" not in str(caught.value)

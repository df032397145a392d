"""Attention to a window of the grid: what it sees, in tiles or not, what sampling keeps of it, and what that costs."""

import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from costs import all_steps, flops, saved_elements
from small import ORDERS, draw_tokens, make_prior, moved_by
from torch.nn.attention.flex_attention import flex_attention

from prior import masks
from prior.masks import Window
from prior.orders import make_order

SHAPE = (5, 6)


@dataclass(frozen=True)
class Case:
    """A window, the dilation of its two layers, and an order."""

    window: tuple[int, int]
    dilation: tuple[int, int] | None = None
    order: str = "raster"

    def model(self, shape=SHAPE, **config):
        return make_prior("gpt", shape, window=self.window, dilation=self.dilation, order=self.order, **config)


CASES = [Case((2, 1)), Case((1, 2), (2, 1)), Case((1, 1), (1, 3)), Case((4, 1)), Case((1, 5))]
CASES += [Case((1, 2), (1, 2) if number % 2 else None, order) for number, order in enumerate(ORDERS[1:])]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=str)


every_tile = pytest.mark.parametrize("tile", [(2, 2), masks.TILE], ids=str)
"""Many with few keys, or two that nearly fill the grid; all else is tested with the first."""


@pytest.fixture
def tile():
    return (2, 2)


@pytest.fixture(autouse=True)
def set_tile(tile, monkeypatch):
    monkeypatch.setattr(masks, "TILE", tile)


def seen_by_definition(order, shape, window, dilation):
    """bool `(N, N)`, whether a query sees a key. Rank r predicts order[r], and holds the token of order[r - 1]."""
    cells = [divmod(cell, shape[1]) for cell in order.tolist()]
    seen = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    seen[:, 0] = True  # the start
    for query, (row, column) in enumerate(cells):
        for key in range(1, query + 1):
            down, right = abs(row - cells[key - 1][0]), abs(column - cells[key - 1][1])
            near = down <= dilation * window[0] and right <= dilation * window[1]
            seen[query, key] = near and down % dilation == right % dilation == 0
    return seen


@every_tile
@every_case
def test_tiles_and_rule_are_the_definition(case):
    model = case.model()
    for layer, dilation in zip(model.layers, case.dilation or (1, 1), strict=True):
        expected = seen_by_definition(make_order(case.order, SHAPE), SHAPE, case.window, dilation)
        ranks = torch.arange(30)
        assert layer.window.rule()(ranks[:, None], ranks).equal(expected)
        found, window = torch.zeros_like(expected), layer.window
        for rank, at in enumerate(window.at.tolist()):
            tile, query = divmod(at, window.queries.shape[1])
            assert window.queries[tile, query] == rank
            found[rank, window.keys[tile, window.mask[tile, query]]] = True
        assert found.equal(expected)
        assert window.mask.any(-1).all(), "a softmax over nothing"
        memory = layer.window.memory
        assert torch.equal(expected.sum(1), torch.tensor(memory.counts))


@every_tile
@every_case
def test_tiles_attend_as_one_dense_mask_does(case):
    """Values and gradients."""
    window = case.model().layers[0].window
    q, k, v = (torch.randn(2, 30, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ranks = torch.arange(30)
    mask = window.rule()(ranks[:, None], ranks)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    found, weights = window.attend(q, k, v), torch.randn(2, 30, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(found, dense)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, dense)]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@some_cases
def test_flex_attention_is_given_the_same_window(case):
    """On a CPU, as it is written, without the compiler."""
    window = case.model().layers[0].window
    q, k, v = torch.randn(3, 2, 30, 2, 16)
    torch.testing.assert_close(window.flex(q, k, v, flex_attention), window.attend(q, k, v))
    assert window.block_mask.shape == (1, 1, 30, 30)


@every_case
def test_logits_move_with_what_the_receptive_field_says(case):
    """With both layers, and nothing that comes later in the order."""
    model = case.model().double()
    tokens = draw_tokens(model, 6)
    field, ranks = model.receptive_field, model.order.argsort()
    earlier = ranks < ranks[:, None]
    assert moved_by(model, tokens, torch.arange(6) % 4, least=1e-12).equal(field)
    assert not (field & ~earlier).any() and not field.equal(earlier)


@every_tile
@every_case
def test_steps_give_the_logits_of_the_pass(case):
    model = case.model().double()
    tokens, labels = draw_tokens(model, 3), torch.tensor([0, 1, 3])
    steps = all_steps(model, tokens, labels)
    assert (steps - model(tokens, labels)[:, model.order]).abs().max() < 1e-9


def test_steps_with_gradients_on_follow_sampling_without():
    """What to keep is found out once, in inference mode here."""
    model, fresh = (make_prior("gpt", SHAPE, window=(1, 2)) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    model.sample(2)
    tokens = draw_tokens(model, 2)
    assert torch.equal(all_steps(model, tokens), all_steps(fresh, tokens))


def test_a_window_that_covers_the_grid_is_none(monkeypatch):
    """To the bit; and in tiles up to rounding."""
    plain = make_prior("gpt", SHAPE)
    tokens = draw_tokens(plain, 3)
    expected = plain(tokens)
    for window, tiled in (((4, 5), False), ((9, 9), False), ((4, 5), True), ((9, 9), True)):
        if tiled:
            monkeypatch.setattr(masks, "covers", lambda *_: False)
        model = make_prior("gpt", SHAPE, window=window)
        model.load_state_dict(plain.state_dict())
        assert (model.layers[0].window is not None) == tiled
        assert torch.equal(model(tokens), expected) if not tiled else (model(tokens) - expected).abs().max() < 1e-5
        assert model.receptive_field.equal(plain.receptive_field)


def test_a_layer_that_sees_everything_lets_all_through():
    """Beside one with a dilation, which does not."""
    model = make_prior("gpt", SHAPE, window=(4, 5), dilation=(2, 1)).double()
    assert moved_by(model, draw_tokens(model, 6), least=1e-12).equal(model.receptive_field)
    assert [layer.window is None for layer in model.layers] == [False, True]


def test_a_compiled_layer_attends_alike():
    """In one graph, and with gradients."""
    layer = Case((1, 2)).model().layers[0].double().train()
    x, rotations = torch.randn(2, 30, 32, dtype=torch.float64, requires_grad=True), torch.ones(30, 2, 8, 2).double()
    outputs = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = call(x, rotations)
        outputs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*outputs)


# What it costs


def window_of(side, window, dilation=1):
    return make_prior("gpt", (side, side), depth=1, window=window, dilation=(dilation,)).layers[0].window


@pytest.mark.parametrize("dilation", [1, 2])
def test_sampling_keeps_what_later_steps_see(dilation):
    """Of raster order the rows above, and the own row so far; each step reads its window and the start."""
    window = window_of(20, (3, 2), dilation)
    assert window.memory.size <= dilation * (3 * 20 + 2) + 2
    assert max(window.memory.counts) == 1 + 3 * 5 + 2


def test_a_pass_grows_with_the_positions_not_with_their_square():
    """Of FLOPs, and of what is kept for the backward pass."""
    costs = []
    for side in (16, 32):
        window, (q, k, v) = window_of(side, (2, 2)), torch.randn(3, 1, side**2, 2, 8)
        kept = saved_elements(lambda: window.attend(q.requires_grad_(), k, v))  # noqa: B023
        costs.append((flops(lambda: window.attend(q, k, v)), kept))  # noqa: B023
    assert all(large < 5 * small for small, large in zip(*costs, strict=True))


# What it is built from


def test_a_window_is_built_from_any_times_and_places():
    """As a prior of blocks needs it: queries of raster order that see the blocks before theirs, and a start."""
    cells, block = torch.cartesian_prod(torch.arange(4), torch.arange(5)), torch.arange(20) % 3
    targets = torch.cat([block[:, None], cells], 1)
    sources = torch.cat([torch.tensor([[-1, 0, 0]]), targets])
    window, (q, k, v) = Window(targets, sources, (1, 2)), torch.randn(3, 2, 21, 2, 4)
    far = (cells[:, None] - cells).abs() > torch.tensor([1, 2])
    mask = F.pad(~far.any(-1) & (block < block[:, None]), (1, 0), value=True)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, 1:], k, v)), attn_mask=mask)
    torch.testing.assert_close(window.attend(q[:, 1:], k, v), expected.transpose(1, 2))


def test_a_layer_can_be_pickled_after_flex_attention_and_trained_after_inference_mode():
    window = window_of(8, (2, 2))
    q = torch.randn(1, 64, 2, 16)
    k = torch.randn(1, len(window.sources), 2, 16)
    with torch.inference_mode():
        window.flex(q, k, k, flex_attention)
    attended = window.flex(q, k, k, flex_attention)
    assert not window.block_mask.kv_indices.is_inference()  # which a backward pass could not save
    again = pickle.loads(pickle.dumps(window))
    torch.testing.assert_close(again.flex(q, k, k, flex_attention), attended)

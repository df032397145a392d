"""Windows of attention: their receptive field with tiles or without, the memory of sampling, and their cost."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from costs import all_steps, flops, saved_elements
from small import ORDERS, draw_tokens, logits_of, make_prior, moved_by
from torch.nn.attention.flex_attention import flex_attention

from prior import masks
from prior.orders import make_order

SHAPE, CLIP = (5, 6), (3, 2, 5)  # 30 cells each


@dataclass(frozen=True)
class Case:
    """A window, the dilation of its two layers, and an order."""

    window: tuple[int, ...]
    dilation: tuple[int, int] | None = None
    order: str = "raster"
    shape: tuple[int, ...] = SHAPE

    def model(self, **config):
        return make_prior("gpt", self.shape, window=self.window, dilation=self.dilation, order=self.order, **config)


CASES = [Case((2, 1)), Case((1, 2), (2, 1)), Case((1, 1), (1, 3)), Case((4, 1)), Case((1, 5))]
CASES += [Case((1, 2), (1, 2) if number % 2 else None, order) for number, order in enumerate(ORDERS[1:])]
CASES += [
    Case((1, 1, 2), (1, 2), shape=CLIP),
    Case((1, 2, 1), (2, 1), shape=CLIP),
    Case((2, 1, 1), None, "random:3", CLIP),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


every_tile = pytest.mark.parametrize("tile", [(2, 2), masks.TILE], ids=str)
"""Many tiles with few keys, or two that nearly fill the grid; other tests use the first."""


@pytest.fixture
def tile():
    return (2, 2)


@pytest.fixture(autouse=True)
def set_tile(tile, monkeypatch):
    monkeypatch.setattr(masks, "TILE", tile)


def seen_by_definition(order, shape, window, dilation):
    """bool `(N, N)`, whether a query sees a key. Rank r predicts order[r], and holds the token of order[r - 1]."""
    cells = [np.unravel_index(cell, shape) for cell in order.tolist()]
    seen = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    seen[:, 0] = True  # the start
    for query, cell in enumerate(cells):
        for key in range(1, query + 1):
            offsets = [abs(int(one) - int(other)) for one, other in zip(cell, cells[key - 1], strict=True)]
            near = all(offset <= dilation * reach for offset, reach in zip(offsets, window, strict=True))
            seen[query, key] = near and all(offset % dilation == 0 for offset in offsets)
    return seen


@pytest.mark.sparse
@every_tile
@every_case
def test_tiles_and_rule_are_the_definition(case):
    model = case.model()
    for layer, dilation in zip(model.layers, case.dilation or (1, 1), strict=True):
        expected = seen_by_definition(make_order(case.order, case.shape), case.shape, case.window, dilation)
        ranks = torch.arange(30)
        assert layer.window.rule()(ranks[:, None], ranks).equal(expected)
        found, window = torch.zeros_like(expected), layer.window
        for rank, at in enumerate(window.at.tolist()):
            tile, query = divmod(at, window.queries.shape[1])
            assert window.queries[tile, query] == rank
            found[rank, window.keys[tile, window.mask[tile, query]]] = True
        assert found.equal(expected)
        assert window.mask.any(-1).all(), "a softmax over nothing"
        memory = layer.window.key_slots
        assert torch.equal(expected.sum(1), torch.tensor(memory.counts))


@every_case
def test_a_model_sees_its_windows_in_forward_and_in_steps(case):
    """With both layers: what `receptive_field` says, and nothing that comes later in the order."""
    model = case.model().double()
    tokens, labels, ranks = draw_tokens(model, 6), torch.arange(6) % 4, model.order.argsort()
    earlier, field = ranks < ranks[:, None], model.receptive_field
    assert moved_by(model, tokens, labels, least=1e-12).equal(field)
    assert not (field & ~earlier).any() and not field.equal(earlier)
    assert (all_steps(model, tokens, labels) - logits_of(model, tokens, labels)[:, model.order]).abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gets_the_same_window_after_inference_mode_and_pickling():
    """On a CPU, without the compiler."""
    window = CASES[1].model().layers[0].window
    q, k, v = torch.randn(3, 2, 30, 2, 16)
    with torch.inference_mode():
        window.flex(q, k, v, flex_attention)
    assert not window.block_mask.kv_indices.is_inference()  # which a backward pass could not save
    expected = window.attend(q, k, v)
    for each in (window, pickle.loads(pickle.dumps(window))):
        torch.testing.assert_close(each.flex(q, k, v, flex_attention), expected)


@pytest.mark.parametrize("window", [(4, 5), (9, 9), (2, 1, 4)])
def test_a_window_that_covers_the_grid_changes_nothing(window, monkeypatch):
    """To the last bit; and in tiles up to rounding."""
    shape = SHAPE if len(window) == 2 else CLIP
    plain = make_prior("gpt", shape)
    tokens = draw_tokens(plain, 3)
    for tiled in (False, True):
        if tiled:
            monkeypatch.setattr(masks, "covers", lambda *_: False)
        model = make_prior("gpt", shape, window=window)
        model.load_state_dict(plain.state_dict())
        assert (model.layers[0].window is not None) == tiled
        assert (model(tokens) - plain(tokens)).abs().max() <= (1e-5 if tiled else 0)
        assert model.receptive_field.equal(plain.receptive_field)


def test_a_pass_grows_with_the_positions_not_with_their_square():
    """FLOPs, and memory for the backward pass."""
    costs = []
    for side in (16, 32):
        window = make_prior("gpt", (side, side), depth=1, window=(2, 2)).layers[0].window
        assert window.key_slots.size <= 2 * side + 4, "rows above and the row so far"
        q, k, v = torch.randn(3, 1, side**2, 2, 8)
        kept = saved_elements(lambda: window.attend(q.requires_grad_(), k, v))  # noqa: B023
        costs.append((flops(lambda: window.attend(q, k, v)), kept))  # noqa: B023
    assert all(large < 5 * small for small, large in zip(*costs, strict=True))

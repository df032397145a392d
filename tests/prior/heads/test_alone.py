"""Heads without a prior: that all they say of ids agrees, for positions of one id and of several.

Covers: prior/heads/base.py, prior/heads/depth.py, prior/heads/logistic.py.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prior.heads.base import Softmax, head_problem, make_head
from prior.heads.depth import Depth, DepthConfig
from prior.heads.logistic import FLOOR, Logistic, LogisticConfig

from prior.heads import Head
from tokenizer import TokenGrid

HEADS: dict[str, Head] = {
    "softmax": Softmax(TokenGrid((2, 5), 20)),
    "softmax over levels": Softmax(TokenGrid((6, 5), 20, levels=3)),
    "depth of two": Depth(DepthConfig(dim=8), TokenGrid((4, 5), 20, levels=2)),
    "depth of three": Depth(DepthConfig(dim=8), TokenGrid((6, 5), 20, channels=3)),
    "logistic of grey": Logistic(LogisticConfig(components=2), TokenGrid((2, 5), 20, channels=1)),
    "logistic of colours": Logistic(LogisticConfig(components=4), TokenGrid((6, 5), 20, channels=3)),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_all_that_a_head_says_of_ids_agrees(name, dtype):
    torch.manual_seed(0)
    head = copy.deepcopy(HEADS[name])
    head = head if dtype == torch.bfloat16 and isinstance(head, Logistic) else head.to(dtype)
    outputs, ids = torch.randn(2, 5, head.size).to(dtype), torch.randint(20, (2, 5, head.together))
    logits = head.logits(outputs, ids).detach()
    assert logits.shape == (2, 5, head.together, 20)
    for level in range(head.together):
        torch.testing.assert_close(head.next_logits(outputs, ids[..., :level]).detach(), logits[..., level, :])
    found = head.log_probs(outputs, ids).detach()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide and found.shape == ids.shape
    expected = logits.to(wide).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    nats = head.nats(outputs, ids).detach()
    assert nats.dtype == torch.float32 and nats.shape == ids.shape
    torch.testing.assert_close(nats, -found.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.mean_nats(outputs, ids).detach(), nats.mean(), rtol=1e-5, atol=1e-5)
    for moved in range(head.together):
        changed = ids.clone()
        changed[..., moved] = (changed[..., moved] + 7) % 20
        before = [
            (head.logits(outputs, changed) - logits)[..., level, :].abs().max() == 0 for level in range(head.together)
        ]
        assert all(before[: moved + 1]), "an id is seen by those after it alone"


def test_labels_are_smoothed_over_all_ids():
    head, logits, ids = HEADS["softmax"], torch.randn(2, 5, 20), torch.randint(20, (2, 5, 1))
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits.transpose(1, 2), ids[..., 0], reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(head.nats(logits, ids, smoothing), expected[..., None])


def test_a_head_knows_its_settings_and_its_grid():
    for name, head in HEADS.items():
        expected = 3 if name in ("depth of three", "logistic of colours") else 2 if name == "depth of two" else 1
        assert (head.vocab_size, head.together) == (20, expected), name
    config = DepthConfig(dim=6, layers=3, hidden=5)
    assert Depth(config, TokenGrid((4, 5), 20, levels=2)).config == config
    assert HEADS["logistic of colours"].config.components == 4 and HEADS["softmax"].size == 20
    assert HEADS["logistic of colours"].size == 4 * (1 + 3 + 3 + 3) and HEADS["logistic of grey"].size == 2 * 3


def test_the_weights_of_a_depth_head_are_these():
    """Files hold them by name; no layer has a bias."""
    head = Depth(DepthConfig(dim=6, layers=2, hidden=5), TokenGrid((6, 5), 20, levels=3))
    layer = {"norm.weight": (6,), "gate_up.weight": (10, 6), "down.weight": (6, 5)}
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        **{f"id_embeddings.{level}": (20, 6) for level in range(2)},
        **{f"layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()},
        **{"level_embedding": (3, 6), "norm.weight": (6,), "head.weight": (20, 6)},
    }
    for table in (head.level_embedding, *head.id_embeddings):
        assert 0.05 < float(table.detach().std()) < 0.2


@pytest.mark.parametrize(("components", "means"), [(1, [0.0]), (2, [-1.0, 1.0]), (5, [-1.0, -0.5, 0.0, 0.5, 1.0])])
def test_the_logistics_of_an_untrained_network_are_spread_over_all_values(components, means):
    head = Logistic(LogisticConfig(components=components), TokenGrid((3, 1), 256, channels=3)).double()
    found, mixture = head.given(torch.zeros(1, head.size).double(), torch.zeros(1, 0).long())
    assert found == [] and mixture.means[0].tolist() == means
    torch.testing.assert_close(mixture.weights[0].exp(), torch.full((components,), 1 / components).double())
    table = head.next_logits(torch.zeros(1, head.size).double(), torch.zeros(1, 0).long())[0].exp()
    torch.testing.assert_close(table, table.flip(0))
    assert float(table.sum()) == pytest.approx(1) and float(table.min()) > FLOOR / 256


def head_of(kind: str, grid: TokenGrid, takes_heads: bool, takes_positions: bool, settings: Any = None) -> Any:
    """A configuration of some kind of prior."""
    head = settings if kind == "none" else Head.find(kind).Config()
    return SimpleNamespace(kind="some", head=head, grid=grid, takes_heads=takes_heads, takes_positions=takes_positions)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_a_head_fits_a_kind_that_takes_it(together):
    grid = TokenGrid((6, 5), 20, channels=together)
    several = f"some takes none for several ids at a position, of which this grid has {together}"
    for takes_positions in (False, True):
        fits = takes_positions or together == 1
        assert head_problem(head_of("logistic", grid, True, takes_positions)) == (None if fits else several)
        problem = head_problem(head_of("depth", grid, True, takes_positions))
        assert problem == (None if fits else several) if together > 1 else problem is not None
        none = "some has none but a logit for each id; leave it null (got 'logistic')"
        assert head_problem(head_of("logistic", grid, False, takes_positions)) == none
        assert head_problem(head_of("none", grid, False, takes_positions)) is None
    assert type(make_head(head_of("none", grid, True, True))) is Softmax
    assert type(make_head(head_of("logistic", grid, True, True))) is Logistic


@pytest.mark.parametrize("levels", [15, 16, 17])
def test_logistics_are_of_sixteen_values_and_more(levels):
    problem = Logistic.problem(LogisticConfig(), TokenGrid((2, 5), levels, channels=1))
    assert problem == (
        f"logistic is for pixels of at least 16 levels, and this grid has {levels}" if levels < 16 else None
    )

"""Steps of sampling add to running sums: they equal a whole pass, and together cost a share of one."""

import pytest
import torch
from costs import Operations, all_steps, flops
from givens.made_variants import ROWS, WIDE, every_variant, make_made
from prior.masks.running_sums import of_units, summed
from small import draw_tokens, generators, make_prior


@pytest.mark.sparse
@every_variant
@pytest.mark.parametrize("walk", ["its own", "another", "each its own"])
def test_steps_equal_a_whole_pass(variant, walk):
    model = make_made(variant, order="snake", order_agnostic=True).double()
    tokens, labels = draw_tokens(model, 5), torch.arange(5) % 4
    orders = torch.rand(5, 12).argsort(1)
    given = {"its own": None, "another": orders[0], "each its own": orders}[walk]
    path = (model.order if given is None else given).expand(5, 12)
    for rows in (5, 1):
        order = given if given is None or given.ndim == 1 else given[:rows]
        with torch.no_grad():
            whole = model(tokens[:rows], labels[:rows], order=order)
            steps, images = all_steps(model, tokens[:rows], labels[:rows], order), torch.arange(rows)[:, None]
            assert (steps - whole[images, path[:rows]]).abs().max() < 1e-9


@pytest.mark.parametrize("variant", WIDE)
@pytest.mark.parametrize("walk", ["another", "each its own"])
def test_cached_sampling_equals_uncached(variant, walk):
    model, orders = make_made(variant, order_agnostic=True), torch.rand(6, 12).argsort(1)
    order = orders[0] if walk == "another" else orders
    drawn = [model.sample(6, order=order, generator=generators(6), cache=cache) for cache in (True, False)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        ({"vocab_size": 2, "hidden": (500,)}, 0.51),  # half of the weights are masked
        ({"vocab_size": 2, "hidden": (200, 200)}, 0.51),
        ({"vocab_size": 2, "hidden": (200,), "direct": True}, 0.58),  # direct ones are added to all positions
        ({"vocab_size": 2, "hidden": (500,), "sigmoid": False}, 0.26),  # rows for one-hot products, then half
        ({"vocab_size": 2, "hidden": (200, 200), "sigmoid": False}, 0.4),
        ({"vocab_size": 2, "hidden": (200,), "direct": True, "sigmoid": False}, 0.2),
        ({"vocab_size": ROWS, "hidden": (200,)}, 0.51),
        ({"vocab_size": 16, "hidden": (30, 20)}, 0.3),  # fewer units than positions
        ({"vocab_size": 100, "hidden": (200, 200), "embedding": 8}, 0.8),
        ({"vocab_size": 100, "hidden": (200,), "embedding": 8, "direct": True}, 1.0),
        ({"vocab_size": 2, "hidden": (200,), "num_classes": 0}, 0.51),
    ],
)
def test_sampling_costs_a_share_of_one_pass(config, bound):
    model = make_prior("made", shape=(8, 8), order_agnostic=True, **config)
    whole, tokens, labels = flops(lambda: model(draw_tokens(model, 4))), draw_tokens(model, 4), torch.zeros(4).long()
    for order in (None, torch.rand(4, 64).argsort(1)):
        steps = flops(lambda order=order: all_steps(model, tokens, labels, order))
        assert steps <= bound * whole


@pytest.mark.parametrize("num_classes", [0, 3])
def test_samples_can_be_counted(num_classes):
    model = make_made("two ids", num_classes=num_classes)
    assert 0 < flops(lambda: model.sample(4)) < flops(lambda: model(draw_tokens(model, 4)))


def test_a_step_is_few_operations_whatever_the_sizes():
    counts = set()
    for shape, rows in (((4, 4), 4), ((16, 16), 32)):
        model = make_prior("made", shape=shape, hidden=(512, 512), order_agnostic=True)
        state, token = model.start(rows, torch.zeros(rows).long()), torch.zeros(rows).long()
        with torch.inference_mode():
            state.step(None)
            for _ in range(8):
                with Operations() as step:
                    state.step(token)
                counts.add(len(step.names))
                assert step.largest <= rows * 512, "a step may not copy weights or maps"
    assert max(counts) <= 40


@pytest.mark.parametrize("variant", ["three layers", *WIDE])
def test_steps_equal_a_whole_pass_whatever_the_degrees(variant):
    """Drawn ones are in no order: units are put into one, in every layer, with their weights and their bias."""
    model = make_made(variant, connectivity_agnostic=True).double()
    tokens, labels = draw_tokens(model, 3), torch.arange(3)
    with torch.no_grad():
        own = model(tokens, labels)
        for number in (1, 2):
            with model.connected(number):
                whole = model(tokens, labels)
                assert (all_steps(model, tokens, labels) - whole[:, model.order]).abs().max() < 1e-9
            assert (whole - own).abs().max() > 1e-3


def test_units_in_order_are_left_where_they_are():
    weight = torch.randn(3, 4)
    assert of_units(weight, 1, torch.arange(4)) is weight
    assert torch.equal(of_units(weight, 1, torch.tensor([2, 0, 3, 1])), weight[:, [2, 0, 3, 1]])
    assert torch.equal(of_units(weight, 0, torch.tensor([1, 0, 2])), weight[[1, 0, 2]])
    assert torch.equal(of_units(weight, -1, torch.tensor([0, 1, 3, 2])), weight[:, [0, 1, 3, 2]])


@pytest.mark.parametrize("ids", [False, True])
def test_units_sum_over_all_positions(ids):
    weight = torch.randn(5, 4, 6).double()
    inputs = torch.randint(4, (3, 5)) if ids else torch.randn(3, 5, 4).double()
    features = torch.nn.functional.one_hot(inputs, 4).double() if ids else inputs
    torch.testing.assert_close(summed(inputs, weight), torch.einsum("bnw,nwu->bu", features, weight))

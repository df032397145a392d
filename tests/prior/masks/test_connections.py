"""Connections: degrees spread evenly or drawn, and the masks made of them, which are kept as long as they hold."""

import copy
import itertools

import pytest
import torch
from made_variants import earlier, every_variant, make_made, make_same
from small import draw_tokens, make_prior

from pipelines.training.schedule import move_average
from prior.masks.connections import Memory, even_degrees, random_degrees

# Degrees


@pytest.mark.parametrize("hidden", [(11,), (11, 11), (23, 11), (200, 40, 17), (10,), (11, 10), (3, 40), (1,)])
def test_the_receptive_field_is_that_of_the_product_of_masks(hidden):
    """Paths from input to output, as the paper counts them: the product of all masks."""
    model = make_prior("made", hidden=hidden, order="z_curve")
    degrees, ranks = model.degrees(), torch.argsort(model.order)
    paths = (degrees[0][:, None] > ranks).double()
    for below, own in itertools.pairwise(degrees):
        paths = (own[:, None] >= below).double() @ paths
    paths = (ranks[:, None] >= degrees[-1]).double() @ paths
    assert not (paths > 0)[~earlier(model.order)].any()
    assert model.receptive_field.equal(paths > 0)
    assert model.receptive_field.equal(earlier(model.order)) == (min(hidden) >= 11)


def test_evenly_spread_degrees():
    for units, size in ((500, 784), (783, 784), (784, 784), (8000, 784), (11, 12), (5, 12), (1, 12), (4, 2), (3, 1)):
        degrees = even_degrees(units, size)
        assert degrees.shape == (units,) and degrees.equal(degrees.sort().values)
        assert degrees.min() >= 1 and degrees.max() == max(1, size - 1)
        counts = degrees.bincount(minlength=size)[1:]
        assert size == 1 or counts.max() - counts.min() <= 1


def test_random_degrees_leave_no_unit_blind():
    for _ in range(50):
        degrees = random_degrees((4, 30, 2, 30), 12)
        assert [len(each) for each in degrees] == [4, 30, 2, 30]
        assert all(each.min() >= 1 and each.max() <= 11 for each in degrees)
        assert all(own.min() >= below.min() for below, own in itertools.pairwise(degrees))
    assert torch.cat([random_degrees((100,), 12)[0] for _ in range(20)]).unique().tolist() == list(range(1, 12))
    assert random_degrees((3,), 1)[0].tolist() == [1, 1, 1]


# Masks and masked weights are kept


@pytest.fixture
def builds(monkeypatch):
    """What is built, in turn: masks, and weights multiplied by them."""
    told, get = [], Memory.get

    def counting(self, made_of, build):
        what = "weights" if isinstance(made_of[0], torch.nn.Parameter) else "masks"
        return get(self, made_of, lambda: (told.append(what), build())[1])

    monkeypatch.setattr(Memory, "get", counting)
    return told


@every_variant
def test_masks_are_built_once_and_weights_masked_once_per_change(variant, builds):
    model = make_made(variant, order_agnostic=True)
    tokens, order = draw_tokens(model, 2), torch.randperm(12)

    def built(passes, **given):
        builds.clear()
        for _ in range(passes):
            model(tokens, **given)
        return list(builds)

    with torch.no_grad():
        assert built(3) == ["masks", "weights"] and built(2) == []
        assert built(2, order=order) == ["masks", "weights"]
        assert built(2) == ["masks", "weights"]
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert built(2) == ["weights"]
    model.train()
    assert built(3) == []  # trained weights are multiplied at every step, by the masks that there are


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", ["step", "step after a look", "half", "load", "average"])
def test_kept_weights_are_never_stale(mode, change):
    model, tokens = make_made("three layers", num_classes=0), torch.randint(5, (2, 3, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with mode():
        before = model(tokens)
    if change.startswith("step"):
        model.loss(model.train()(tokens), tokens).backward()  # what was kept in inference mode is not in its way
        if "look" in change:
            with mode():
                model.eval()(tokens)
        optimizer.step()
        optimizer.zero_grad()
    elif change == "half":
        model.half().float()
    elif change == "load":
        model.load_state_dict(make_made("three layers", num_classes=0).state_dict())
    else:
        averaged = torch.optim.swa_utils.AveragedModel(model)
        with mode():
            averaged.module.eval()(tokens)
        move_average(averaged, model, 0.9)
        move_average(averaged, make_made("three layers", num_classes=0), 0.9)
        model = averaged.module.eval()
    with mode():
        after, fresh = model.eval()(tokens), make_same(model)(tokens)
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def test_a_copy_keeps_nothing_of_the_original():
    model, tokens = make_made("three layers"), torch.randint(5, (2, 3, 4))
    with torch.no_grad():
        model(tokens)
        other = copy.deepcopy(model)
        assert not other._connections.masked.last[2] and not other._connections.masks.last[2]
        other.input.zero_()
        assert torch.equal(other(tokens), make_same(other)(tokens)) and not torch.equal(other(tokens), model(tokens))

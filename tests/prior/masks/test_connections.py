"""Connections: degrees spread evenly or drawn, and the masks made of them, which are kept as long as they hold."""

import copy
import itertools
import threading

import pytest
import torch
from givens.made_variants import earlier, every_variant, make_made, make_same
from prior.masks.connections import Memory, build_masks, chosen_degrees, degrees_of, even_degrees, random_degrees
from small import draw_tokens, make_prior

from pipelines.training.schedule import move_average

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
        model.loss_from_outputs(
            model.train()(tokens), tokens
        ).backward()  # what was kept in inference mode is not in its way
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


def test_degrees_are_chosen_for_one_model_in_one_thread_while_a_block_lasts():
    one, two = make_prior("made"), make_prior("made")
    own, given, other = degrees_of(one), torch.ones(253).long(), torch.full((253,), 2)
    in_a_thread = []
    with chosen_degrees(one, given):
        assert degrees_of(one) is given and degrees_of(two) is two.all_degrees
        with chosen_degrees(two, other):
            assert degrees_of(one) is given and degrees_of(two) is other
            with chosen_degrees(one, other):
                assert degrees_of(one) is other
            assert degrees_of(one) is given
        assert degrees_of(two) is two.all_degrees
        thread = threading.Thread(target=lambda: in_a_thread.append(degrees_of(one)))
        thread.start()
        thread.join()
    assert degrees_of(one) is own is in_a_thread[0]


def test_masks_are_where_a_path_may_be():
    """From a token to units that see it, on to those of at least their degree, and out to places behind."""
    ranks, degrees = torch.tensor([2, 0, 1, 3]), [torch.tensor([1, 2, 3]), torch.tensor([1, 3])]
    masks = build_masks(ranks, degrees, 2, torch.float64)
    assert [tuple(mask.shape) for mask in masks] == [(4, 1, 3), (2, 3), (4, 1, 8), (4, 1, 2)]
    assert all(mask.dtype == torch.float64 and not mask.requires_grad for mask in masks)
    for token, rank in enumerate(ranks.tolist()):
        assert masks[0][token, 0].tolist() == [float(rank < degree) for degree in (1, 2, 3)]
        assert masks[3][token, 0].tolist() == [float(degree <= rank) for degree in (1, 3)]
        seen_by = [float(rank < other) for other in ranks.tolist() for _ in range(2)]
        assert masks[2][token, 0].tolist() == seen_by
    assert masks[1].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert len(build_masks(ranks, degrees, None, torch.float32)) == 3


def test_what_was_built_is_kept_until_a_tensor_is_another_or_has_changed():
    memory, one, two, counts = Memory(), torch.zeros(2), torch.zeros(2), itertools.count()

    def built(*made_of: torch.Tensor) -> int:
        return memory.get(list(made_of), lambda: [next(counts)])[0]

    assert [built(one, two), built(one, two)] == [0, 0]
    assert [built(two, one), built(two, one), built(two), built(two)] == [1, 1, 2, 2]
    two.add_(1)
    assert [built(two), built(two)] == [3, 3]
    with torch.inference_mode():
        kept = torch.zeros(2)
        assert [built(kept), built(kept), built(two, kept), built(two, kept)] == [4, 4, 5, 5]

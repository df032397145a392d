"""The masked autoencoder against its paper's masks, and what being agnostic of orders and connections promises.

Covers: prior/connections.py, prior/running_sums.py.
"""

import copy
import itertools
import json
import shutil

import pytest
import torch
import yaml
from costs import Operations, all_steps, flops
from launch import losses, train_prior
from safetensors.torch import load_file, save_file
from small import generators, make_prior

from pipelines import ImagePipeline
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.training.schedule import ema_update
from prior import Prior
from prior.connections import Memory, even_degrees, random_degrees
from prior.made import DENSE_WIDTH
from prior.orders import make_order
from prior.running_sums import summed
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files.writing import write_manifest

ROWS = DENSE_WIDTH + 3  # so many ids that rows of weights are picked
VARIANTS = {
    "one layer": {"hidden": (99,)},
    "three layers": {"hidden": (99, 132, 88)},
    "direct": {"hidden": (99,), "direct": True},
    "two ids": {"hidden": (99, 88), "vocab_size": 2},
    "two ids, direct": {"hidden": (99,), "direct": True, "vocab_size": 2},
    "two ids, one-hot": {"hidden": (99,), "direct": True, "vocab_size": 2, "sigmoid": False},
    "rows": {"hidden": (99, 88), "vocab_size": ROWS},
    "rows, direct": {"hidden": (99,), "direct": True, "vocab_size": ROWS},
    "embedded": {"hidden": (99, 88), "embedding": 4},
    "embedded, direct": {"hidden": (99,), "embedding": 4, "direct": True},
    "width one": {"hidden": (99,), "embedding": 1, "direct": True},
    "narrow": {"hidden": (7, 5)},
    "narrow, direct": {"hidden": (7, 5), "direct": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
some_orders = pytest.mark.parametrize("order", ["raster", "snake", "random:3"])
WIDE = [name for name in VARIANTS if not name.startswith("narrow")]


def make(variant, **config):
    return make_prior("made", **{**VARIANTS[variant], **config})


def draw_tokens(model, count):
    return torch.randint(model.grid.vocab_size, (count, *model.grid.shape))


def moved_by(model, tokens, labels, **inputs):
    """bool `(N, N)`: [i, j] where logits at i move, in some image, when token j does."""
    vocab, size = model.grid.vocab_size, len(model.grid)
    before, moved = model(tokens, labels, **inputs), torch.zeros(size, size, dtype=torch.bool)
    for at in range(size):
        changed = tokens.flatten(1).clone()
        changed[:, at] = (changed[:, at] + torch.randint(1, vocab, changed[:, at].shape)) % vocab
        moved[:, at] = (model(changed.view_as(tokens), labels, **inputs) - before).abs().amax((0, 2)) > 1e-9
    return moved


def keep_awake(model):
    """Weights above zero: no unit is zero, whatever the tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()


def earlier(order):
    """bool `(N, N)`: [i, j] where j comes before i."""
    ranks = torch.argsort(order)
    return ranks < ranks[:, None]


def by_the_paper(model, tokens, labels, order, degrees):
    """Logits of one image from the paper's equations, position by position and unit by unit."""
    ranks, config = torch.argsort(order).tolist(), model.config
    table = torch.eye(config.grid.vocab_size).double() if model.embedding is None else model.embedding
    inputs = [table[token] for token in tokens.flatten()]
    bias = [b.shared + (0 if b.own is None else b.own[labels]) for b in model.biases]
    # Eq. 12 has m(k) >= d with inputs numbered from 1: here ranks count from 0.
    below = []
    for k, degree in enumerate(degrees[0].tolist()):
        seen = [x @ model.input[n, :, k] for n, x in enumerate(inputs) if degree >= ranks[n] + 1]
        below.append((bias[0][k] + sum(seen)).clamp(min=0))
    for depth, weight in enumerate(model.hidden, 1):
        sums = []
        for k, degree in enumerate(degrees[depth].tolist()):
            seen = [weight[k, j] * h for j, h in enumerate(below) if degree >= degrees[depth - 1][j]]
            sums.append((bias[depth][k] + sum(seen)).clamp(min=0))
        below = sums
    rows = []
    for n, rank in enumerate(ranks):  # eq. 13: d > m(k)
        x = bias[-1].view(len(ranks), -1)[n]
        x = x + sum(model.output[n, :, k] * h for k, h in enumerate(below) if rank + 1 > degrees[-1][k])
        if model.direct is not None:  # section 4.2: strictly lower triangular
            x = x + sum(
                y @ model.direct[j].view(len(y), len(ranks), -1)[:, n] for j, y in enumerate(inputs) if ranks[j] < rank
            )
        x = x if model.head is None else model.head @ x
        rows.append(x if model.head_bias is None else x + model.head_bias[n])
    return torch.stack(rows)


# Masks


@every_variant
def test_logits_are_those_of_the_paper(variant):
    model = make(variant, shape=(2, 3), order="random:2", num_classes=2, order_agnostic=True).double()
    tokens, labels = draw_tokens(model, 4), torch.tensor([0, 1, 2, 2])
    order, degrees = torch.tensor([3, 0, 5, 1, 4, 2]), random_degrees(model.config.hidden, 6)
    with torch.no_grad():
        for given in ({}, {"order": order}, {"degrees": degrees}, {"order": order, "degrees": degrees}):
            logits = model(tokens, labels, **given)
            settings = (given.get("order", model.order), given.get("degrees", model.degrees()))
            for k in range(4):
                expected = by_the_paper(model, tokens[k], int(labels[k]), *settings)
                assert (logits[k] - expected).abs().max() < 1e-10


@every_variant
@some_orders
def test_later_logits_see_all_that_the_receptive_field_says(variant, order):
    model = make(variant, order=order).double()
    if "narrow" in variant:  # so few units must not rest
        keep_awake(model)
    moved = moved_by(model, draw_tokens(model, 64), torch.arange(64) % 4)
    if variant == "narrow":
        assert model.receptive_field.dtype == torch.bool
        assert not model.receptive_field.equal(earlier(model.order))
        assert moved.equal(model.receptive_field)
    else:
        assert moved.equal(earlier(model.order)) and moved.equal(model.receptive_field)


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


def test_summing_rows_equals_multiplying_one_hot_features():
    ids, weight = torch.randint(6, (5, 4)), torch.randn(4, 6, 9)
    features = torch.nn.functional.one_hot(ids, 6).float()
    assert torch.allclose(summed(ids, weight), summed(features, weight), atol=1e-5)


@every_variant
def test_masks_multiply_and_are_neither_weights_nor_saved(variant):
    model = make(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(value.is_floating_point() and (value != 0).all() for value in before.values())
    model(draw_tokens(model, 2)).sum().backward()
    model.sample(2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(before) == {name for name, _ in model.named_parameters()}


def test_gradients_reach_exactly_what_is_not_masked():
    model = make("three layers", num_classes=0).double()
    keep_awake(model)
    tokens = draw_tokens(model, 500)
    model.loss(model(tokens), tokens).backward()
    (first, second, last), ranks = model.degrees(), model.ranks[:, None]
    assert (model.input.grad != 0).any(1).equal(ranks < first)
    assert (model.hidden[0].grad != 0).equal(first <= second[:, None])
    assert (model.output.grad != 0).any(1).equal(last <= ranks)


def test_dropout_is_only_trained_with():
    model = make("three layers", dropout=0.5)
    tokens = draw_tokens(model, 3)
    assert torch.equal(model(tokens), model(tokens)) and torch.equal(model(tokens), make_same(model)(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))


def make_same(model, **config):
    """The same weights, configured otherwise."""
    same = Prior.create("made", **{**model.config.__dict__, "dropout": 0.0, **config})
    same.load_state_dict(model.state_dict())
    return same.eval()


# Densities


@every_variant
@some_orders
def test_probabilities_sum_to_one(variant, order):
    shape, vocab = ((1, 2), ROWS) if "rows" in variant else ((2, 3), 2 if "two" in variant else 3)
    model = make(variant, shape=shape, vocab_size=vocab, order=order).double()
    size = shape[0] * shape[1]
    grids = torch.tensor(list(itertools.product(range(vocab), repeat=size))).reshape(-1, *shape)
    with torch.no_grad():
        total = model.log_prob(grids, torch.full((len(grids),), 1)).double().exp().sum()
    assert abs(float(total) - 1) < 1e-5


def test_each_draw_of_orders_and_degrees_is_another_density():
    """The same weights, each draw normalised and causal in its order; sampling follows the order, too."""
    model = make_prior(
        "made", shape=(2, 3), vocab_size=3, hidden=(40, 30), order_agnostic=True, connectivity_agnostic=True
    ).double()
    grids = torch.tensor(list(itertools.product(range(3), repeat=6))).reshape(-1, 2, 3)
    ids, totals = grids.reshape(-1, 6, 1), []
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            drawn = model.training_inputs(grids, 0.5)
            log_probs = model(grids, **drawn).log_softmax(-1).gather(-1, ids).sum((1, 2))
            assert abs(float(log_probs.exp().sum()) - 1) < 1e-10
            totals.append(log_probs)
            moved = moved_by(model, grids[::7], None, **drawn)
            assert not moved[~earlier(drawn["order"])].any() and moved.any()
            fewer = {"degrees": drawn["degrees"]}
            assert not torch.allclose(model(grids, **fewer), model(grids), atol=1e-2)
            again = {"degrees": [each.flip(0) for each in drawn["degrees"]]}
            assert not torch.allclose(model(grids, **fewer), model(grids, **again), atol=1e-2)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(totals, 2))


def test_training_draws_come_from_the_seed():
    model = make_prior("made", hidden=(20, 30), order_agnostic=True, connectivity_agnostic=True)
    tokens = draw_tokens(model, 2)

    def draw(seed, model=model):
        torch.manual_seed(seed)
        return model.training_inputs(tokens, 0.3)

    one, other = draw(0), draw(1)
    assert set(one) == {"order", "degrees"} and [len(each) for each in one["degrees"]] == [20, 30]
    assert one["order"].sort().values.equal(torch.arange(12))
    assert one["order"].equal(draw(0)["order"]) and not one["order"].equal(other["order"])
    for a, b, c in zip(one["degrees"], draw(0)["degrees"], other["degrees"], strict=True):
        assert a.equal(b) and not a.equal(c)
    assert set(draw(0, make_same(model, connectivity_agnostic=False))) == {"order"}
    assert set(draw(0, make_same(model, order_agnostic=False))) == {"degrees"}
    assert draw(0, make_same(model, order_agnostic=False, connectivity_agnostic=False)) == {}
    assert not make_same(model, order_agnostic=False).any_order and model.any_order
    model.loss(model(tokens, **one), tokens, **one).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Sampling


@every_variant
@pytest.mark.parametrize("walk", ["its own", "another", "each its own"])
def test_steps_equal_a_whole_pass(variant, walk):
    model = make(variant, order="snake", order_agnostic=True).double()
    tokens, labels = draw_tokens(model, 5), torch.arange(5) % 4
    orders = torch.rand(5, 12).argsort(1)
    given = {"its own": None, "another": orders[0], "each its own": orders}[walk]
    path = (model.order if given is None else given).expand(5, 12)
    for rows in (5, 1):
        order = given if given is None or given.ndim == 1 else given[:rows]
        with torch.no_grad():
            whole = model(tokens[:rows], labels[:rows], order=order)
            state, token, images = model.start(rows, labels[:rows], order=order), None, torch.arange(rows)
            for rank in range(12):
                at = path[:rows, rank]
                assert (model.next_logits(state, token) - whole[images, at]).abs().max() < 1e-9
                token = tokens.flatten(1)[images, at]


@pytest.mark.parametrize("variant", WIDE)
@pytest.mark.parametrize("walk", ["another", "each its own"])
def test_cached_sampling_equals_uncached(variant, walk):
    model, orders = make(variant, order_agnostic=True), torch.rand(6, 12).argsort(1)
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
    model = make("two ids", num_classes=num_classes)
    assert 0 < flops(lambda: model.sample(4)) < flops(lambda: model(draw_tokens(model, 4)))


def test_a_step_is_few_operations_whatever_the_sizes():
    counts = set()
    for shape, rows in (((4, 4), 4), ((16, 16), 32)):
        model = make_prior("made", shape=shape, hidden=(512, 512), order_agnostic=True)
        state, token = model.start(rows, torch.zeros(rows).long()), torch.zeros(rows).long()
        with torch.inference_mode():
            model.next_logits(state, None)
            for _ in range(8):
                with Operations() as step:
                    model.next_logits(state, token)
                counts.add(len(step.names))
                assert step.largest <= rows * 512, "a step may not copy weights or maps"
    assert max(counts) <= 40


# The published sizes


def test_published_sizes():
    """784-8000-784 (Germain et al. 2015), and that of the black and white garments: one weight for each pixel and
    unit, one logit for each pixel."""
    for units, count in ((8000, 12_552_784), (1000, 1_569_784)):
        with torch.device("meta"):
            model = Prior.create("made", grid=TokenGrid((28, 28), 2), hidden=(units,))
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert count == 784 * units + units + units * 784 + 784


def test_direct_connections_have_to_be_few():
    with pytest.raises(ValueError, match="direct: .*embedding"):
        Prior.create("made", grid=TokenGrid((16, 16), 512), direct=True)
    with torch.device("meta"):
        Prior.create("made", grid=TokenGrid((16, 16), 512), direct=True, embedding=16)


# Two ids


def test_of_two_ids_one_number_goes_in_and_one_logit_comes_out():
    model = make("two ids, direct", shape=(2, 3), num_classes=0).double()
    tokens = draw_tokens(model, 4)
    logits, signs = model(tokens), 2 * tokens.flatten(1).double() - 1
    ranks, (degrees,) = model.ranks, model.degrees()
    below = (signs @ (model.input[:, 0] * (ranks[:, None] < degrees)) + model.biases[0].shared).clamp(min=0)
    z = below @ (model.output[:, 0] * (degrees <= ranks[:, None])).t() + model.biases[1].shared
    z = z + signs @ (model.direct[:, 0] * (ranks[:, None] < ranks))
    assert torch.allclose(logits.softmax(-1)[..., 1], z.sigmoid(), atol=1e-12)
    assert model.input.shape == (6, 1, 99) and model.output.shape == (6, 1, 99) and model.direct.shape == (6, 1, 6)


@pytest.mark.parametrize("variant", ["two ids", "two ids, one-hot", "three layers"])
def test_the_loss_is_the_cross_entropy(variant):
    model = make(variant).double()
    tokens = draw_tokens(model, 4)
    logits = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert model.loss(logits, tokens).item() == pytest.approx(expected.item(), abs=1e-6)


OLD = {  # of two ids, saved when there was no `sigmoid`: configuration, shapes; log p, sample and fingerprint then
    "one-hot": (
        {"num_classes": 2, "order": "snake", "hidden": [13, 12], "direct": True, "embedding": None},
        {
            "input": (12, 2, 13),
            "hidden.0": (12, 13),
            "output": (12, 2, 12),
            "direct": (12, 2, 24),
            "biases.0.shared": (13,),
            "biases.0.own": (3, 13),
            "biases.1.shared": (12,),
            "biases.1.own": (3, 12),
            "biases.2.shared": (24,),
            "biases.2.own": (3, 24),
        },
        [-16.76691436767578, -15.385770797729492, -16.165964126586914],
        "101000011110101000111100",
        "34db8390d9cc4757124eb697aae17da11ea1f029418286e9f83bdb7886b11c4a",
    ),
    "embedded": (
        {"num_classes": 0, "order": "raster", "hidden": [12], "direct": False, "embedding": 3},
        {
            "embedding": (2, 3),
            "input": (12, 3, 12),
            "output": (12, 3, 12),
            "head": (2, 3),
            "head_bias": (12, 2),
            "biases.0.shared": (12,),
            "biases.1.shared": (36,),
        },
        [-9.64004898071289, -7.4328508377075195, -10.454418182373047],
        "101010000011101111001111",
        "81edd6969ecc97f89d478faef8f8b786d7c30518fbbde9612dc4000c12df3fa7",
    ),
}


@pytest.mark.parametrize("form", OLD)
def test_an_old_folder_of_two_ids_loads_and_gives_the_same(form, tmp_path):
    told, shapes, log_probs, drawn, fingerprint = OLD[form]
    config = {
        "kind": "made",
        "grid": {"shape": [3, 4], "vocab_size": 2},
        "tokenizer": "",
        **told,
        "dropout": 0.0,
        "order_agnostic": False,
        "connectivity_agnostic": False,
    }
    weights = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        steps = torch.arange(torch.Size(shape).numel()) * (index + 3) % 17
        weights[name] = ((steps - 8) / 8).view(shape)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "old/model.safetensors")
    model = Prior.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "again")
    for same in (model, Prior.from_pretrained(tmp_path / "again")):
        assert same.fingerprint() == fingerprint
        tokens = (torch.arange(36) ** 3 // 5 % 2).view(3, 3, 4)
        assert same.log_prob(tokens).tolist() == pytest.approx(log_probs, abs=1e-4)
        sample = same.sample(2, generator=torch.Generator().manual_seed(3))
        assert "".join(map(str, sample.flatten().tolist())) == drawn


def test_models_with_and_without_a_sigmoid_are_not_the_same():
    ours, other = (make("two ids", sigmoid=sigmoid) for sigmoid in (True, False))
    assert ours.config.identity() != other.config.identity()
    more, same = (make("three layers", sigmoid=sigmoid) for sigmoid in (True, False))  # where there are more ids
    assert more.config.identity() == same.config.identity()


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
    model = make(variant, order_agnostic=True)
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
    model, tokens = make("three layers", num_classes=0), torch.randint(5, (2, 3, 4))
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
        model.load_state_dict(make("three layers", num_classes=0).state_dict())
    else:
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_update(0.9))
        with mode():
            averaged.module.eval()(tokens)
        averaged.update_parameters(model)
        averaged.update_parameters(make("three layers", num_classes=0))
        model = averaged.module.eval()
    with mode():
        after, fresh = model.eval()(tokens), make_same(model)(tokens)
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def test_a_copy_keeps_nothing_of_the_original():
    model, tokens = make("three layers"), torch.randint(5, (2, 3, 4))
    with torch.no_grad():
        model(tokens)
        other = copy.deepcopy(model)
        assert not other._connections.masked.built and not other._connections.masks.built
        other.input.zero_()
        assert torch.equal(other(tokens), make_same(other)(tokens)) and not torch.equal(other(tokens), model(tokens))


# Ensembles of orders and connectivities

ENSEMBLES = {
    "masks": {"hidden": (7, 6), "connectivity_agnostic": True},
    "masks, two ids": {"hidden": (7, 6), "vocab_size": 2, "connectivity_agnostic": True, "direct": True},
    "orders and masks": {"hidden": (7,), "vocab_size": 2, "connectivity_agnostic": True, "order_agnostic": True},
}


def make_ensemble(name, **config):
    torch.manual_seed(5)
    config = {"shape": (2, 2), "vocab_size": 3, "num_classes": 2, **ENSEMBLES[name], **config}
    model, orders = make_prior("made", **config), 3 if config.get("order_agnostic") else 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that its members are far apart
    grids = torch.tensor(list(itertools.product(range(config["vocab_size"]), repeat=4))).reshape(-1, 2, 2)
    return model, grids, {"num_orders": orders, "num_masks": 4}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_mixture_of_orders_and_masks_is_a_density(name):
    model, grids, mixture = make_ensemble(name)
    model, labels = model.double(), torch.ones(len(grids), dtype=torch.long)
    with torch.no_grad():
        mixed = model.log_prob(grids, labels, **mixture).exp()
        assert abs(float(mixed.sum()) - 1) < 1e-5
        members = []
        for number in range(4):  # each as the paper has it
            degrees = model.numbered_degrees(number)
            for order in model.orders(mixture["num_orders"]):
                walk = model.order if order is None else make_order(order, (2, 2))
                logits = torch.stack([by_the_paper(model, grid, 1, walk, degrees) for grid in grids])
                each = logits.log_softmax(-1).gather(-1, grids.reshape(-1, 4, 1)).sum((1, 2))
                members.append(each.exp())
        assert torch.allclose(mixed.double(), torch.stack(members).mean(0), atol=1e-6)
        assert torch.stack(members).std(0).max() > 0.02, "the members are to differ"
        assert torch.equal(model.log_prob(grids, labels), model.log_prob(grids, labels, num_masks=1))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_samples_of_a_mixture_have_its_frequencies(name):
    model, grids, mixture = make_ensemble(name)
    count, labels = 20_000, torch.ones(20_000, dtype=torch.long)
    drawn = model.sample(count, labels, generator=torch.Generator().manual_seed(1), **mixture)
    base = model.grid.vocab_size ** torch.arange(3, -1, -1)
    found = (drawn.flatten(1) * base).sum(1).bincount(minlength=len(grids)).double() / count
    with torch.no_grad():
        expected = model.log_prob(grids, labels[: len(grids)], **mixture).exp().double()
        own = model.log_prob(grids, labels[: len(grids)]).exp().double()
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4.5 * spread + 1e-6).all()
    assert ((found - own).abs() > 10 * spread).any()


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_image_of_a_mixture_depends_on_its_generator_alone(name):
    model, _, mixture = make_ensemble(name)
    labels, many = torch.arange(12) % 3, {"num_masks": 3, "num_orders": mixture["num_orders"]}
    drawn = model.sample(12, labels, generator=generators(12), **many)
    for more in ({"cache": False}, {"parallel": True}):
        assert torch.equal(model.sample(12, labels, generator=generators(12), **many, **more), drawn)
    for k in (0, 5, 11):
        assert torch.equal(model.sample(1, labels[[k]], generator=[generators(12)[k]], **many)[0], drawn[k])
    known = torch.tensor([[True, False], [False, True]])
    kept = model.sample(12, labels, generator=generators(12), tokens=drawn[0], known=known, **many)
    assert (kept[:, known] == drawn[0][known]).all() and model.degrees()[0].equal(even_degrees(7, 4))


@pytest.mark.parametrize("walk", ["its own", "each its own"])
@pytest.mark.parametrize("number", [0, 1, 2])
@every_variant
def test_steps_of_a_drawn_connectivity_equal_a_whole_pass(variant, walk, number):
    model = make(variant, order="snake", order_agnostic=True, connectivity_agnostic=True).double()
    tokens, labels = draw_tokens(model, 5), torch.arange(5) % 4
    order = torch.rand(5, 12).argsort(1) if walk == "each its own" else None
    path = (model.order if order is None else order).expand(5, 12)
    with torch.no_grad(), model.connected(number):
        whole = model(tokens, labels, order=order)
        state, token = model.start(5, labels, order=order), None
        for at in path.t():
            assert (model.next_logits(state, token) - whole[torch.arange(5), at]).abs().max() < 1e-9
            token = tokens.flatten(1)[torch.arange(5), at]
    assert number == 0 or not torch.allclose(model(tokens, labels, order=order), whole)


def test_a_mixture_is_refused_where_there_is_none():
    tokens = torch.zeros(1, 3, 4, dtype=torch.long)
    for model in (make_prior("made"), make_prior("gpt")):
        with pytest.raises(ValueError, match="num_masks: .* as it was made has one connectivity"):
            model.log_prob(tokens, num_masks=2)
    with pytest.raises(ValueError, match="num_masks: made as it was made has one connectivity"):
        make_prior("made").sample(2, num_masks=2)
    agnostic = make_prior("made", connectivity_agnostic=True)
    for wrong in (lambda: agnostic.sample(2, num_masks=0), lambda: agnostic.log_prob(tokens, num_masks=0)):
        with pytest.raises(ValueError, match=r"num_masks must be at least 1 \(got 0\)"):
            wrong()
    with pytest.raises(ValueError, match="masks: needs order_agnostic or connectivity_agnostic"):
        make_prior("made", masks=2)


def test_a_finite_set_of_masks_is_that_of_the_mixture():
    model = make_prior("made", hidden=(20, 30), order_agnostic=True, connectivity_agnostic=True, masks=3)
    tokens, drawn = draw_tokens(model, 2), []
    for seed in range(60):
        torch.manual_seed(seed)
        drawn.append(model.training_inputs(tokens, 0.3))
    orders = {tuple(each["order"].tolist()) for each in drawn}
    degrees = {tuple(torch.cat(each["degrees"]).tolist()) for each in drawn}
    names = [model.order, *(make_order(name, (3, 4)) for name in model.orders(3)[1:])]
    assert orders == {tuple(order.tolist()) for order in names}
    assert degrees == {tuple(torch.cat(model.numbered_degrees(number)).tolist()) for number in range(3)}
    assert len({(tuple(each["order"].tolist()), int(each["degrees"][0].sum())) for each in drawn}) == 9


def test_a_pipeline_scores_and_draws_a_mixture_of_masks():
    pixels = Tokenizer.create("pixels", image_size=(4, 4), channels=1, levels=2).eval()
    prior = make_prior(
        "made", shape=(4, 4), vocab_size=2, num_classes=0, connectivity_agnostic=True, tokenizer=pixels.fingerprint()
    )
    pipe, images = ImagePipeline(pixels, prior), torch.rand(3, 1, 4, 4) * 2 - 1
    scores = pipe.log_prob(images, num_masks=3, batch_size=2)
    assert scores.tolist() == pytest.approx(prior.log_prob(pipe.encode(images), num_masks=3).tolist(), abs=1e-4)
    assert not torch.allclose(scores, pipe.log_prob(images), atol=1e-3)
    drawn = pipe(9, seed=0, num_masks=3, batch_size=4, progress=False).tokens
    assert torch.equal(drawn, prior.sample(9, generator=generators(9, 0), num_masks=3))
    assert not torch.equal(drawn, pipe(9, seed=0, progress=False).tokens)


def without(node, *names):
    return {key: value for key, value in node.items() if key not in names}


def test_an_old_run_of_two_ids_goes_on_to_the_bit(tmp_path, one_process):
    """Begun when there was no `sigmoid`, stopped halfway, continued by the command that began it."""
    pixels = Tokenizer.create("pixels", image_size=(4, 4), channels=1, levels=2).eval()
    rows = torch.randint(2, (64, 4, 4))
    splits = {name: TokenSplit(rows.byte(), None) for name in ("train", "test")}
    TokenDataset(pixels.grid, [], splits, pixels, {}).save(tmp_path / "tokens")
    command = {"train__steps": 8, "train__save_every": 4, "train__lr": 4e-3}
    run = train_prior(
        tmp_path / "run", tmp_path / "tokens", model={"kind": "made", "hidden": [20], "sigmoid": False}, **command
    )
    before, weights = losses(run), load_file(run / "pipeline/prior/model.safetensors")
    shutil.rmtree(run / "state" / "step-00000008")
    state = run / "state" / "step-00000004"
    written = json.loads((state / "state.json").read_text())
    written["config"]["model"] = without(written["config"]["model"], "sigmoid", "masks")
    (state / "state.json").write_text(json.dumps(written))
    (state / "manifest.json").unlink()
    write_manifest(state, step=4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": without(config["model"], "sigmoid", "masks")}))
    train_prior(run, tmp_path / "tokens", model={"kind": "made", "hidden": [20]}, **command)
    assert losses(run) == before and weights["input"].shape == (16, 2, 20)
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(run / "pipeline/prior/model.safetensors").items()
    )
    new = train_prior(tmp_path / "new", tmp_path / "tokens", model={"kind": "made", "hidden": [20]}, **command)
    assert load_file(new / "pipeline/prior/model.safetensors")["input"].shape == (16, 1, 20)

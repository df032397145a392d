"""The masked-token model: its density along an order, its bound over all orders, decoding in a few passes."""

import itertools
import math

import counter_noise
import pytest
import torch
from frequencies import as_frequent
from givens.headed import all_grids, numbers_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small import draw_known, draw_tokens, generators, logits_of, make_prior

from prior.masked import SCHEDULES, MaskedOptions, bound_masks

examples = settings(deadline=None, max_examples=40, derandomize=True)


def make(shape=(2, 3), vocab_size=3, **config):
    return make_prior("masked", shape=shape, vocab_size=vocab_size, **config)


def test_a_pass_sees_what_is_known_and_nothing_else():
    model, tokens = make(shape=(3, 4), vocab_size=5), torch.randint(5, (4, 3, 4))
    labels, known = torch.arange(4), torch.rand(4, 3, 4) < 0.5
    before = logits_of(model, tokens, labels, known=known)
    for at in range(12):
        changed = tokens.flatten(1).clone()
        changed[:, at] = (changed[:, at] + 1) % 5
        moved = (logits_of(model, changed.view(4, 3, 4), labels, known=known) - before).abs().amax(-1) > 1e-6
        assert moved.equal(known.flatten(1)[:, at, None].expand(4, 12))


def test_teacher_forced_logits_are_those_of_one_pass_per_token_however_passes_are_cut(monkeypatch):
    model, tokens = make(shape=(3, 4), vocab_size=5).double(), torch.randint(5, (3, 3, 4))
    orders, labels = torch.rand(3, 12).argsort(1), torch.tensor([0, 3, 1])
    expected = torch.empty(3, 12, 5).double()
    for rank, at in enumerate(orders.t()):
        known = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, orders[:, :rank], True)
        expected[range(3), at] = logits_of(model, tokens, labels, known=known)[range(3), at]
    for rows in (None, 1, 7, 36):
        if rows:
            monkeypatch.setattr(model, "rows_per_pass", lambda rows=rows: rows)
        assert (logits_of(model, tokens, labels, order=orders) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_follow_the_schedule(schedule):
    """The mean share of masked tokens is that of the schedule at each position, and some token is always masked."""
    model = make(shape=(8, 8), schedule=schedule)
    known = model.training_inputs(torch.zeros(20_000, 8, 8), 0.3)["known"]
    masked = (~known).double()
    assert known.shape == (20_000, 64) and masked.sum(1).min() >= 1
    points = (torch.arange(1000).double() + 0.5) / 1000
    shares = (SCHEDULES[schedule](points) * 64).ceil().clamp(1, 64) / 64
    assert (masked.mean(0) - shares.mean()).abs().max() < 0.02
    assert SCHEDULES[schedule](torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_the_loss_is_the_bound():
    """Under the linear schedule its expectation is -E_order log p per token, over all masks enumerated."""
    model = make(shape=(1, 3), vocab_size=3).double()
    tokens, label = torch.tensor([[[2, 0, 1]]]), torch.tensor([1])
    orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
    expected = -torch.stack([model.log_prob(tokens, label, order).double() for order in orders]).mean() / 3
    losses, weights = [], []
    for known in itertools.product([False, True], repeat=3):
        mask = torch.tensor([known])
        if (masked := 3 - sum(known)) == 0:
            continue
        loss = model.loss_from_outputs(logits_of(model, tokens, label, known=mask), tokens, known=mask)
        losses.append(float(loss.detach()))
        weights.append(1 / 3 / math.comb(3, masked))  # the number is uniform, then the set
    assert sum(weights) == pytest.approx(1)
    assert sum(w * loss for w, loss in zip(weights, losses, strict=True)) == pytest.approx(
        float(expected.detach()), abs=1e-6
    )


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"linear"}))
def test_other_schedules_give_all_masked_tokens_the_same_weight(schedule):
    """The mean over masked tokens, times their number over the average number; also after inference mode."""
    model = make(shape=(2, 3), schedule=schedule, label_smoothing=0.0)
    tokens = torch.randint(3, (5, 2, 3))
    known = model.training_inputs(tokens, 0.0)["known"]
    with torch.inference_mode():
        model.loss(tokens, known=known)
    logits = model.train()(tokens, known=known)
    mean = torch.nn.functional.cross_entropy(logits[~known], tokens.flatten(1)[~known])
    drawn = (~model.training_inputs(torch.zeros(50_000, 2, 3), 0.0)["known"]).sum(1).float().mean()
    loss = model.loss_from_outputs(logits, tokens, known=known)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(mean.detach() * (~known).sum() / 5 / drawn), rel=0.01)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_batch_in_parts_has_the_same_gradient(schedule):
    """Micro-batches and processes: the mean of their gradients is that of the whole, for the same masks."""
    model, tokens = make(shape=(3, 4), vocab_size=5, schedule=schedule), torch.randint(5, (8, 3, 4))
    known = torch.rand(8, 12) < torch.linspace(0.1, 0.8, 8)[:, None]

    def gradient(rows):
        model.zero_grad()
        model.loss_from_outputs(model(tokens[rows], known=known[rows]), tokens[rows], known=known[rows]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole, parts = gradient(slice(8)), [gradient(slice(k, k + 2)) for k in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_the_bound_is_the_mean_over_orders():
    """Its mean over many images' masks is E_order log p, which is below the log of the mixture."""
    model = make(shape=(1, 4), vocab_size=3, bound_passes=4)
    grids = all_grids(model.grid)
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    with torch.no_grad():
        assert model.exact and abs(float(model.log_prob(grids).double().exp().sum()) - 1) < 1e-5
        each = torch.stack([model.log_prob(grids, order=order).double() for order in orders])
        mean, mixture = each.mean(0), each.logsumexp(0) - math.log(len(orders))
        model.exact = False
        estimate = model.log_prob(grids).double()
        assert (mean < mixture).all() and abs(float(estimate.exp().sum()) - 1) > 1e-3
        assert torch.equal(model.log_prob(grids).double(), estimate), "an image always has the same masks"
        assert torch.allclose(model.log_prob(grids[5:7]).double(), estimate[5:7], atol=1e-5)
        deviation = (estimate - mean).std() / len(grids) ** 0.5
        assert abs(float((estimate - mean).mean())) < 4 * float(deviation)


def test_masks_of_the_bound_cover_all_numbers_evenly():
    ids = torch.randint(9, (200, 16))
    known = bound_masks(ids, 8)
    assert known.shape == (8, 200, 16)
    visible = known.sum(-1)
    assert (visible.diff(dim=0) == 2).all() and visible.min() == 0 and visible.max() == 15
    assert (known.float().mean((0, 1)) - known.float().mean()).abs().max() < 0.05


@pytest.mark.sparse
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_a_step_is_a_pass_that_keeps_known_tokens_and_sees_them(schedule, steps, monkeypatch):
    model, masked, real = make(shape=(3, 4), vocab_size=5), [], type(make()).predict
    monkeypatch.setattr(
        model, "predict", lambda ids, *rest: masked.append((ids == model.mask).sum(1)) or real(model, ids, *rest)
    )
    drawn = model.sample(6, generator=generators(6), steps=steps, schedule=schedule)
    assert drawn.min() >= 0 and drawn.max() < 5
    counts = torch.stack(masked)
    assert len(counts) == steps and (counts[0] == 12).all() and (counts.diff(dim=0) < 0).all()
    model.head.weight.data.mul_(10)  # so that tokens depend much on each other
    tokens, known = draw_tokens(model, 8), draw_known(model, 8, 0.5)
    settings = {"generator": generators(8), "steps": steps, "schedule": schedule, "known": known}
    drawn = model.sample(8, tokens=tokens, **settings)
    assert torch.equal(drawn[known], tokens[known])
    seen = model.sample(8, tokens=(tokens + 1) % 5, **{**settings, "generator": generators(8)})
    assert not torch.equal(drawn[~known], seen[~known])


@examples
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 64), st.lists(st.integers(1, 1024), min_size=1, max_size=9))
def test_each_step_reveals_tokens_until_none_is_left(schedule, steps, numbers):
    """An even schedule reveals the same number in each step."""
    masked = MaskedOptions(steps=steps, schedule=schedule).masked_before_steps(torch.tensor(numbers))
    sizes = -masked.diff(dim=0)
    assert masked[0].tolist() == numbers and not masked[-1].any() and ((sizes > 0) | (masked[:-1] == 0)).all()
    for number, each in zip(numbers, sizes.t().tolist(), strict=True):
        assert schedule != "linear" or number % steps or each == [number // steps] * steps


@pytest.mark.parametrize("settings", [{}, {"guidance_end": 3.0, "top_k": 4}])
def test_an_image_drawn_in_steps_does_not_depend_on_its_batch(settings):
    model, labels = make(shape=(4, 4), vocab_size=7), torch.arange(9) % 3
    together = model.sample(9, labels, generator=generators(9), steps=4, **settings)
    for size in (1, 5):
        parts = [
            model.sample(len(at), labels[at], generator=[generators(9)[k] for k in at], steps=4, **settings)
            for at in torch.arange(9).split(size)
        ]
        assert torch.equal(torch.cat(parts), together)


def test_where_tokens_are_independent_any_number_of_steps_is_right():
    model, count = make(shape=(2, 2), vocab_size=2), 6000
    with torch.no_grad():
        for block in model.layers:
            block.project.weight.zero_()  # positions do not see each other
    seed, labels = torch.Generator().manual_seed(5), torch.ones(count).long()
    drawn = model.sample(count, labels, generator=seed, steps=2, confidence_temperature=0.0)
    expected = model.log_prob(all_grids(model.grid), labels[:16]).exp()
    assert as_frequent(numbers_of(drawn, model.grid), expected)


@pytest.mark.parametrize(("order", "steps"), [("column", 2), pytest.param("random:2", 3, marks=pytest.mark.slow)])
def test_steps_along_an_order_are_exact(order, steps):
    """Samples have the frequencies of the ordered partition's density. Without an order, where confidence chooses, they
    do not, as two steps show."""
    model, count = make(shape=(2, 2), vocab_size=2), 6000
    partition, grids = model.make_steps(order, steps), all_grids(model.grid)
    assert len(partition.blocks) == steps and sum(partition.blocks) == 4
    expected = model.log_prob(grids, torch.ones(16).long(), order=partition).detach().exp()
    assert abs(float(expected.sum()) - 1) < 1e-6

    def draw(**given):
        seed = torch.Generator().manual_seed(5)
        return numbers_of(
            model.sample(count, torch.ones(count).long(), generator=seed, steps=steps, **given), model.grid
        )

    assert as_frequent(draw(order=order), expected)
    if steps == 2:
        assert not as_frequent(draw(confidence_temperature=0.0), expected)


@pytest.mark.parametrize("temperature", [0.0, 1000.0])
def test_a_step_reveals_the_most_confident_tokens_or_at_a_high_temperature_any(temperature, monkeypatch):
    model, inputs = make(shape=(3, 4), vocab_size=5), []
    with torch.no_grad():
        logits = model.predict(torch.full((40, 12), model.mask), model.encode_nothing(40))
    real = model.predict
    monkeypatch.setattr(model, "predict", lambda ids, *rest: inputs.append(ids.clone()) or real(ids, *rest))
    model.sample(40, generator=generators(40), steps=3, confidence_temperature=temperature)
    noise = [counter_noise.gumbel(counter_noise.next_key(g), 0, (12, 5)) for g in generators(40)]
    ids = (logits + torch.stack(noise)).argmax(-1, keepdim=True)
    revealed, confidence = inputs[1] != model.mask, logits.log_softmax(-1).gather(-1, ids)[..., 0]
    count = int(revealed[0].sum())
    assert 0 < count < 12 and (revealed.sum(1) == count).all()
    found = revealed.gather(1, confidence.topk(count).indices).float().mean()
    assert found == 1 if temperature == 0 else 0.3 < found / (count / 12) < 1.7  # noise alone decides


def test_guidance_follows_the_share_of_tokens_that_each_image_knows():
    """In a batch of images that know more and less as alone; the last step has the last guidance scale."""
    model, labels = make(shape=(4, 4), vocab_size=7), torch.arange(8) % 3
    tokens, known = (
        draw_tokens(model, 8),
        torch.arange(16).reshape(4, 4) < torch.tensor([0, 1, 4, 9, 12, 13, 14, 15])[:, None, None],
    )
    given = {"steps": 4, "guidance_scale": 0.0, "guidance_end": 6.0}
    together = model.sample(8, labels, generator=generators(8), tokens=tokens, known=known, **given)
    for k in range(8):
        one = {"tokens": tokens[k], "known": known[k], "generator": [generators(8)[k]]}
        assert torch.equal(model.sample(1, labels[[k]], **one, **given)[0], together[k])
    given |= {"guidance_scale": 6.0, "guidance_end": None, "tokens": tokens, "known": known}
    ended = model.sample(8, labels, generator=generators(8), **given)
    assert torch.equal(ended[7], together[7]) and not torch.equal(ended[:4], together[:4])

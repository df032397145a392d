"""A caller sees each step of every prior, by whatever path its images are drawn, and may end it."""

import pytest
import torch
from pretended.emulated_graphs import Emulated
from small import ANY_ORDER, PRIORS, VARIANTS, draw_known, draw_tokens, generators, make_prior

from prior.sampling import steps

PATHS = {
    "cached": {},
    "uncached": {"cache": False},
    "parallel": {"parallel": True},
    "guided": {"guidance_scale": 2.0},
}
every_prior = pytest.mark.parametrize("name", [*PRIORS, *VARIANTS])


def watched(model, count=5, **settings):
    """Tokens of `count` images, and of each step its number, rank, tokens and which are known."""
    seen = []

    def look(step):
        seen.append((step.number, step.rank, step.tokens, step.known))

    return model.sample(count, torch.arange(count) % 3, generator=generators(count), on_step=look, **settings), seen


def check(model, drawn, seen, given=None):
    """What holds of every path: decided tokens stay, there are more and more of them, and they become the images."""
    numbers, ranks, tokens, known = zip(*seen, strict=True)
    assert numbers == tuple(range(len(seen)))
    assert tokens[-1].equal(drawn) and known[-1].all()
    before = torch.zeros_like(known[0]) if given is None else given
    for rank, ids, there in zip(ranks, tokens, known, strict=True):
        assert ids.shape == there.shape == drawn.shape and there.dtype == torch.bool
        assert not (before & ~there).any() and (there.sum() > before.sum())
        assert ids[there].equal(drawn[there]) and not ids[~there].any()
        assert 0 < rank <= len(model.grid)
        before = there


@pytest.mark.sparse
@every_prior
@pytest.mark.parametrize("path", PATHS)
def test_each_step_shows_what_is_drawn(name, path):
    model = make_prior(name)
    drawn, seen = watched(model, **PATHS[path])
    check(model, drawn, seen)
    plain = model.sample(5, torch.arange(5) % 3, generator=generators(5), **PATHS[path])
    assert plain.equal(drawn), "watching changes what is drawn"
    if path != "parallel":
        ends = torch.tensor(model.blocks).cumsum(0).tolist()
        parts = -(-len(seen) // len(ends))
        assert [rank for _, rank, *_ in seen] == ends * parts
    if path != "parallel" and len(seen) == len(model.blocks):  # in one part
        for (_, rank, _, known), block in zip(seen, model.order.split(model.blocks), strict=True):
            assert known.flatten(1)[:, block].all() and int(known[0].sum()) == rank


@pytest.mark.parametrize("name", ANY_ORDER)
def test_steps_in_other_orders_and_with_known_tokens(name):
    model = make_prior(name, **ANY_ORDER[name])
    tokens, known = draw_tokens(model, 5), draw_known(model, 5, 0.4)
    known.flatten(1)[:, 0] = False
    for walk in ({"order": "random:3"}, {"num_orders": 3}):
        drawn, seen = watched(model, tokens=tokens, known=known, **walk)
        assert drawn[known].equal(tokens[known])
        seen = [each for each in seen if each[3].sum() > known.sum()]  # the known ones come first, step by step
        check(model, drawn, [(number, *each[1:]) for number, each in enumerate(seen)], known)


def test_steps_of_confidence_and_of_several_connectivities():
    model = make_prior("masked")
    drawn, seen = watched(model, steps=4)
    check(model, drawn, seen)
    assert len(seen) == 4
    model = make_prior("made", connectivity_agnostic=True)
    drawn, seen = watched(model, num_masks=3)
    check(model, drawn, seen)
    assert len(seen) % len(model.grid) == 0


def test_parts_count_on_and_what_was_drawn_before_is_shown(monkeypatch):
    model = make_prior("gpt")
    monkeypatch.setattr(type(model), "rows_at_once", lambda self: 1)
    monkeypatch.setattr("prior.drawing.FEW_ROWS", 2)
    drawn, seen = watched(model, 5)
    check(model, drawn, seen)
    assert len(seen) == 3 * len(model.grid)
    last = len(model.grid)
    assert seen[last][3].flatten(1).sum(1).tolist() == [12, 1, 1, 0, 0]


@pytest.mark.parametrize("path", [*PATHS, "graphs"])
def test_what_a_caller_raises_ends_sampling_and_the_next_call_is_whole(path, monkeypatch):
    """From graphs, too: an error of the caller's is none of theirs, so nothing is refused."""
    settings = PATHS.get(path, {})
    model = make_prior("gpt").double()
    wanted = model.sample(4, torch.arange(4) % 3, generator=generators(4), **settings)
    if path == "graphs":
        monkeypatch.setattr(steps, "recorder_for", lambda device: Emulated)
    for last in (0, 1, 1, 0):  # of graphs: before there are any, while they are captured, and again
        taken = []

        def look(step, taken=taken, last=last):
            taken.append(step.number)
            if step.number == last:
                raise LookupError("enough")

        with pytest.raises(LookupError, match="enough"):
            model.sample(4, torch.arange(4) % 3, generator=generators(4), on_step=look, **settings)
        assert taken == list(range(last + 1))
        assert wanted.equal(model.sample(4, torch.arange(4) % 3, generator=generators(4), **settings))


def test_steps_of_graphs(monkeypatch):
    monkeypatch.setattr(steps, "recorder_for", lambda device: Emulated)
    model, before = make_prior("gpt").double(), Emulated.replayed
    for _ in range(3):
        drawn, seen = watched(model)
        check(model, drawn, seen)
        assert len(seen) == len(model.grid)
    assert Emulated.replayed > before


def test_nothing_is_copied_unless_somebody_looks(monkeypatch):
    """A step that nobody looks at costs no more than the call."""
    model = make_prior("gpt")
    monkeypatch.setattr("prior.sampling.watching.to_raster", lambda *_: 1 / 0)
    numbers = []
    with pytest.raises(ZeroDivisionError):  # only at the end of the part
        model.sample(2, on_step=lambda step: numbers.append((step.number, step.rank)))
    assert numbers == [(k, k + 1) for k in range(12)]

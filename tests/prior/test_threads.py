"""What several threads do with one prior at once does not meet.

Covers: prior/drawing.py, prior/features.py
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from small import VARIANTS, draw_tokens, generators, make_prior

from prior.masks import connections
from prior.sampling import buffers


def beside(work: Callable[[], Any]) -> Any:
    """What `work` returns in another thread, which has ended by then."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    return found[0]


def at_first_step(prior: Any, work: Callable[[], Any], **asked: Any) -> tuple[Any, Any]:
    """A sample of `prior`, and what `work` returned in another thread after its first step."""
    found: list[Any] = []

    def watch(step: Any) -> None:
        if step.number == 0:
            found.append(beside(work))

    return prior.sample(2, generator=generators(2), on_step=watch, **asked), found[0]


def test_features_are_of_the_pass_that_asked_for_them(monkeypatch):
    """Another pass goes through the same layers between two of this one's."""
    prior = make_prior("gpt")
    mine, others = draw_tokens(prior, 2), draw_tokens(prior, 2)
    wanted = prior.layer_features(mine, None, [0, 1])
    arranged = prior.arrange

    def arrange(output: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            beside(lambda: prior(others))
        return arranged(output)

    monkeypatch.setattr(prior, "arrange", arrange)
    found = prior.layer_features(mine, None, [0, 1])
    assert len(found) == 2 and all(map(torch.equal, found, wanted))


def test_a_prior_in_training_mode_is_drawn_from_by_two():
    """The one that ends first leaves eval mode, and cuDNN's attention off, to the other; the last puts both back."""
    prior = make_prior("gpt", dropout=0.5)
    wanted = prior.sample(2, generator=generators(2))
    prior.train()
    modes: list[Any] = []

    def one_within() -> bool:
        prior.sample(1)
        modes.append((prior.training, torch.backends.cuda.cudnn_sdp_enabled()))
        return True

    found, _ = at_first_step(prior, one_within)
    assert torch.equal(found, wanted) and modes == [(False, False)]
    assert prior.training and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_first_to_come_ends_before_the_second():
    prior, begun, done = make_prior("gpt").train(), threading.Event(), threading.Event()

    def wait(step: Any) -> None:
        begun.set()
        assert done.wait(30)

    second = threading.Thread(target=lambda: prior.sample(1, on_step=wait))

    def begin_the_second(step: Any) -> None:
        if step.number == 0:
            second.start()
            assert begun.wait(30)

    prior.sample(1, on_step=begin_the_second)
    left = prior.training, torch.backends.cuda.cudnn_sdp_enabled()
    done.set()
    second.join(30)
    assert left == (False, False) and prior.training and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_connectivity_is_the_threads_own():
    prior = make_prior("made", connectivity_agnostic=True)
    tokens = draw_tokens(prior, 2)
    wanted = prior.log_prob(tokens)
    with prior.connected(2):
        other = prior.log_prob(tokens)
        assert torch.equal(beside(lambda: prior.log_prob(tokens)), wanted)
        assert torch.equal(prior.log_prob(tokens), other)
    assert not torch.equal(other, wanted) and torch.equal(prior.log_prob(tokens), wanted)


def test_masks_of_an_order_are_not_those_of_another_that_is_asked_for_meanwhile(monkeypatch):
    """Whatever moment the other thread comes in: while masks are compared, built, or about to be used."""
    prior = make_prior("made", order_agnostic=True)
    tokens = draw_tokens(prior, 2)
    order = torch.arange(len(prior.grid)).flip(0)
    with torch.no_grad():
        wanted, others = prior(tokens), prior(tokens, None, order)
        build, within = connections.build_masks, [True]

        def built(*given: Any) -> Any:
            masks = build(*given)
            if within:
                within.clear()
                assert torch.equal(beside(lambda: prior(tokens, None, order)), others)
            return masks

        monkeypatch.setattr(connections, "build_masks", built)
        assert torch.equal(prior(tokens), wanted) and not within
    assert not torch.equal(wanted, others)


def test_a_copy_may_be_made_at_any_time():
    """Sampling adds no name to a model: a copy would find that what it goes through changes."""
    for kind, more in (*VARIANTS.values(), ("made", {}), ("masked", {})):
        prior = make_prior(kind, **more)
        names = [set(vars(module)) for module in prior.modules()]
        prior.sample(1)
        prior.log_prob(draw_tokens(prior, 2))
        assert [set(vars(module)) for module in prior.modules()] == names
        copy.deepcopy(prior)


def test_threads_that_draw_noise_begin_once(monkeypatch):
    """However many ask for them first; and torch computes in as many threads as before."""
    monkeypatch.setattr(buffers, "cores", lambda: 2)
    monkeypatch.setattr(buffers, "MANY", 0)
    begun, made = [], buffers.threads.__wrapped__

    def counted(process: int) -> Any:
        begun.append(made(process))
        return begun[-1]

    monkeypatch.setattr(buffers, "threads", cache(counted))
    own, prior, ready = torch.get_num_threads(), make_prior("gpt"), threading.Barrier(4)
    wanted = prior.sample(2, generator=generators(2))
    buffers.threads.cache_clear()
    begun.clear()
    found: list[Any] = []

    def work() -> None:
        ready.wait()
        found.append(prior.sample(2, generator=generators(2)))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert len(begun) == 1 and torch.get_num_threads() == own
    assert len(found) == 4 and all(torch.equal(each, wanted) for each in found)
    begun[0].shutdown()

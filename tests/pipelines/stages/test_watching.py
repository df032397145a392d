"""`callback_on_step_end` and `pipe.interrupt`, as diffusers has them."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from small_pipelines import every_pair, make_pipeline, pixels_for

from pipelines import Interrupted


def recorder(seen):
    def look(pipe, step, rank, kwargs):
        seen.append((pipe, step, rank, kwargs["tokens"], kwargs["known"]))
        return kwargs

    return look


@pytest.mark.sparse
@every_pair
@pytest.mark.parametrize("batch_size", [64, 2])
def test_a_callback_sees_every_step_of_every_batch(tokenizer, prior, batch_size):
    pipe, seen = make_pipeline(tokenizer, prior), []
    out = pipe(5, 1, seed=3, batch_size=batch_size, callback_on_step_end=recorder(seen))
    assert out.tokens.equal(pipe(5, 1, seed=3).tokens)
    assert all(each[0] is pipe for each in seen) and [each[1] for each in seen] == list(range(len(seen)))
    before = torch.zeros_like(out.tokens, dtype=torch.bool)
    for _, _, rank, tokens, known in seen:
        assert tokens.shape == known.shape == out.tokens.shape and 0 < rank <= len(pipe.prior.grid)
        assert tokens[known].equal(out.tokens[known]) and not tokens[~known].any()
        assert not (before & ~known).any() and known.sum() > before.sum()
        before = known
    assert before.all()


@pytest.mark.parametrize("prior", ["gpt", "masked"])
def test_completions_are_watched_too(prior):
    pipe, seen = make_pipeline(prior=prior), []
    known = torch.zeros(8, 12, dtype=torch.bool)
    known[:4] = True
    out = pipe.complete(pixels_for(pipe, 2), known, draws=3, seed=0, callback_on_step_end=recorder(seen))
    assert seen[-1][3].equal(out.tokens.flatten(0, 1)) and seen[-1][4].all()
    kept = pipe.tokenizer.known_tokens(known[None])
    assert all(each[4][:, kept[0]].all() for each in seen)


def test_what_a_caller_gives_is_not_written_to():
    pipe = make_pipeline()
    tokens, known = pipe(4, seed=0).tokens, torch.rand(4, 2, 3) < 0.5
    kept = tokens.clone(), known.clone()
    pipe(4, seed=1, tokens=tokens, known=known, batch_size=2, callback_on_step_end=recorder([]))
    assert tokens.equal(kept[0]) and known.equal(kept[1])


SETTINGS = {
    "cached": {},
    "uncached": {"cache": False},
    "parallel": {"parallel": True},
    "batches": {"batch_size": 2},
    "guided": {"guidance_scale": 3.0},
}


@pytest.mark.parametrize("path", SETTINGS)
def test_an_interrupted_call_says_so_and_is_taken_up_again(path):
    pipe, steps = make_pipeline(), []
    wanted = pipe(16, 1, seed=5, **SETTINGS[path]).tokens

    def stop(pipe, step, rank, kwargs):
        steps.append(step)
        pipe.interrupt = step == 1

    with pytest.raises(Interrupted, match=r"^interrupted after \d+ of 96 tokens") as caught:
        pipe(16, 1, seed=5, callback_on_step_end=stop, **SETTINGS[path])
    error = pickle.loads(pickle.dumps(caught.value))
    assert steps == [0, 1] and error.tokens.shape == wanted.shape and 0 < int(error.known.sum()) < 96
    assert error.tokens[error.known].equal(wanted[error.known])
    assert pipe(16, 1, seed=5, tokens=error.tokens, known=error.known, **SETTINGS[path]).tokens.equal(wanted)
    assert pipe.interrupt is False


def test_masked_steps_are_interrupted():
    pipe = make_pipeline(prior="masked", sampler={"steps": 3})
    with pytest.raises(Interrupted):
        pipe(2, seed=0, callback_on_step_end=lambda pipe, *_: setattr(pipe, "interrupt", True))
    assert pipe(2, seed=0).tokens.shape == (2, 2, 3)


def test_another_thread_may_interrupt():
    """Without a callback: the step that is under way is the last."""
    pipe, started, failures = make_pipeline(), threading.Event(), []
    real = pipe.prior.next_logits

    def slow(*given):
        started.set()
        waited.wait(10)
        return real(*given)

    waited, pipe.prior.next_logits = threading.Event(), slow

    def work():
        try:
            pipe(2, seed=0)
        except Interrupted as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(10)
    pipe.interrupt = True
    waited.set()
    thread.join(30)
    assert len(failures) == 1 and int(failures[0].known.sum()) == 2


def call_beside(pipe, **asked):
    """A call in another thread, at rest before its second step until `go_on` is set; its outcome comes to `found`."""
    first, go_on, found = threading.Event(), threading.Event(), []

    def rest(pipe, step, *_):
        first.set()
        assert go_on.wait(30)

    def work():
        try:
            found.append(pipe(2, seed=7, callback_on_step_end=rest, **asked).tokens)
        except Interrupted as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert first.wait(30)

    def end():
        go_on.set()
        thread.join(30)
        return found[0]

    return end


def test_calls_from_several_threads_wait_for_each_other():
    """Each gets what it gets alone; one is under way at a time."""
    pipe = make_pipeline()
    wanted, under_way, most = [pipe(2, labels=k % 3, seed=k).tokens for k in range(4)], set(), []

    def count(pipe, step, *_):
        under_way.add(threading.get_ident())
        most.append(len(under_way))
        if step == len(pipe.prior.grid) - 1:
            under_way.remove(threading.get_ident())

    def work(k):
        found[k] = pipe(2, labels=k % 3, seed=k, callback_on_step_end=count).tokens

    found = {}
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(found[k].equal(wanted[k]) for k in range(4)) and max(most) == 1


def test_a_callback_may_call_the_pipeline():
    pipe, seen = make_pipeline(), []

    def look(pipe, step, rank, kwargs):
        seen.append(pipe.decode(kwargs["tokens"], output_type="pt").shape[0] + len(pipe(1, seed=step).images))

    pipe(2, seed=0, callback_on_step_end=look)
    assert seen == [3] * len(pipe.prior.grid)


def test_an_interrupt_ends_the_call_under_way_alone():
    """Another one that waits for it goes on."""
    pipe, found = make_pipeline(), []
    wanted = pipe(2, seed=3).tokens
    end = call_beside(pipe)
    waiting = threading.Thread(target=lambda: found.append(pipe(2, seed=3).tokens))
    waiting.start()
    pipe.interrupt = True
    assert pipe.interrupt and type(end()) is Interrupted
    waiting.join(30)
    assert found[0].equal(wanted) and not pipe.interrupt


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_has_calls_of_its_own(copied):
    pipe = make_pipeline()
    other = copied(pipe)
    other.interrupt = True
    end = call_beside(pipe)
    other.interrupt = True
    assert not pipe.interrupt and end().equal(other(2, seed=7).tokens)


def test_an_interrupt_after_the_last_step_is_none():
    pipe = make_pipeline()
    last = len(pipe.prior.grid) - 1
    out = pipe(2, seed=0, callback_on_step_end=lambda p, step, *_: setattr(p, "interrupt", step == last))
    assert len(out.images) == 2


def test_drawn_tokens_are_to_look_at():
    pipe = make_pipeline()

    def change(pipe, step, rank, kwargs):
        kwargs["tokens"][0] = 1

    def replace(pipe, step, rank, kwargs):
        return {"tokens": kwargs["tokens"] * 1}

    for callback in (change, replace):
        with pytest.raises(ValueError, match="to look at"):
            pipe(2, seed=0, callback_on_step_end=callback)
    with pytest.raises(TypeError, match="should return its last argument or None"):
        pipe(2, seed=0, callback_on_step_end=lambda *_: 3)
    with pytest.raises(TypeError, match="should be a function"):
        pipe(2, seed=0, callback_on_step_end=3)
    with pytest.raises(StopIteration):
        pipe(2, seed=0, callback_on_step_end=lambda *_: next(iter(())))
    assert pipe(2, seed=0, callback_on_step_end=lambda *_: None).tokens.equal(pipe(2, seed=0).tokens)

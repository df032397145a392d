"""One pipeline, used by several threads at once, gives each what it gives it alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from small_pipelines import make_pipeline
from trust import at_once
from trust.at_once import acts_of, differences, in_turns

QUICK = ("sampled", "watched", "interrupted", "scored", "represented")
AGNOSTIC = {"order_agnostic": True, "connectivity_agnostic": True}


@pytest.mark.parametrize(("prior", "config"), [("gpt", {}), ("made", AGNOSTIC)], ids=["gpt", "made"])
def test_threads_get_what_each_gets_alone(prior, config):
    """The other acts, priors, and more threads: `python -m benchmarks.trust.soak what=threads`."""
    pipe = make_pipeline(prior=prior, size=(8, 8), **config)
    acts = {name: act for name, act in acts_of(pipe).items() if name in QUICK}
    assert len(acts) == len(QUICK)
    assert differences(pipe, acts, threads=3) == []


def test_a_difference_is_seen(monkeypatch):
    """What a thread leaves on the pipeline reaches another, and an error in one is a difference."""
    pipe, met = make_pipeline(prior="marginal"), threading.Barrier(2)

    def leaves(pipe: Any, number: int) -> int:
        pipe.left = number
        if threading.current_thread() is not threading.main_thread():
            met.wait(30)
        return pipe.left

    def fails(pipe: Any, number: int) -> int:
        return number if threading.current_thread() is threading.main_thread() else 1 // 0

    assert len(differences(pipe, {"leaves": leaves}, threads=2)) == 1
    found = differences(pipe, {"fails": fails}, threads=2)
    assert len(found) == 2 and all("ZeroDivisionError" in line for line in found)


def test_arrays_that_differ_in_a_bit_or_in_shape_differ():
    one = at_once.np.zeros((2, 3), "f4")
    assert at_once.digest([one, "a"]) == at_once.digest((one.copy(), "a"))
    other = one.copy()
    other[1, 2] = -0.0
    assert len({at_once.digest(each) for each in (one, other, one.T, one.astype("f8"), [one, "b"])}) == 5


def test_turns_are_as_they_were_afterwards():
    before = at_once.sys.getswitchinterval()
    with in_turns(1e-3):
        assert at_once.sys.getswitchinterval() == pytest.approx(1e-3)
    assert at_once.sys.getswitchinterval() == before

"""Thousands of damaged and forged folders: each is refused in one line, or is simply another valid one."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from fuzzing import hostile_bases as bases
from fuzzing.hostility import FOREIGN, GROWTH, Watch, attempt, limits, make_case, run, table, write_tree
from fuzzing.mutations import CANARIES, CANARY, Canary, damage_config

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files.errors import PipelineLoadError

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured as Linux does")
CASES, MORE_CASES, FEW_CASES = 250, 20_000, 100


@pytest.fixture(scope="module")
def place():
    """A folder in memory, where there is one: thousands of small files are written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def away(place, monkeypatch):
    """Canaries sing in the current folder; warnings of files that may hold code are many."""
    monkeypatch.chdir(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
    shutil.rmtree(CANARY, ignore_errors=True)


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def good(place):
    return bases.pipelines(place / "good")


def nothing_forbidden(found):
    """The outcomes by name, after looking at each."""
    problems = [
        f"case {case.number} ({case.base}: {'; '.join(case.ways)}): {outcome.problem}"
        for case, outcome in found
        if outcome.problem
    ]
    assert not problems, "\n".join([f"{len(problems)} of {len(found)}", *problems[:20]])
    return Counter(outcome.kind for _, outcome in found)


def test_damaged_pipelines_are_refused_or_valid(good, place, watch):
    check = partial(bases.check_pipeline, good=good)
    counts = nothing_forbidden(run(range(CASES), good, ImagePipeline.from_pretrained, place, watch, check))
    errors = {error.__name__ for error in PipelineLoadError.__subclasses__()}
    assert set(counts) == errors | {"loads"} and min(counts.values()) > CASES // 200, counts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_more_damaged_pipelines(good, place, watch):
    check = partial(bases.check_pipeline, good=good)
    found = run(range(MORE_CASES), good, ImagePipeline.from_pretrained, place, watch, check, seed=1)
    print("", table(found), sep="\n")
    assert nothing_forbidden(found).total() == MORE_CASES


@pytest.mark.parametrize(("part", "family"), [("tokenizer/", Tokenizer), ("prior/", Prior)])
def test_damaged_models_are_refused_or_valid(good, place, watch, part, family):
    counts = nothing_forbidden(run(range(FEW_CASES), bases.part_of(good, part), family.from_pretrained, place, watch))
    assert counts["loads"] and counts["ConfigError"] and counts["WeightsError"], counts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_configurations_cost_little(good, place, watch, monkeypatch):
    """A thousand of them for each of the models, every number of an allowed kind."""
    monkeypatch.setattr("fuzzing.hostility.WAYS", [damage_config])
    monkeypatch.setattr("fuzzing.hostility.SECONDS", 0.5)
    monkeypatch.setattr("fuzzing.hostility.GROWTH", 100 << 20)
    for part, family in (("tokenizer/", Tokenizer), ("prior/", Prior)):
        found = run(range(1000), bases.part_of(good, part), family.from_pretrained, place, watch)
        print("", table(found), sep="\n")
        assert nothing_forbidden(found).total() == 1000


def test_a_case_is_the_same_wherever_it_is_made(good):
    for number in range(50):
        one, two = make_case(number, good), make_case(number, good)
        assert one == two and one.ways
    assert make_case(0, good) != make_case(1, good) != make_case(1, good, seed=1)


# What is watched is seen


def looks_outside(folder):
    (folder.parent / f"{FOREIGN}-plain" / "secret").read_bytes()


def opens_a_pickle(folder):
    os.close(os.open(CANARIES[0], os.O_RDONLY | os.O_CREAT))


def unpickles(folder):
    pickle.loads(pickle.dumps(Canary()))


def connects(folder):
    with socket.socket() as one:
        one.settimeout(0.1)
        one.connect_ex(("127.0.0.1", 9))


def takes_memory(folder):
    return bytearray(b"x") * (GROWTH + (100 << 20))


def takes_time(folder):
    while True:
        pass


def says_too_much(folder):
    error = PipelineLoadError()
    error.args = ("x" * 1000,)
    raise error


def rings(folder):
    error = PipelineLoadError()
    error.args = ("\a",)
    raise error


def fails(folder):
    raise KeyError("a")


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        (looks_outside, "secret"),
        (opens_a_pickle, CANARIES[0]),
        (unpickles, "pickle.find_class"),
        (connects, "socket"),
        (takes_memory, "MiB"),
        (takes_time, "TooSlow"),
        (says_too_much, "message"),
        (rings, "message"),
        (fails, "KeyError"),
        (lambda folder: open(folder / "model_index.json").close(), ""),
    ],
)
def test_what_is_forbidden_is_seen(good, place, watch, monkeypatch, does, problem):
    monkeypatch.setattr("fuzzing.hostility.PATIENCE", 0.5 if does is takes_time else 20)
    write_tree(good["plain"], place / "folder", place)
    write_tree({"secret": b"?"}, place / f"{FOREIGN}-plain", place)
    with limits():
        outcome, _ = attempt(does, place / "folder", watch)
    assert problem in outcome.problem and bool(problem) == bool(outcome.problem), outcome


def test_cases_are_of_every_way_and_half_of_them_fit_their_manifest(good):
    cases = [make_case(number, good) for number in range(300)]
    assert 0.3 < sum(case.sealed for case in cases) / 300 < 0.8
    words = Counter(way.split()[0] for case in cases for way in case.ways)
    assert {"flip", "cut", "replace", "delete", "set", "numbers", "pickle", "swap", "pipe", "twin"} <= set(words), words

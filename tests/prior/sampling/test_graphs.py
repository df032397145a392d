"""Steps that are replayed from graphs draw what they draw without. The graphs are emulated: `emulated_graphs`.

Covers: prior/sampling/steps.py.
"""

import contextlib
import copy
import pickle
import threading
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretended.emulated_graphs import Emulated, HostRead
from small import PRIORS, VARIANTS, draw_known, draw_tokens, generators, make_prior

from prior.drawing import State
from prior.sampling import steps
from prior.sampling.graphs import CUDARecorder, Graphs, bucket, graphs_of, places, recorder_for

CAPTURED = [name for name in (*PRIORS, *VARIANTS) if make_prior(name).captures]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Graphs without a GPU; that something is not captured is an error."""
    monkeypatch.setattr(steps, "recorder_for", lambda device: Emulated)
    monkeypatch.setattr(Emulated, "captured", 0)
    monkeypatch.setattr(Emulated, "replayed", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def both(model, count, **settings):
    """Tokens of `count` images from graphs and without, and how many graphs were captured and replayed."""
    labels, before = torch.arange(count) % 3, (Emulated.captured, Emulated.replayed)
    one = model.sample(count, labels, generator=generators(count), **settings)
    made = Emulated.captured - before[0], Emulated.replayed - before[1]
    return one, model.sample(count, labels, generator=generators(count), capture=False, **settings), made


def test_all_but_made_are_captured():
    assert set(CAPTURED) == {*PRIORS, *VARIANTS} - {"made"}


@pytest.mark.sparse
@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.0, "temperature": 0.7, "top_k": 3, "top_p": 0.9},
        {"known": True},
        {"guidance_end": 3.0, "guidance_power": 1.5},
    ],
)
def test_graphs_draw_the_same_tokens(name, settings, monkeypatch):
    """From the second call on, in batches of other sizes that share the graphs, and in others."""
    monkeypatch.setattr("prior.drawing.settled", lambda prior, row, sampler, tokens, close: tokens)
    model = make_prior(name).double()
    blocks, counts, mask = len(model.blocks), [], draw_known(model, 1, 0.4)
    for count in (8, 8, 5, 3, 2, 7):
        given = dict(settings)
        if given.pop("known", False):
            known = mask.repeat(count, *[1] * (mask.ndim - 1)) if model.any_order else draw_known(model, count, 0.4)
            known.flatten(1)[:, model.order[-1]] = False
            given |= {"tokens": draw_tokens(model, count), "known": known}
        one, other, made = both(model, count, **given)
        assert torch.equal(one, other)
        counts.append(made)
    whole = 1 + blocks
    assert counts == [(0, 0), (whole, whole), (0, whole), (0, 0), (whole, whole), (0, whole)]


@pytest.mark.parametrize("name", CAPTURED)
def test_graphs_draw_from_the_weights_that_there_are(name):
    """Changed in place, as averages of a run are, the same graphs lay them out anew; moved, others are made."""
    model = make_prior(name).double()
    first = [both(model, 4) for _ in range(2)][1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    one, other, made = both(model, 4)
    assert torch.equal(one, other) and made[0] == 0 < made[1] and not torch.equal(one, first[0])
    one, other, made = both(model.float(), 4)
    assert torch.equal(one, other) and made == (0, 0)
    one, other, made = both(model, 4)
    assert torch.equal(one, other) and made[0] == made[1] > 0


def test_a_walk_that_ends_early_leaves_the_rest_to_a_later_one():
    model, known = make_prior("gpt"), torch.zeros(3, 4, dtype=torch.bool)
    tokens = draw_tokens(model, 8)
    counts = []
    for last in (9, 9, 9, 11, 4, 11):
        mask = known.expand(8, 3, 4).clone()
        mask.view(8, -1)[:, last + 1 :] = True
        mask[0, 0, 0] = True
        one, other, made = both(model, 8, tokens=tokens, known=mask)
        assert torch.equal(one, other)
        counts.append(made)
    assert counts == [(0, 0), (11, 11), (0, 11), (2, 13), (0, 6), (0, 13)]


def test_positions_that_all_images_keep_cost_no_pass():
    """Of a model that recomputes everything: which they are is then part of what graphs hold."""
    model, known, made = make_prior("masked"), torch.zeros(3, 4, dtype=torch.bool), []
    assert isinstance(model.start(1, None), State)
    known[1] = True
    real, passes = model.predict, []
    model.predict = lambda *given: passes.append(1) or real(*given)
    for _ in range(2):
        one, other, each = both(model, 8, tokens=draw_tokens(model, 8), known=known)
        assert torch.equal(one, other)
        made.append(each)
    assert made == [(0, 0), (13, 13)] and len(passes) == 4 * 8


def test_the_two_sets_used_last_are_kept():
    model = make_prior("gpt")
    for _ in range(2):
        for count in (4, 8):
            both(model, count)
    assert len(graphs_of(model).sets) == 2
    both(model, 16), both(model, 16)
    assert [both(model, count)[2][0] for count in (16, 8, 4)] == [0, 0, 13]
    assert [both(model, count)[2][0] for count in (8, 4, 16)] == [0, 0, 13]


def test_that_tokens_are_kept_is_part_of_what_graphs_hold():
    """And, of a model that recomputes everything, which ones all images keep."""
    for name in ("gpt", "masked"):
        model, tokens, masks = (
            make_prior(name),
            draw_tokens(make_prior(name), 4),
            torch.zeros(2, 3, 4, dtype=torch.bool),
        )
        masks[0, 0], masks[1, 0, :2] = True, True
        for known in (None, *masks, None, *masks):
            given = {} if known is None else {"tokens": tokens, "known": known}
            for _ in range(2):
                one, other, _ = both(model, 4, **given)
                assert torch.equal(one, other)


def test_parts_of_a_batch_share_graphs(monkeypatch):
    model = make_prior("gpt")
    monkeypatch.setattr(model, "rows_at_once", lambda: 4)
    for made in ((13, 26), (0, 39)):
        one, other, counts = both(model, 12)
        assert torch.equal(one, other) and counts == made


def test_what_cannot_be_captured_is_said_once_and_drawn_as_ever(monkeypatch):
    """Generators are then where they were: the images are the same."""
    model = make_prior("gpt")
    both(model, 5)
    step, reads = model.next_logits, []

    def reading(state, tokens):
        if state.rank == 6 and Emulated.captured == 7:  # the seventh step
            reads.append(float(tokens.sum()))
        return step(state, tokens)

    monkeypatch.setattr(model, "next_logits", reading)
    with pytest.warns(UserWarning, match="not captured in CUDA graphs") as told:
        one, other, made = both(model, 5)
    assert torch.equal(one, other) and made == (7, 7) and len(told) == 1
    assert torch.equal(*both(model, 5)[:2]) and both(model, 5)[2] == (0, 0), "and without a warning"
    assert not graphs_of(model).sets and both(model, 9)[2] == (0, 0) and both(model, 9)[2] == (13, 13)


def test_a_call_that_is_interrupted_leaves_no_half_made_graphs(monkeypatch):
    model, launch = make_prior("gpt"), steps.Captured.launch
    both(model, 4)

    def interrupted(captured, number, run):
        if number == 5:
            raise KeyboardInterrupt
        launch(captured, number, run)

    monkeypatch.setattr(steps.Captured, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both(model, 4)
    monkeypatch.undo()
    monkeypatch.setattr(steps, "recorder_for", lambda device: Emulated)
    assert not graphs_of(model).sets and torch.equal(*both(model, 4)[:2])


@pytest.mark.parametrize("path", [{"cache": False}, {"parallel": True}, {"capture": False}])
def test_other_ways_have_no_graphs(path):
    model = make_prior("gpt")
    for _ in range(3):
        model.sample(4, **path)
    assert Emulated.captured == 0


def test_orders_of_their_own():
    """One for all is part of what graphs hold; one for each image has none."""
    model = make_prior("gpt", any_order=True)
    own = torch.stack([torch.randperm(12) for _ in range(4)])
    for order, expected in (("column", [0, 13, 0]), ("snake", [0, 13, 0]), (own, [0, 0, 0])):
        drawn = [both(model, 4, order=order) for _ in range(3)]
        assert all(torch.equal(one, other) for one, other, _ in drawn)
        assert [made[0] for *_, made in drawn] == expected


def test_they_are_no_part_of_the_model(tmp_path):
    model = make_prior("gpt")
    names = set(model.state_dict())
    both(model, 4), both(model, 4)
    kept = graphs_of(model)
    assert len(kept.sets) == 1 and set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not graphs_of(other).sets and graphs_of(other) is not kept and torch.equal(*both(other, 4)[:2])
    model.save_pretrained(tmp_path / "prior")


@pytest.mark.parametrize("beside", [False, True])
def test_graphs_are_one_calls_at_a_time(beside):
    """While a call draws from them, another of this thread (from `on_step`) or of one beside it does without."""
    model = make_prior("gpt")
    wanted, others = both(model, 4)[0], both(model, 4, temperature=0.5)[0]
    both(model, 4), both(model, 4, temperature=0.5)
    found = []

    def again():
        found.append(model.sample(4, torch.arange(4) % 3, generator=generators(4), temperature=0.5))

    def look(step):
        if step.number == 3:
            thread = threading.Thread(target=again)
            thread.start() if beside else again()
            thread.join(30) if beside else None
            assert Emulated.replayed == 5  # those of this call

    Emulated.replayed = 0
    drawn = model.sample(4, torch.arange(4) % 3, generator=generators(4), on_step=look)
    assert torch.equal(drawn, wanted) and len(found) == 1 and torch.equal(found[0], others)
    assert not graphs_of(model).busy.locked() and both(model, 4)[2] == (0, 13)


def test_a_value_that_is_read_is_seen():
    """The emulation refuses what a graph would."""
    numbers = torch.arange(3)
    for read in (
        lambda: bool(numbers[0]),
        lambda: numbers.tolist(),
        lambda: numbers[numbers > 1],
        lambda: numbers.cpu(),
    ):
        with pytest.raises(HostRead):
            Emulated().capture(read)


def test_what_is_captured_is_computed_when_it_is_replayed():
    """Numbers of Python are those of the time of capturing; memory is as it was until then."""
    memory, more = torch.zeros(3), [1]
    replay = Emulated().capture(lambda: memory.add_(more[0]))
    assert not memory.any()
    more[0] = 5
    replay()
    replay()
    assert memory.tolist() == [2.0] * 3


def test_buckets():
    assert [bucket(rows) for rows in (1, 4, 5, 8, 9, 64, 65, 256, 257, 600)] == [4, 4, 8, 8, 16, 64, 128, 256, 512, 768]


def test_few_keys_are_remembered():
    kept = Graphs()
    for key in range(100):
        assert kept.find(key, "here", list) is None
    assert len(kept.seen) == 64 and kept.find(99, "here", list) == []
    assert kept.find(99, "elsewhere", list) is None and not kept.sets


def test_how_graphs_of_cuda_are_made(monkeypatch):
    """One pool for all; what is captured is ended, even where it fails."""
    calls = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    here = torch.device("cuda", 0)
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda device: mock.MagicMock(),
        "current_stream": lambda device: mock.MagicMock(),
        "graph_pool_handle": lambda: "pool",
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = recorder_for(here)()
    recorder.capture(lambda: calls.append("run"))()
    begin = ("begin", "pool", "thread_local")
    assert calls == [begin, "run", "end", "replay"]
    with pytest.raises(ZeroDivisionError):
        recorder.capture(lambda: 1 / 0)
    assert calls[4:] == [begin, "end"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert recorder_for(here) is None and recorder_for(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert recorder_for(here) is None


def test_why_nothing_is_captured_is_the_first_line_of_the_error():
    kept, text = Graphs(), "steps are not captured in CUDA graphs, so sampling takes longer: "
    assert kept.find("key", "here", list) is None
    for error, reason in ((RuntimeError("\n out of memory\nat 0x7f\n"), "out of memory"), (ValueError(), "")):
        with pytest.warns(UserWarning) as warned:
            kept.refuse("key", error)
        assert [str(each.message) for each in warned] == [text + reason]
        assert warned[0].filename == __file__  # whoever asked
    assert kept.find("key", "here", list) is None and not kept.sets


def test_the_least_recently_used_sets_go_first():
    kept = Graphs()
    for key in "abc":
        kept.find(key, "here", list)
    sets = {key: kept.find(key, "here", list) for key in "ab"}
    assert kept.find("a", "here", list) is sets["a"] and list(kept.sets) == ["b", "a"]
    kept.find("c", "here", list)
    assert list(kept.sets) == ["a", "c"] and kept.find("a", "here", list) is sets["a"]
    assert kept.find("b", "here", list) is not sets["b"]
    kept.drop("b")
    kept.drop("nothing")
    assert list(kept.sets) == ["a"]


def test_what_is_captured_waits_for_what_was_computed_and_is_waited_for(monkeypatch):
    log, here = [], torch.device("cuda", 0)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    graph = SimpleNamespace(capture_begin=lambda **how: log.append("begin"), capture_end=lambda: log.append("end"))
    others = Stream("others")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side of {device.index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: others)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(
        torch.cuda, "stream", lambda stream: log.append(f"in {stream.name}") or contextlib.nullcontext()
    )
    CUDARecorder(here).capture(lambda: log.append("run"))
    assert log == [
        *("side of 0 waits for others", "in side of 0", "begin", "run", "end", "others waits for side of 0"),
    ]


def test_places_are_those_of_all_weights_and_buffers():
    model = make_prior("gpt")
    before = places(model)
    assert places(model) == before and len(before) == len([*model.parameters(), *model.buffers()])
    assert {each[0] for each in before} >= {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert places(model) == before  # the same memory
    model.head.weight = torch.nn.Parameter(model.head.weight.clone())
    assert places(model) != before

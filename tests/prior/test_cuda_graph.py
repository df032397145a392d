"""Sampling as one CUDA graph, on emulated graphs: the same tokens, for any weights, labels and known tokens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Event

import pytest
import torch
from emulated_graphs import Emulated, TwoCards
from givens.columns import draw_given, make_conditioned
from small import PRIORS, draw_known, draw_tokens, generators, make_prior

from prior import cuda_graph, sampling
from prior.canvas import Chain, draw_canvas
from prior.cuda_graph import Graph, capture, release_graph
from prior.given import Given
from prior.options import DecodingOptions, SamplingOptions


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured on the CPU, as lists of operations."""
    monkeypatch.setattr(sampling, "can_capture", lambda device: True)
    monkeypatch.setattr(cuda_graph, "capture", Emulated().capture)
    Emulated.captured = Emulated.replayed = 0
    release_graph()
    yield
    release_graph()


@pytest.mark.parametrize("name", [name for name in PRIORS if make_prior(name).supports_cuda_graphs])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "guidance_end": 3.0, "top_p": 0.9}])
def test_a_graph_draws_the_same_tokens(name: str, settings: dict[str, float]) -> None:
    """Whose labels, noise and known tokens are other ones at each call, after weights have changed too, for as many
    images or fewer, down to half."""
    model = make_prior(name)
    for call, count in enumerate((5, 4, 3, 5)):
        labels, known = torch.arange(count) % (call + 1), draw_known(model, count, 0.4)
        request = {"tokens": draw_tokens(model, count), "known": known, **settings}
        drawn = model.sample(count, labels, generator=generators(count, call), **request)
        eager = model.sample(count, labels, generator=generators(count, call), on_step=lambda step: None, **request)
        assert torch.equal(drawn, eager)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.1)
    assert (Emulated.captured, Emulated.replayed) == (1, 3)  # the first call warms up


def test_places_of_a_canvas_are_inputs_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the noise of a captured window is not that of all others."""
    model = make_prior("gpt", (4, 4), any_order=True).double()
    chain, keys = Chain(model.grid, (8, 10), (2, 2)), torch.arange(2)
    given, empty = Given(model.columns, {}, 2 * len(chain.corners)), torch.zeros(2, 8, 10, dtype=torch.long)

    def draw() -> torch.Tensor:
        options = SamplingOptions(), DecodingOptions()
        return draw_canvas(model, chain, given, keys, empty, empty.bool(), *options)

    drawn = draw()
    assert Emulated.captured and Emulated.replayed
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    assert torch.equal(drawn, draw())


@pytest.mark.parametrize(
    "name", [name for name in PRIORS if name != "marginal" and make_prior(name).supports_cuda_graphs]
)
def test_conditions_are_inputs_of_a_graph(name: str) -> None:
    """All columns are, whether they are null, given once or per image."""
    model = make_conditioned(name, "all").float()
    for call, count in enumerate((5, 4, 3, 5)):
        condition = draw_given(model, count, "some null") if call % 2 else {"age": 10.0 * call}
        request = {"condition": condition, "guidance_scale": 2.0, "guidance_on": ["age", "outline"]}
        drawn = model.sample(count, generator=generators(count, call), **request)
        eager = model.sample(count, generator=generators(count, call), on_step=lambda step: None, **request)
        assert torch.equal(drawn, eager)
    assert (Emulated.captured, Emulated.replayed) == (1, 3)


def test_orders_of_images_are_inputs_of_a_graph() -> None:
    model = make_prior("gpt", any_order=True)
    for call in range(3):
        request = {"generator": generators(6, call), "num_orders": 3}
        drawn = model.sample(6, **request)
        assert torch.equal(drawn, model.sample(6, generator=generators(6, call), num_orders=3, cache=False))
    assert Emulated.captured == 1


def test_only_the_last_graph_is_kept_and_it_does_not_keep_its_model() -> None:
    model = make_prior("gpt")
    for count in (2, 2, 5, 5, 2, 2):
        model.sample(count)
    assert Emulated.captured == 3
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and Graph.last is None


def test_moved_weights_and_a_failed_capture_are_drawn_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_prior("gpt")
    expected = model.sample(3, generator=generators(3))
    model.sample(3)
    with torch.no_grad():
        for parameter in model.parameters():
            old, parameter.data = parameter.data, parameter.data.clone()
            old.zero_()  # what the graph has read
    assert torch.equal(model.sample(3, generator=generators(3)), expected) and Emulated.captured == 1

    def fails(run: object, device: torch.device) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # as torch does

    monkeypatch.setattr(cuda_graph, "capture", fails)
    with pytest.warns(UserWarning, match="CUDA graph .* not permitted when stream is capturing"):
        assert torch.equal(model.sample(3, generator=generators(3)), expected)
    assert Graph.last is not None and Graph.last.failed
    assert torch.equal(model.sample(3, generator=generators(3)), expected)


def test_the_memory_of_a_graph_is_freed_when_weights_move() -> None:
    model = make_prior("gpt")
    for _ in range(2):
        model.sample(3)
    assert Emulated.captured == 1 and Graph.last is not None
    model.to(torch.bfloat16)
    assert Graph.last is None


CARDS = [torch.device("cuda", index) for index in range(2)]


@pytest.mark.parametrize("device", CARDS, ids=str)
def test_kernels_of_any_card_are_recorded_and_streams_are_restored(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current card is the first. Afterwards it is again, and both cards have their streams, if a capture failed,
    too."""
    cards, recorded = TwoCards(), list[bool]()
    before = list(cards.current)
    monkeypatch.setattr(cuda_graph, "STREAMS", {})

    def fails() -> None:
        raise RuntimeError("a copy from the host")

    with cards.installed():
        for _ in range(2):
            capture(lambda: recorded.append(cards.launch(device.index)), device)
        assert recorded == [True, True] and (cards.device, cards.current) == (0, before)
        with pytest.raises(RuntimeError, match="previous error") as raised:
            capture(fails, device)
        assert "host" in str(raised.value.__context__) and (cards.device, cards.current) == (0, before)


def test_one_thread_captures_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    models, begun, both, overlaps = [make_prior("gpt"), make_prior("gpt")], Event(), Barrier(2), list[bool]()

    def slow(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        begun.set()
        with suppress(BrokenBarrierError):
            both.wait(0.3)
        overlaps.append(not both.broken)
        run()
        return run

    monkeypatch.setattr(cuda_graph, "capture", slow)
    models[0].sample(2)
    with ThreadPoolExecutor() as pool:
        capturing = pool.submit(models[0].sample, 2)
        assert begun.wait(10)
        for _ in range(2):
            models[1].sample(2)
        capturing.result()
    assert overlaps == [False, False]

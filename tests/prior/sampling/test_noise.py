"""Noise is the same to the bit, however it is drawn: at once, in blocks, by threads, ahead of its use.

Covers: prior/sampling/buffers.py.
"""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from small import generators, make_prior

from prior.sampling import GumbelNoise, gumbel
from prior.sampling import buffers as buffers_of

CPU = torch.device("cpu")


@pytest.fixture
def by_threads(monkeypatch):
    """Three threads, whatever the size of a block is."""
    monkeypatch.setattr(buffers_of, "MANY", 0)
    monkeypatch.setattr(buffers_of, "cores", lambda: 3)
    buffers_of.threads.cache_clear()
    yield
    buffers_of.threads(os.getpid()).shutdown()
    buffers_of.threads.cache_clear()


def defined(count, size, vocab_size, positions):
    """Noise `(B, N, V)` of whole blocks from its definition, and the generators after the blocks of the first N."""
    own = generators(count)
    blocks = -(-size // positions)
    rows = [torch.cat([gumbel((positions, vocab_size), g) for _ in range(blocks)]) for g in own]
    return torch.stack(rows), [g.get_state() for g in own]


def test_noise_of_a_block_is_that_of_its_ranks(monkeypatch):
    """However blocks lie over the pieces in which it is drawn, and though some are left out."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 3 * 5)
    whole = GumbelNoise(generators(2), 12, 5, CPU).of(0, 12)
    assert whole.shape == (2, 12, 5)
    for cuts in ((0, 1, 2, 3, 4, 12), (0, 2, 7, 11, 12), (0, 5, 12)):
        noise = GumbelNoise(generators(2), 12, 5, CPU)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            assert torch.equal(noise.of(begin, end), whole[:, begin:end])
    assert torch.equal(GumbelNoise(generators(2), 12, 5, CPU).of(8, 10), whole[:, 8:10])


@pytest.mark.parametrize("ahead", [0, 7, 12])
@pytest.mark.parametrize("cuts", [range(8), [0, 2, 7], [3, 4, 7], [0, 7]])
def test_threads_draw_the_same_and_no_more(ahead, cuts, by_threads, monkeypatch):
    """One block ahead, in two buffers that take turns; afterwards generators are where they would be without."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 2 * 700)
    ahead = min(ahead, 7)
    expected, states = defined(5, 7, 700, 2)
    own, cuts = generators(5), list(cuts)
    with GumbelNoise(own, 12, 700, CPU, ahead) as noise:
        for begin, end in zip(cuts, cuts[1:], strict=False):
            assert torch.equal(noise.of(begin, end), expected[:, begin:end])
        assert len(noise.buffers) == (2 if ahead else 1)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(own, states, strict=True))


@pytest.mark.parametrize("ahead", [0, 12])
def test_generators_of_a_device_draw_the_same_blocks(ahead, monkeypatch):
    """One after another, on it; none is drawn ahead, and no buffer is kept."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 3 * 5)
    expected, states = defined(2, 12, 5, 3)
    own = generators(2)
    noise = GumbelNoise(own, 12, 5, CPU, ahead)
    noise.on_cpu = False
    assert torch.equal(noise.of(0, 4), expected[:, :4]) and torch.equal(noise.of(4, 12), expected[:, 4:12])
    assert noise.buffers == [] and all(torch.equal(g.get_state(), s) for g, s in zip(own, states, strict=True))


@pytest.mark.parametrize(("place", "kind"), [("mps", torch.float32), ("cuda", torch.float64)])
def test_noise_is_drawn_on_the_device_of_its_generator_in_what_it_has(place, kind, monkeypatch):
    asked, generator = {}, SimpleNamespace(device=torch.device(place))
    monkeypatch.setattr(torch, "rand", lambda shape, **how: asked.update(how) or torch.full(shape, 0.5, dtype=kind))
    assert gumbel((2, 3), generator).dtype == torch.float32
    assert asked == {"generator": generator, "device": torch.device(place), "dtype": kind}


def test_one_block_ahead_needs_one_buffer(by_threads, monkeypatch):
    """Which the next one is drawn into once it is used up."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 6 * 5)
    with GumbelNoise(generators(2), 12, 5, CPU, ahead=6) as noise:
        assert noise.positions == 6
        for begin in (0, 6):
            assert noise.of(begin, begin + 6).shape == (2, 6, 5) and len(noise.buffers) == 1


def test_blocks_are_drawn_while_the_last_is_used(by_threads, monkeypatch):
    """Where one is asked for, the next one has been begun, in other memory; the last one begins no other."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 700)
    noise, begun = GumbelNoise(generators(4), 3, 700, CPU, 3), []
    monkeypatch.setattr(
        buffers_of.Buffer,
        "begin",
        lambda buffer, given, real=buffers_of.Buffer.begin: begun.append(buffer) or real(buffer, given),
    )
    with noise:
        for rank, count in enumerate([2, 3, 3]):
            noise.of(rank, rank + 1)
            assert len(begun) == count
    assert begun[0] is not begun[1] and begun[0] is begun[2]


class Lagging(buffers_of.Buffer):
    """Of a GPU that does nothing until it must: steps that read the block wait in `queue`, those given before `leave`
    are done when the next block is copied over it, and no others."""

    queue: list = []

    def __init__(self, shape, device):
        super().__init__(shape, device)
        self.used, self.left, self.sent = torch.empty(shape), 0, False

    def begin(self, generators):
        self.sent = False
        super().begin(generators)

    def send(self):
        if not self.sent and all(task.done() for task in self.tasks):
            self.wait()
            for number in range(self.left):
                self.queue[number]()
            self.used.copy_(self.drawn)
            self.sent = True

    def receive(self):
        self.wait()
        self.send()
        return self.used

    def leave(self):
        self.left = len(self.queue)


@pytest.mark.parametrize("ahead", [0, 2, 7, 11, 12])
@pytest.mark.parametrize("positions", [1, 2, 5, 12])
@pytest.mark.parametrize("cuts", [range(13), [0, 1, 4, 12]], ids=["tokens", "blocks"])
def test_no_block_is_copied_over_one_that_is_still_to_be_read(ahead, positions, cuts, monkeypatch):
    """However far a GPU is behind: each step finds the noise of its own ranks when it is done at last."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", positions * 5)
    monkeypatch.setattr("prior.sampling.noise.make_buffer", Lagging)
    monkeypatch.setattr(Lagging, "queue", queue := [])
    expected, found, cuts = defined(2, 12, 5, positions)[0], {}, list(cuts)
    with GumbelNoise(generators(2), 12, 5, CPU, ahead) as noise:
        for begin, end in zip(cuts, cuts[1:], strict=False):
            block = noise.of(begin, end)
            queue.append(lambda at=begin, block=block: found.setdefault(at, block.clone()))
    for step in queue:
        step()
    for begin, end in zip(cuts, cuts[1:], strict=False):
        assert torch.equal(found[begin], expected[:, begin:end])


def test_nobody_draws_once_it_is_left(by_threads, monkeypatch):
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 700)
    own = generators(30)
    with pytest.raises(RuntimeError, match="stop"), GumbelNoise(own, 9, 700, CPU, 9) as noise:
        noise.of(0, 1)
        raise RuntimeError("stop")
    expected, states = defined(30, 2, 700, 1)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(own, states, strict=True))


def test_an_error_of_a_thread_is_raised(by_threads, monkeypatch):
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 700)
    noise = GumbelNoise(generators(3), 9, 700, CPU)
    noise.generators = [*noise.generators[:2], None]
    monkeypatch.setattr(noise, "on_cpu", True)
    monkeypatch.setattr(buffers_of.Buffer, "draw", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        noise.of(0, 1)


def test_threads_that_draw_leave_the_number_of_torchs_alone(by_threads):
    own, others = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        GumbelNoise(generators(4), 3, 700, CPU).of(0, 3)
        inside = buffers_of.threads(os.getpid()).submit(torch.get_num_threads).result()
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (inside, torch.get_num_threads(), others) == (1, 2, [2])
    finally:
        torch.set_num_threads(own)


def test_generators_end_where_they_do_without_threads(by_threads, monkeypatch):
    """Of a whole call, with tokens known at the end, so that the last blocks are not drawn."""
    monkeypatch.setattr("prior.sampling.noise.NOISE_BLOCK", 2 * 5)
    model, known = make_prior("gpt"), torch.zeros(3, 4, dtype=torch.bool)
    known[2] = True
    real, states, drawn = GumbelNoise.__init__, [], []
    for ahead in (0, 8):
        own = generators(4)
        monkeypatch.setattr(GumbelNoise, "__init__", lambda noise, *given, a=ahead: real(noise, *given[:4], a))
        drawn.append(model.sample(4, generator=own, tokens=torch.zeros(3, 4).long(), known=known))
        states.append(torch.stack([g.get_state() for g in own]))
    assert torch.equal(*drawn) and torch.equal(*states)

"""Drawing tokens along a walk, step by step or in whole passes, so that both give the same.

Other batches, cached steps and whole passes round otherwise, and so might decide otherwise where two ids are that
close. They leave these decisions to one computation: a pass over the image alone (`parallel.settled`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenizer.base import Held, full_float32

from .parallel import parallel_rows, sample_parallel, settled
from .requests import Model, Rows, Walk, choose_walk
from .sampling import Sampler
from .sampling.steps import State as State
from .sampling.steps import from_graphs, step_by_step
from .sampling.watching import Watch, to_raster

FEW_ROWS = 4
"""With fewer rows, a matrix product is bound by reading the weights."""
FINE = (torch.float32, torch.float64)
"""The types of weights for which it is promised that caches and batches do not matter: logits are precise enough."""

NO_CUDNN = Held([(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)])
"""cuDNN's attention plans anew, for tens of milliseconds, whenever there is one more key."""
MODES: dict[Any, tuple[int, list[tuple[torch.nn.Module, bool]]]] = {}
"""The priors that are drawn from: how many calls draw from each at once, and which of its modules were in training mode
before: somebody may train a part of it alone."""
LOCK = threading.Lock()


@contextmanager
def evaluating(prior: Any) -> Iterator[None]:
    """Eval mode and full precision: with autocast or TF32, steps and whole passes would not agree. The mode is that
    of all threads; the last call to end puts back the one that was."""
    with LOCK:
        count, before = MODES.get(prior) or (0, [(module, module.training) for module in prior.modules()])
        MODES[prior] = count + 1, before
        prior.eval()
    try:
        with NO_CUDNN.inside(), full_float32(), torch.autocast(prior.device.type, enabled=False):
            yield
    finally:
        with LOCK:
            count, before = MODES.pop(prior)
            if count > 1:
                MODES[prior] = count - 1, before
            else:
                for module, training in before:
                    module.training = training


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """`drawn` on this device: from the CPU to a GPU by way of pinned memory, so that the host does not wait."""
    pinned = device.type == "cuda" and drawn.device.type == "cpu"
    return drawn.pin_memory().to(device, non_blocking=True) if pinned else drawn.to(device)


def draw(prior: Model, rows: Rows, sampler: Sampler, walk: Walk, watch: Watch) -> Tensor:
    """Tokens `(B, N)` for `rows`, both in raster order."""
    rows = rows.along(choose_walk(prior, walk.order, walk.num_orders, rows), prior)
    most = (
        parallel_rows(prior.grid, prior.device) if walk.parallel else prior.rows_at_once() or len(rows) * sampler.copies
    )
    walked = torch.empty_like(rows.given)
    for at, alike in rows.alike(prior):
        parts = alike.cut(max(FEW_ROWS, most // sampler.copies))
        walked[at] = torch.cat([draw_part(prior, part, sampler, walk, watch) for part in parts])
    return to_raster(rows, walked)


def draw_part(prior: Model, rows: Rows, sampler: Sampler, walk: Walk, watch: Watch) -> Tensor:
    """Tokens `(B, N)` in the order of the walk, of rows that go through the model together."""
    states = [generator.get_state() for generator in rows.generators]
    if walk.parallel:
        tokens, close, _ = sample_parallel(prior, rows, sampler, walk.guess, watch)
    else:
        captured = from_graphs(prior, rows, sampler, watch) if walk.cache and walk.capture else None
        tokens, close = captured or step_by_step(prior, rows, sampler, walk.cache, watch)
    close = close & ~rows.keep & (prior.dtype in FINE)
    for k in torch.nonzero(close.any(1)).flatten().tolist():
        rows.generators[k].set_state(states[k])
        tokens[k] = settled(prior, rows[[k]], sampler, tokens[[k]], close[[k]])
    watch.drew(rows, tokens)
    return tokens

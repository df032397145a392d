"""What drawing does around the steps: where tensors are sent, how weights are laid out, how modes are put back.

Covers: prior/layers.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prior.drawing import FEW_ROWS, MODES, evaluating, sent
from small import draw_tokens, generators, make_prior
from torch import nn

from prior import drawing
from prior.layers import ClosingLayers, pack

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("here", "there", "asked"),
    [
        (CPU, GPU, ["pinned", (GPU, {"non_blocking": True})]),
        (CPU, CPU, [(CPU, {})]),
        (GPU, GPU, [(GPU, {})]),
        (GPU, CPU, [(CPU, {})]),
        (CPU, torch.device("mps"), [(torch.device("mps"), {})]),
    ],
    ids=str,
)
def test_what_is_drawn_for_a_gpu_goes_by_way_of_pinned_memory(here, there, asked):
    told: list[Any] = []
    drawn = SimpleNamespace(device=here)
    drawn.pin_memory = lambda: told.append("pinned") or drawn
    drawn.to = lambda device, **how: told.append((device, how)) or "sent"
    assert sent(drawn, there) == "sent" and told == asked


def test_a_prior_is_in_eval_mode_while_it_is_drawn_from_and_then_as_it_was():
    """Each of its modules: a part may be trained alone. In full precision, however the caller is."""
    model = make_prior("gpt").train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    with torch.autocast("cpu", torch.bfloat16), evaluating(model), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert MODES[model][0] == 2 and not torch.is_autocast_enabled("cpu")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert [module.training for module in model.modules()] == before and model not in MODES
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before and model not in MODES


@pytest.mark.parametrize(("most", "sizes"), [(None, [9]), (5, [4, 5]), (1, [3, 3, 3]), (8, [4, 5])])
def test_so_many_rows_are_drawn_together(monkeypatch, most, sizes):
    """As many as the prior says, but not fewer than a matrix product takes as long for; with guidance half as many."""
    model, seen = make_prior("gpt"), []
    monkeypatch.setattr(type(model), "rows_at_once", lambda self: most)
    real = drawing.draw_part
    monkeypatch.setattr(
        drawing, "draw_part", lambda prior, rows, *more: seen.append(len(rows)) or real(prior, rows, *more)
    )
    drawn = model.sample(9, torch.arange(9) % 3, generator=generators(9))
    assert FEW_ROWS == 4 and seen == sizes
    seen.clear()
    model.sample(9, torch.arange(9) % 3, generator=generators(9), guidance_scale=2.0)
    assert seen == ([9] if most is None else [3, 3, 3])
    monkeypatch.setattr(type(model), "rows_at_once", lambda self: None)
    assert torch.equal(model.sample(9, torch.arange(9) % 3, generator=generators(9)), drawn)


def test_what_is_drawn_is_the_callers_to_train_on():
    model = make_prior("gpt")
    drawn = model.sample(2, generator=generators(2))
    assert drawn.shape == (2, 3, 4) and drawn.dtype == torch.int64 and not drawn.is_inference()
    model.loss_from_outputs(model(drawn), drawn).backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "class" not in name)


def test_only_weights_that_are_fine_enough_are_settled(monkeypatch):
    """What rounding could turn is decided once, of float32 and float64; of lower precision it would be always."""
    asked = []
    monkeypatch.setattr(drawing, "settled", lambda prior, row, sampler, tokens, close: asked.append(close) or tokens)
    model = make_prior("gpt")
    model.rounding = 100.0  # of everything
    for dtype, times in ((torch.float32, 3), (torch.float64, 3), (torch.bfloat16, 0)):
        asked.clear()
        model.to(dtype).sample(3, generator=generators(3))
        assert len(asked) == times and all(close.shape == (1, 12) and close.all() for close in asked)
    asked.clear()
    known = torch.arange(12).view(3, 4) < 5
    model.float().sample(3, generator=generators(3), tokens=draw_tokens(model, 3), known=known)
    assert len(asked) == 3 and all(close[0].tolist() == [False] * 5 + [True] * 7 for close in asked)


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_weights_are_laid_out_for_so_many_rows(rows):
    weight, kernel, x = torch.randn(5, 3), torch.randn(5, 3, 2, 4), torch.randn(rows, 3)
    packed = pack(nn.Parameter(weight), rows)
    assert torch.equal(packed, weight.t()) and not packed.requires_grad
    assert packed.is_contiguous() == (rows < FEW_ROWS) and packed.t().is_contiguous() == (rows >= FEW_ROWS)
    patches = torch.randn(rows, 2, 4, 3)
    expected = torch.einsum("nrci,oirc->no", patches, kernel)
    torch.testing.assert_close(patches.flatten(1) @ pack(kernel, rows), expected, rtol=1e-4, atol=1e-5)
    hidden, head = nn.Linear(3, 7), nn.Linear(7, 2)
    closing = ClosingLayers(hidden, head, rows, torch.relu_)
    with torch.no_grad():
        expected = head(hidden(x.relu()).relu())
    torch.testing.assert_close(closing.outputs(x.clone()), expected)


def test_graphs_are_asked_for_cached_steps_unless_a_caller_does_without(monkeypatch):
    model, asked, watches = make_prior("gpt"), [], []

    def none(prior: Any, rows: Any, sampler: Any, watch: Any) -> None:
        asked.append((prior, len(rows), sampler.top_k))
        watches.append(watch)

    monkeypatch.setattr(drawing, "from_graphs", none)
    model.sample(3, generator=generators(3), top_k=2, on_step=lambda step: None)
    assert asked == [(model, 3, 2)] and watches[0].steps == 12
    for without in ({"cache": False}, {"capture": False}, {"parallel": True}):
        model.sample(3, generator=generators(3), **without)
    assert len(asked) == 1
    drawn = torch.zeros(3, 12).long(), torch.zeros(3, 12, dtype=torch.bool)
    monkeypatch.setattr(drawing, "from_graphs", lambda *given: drawn)
    assert not model.sample(3, generator=generators(3)).any()

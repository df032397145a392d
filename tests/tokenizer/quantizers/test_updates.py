"""Codebooks that update themselves do so once after each training forward, and at no other time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import QUANTIZERS, latents, make_quantizer, make_tokenizer, quantizer_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.updates import SelfUpdating, one_training_forward

BUSY = {"decay": 0.5, "revive_every": 2, "revive_below": 0.5}  # codes are revived all the time
BOOK = {"kind": "ema", "codes": 32, "dim": 8, **BUSY}
NODES: dict[str, dict[str, Any]] = {
    "ema": BOOK,
    "vq": {**BOOK, "kind": "vq"},
    "directions": {**BOOK, "kind": "vq", "normalize": True},
    "rvq": {"kind": "rvq", "depth": 2, "book": BOOK},
    "shared": {"kind": "rvq", "depth": 2, "shared": True, "book": BOOK},
    "multiscale": {"kind": "multiscale", "scales": (1, 2), "book": BOOK},
}
UPDATED = [name for name in QUANTIZERS if issubclass(Quantizer.find(name), SelfUpdating)] + ["rvq"]
every_kind = pytest.mark.parametrize("kind", NODES)


def vqvae(kind: str) -> Any:
    """A small tokenizer in training with a grid of 2 x 2."""
    torch.manual_seed(0)
    return make_tokenizer("vqvae", (8, 8), 1, quantizer=NODES[kind]).train()


def images(step: int, count: int = 32) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def counters(model: nn.Module) -> set[int]:
    return {int(each.started) for each in model.modules() if isinstance(each, SelfUpdating)}


@every_kind
def test_each_training_forward_updates_once(kind):
    tokenizer = vqvae(kind)
    tokenizer(images(0))
    for step in range(1, 4):
        before = state(tokenizer)
        tokenizer(images(step)).images.square().mean().backward()
        assert any(name.endswith("counts") for name in changed(tokenizer, before))
        assert counters(tokenizer) == {step + 1}


@every_kind
def test_nothing_is_updated_outside_of_training(kind):
    tokenizer = vqvae(kind)
    for trained in (False, True):
        before = state(tokenizer)
        tokenizer.encode(images(1))
        with torch.no_grad():
            tokenizer(images(2))
        with torch.inference_mode():
            tokenizer(images(3))
        tokenizer.eval()
        tokenizer(images(4)).images.mean().backward()
        tokenizer.train()
        assert not changed(tokenizer, before), trained
        tokenizer(images(5))
        assert changed(tokenizer, before)


@pytest.mark.parametrize("name", UPDATED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_updates_nothing(name, value):
    quantizer = make_quantizer(name).train()
    for trained in (False, True):
        before = state(quantizer)
        for _ in range(10):  # through a revival
            z = latents(quantizer, 4, 4, 4)
            z[1, 0].flatten()[0] = value
            quantizer.quantize(z)
        assert {name for name in changed(quantizer, before) if not name.endswith("started")} == set()
        assert trained or counters(quantizer) == {0}, "the next batch starts it"
        quantizer.quantize(latents(quantizer, 16, 4, 4))
        assert changed(quantizer, before)


@every_kind
def test_two_calls_in_one_forward_update_once(kind):
    """After the outermost forward, by the batches of both calls."""
    one, two = vqvae(kind), vqvae(kind)
    for step in range(4):
        whole = images(step)
        one(whole)
        with one_training_forward():
            before = state(two)
            two(whole[:16])
            inside = changed(two, before)
            two(whole[16:])
        assert not inside or step == 0  # the first batch initializes the codebook
        assert counters(two) == counters(one) == {step + 1}
        if step == 0:
            two.load_state_dict(one.state_dict())
    if "multiscale" not in kind:
        for name, value in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_a_forward_that_fails_updates_nothing(monkeypatch):
    tokenizer = vqvae("ema")
    tokenizer(images(0))
    before = state(tokenizer)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(tokenizer.decoder, "forward", lambda z: z @ z.new_zeros(3, 3, 3, 7))
        tokenizer(images(1))
    assert not changed(tokenizer, before)


@pytest.mark.parametrize("kind", ["ema", "shared", "multiscale"])
def test_checkpointed_tokenizers_update_once(kind):
    plain, other = vqvae(kind), vqvae(kind)
    for step in range(3):
        plain(images(step))
        with set_checkpoint_early_stop(False):  # so that the whole forward is repeated
            found = checkpoint(lambda x: other(x).images, images(step).requires_grad_(), use_reentrant=False)
        found.mean().backward()
        assert counters(other) == {step + 1} and not changed(other, state(plain))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if not name.startswith("f")])
def test_a_backward_pass_uses_the_codes_of_its_forward(name):
    """A revival between a forward and its backward pass changes no gradient."""
    gradients = []
    for moves in (True, False):
        torch.manual_seed(0)
        node = {**quantizer_of(name, 4, 4), **(BUSY if name in ("ema", "vq") else {}), "kind": name}
        node = {**node, "normalize": True} if name in ("ema", "vq", "simvq", "ibq") else node
        quantizer: Any = Quantizer.create(**{"name": node.pop("kind"), **node}).train()
        for step in range(4):
            torch.manual_seed(step)
            quantizer.zero_grad()
            z = latents(quantizer, 8, 4, 4).requires_grad_()
            if not moves and step == 3:
                for each in quantizer.modules():
                    each.update = lambda *batch: None
            found = quantizer.quantize(z)
            (found.z_q.square().sum() + sum(found.losses.values())).backward()
        gradients.append([z.grad, *(parameter.grad for parameter in quantizer.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)

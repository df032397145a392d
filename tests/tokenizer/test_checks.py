"""The checks that models from outside of the package can be held to: no false alarm, and each broken promise found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import QUANTIZERS, make_quantizer, make_tokenizer
from torch import Tensor

from tokenizer.checks import check_quantizer, check_tokenizer
from tokenizer.config import ModelConfig
from tokenizer.quantizers import Quantized, Quantizer
from tokenizer.quantizers.gradients import straight_through

BROKEN = {
    "no straight-through": "z_q passes a gradient to every channel",
    "a channel without a gradient": "z_q passes a gradient to every channel",
    "normalises by the batch": "tokens do not depend on the batch",
    "counts in eval mode": "tokens do not depend on the batch",
    "no weight": "losses are finite scalars with weights",
    "a loss for each image": "losses are finite scalars with weights",
    "ids of other codes": "lookup inverts quantize",
}


def make_broken(fault: str) -> Quantizer:
    """The nearest of 16 fixed codes, with one fault; it registers no name."""

    class Broken(Quantizer):
        Config = ModelConfig
        name = "broken"
        dim, vocab_size = 4, 16

        def __init__(self) -> None:
            super().__init__(ModelConfig())
            codes = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
            self.register_buffer("codes", codes)
            self.register_buffer("counts", torch.zeros(16))

        def _quantize(self, z: Tensor) -> Quantized:
            near = z - z.mean(0, keepdim=True) / 2 if fault == "normalises by the batch" else z
            vectors = near.movedim(1, -1)
            tokens = torch.cdist(vectors.flatten(0, -2), self.codes).argmin(1).reshape(vectors.shape[:-1])
            if fault == "counts in eval mode":
                self.counts += tokens.flatten().bincount(minlength=16)
            codes = self.lookup_checked(tokens)
            if fault == "a channel without a gradient":
                z_q = torch.cat([straight_through(z[:, :3], codes[:, :3]), codes[:, 3:]], 1)
            else:
                z_q = codes if fault.startswith("no straight") else straight_through(z, codes)
            loss = (z - codes.detach()).square()
            loss = loss.mean((1, 2, 3)) if fault == "a loss for each image" else loss.mean()
            tokens = (tokens + 1) % 16 if fault == "ids of other codes" else tokens
            return Quantized(z_q, tokens, {"commitment": loss})

        def lookup_checked(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, self.codes).movedim(-1, 1)

        @property
        def loss_weights(self) -> dict[str, float]:
            return {} if fault == "no weight" else {"commitment": 0.25}

    return Broken()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_quantizer_is_found_by_the_promise_that_it_breaks(fault):
    problems = {promise: problem for promise, problem in check_quantizer(make_broken(fault)) if problem}
    assert list(problems) == [BROKEN[fault]] and "\n" not in problems[BROKEN[fault]]


def test_our_own_quantizers_keep_all_promises():
    for quantizer in (make_broken("none"), *map(make_quantizer, QUANTIZERS), *map(Quantizer.create, QUANTIZERS)):
        found = dict(check_quantizer(quantizer))
        assert len(found) == 5 and not any(found.values()), (quantizer.name, found)


def test_a_tokenizer_with_a_loss_without_a_weight_is_found(monkeypatch):
    tokenizer = make_tokenizer("vqvae")
    assert not any(dict(check_tokenizer(tokenizer)).values())
    monkeypatch.setattr(type(tokenizer.quantizer), "loss_weights", {})
    problems = {promise: problem for promise, problem in check_tokenizer(tokenizer) if problem}
    assert list(problems) == ["losses are finite scalars with weights"]

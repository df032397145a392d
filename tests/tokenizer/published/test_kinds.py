"""Imported kinds are tokenizers like others: any quantizer goes with them."""

from __future__ import annotations

import pytest
import torch
from small import QUANTIZERS, make_tokenizer, quantizer_of

KINDS = ("cosmos", "magvit2", "maskgit")


@pytest.mark.sparse
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_quantizer_goes_with_it(kind, quantizer):
    node = quantizer_of(quantizer, *((4, 2) if kind == "cosmos" else (8, 4)))
    tokenizer = make_tokenizer(kind, (16, 8), quantizer=node)
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    tokenizer(images).images.square().mean().backward()
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)

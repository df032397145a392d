"""What quantizers have from their base: where their tensors are and of which type, and what is refused in one line."""

from __future__ import annotations

import re

import pytest
import torch
from small import QUANTIZERS, latents, make_quantizer, train_on

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@every_quantizer
def test_it_stays_float32_to_the_bit_whatever_type_the_model_takes(name):
    quantizer = make_quantizer(name).train()
    train_on(quantizer, latents(quantizer, 4, 4, 4))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float64):
        torch.nn.ModuleList([quantizer]).to(dtype)
        for key, value in quantizer.state_dict().items():
            assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in quantizer.buffers())


@every_quantizer
def test_all_of_it_moves_with_the_model(name):
    quantizer = make_quantizer(name)
    own = [*quantizer.parameters(), *quantizer.buffers()]
    assert {tensor.device.type for tensor in own} <= {"cpu"}
    torch.nn.ModuleList([quantizer]).to("meta")
    assert {tensor.device.type for tensor in [*quantizer.parameters(), *quantizer.buffers()]} <= {"meta"}


def test_without_its_parts_only_its_own_tensors_move():
    quantizer = make_quantizer("gumbel").to_empty(device="meta", recurse=False)
    assert quantizer.started.is_meta and not quantizer.embed.weight.is_meta


@every_quantizer
def test_what_it_does_not_take_is_told_in_one_line(name):
    quantizer = make_quantizer(name)
    wide = f"z should have {quantizer.dim} channels, got {quantizer.dim + 1}"
    with pytest.raises(ValueError, match=f"^{wide}$"):
        quantizer.quantize(torch.randn(1, quantizer.dim + 1, 2, 2))
    tokens = torch.zeros(1, *quantizer.grid_shape(*(quantizer.scales[-1] if quantizer.scales else (3, 4)))).long()
    tokens[0].flatten()[0] = quantizer.vocab_size
    for wrong, span in ((tokens, f"0 to {quantizer.vocab_size}"), (tokens - 1, f"-1 to {quantizer.vocab_size - 1}")):
        said = f"token ids should lie in [0, {quantizer.vocab_size}), got {span}"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            quantizer.lookup(wrong)
    if not quantizer.scales:
        with pytest.raises(ValueError, match=f"^a '{name}' quantizer has no scales$"):
            quantizer.lookup_scales(tokens, 1)

"""Imported kinds are tokenizers like others: any quantizer goes with them.

Covers: tokenizer/published/emu3.py.
"""

from __future__ import annotations

import pytest
import torch
from small import QUANTIZERS, make_quantizer, make_tokenizer, quantizer_of

from tokenizer.files import ConfigError

KINDS = ("cosmos", "emu3", "magvit2", "maskgit")


@pytest.mark.sparse
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_quantizer_goes_with_it(kind, quantizer):
    node = quantizer_of(quantizer, *((4, 2) if kind == "cosmos" else (8, 4)))
    width = {"z_channels": make_quantizer(quantizer).dim} if kind == "emu3" else {}
    tokenizer = make_tokenizer(kind, (16, 8), quantizer=node, **width)
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    tokenizer(images).images.square().mean().backward()
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


def test_emu3s_codes_normalise_its_decoder_so_both_are_as_wide():
    with pytest.raises(ConfigError, match=r"z_channels: must be the width of the codes, 8 \(got 6\)"):
        make_tokenizer("emu3", z_channels=6)
    with pytest.raises(ConfigError, match="mid_attention: this network has it"):
        make_tokenizer("emu3", mid_attention=False)
    with pytest.raises(ConfigError, match="frames: must be one of 1, 2, 4, 8"):
        make_tokenizer("emu3", frames=3)

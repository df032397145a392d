"""Large vocabularies train in little memory: no matrix of vectors x codes exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.quantizers import Quantizer

CODES, ROWS = 16_384, 1024
BOOK = {"codes": CODES, "dim": 8, "kmeans_iterations": 1}


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return found


def train_step(quantizer: Any, z: Tensor) -> tuple[int, int]:
    """Elements of the largest tensor of a training step, and of all tensors that are saved for the backward pass."""
    saved = []
    with Largest() as largest, saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        z_q, _, losses = quantizer.quantize(z)
        loss = (z_q - 1).square().mean() + sum(quantizer.loss_weights[name] * value for name, value in losses.items())
        loss.backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.any()
    return largest.elements, sum(saved)


def large(name: str) -> dict[str, Any] | None:
    """The settings of a quantizer with a large codebook; None for quantizers without codebooks."""
    fields = Quantizer.find(name).Config.model_fields
    if "codes" in fields:
        return {key: value for key, value in BOOK.items() if key in fields}
    more = {"scales": (1, 4, 16)} if name == "multiscale" else {"depth": 2}
    return {**more, "book": {"kind": "ema", **BOOK}} if "book" in fields else None


@pytest.mark.parametrize("name", [name for name in Quantizer.available() if large(name)])
def test_a_large_codebook_needs_no_matrix_of_vectors_and_codes(name):
    quantizer: Any = Quantizer.create(name, **large(name)).train()
    largest, saved = train_step(quantizer, torch.randn(ROWS // 256, 8, 16, 16, requires_grad=True))
    assert largest <= ROWS * CODES / 8 and saved <= ROWS * CODES / 8


@pytest.mark.parametrize("name", ["bsq", "lfq"])
def test_eighteen_bits_need_about_the_root_of_a_groups_codes_per_vector(name, group=18, per_row=512):
    quantizer = Quantizer.create(name, bits=18, levels=2, group=group).train()
    rows = 4 * 8 * 8
    largest, saved = train_step(quantizer, torch.randn(4, 18, 8, 8, requires_grad=True))
    assert largest <= max(rows * per_row, 2**group)
    assert saved < rows * per_row * 20 + 8 * 2**group < rows * 2**18 / 8

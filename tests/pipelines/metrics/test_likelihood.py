"""Figures of an evaluation do not depend on its batch size, which is bounded by memory.

Covers: pipelines/metrics/reconstruction.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import make_prior, make_tokenizer

from pipelines.metrics.likelihood import bits_per_token, rows_at_a_time
from pipelines.metrics.reconstruction import evaluate_reconstruction, images_at_a_time, reconstruction_picture
from pipelines.tokens import load_tokens
from tokenizer import TokenGrid
from tokenizer.spec import ImageSpec


class Images(list):
    """Images `(n, C, H, W)` as a data set."""

    spec = ImageSpec(3, 16, 8)

    def batch(self, rows) -> torch.Tensor:
        return torch.stack([self[int(row)] for row in rows])


def test_batches_fit_into_memory_and_do_not_change_the_figures(monkeypatch, tokens):
    grids = [TokenGrid((7, 7), 64), TokenGrid((16, 16), 16384), TokenGrid((64, 64), 1 << 18)]
    assert [rows_at_a_time(grid) for grid in grids] == [256, 64, 1]
    assert [images_at_a_time(ImageSpec(3, s, s)) for s in (28, 96, 2048)] == [256, 113, 1]
    split, model = load_tokens(str(tokens)).splits["test"], make_prior("gpt", (7, 7), 16).eval()
    tokenizer = make_tokenizer("vqgan", (16, 8)).eval()
    held_out: Any = Images(torch.rand(11, 3, 16, 8) * 2 - 1)
    found, sizes, encode = [], [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: (sizes.append(len(images)), encode(images))[1])
    for logits, pixels in ((1 << 28, 1 << 20), (5 * 49 * 16, 3 * 128)):
        monkeypatch.setattr("pipelines.metrics.likelihood.LOGITS", logits)
        monkeypatch.setattr("pipelines.metrics.reconstruction.EVALUATED_PIXELS", pixels)
        figures = evaluate_reconstruction(tokenizer, held_out, ssim_images=7)
        picture = float(reconstruction_picture(tokenizer, held_out).mean())
        found.append({**figures, "bits": bits_per_token(model, split), "picture": picture})
    assert sizes == [11, 11, *(3, 3, 3, 2) * 2]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0]["psnr"] > 0 and found[0]["ssim_images"] == 7

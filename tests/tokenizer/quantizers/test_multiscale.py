"""Multi-scale quantization against the paper's algorithms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import make_tokenizer, train_on
from torch import Tensor

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.multiscale import BOOKS

BOOK_SIZES: dict[str, dict[str, Any]] = {"fsq": {"levels": (5, 4, 3)}, "lfq": {"bits": 6}, "bsq": {"bits": 6}}
every_book = pytest.mark.parametrize("book", BOOKS)


def multiscale(book: str = "ema", more: dict[str, Any] | None = None, **config: Any) -> Any:
    """A small multi-scale quantizer of 4x4 latents, in training mode."""
    node = {"kind": book, **BOOK_SIZES.get(book, {"codes": 32, "dim": 8}), **(more or {})}
    return Quantizer.create("multiscale", **{"scales": (1, 2, 4), **config}, book=node).train()


def batch(step: int = 0, count: int = 8, dim: int = 8, size: tuple[int, int] = (4, 4)) -> Tensor:
    """Smooth vectors `(count, dim, *size)` that are not centred, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randn(count, dim, 2, 2, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    return 2 + smooth + 0.3 * torch.randn(count, dim, *size, generator=generator)


def trained(steps: int = 3, *args: Any, **config: Any) -> Any:
    """A multi-scale quantizer after some training batches."""
    quantizer = multiscale(*args, **config)
    for step in range(steps):
        train_on(quantizer, batch(step, dim=quantizer.dim))
    return quantizer


def reference(quantizer: Any, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The paper's algorithm 1 with torch's own resizing: ids, and the sum after each scale."""
    table, sigma, total = quantizer.book.table().detach(), quantizer.sigma(), quantizer.mean[:, None, None] + 0 * z
    ids, sums = [], []
    for k, sides in enumerate(quantizer.scales):
        small = F.interpolate(z - total, size=sides, mode="area") / sigma[k]
        ids.append((small[:, None] - table[None, :, :, None, None]).square().sum(2).argmin(1))
        added = F.interpolate(table[ids[-1]].movedim(-1, 1) * sigma[k], size=quantizer.scales[-1], mode="bicubic")
        if quantizer.phis:
            conv = quantizer.phis[quantizer._phi_of(k)]
            added = 0.5 * added + 0.5 * F.conv2d(added, conv.weight, conv.bias, padding=1)
        total = total + added
        sums.append(total)
    return ids, sums


# Quantizing


@pytest.mark.parametrize("book", ["ema", "vq", "simvq"])
@pytest.mark.parametrize("config", [{}, {"phi": 2}, {"rms": False, "center": False}, {"scales": ("1x1", "2x3", "4x6")}])
def test_it_is_the_papers_loop(book, config):
    quantizer = multiscale(book, **config)
    size = quantizer.scales[-1]
    for step in range(3):
        train_on(quantizer, batch(step, 64, size=size))
    z = batch(7, size=size)
    z_q, tokens, losses = quantizer.eval().quantize(z)
    with torch.no_grad():
        ids, sums = reference(quantizer, z)
    assert torch.equal(tokens, torch.cat([part.flatten(1) for part in ids], 1)) and len(tokens.unique()) > 12
    torch.testing.assert_close(z_q, sums[-1])
    torch.testing.assert_close(losses["commitment"], torch.stack([F.mse_loss(z, total) for total in sums]).mean())
    for count, total in enumerate(sums, 1):
        torch.testing.assert_close(quantizer.lookup_scales(tokens, count), total)


@every_book
def test_more_scales_are_nearer(book):
    quantizer = trained(10, book).eval()
    z = batch(77, 64, quantizer.dim)
    tokens = quantizer.quantize(z).tokens
    errors = [F.mse_loss(quantizer.lookup_scales(tokens, count), z).item() for count in (1, 2, 3)]
    assert errors[2] < errors[1] < errors[0]
    assert torch.equal(quantizer.lookup_scales(tokens, 3), quantizer.lookup(tokens))
    for count in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"^count should be 1 to 3, the number of scales \(got {count}\)$"):
            quantizer.lookup_scales(tokens, count)


def test_var_shares_four_convolutions_by_ten_scales():
    quantizer = multiscale(phi=4, scales=tuple(range(1, 11)))
    assert [quantizer._phi_of(k) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("book", "phi"), [("vq", 0), ("ema", 2)])
def test_codes_and_convolutions_are_pulled_to_the_vectors(book, phi):
    quantizer = trained(3, book, phi=phi)
    assert quantizer.loss_weights == {"commitment": 0.25, "codebook": 1.0}
    optimizer, errors = torch.optim.Adam(quantizer.parameters(), 1e-2), []
    for _ in range(30):
        loss = quantizer.quantize(batch(5).requires_grad_()).losses["codebook"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.9 * errors[0]
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_truncation_shows_the_decoder_fewer_scales_in_training_only():
    quantizer, all_of_them = trained(3, truncate=0.5), trained(3)
    z, before = batch(9, 400), copy.deepcopy(quantizer)
    shown, whole = quantizer.quantize(z), all_of_them.quantize(z)
    assert torch.equal(shown.tokens, whole.tokens) and shown.losses == whole.losses
    sums = [before.lookup_scales(shown.tokens, count) for count in (1, 2, 3)]
    same = torch.stack([(shown.z_q == total).flatten(1).all(1) for total in sums])
    assert (same.sum(0) == 1).all()  # each image sees one of the sums
    shares = same.double().mean(1).tolist()
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.1)
    quantizer.eval(), all_of_them.eval()
    assert torch.equal(quantizer.quantize(z).z_q, all_of_them.quantize(z).z_q)


# What moves by itself


@pytest.mark.parametrize("book", ["ema", "fsq"])
def test_running_means_are_those_of_the_vectors_of_each_scale(book):
    quantizer = trained(2, book, {} if book == "fsq" else {"decay": 0.7})
    decay = 0.7 if book == "ema" else 0.9
    before, z = copy.deepcopy(quantizer), batch(5, dim=quantizer.dim)
    tokens = train_on(quantizer, z).tokens
    shares = []
    for k in range(3):
        total = before.lookup_scales(tokens, k) if k else before.mean[:, None, None]
        square = F.interpolate(z - total, size=quantizer.scales[k], mode="area").square().mean()
        expected = decay * before.squares[k] + (1 - decay) * square
        torch.testing.assert_close(quantizer.squares[k], expected)
        shares.append(F.mse_loss(before.lookup_scales(tokens, k + 1), z) / z.var((0, 2, 3), correction=0).mean())
    torch.testing.assert_close(quantizer.left, decay * before.left + (1 - decay) * torch.stack(shares))
    torch.testing.assert_close(quantizer.mean, decay * before.mean + (1 - decay) * z.mean((0, 2, 3)))
    assert list(quantizer.figures) == ["left_1x1", "left_2x2", "left_4x4"]
    plain = trained(2, book, rms=False, center=False)
    assert (plain.sigma() == 1).all() and (plain.mean == 0).all() and (plain.left < 1).any()


def test_the_first_codebook_serves_all_scales():
    z, quantizer = batch(0, 64), multiscale()
    z_q, tokens, _ = quantizer.quantize(z)
    assert F.mse_loss(z_q, z) < 0.35 * z.var((0, 2, 3)).mean()
    assert min(len(part.unique()) for part in tokens.split([1, 4, 16], 1)) >= 24


# In a tokenizer


def test_a_tokenizer_of_scales():
    node = {"kind": "multiscale", "scales": (1, 2, 4), "book": {"kind": "ema", "codes": 32, "dim": 8}}
    tokenizer: Any = make_tokenizer("vqvae", (16, 16), 1, quantizer=node).eval()
    tokens = tokenizer.encode(torch.rand(4, 1, 16, 16) * 2 - 1)
    assert tokenizer.grid.scales == ((1, 1), (2, 2), (4, 4)) and tokenizer.parts == (1, 4, 16)
    assert torch.equal(tokenizer.decode_scales(tokens, 3), tokenizer.decode(tokens))
    with pytest.raises(ValueError, match=r"^a 'ema' quantizer has no scales$"):
        make_tokenizer("vqvae").decode_scales(torch.zeros(1, 3, 2, dtype=torch.long), 1)

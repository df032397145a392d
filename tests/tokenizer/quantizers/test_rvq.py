"""Residual quantization and SimVQ against the papers' formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import make_quantizer, train_on
from torch import Tensor

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.gradients import rotate_through

KINDS = [(book, shared) for book in ("ema", "vq", "simvq") for shared in (False, True)]
every_kind = pytest.mark.parametrize(("book", "shared"), KINDS)


def residual(book: str = "ema", depth: int = 3, shared: bool = False, **config: Any) -> Any:
    """A small residual quantizer in training mode."""
    node = {"kind": book, "codes": 32, "dim": 8, **config}
    return Quantizer.create("rvq", depth=depth, shared=shared, book=node).train()


def batch(step: int = 0, count: int = 8, rows: int = 4) -> Tensor:
    """Vectors `(count, 8, rows, 4)` of a few loose clusters, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    centres = torch.randn(12, 8, generator=torch.Generator().manual_seed(99)) * 2
    chosen = centres[torch.randint(12, (count, rows, 4), generator=generator)].movedim(-1, 1)
    return chosen + 0.4 * torch.randn(count, 8, rows, 4, generator=generator)


def trained(steps: int = 3, *choices: Any, **config: Any) -> Any:
    """A residual quantizer after some training batches."""
    quantizer = residual(*choices, **config)
    for step in range(steps):
        train_on(quantizer, batch(step))
    return quantizer


def rows_of(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


# Residual quantization


@every_kind
def test_one_level_is_the_book(book, shared):
    torch.manual_seed(0)
    one: Any = make_quantizer(book).train()
    torch.manual_seed(0)
    other = residual(book, 1, shared)
    for step in range(12):  # through a revival
        z, again = batch(step).requires_grad_(), batch(step).requires_grad_()
        expected, found = one.quantize(z), other.quantize(again)
        assert torch.equal(found.z_q, expected.z_q) and torch.equal(found.tokens, expected.tokens)
        for losses, weights, leaf in ((expected.losses, one, z), (found.losses, other, again)):
            sum(weights.loss_weights[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
            assert leaf.grad is not None
        assert torch.equal(again.grad, z.grad)
    for (key, value), (name, mine) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == f"books.0.{key}" and torch.equal(mine, value)


@every_kind
def test_each_level_takes_the_code_nearest_to_the_residual(book, shared):
    quantizer = trained(3, book, 3, shared).eval()
    z = batch(7)
    z_q, tokens, _ = quantizer.quantize(z)
    assert tokens.shape == (8, 12, 4)
    left, total = rows_of(z), torch.zeros(8 * 4 * 4, 8)
    for level in range(3):
        ids = tokens[:, 4 * level : 4 * (level + 1)].reshape(-1)  # level l of row r stands in row l * rows + r
        table = quantizer.books[0 if shared else level].table().detach()
        distances = (left[:, None] - table).square().sum(2)
        chosen = distances.gather(1, ids[:, None])[:, 0]
        assert torch.allclose(chosen, distances.amin(1), atol=1e-5)
        left, total = left - table[ids], total + table[ids]
    assert torch.equal(rows_of(z_q), total) and torch.equal(quantizer.lookup(tokens), z_q)


@every_kind
def test_commitment_is_that_of_every_partial_sum(book, shared):
    quantizer = trained(3, book, 3, shared).eval()
    z = batch(5)
    _, tokens, losses = quantizer.quantize(z)
    partial, sums = torch.zeros(1), []
    for ids, table in zip(tokens.chunk(3, 1), quantizer.tables(), strict=True):
        partial = partial + F.embedding(ids, table.detach()).movedim(-1, 1)
        sums.append(partial)
    expected = torch.stack([F.mse_loss(z, partial) for partial in sums]).mean()
    torch.testing.assert_close(losses["commitment"], expected)


def test_the_gradient_passes_the_sum_once():
    quantizer = trained(3, "ema", 4, gradient="rotation")
    z, upstream = batch(5).requires_grad_(), torch.randn(8, 8, 4, 4)
    z_q = quantizer.quantize(z).z_q
    (found,) = torch.autograd.grad(z_q, z, upstream)
    leaf = rows_of(z.detach()).requires_grad_()
    rotated = rotate_through(leaf, rows_of(z_q.detach()))
    (expected,) = torch.autograd.grad(rotated, leaf, rows_of(upstream))
    torch.testing.assert_close(rows_of(found), expected)


@every_kind
def test_all_levels_are_quantized_before_any_book_moves(book, shared):
    quantizer = trained(4, book, 3, shared, **({} if book == "simvq" else {"revive_every": 1}))
    z, as_it_was = batch(9), copy.deepcopy(quantizer).eval()
    expected, found = as_it_was.quantize(z), train_on(quantizer, z)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.z_q, expected.z_q)
    assert [int(part.started) for part in quantizer.books] == [5] * (1 if shared else 3)


def test_a_shared_book_moves_once_with_the_rows_of_all_levels():
    quantizer = trained(2, "ema", 3, True, decay=0.9, revive_below=0.0)
    (book,) = quantizer.books
    counts, sums, table = book.counts.clone(), book.sums.clone(), book.codebook.clone()
    z = batch(5)
    left = rows_of(z)
    use, total = torch.zeros(32), torch.zeros(32, 8)
    for ids in train_on(quantizer, z).tokens.chunk(3, 1):
        use += torch.bincount(ids.flatten(), minlength=32)
        total.index_add_(0, ids.flatten(), left)
        left = left - table[ids.flatten()]
    torch.testing.assert_close(book.counts, 0.9 * counts + 0.1 * use)
    torch.testing.assert_close(book.sums, 0.9 * sums + 0.1 * total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("book", ["ema", "vq", "simvq"])
def test_each_book_starts_from_the_residuals_of_its_level(book):
    rows = batch(0, 64)
    separate, shared = residual(book, 3), residual(book, 3, True)
    one = F.mse_loss(make_quantizer(book).train().quantize(rows).z_q, rows)
    for quantizer, share in ((separate, 0.4), (shared, 0.8)):
        z_q, tokens, _ = quantizer.quantize(rows)
        assert F.mse_loss(z_q, rows) < share * one
        used = [len(ids.unique()) for ids in tokens.chunk(3, 1)]
        assert min(used) >= (24 if quantizer is separate else 4)


@pytest.mark.parametrize("shared", [False, True])
def test_lloyd_steps_lower_the_error_level_by_level(shared):
    """Each codebook moves to the means of what the levels before it leave."""
    quantizer = make_quantizer("rvq", shared=shared, depth=3).train()
    z, errors = torch.randn(32, 8, 4, 4), []
    train_on(quantizer, torch.randn(32, 8, 4, 4))
    quantizer.eval()
    for _ in range(4):
        errors.append(float((quantizer.lookup(quantizer.encode(z)) - z).square().mean()))
        quantizer.lloyd_step(z.split(12))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.97 * errors[0]
    assert not make_quantizer("rvq", book={"kind": "simvq", "codes": 32, "dim": 8}).has_means


def test_only_the_map_of_simvq_learns_and_moves_all_codes():
    quantizer: Any = make_quantizer("simvq").train()
    train_on(quantizer, batch(0))
    frozen, before = quantizer.codebook.clone(), quantizer.table().detach()
    quantizer.quantize(batch(1, 1, 1)).losses["codebook"].backward()  # four vectors: at most four codes are used
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    assert torch.equal(quantizer.codebook, frozen)
    assert ((quantizer.table().detach() - before).norm(dim=1) > 1e-4).all()

"""Our quantizers agree with vector-quantize-pytorch (1.20 and later), except for listed differences.

Given equal codes and vectors in training mode, ids, quantized vectors, losses, and gradients of vectors and learned
codes are equal.

Not compared: `ibq`, which theirs lacks; `gumbel`, where theirs uses distances to codes and ours a linear map, like the
dVAE; initial and revived codes, which both choose at random.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers import Quantizer

peers = pytest.importorskip("vector_quantize_pytorch")

DIM, CODES = 6, 20
LEARNED = {"learnable_codebook": True, "ema_update": False}


def vectors(dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Two leaf copies of random vectors `(2, dim, 5, 5)`."""
    z = torch.randn(2, dim, 5, 5)
    return z.clone().requires_grad_(), z.requires_grad_()


def copy_codes(codes: Tensor, mine: Quantizer, other: torch.nn.Module) -> None:
    """Give both codebooks these codes, each used once, after the first step, in which k-means would replace ours."""
    for state in (mine.codebook, getattr(mine, "sums", None), other._codebook.embed[0], other._codebook.embed_avg[0]):
        if state is not None:
            state.data.copy_(codes)
    mine.counts.fill_(1)
    mine.started.fill_(1)


assert_same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def weighted(quantizer: Quantizer, losses: dict[str, Tensor]) -> Tensor | int:
    return sum(weight * losses[name] for name, weight in quantizer.loss_weights.items())


def backward(z_q: Tensor, loss: Tensor | int) -> None:
    """Differentiate the loss, and a sum of outputs whose gradient differs by element."""
    weights = torch.randn(z_q.shape, generator=torch.Generator().manual_seed(1))
    ((z_q * weights).sum() + loss).backward()


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize(("kind", "normalize"), [("ema", False), ("ema", True), ("vq", False)])
def test_a_codebook(kind, normalize, rotation):
    """Including the moving averages of two steps, with Laplace smoothing.

    Theirs stores a cosine codebook normalised, ours normalises it when it is read. Theirs computes the rotated vector,
    ours returns the exact code. Theirs has a single mean squared error for learned codes and vectors, which equals our
    two losses with beta 1.
    """
    codes = torch.randn(CODES, DIM)
    codes = torch.nn.functional.normalize(codes, dim=1) if normalize else codes
    gradient = "rotation" if rotation else "straight_through"
    config = {"decay": 0.99, "normalize": normalize} if kind == "ema" else {}
    mine = Quantizer.create(kind, codes=CODES, dim=DIM, beta=1.0, gradient=gradient, revive_below=0.0, **config).train()
    config = LEARNED if kind == "vq" else {"use_cosine_sim": normalize, "decay": 0.99}
    config = {"accept_image_fmap": True, "rotation_trick": rotation, **config}
    other = peers.VectorQuantize(dim=DIM, codebook_size=CODES, **config).train()
    copy_codes(codes, mine, other)
    for _ in range(2 if kind == "ema" else 1):
        z, z_other = vectors()
        z_q, tokens, losses = mine.quantize(z)
        z_q_other, tokens_other, loss_other = other(z_other)
        assert torch.equal(tokens, tokens_other) and tokens.unique().numel() > 8
        assert_same(z_q, z_q_other)
        for loss in losses.values():
            assert_same(loss, loss_other)
        backward(z_q, weighted(mine, losses))
        backward(z_q_other, loss_other)
        assert_same(z.grad, z_other.grad)
        if kind == "ema":
            assert_same(mine.counts, other._codebook.cluster_size[0])
            assert_same(mine.table(), other.codebook)
        else:
            assert_same(mine.codebook.grad, other._codebook.embed.grad[0])
    assert kind == "vq" or not torch.allclose(mine.table(), codes, atol=1e-3)  # it moved


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_residual_codebooks(kind):
    """Ids of each level, commitments, gradients, and codebooks after a step.

    Theirs passes the output's gradient once per level, ours once in total. With the rotation trick theirs rotates each
    level, ours the vector onto the sum. Theirs updates a shared codebook at each level, ours once. (Theirs takes rows
    here, as version 1.32 fails with images.)
    """
    depth, books = 3, torch.randn(3, CODES, DIM) * torch.tensor([1, 0.5, 0.25]).reshape(3, 1, 1)
    book = {"kind": kind, "codes": CODES, "dim": DIM, "beta": 1.0, "revive_below": 0.0, "decay": 0.99}
    mine = Quantizer.create("rvq", depth=depth, book=book).train()
    config = {"rotation_trick": False, **(LEARNED if kind == "vq" else {"decay": 0.99})}
    other = peers.ResidualVQ(dim=DIM, num_quantizers=depth, codebook_size=CODES, **config).train()
    levels = list(zip(books, mine.books, other.layers, strict=True))
    for level in levels:
        copy_codes(*level)
    z, z_other = vectors()
    z_q, tokens, losses = mine.quantize(z)
    z_q_other, tokens_other, losses_other = other(z_other.flatten(2).transpose(1, 2))
    z_q_other = z_q_other.transpose(1, 2).reshape(z.shape)
    assert torch.equal(torch.stack(tokens.chunk(depth, 1), -1).flatten(1, 2), tokens_other)
    assert_same(z_q, z_q_other)
    assert_same(losses["commitment"], losses_other.mean())
    backward(z_q, weighted(mine, losses))
    backward(z_q_other / depth, losses_other.mean())
    assert_same(z.grad, z_other.grad)
    for codes, a, b in levels:
        assert_same(a.table(), b.codebook)
        if kind == "vq":
            assert_same(a.codebook.grad, b._codebook.embed.grad[0])
        else:
            assert not torch.allclose(a.table(), codes, atol=1e-3)


@pytest.mark.parametrize("levels", [(8, 5, 5), (4, 3, 7, 6)])
def test_fsq(levels):
    """With the same bound, epsilon (1e-3) and digit order. Ours lacks their `preserve_symmetry` (Parker et al. 2024,
    section 3.2)."""
    mine, other = Quantizer.create("fsq", levels=levels).train(), peers.FSQ(list(levels)).train()
    z, z_other = vectors(len(levels))
    z_q, tokens, losses = mine.quantize(3 * z)
    z_q_other, tokens_other = other(3 * z_other)
    assert not losses and torch.equal(tokens, tokens_other.long())
    assert_same(z_q, z_q_other)
    backward(z_q, 0)
    backward(z_q_other, 0)
    assert_same(z.grad, z_other.grad)
    every = torch.arange(math.prod(levels)).reshape(1, 1, -1)
    assert_same(mine.lookup(every), other.indices_to_codes(every))


@pytest.mark.parametrize(("name", "temperature", "scale"), [("lfq", 3.0, 1.0), ("bsq", 0.3, 6**-0.5)])
def test_bits(name, temperature, scale):
    """The first channel is the lowest bit of our ids and the highest of theirs. Our p(code | z) is proportional to
    exp(-|z - code|^2 / temperature), or exp(cosine / temperature) on the sphere, theirs to exp(2 z.code
    inv_temperature). Our commitment of bsq is in units of 1/sqrt(bits), a channel of a code. Theirs clamps
    probabilities at 1e-5 in logarithms, hence the looser tolerance. The two parts of its entropy loss are compared with
    our two losses."""
    bits = 6
    mine = Quantizer.create(name, bits=bits, temperature=temperature, entropy=0.1, diversity=0.1, beta=0.25).train()
    config = {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25 / scale**2, "spherical": name == "bsq"}
    other = peers.LFQ(codebook_size=2**bits, dim=bits, **config).train()
    sharpness = 1 / temperature if name == "lfq" else 1 / (2 * temperature)
    z, z_other = vectors(bits)
    z_q, tokens, losses = mine.quantize(z)
    (z_q_other, tokens_other, loss_other), parts = other(z_other, inv_temperature=sharpness, return_loss_breakdown=True)
    assert torch.equal(sum((tokens >> k & 1) << (bits - 1 - k) for k in range(bits)), tokens_other.long())
    assert_same(z_q, z_q_other)
    torch.testing.assert_close(losses["commitment"], parts.commitment / scale**2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["entropy"], parts.per_sample_entropy, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["diversity"], bits * math.log(2) - parts.batch_entropy, rtol=1e-3, atol=1e-4)
    backward(z_q, weighted(mine, losses))
    backward(z_q_other, loss_other)
    torch.testing.assert_close(z.grad, z_other.grad, rtol=1e-3, atol=1e-4)

"""Our quantizers agree with vector-quantize-pytorch (1.20 and later), except for listed differences.

Given equal codes and vectors in training mode, ids, quantized vectors, losses, and gradients of vectors and learned
codes are equal.

Not compared: `ibq`, which theirs lacks; `gumbel`, where theirs uses distances to codes and ours a linear map, like the
dVAE; initial and revived codes, which both choose at random.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers import Quantizer

peers = pytest.importorskip("vector_quantize_pytorch")

BATCH, DIM, CODES, SIDE = 2, 6, 20, 5


def vectors(dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Two leaf copies of random vectors `(B, dim, 5, 5)`."""
    z = torch.randn(BATCH, dim, SIDE, SIDE)
    return z.clone().requires_grad_(), z.requires_grad_()


def weights_like(z: Tensor) -> Tensor:
    """Weights of the output, so that the elements of its gradient differ."""
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(1))


def ours(name: str, table: Tensor | None = None, **config):
    """Our quantizer in training mode, after its first step, in which k-means would replace the codes of `table`."""
    sizes = {} if table is None else {"codes": len(table), "dim": table.shape[1]}
    quantizer = Quantizer.create(name, **sizes, **config).train()
    if table is not None:
        quantizer.codebook.data.copy_(table)
        quantizer.started.fill_(1)
    return quantizer


def theirs(table: Tensor, **config):
    """Their quantizer with the same codes. Its defaults are the rotation trick and a decay of 0.8."""
    config = {"rotation_trick": False, "decay": 0.99, **config}
    quantizer = peers.VectorQuantize(dim=table.shape[1], codebook_size=len(table), accept_image_fmap=True, **config)
    quantizer._codebook.embed.data.copy_(table)
    quantizer._codebook.embed_avg.copy_(table)  # their counts start at 1
    return quantizer.train()


def loss_of(quantizer, losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum of a quantizer's losses."""
    return torch.stack([weight * losses[name] for name, weight in quantizer.loss_weights.items()]).sum()


def same(a: Tensor, b: Tensor) -> None:
    """Assert equality up to rounding."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_an_ema_codebook(rotation, normalize):
    """Including the codebook after two steps, with Laplace smoothing.

    Theirs stores a cosine codebook normalised, ours normalises it when it is read. Theirs computes the rotated vector,
    ours returns the exact code.
    """
    codes = torch.randn(CODES, DIM)
    codes = torch.nn.functional.normalize(codes, dim=1) if normalize else codes
    gradient = "rotation" if rotation else "straight_through"
    mine = ours("ema", codes, decay=0.99, beta=1.0, normalize=normalize, gradient=gradient, revive_below=0.0)
    mine.counts.fill_(1)
    mine.sums.copy_(codes)
    other = theirs(codes, use_cosine_sim=normalize, rotation_trick=rotation)
    for _ in range(2):
        z, z_other = vectors()
        z_q, tokens, losses = mine.quantize(z)
        z_q_other, tokens_other, loss_other = other(z_other)
        assert torch.equal(tokens, tokens_other) and tokens.unique().numel() > 8
        same(z_q, z_q_other)
        same(losses["commitment"], loss_other)
        ((z_q * weights_like(z)).sum() + loss_of(mine, losses)).backward()
        ((z_q_other * weights_like(z)).sum() + loss_other).backward()
        same(z.grad, z_other.grad)
        same(mine.counts, other._codebook.cluster_size[0])
        same(mine.table(), other.codebook)
    assert not torch.allclose(mine.table(), codes, atol=1e-3)  # it moved


@pytest.mark.parametrize("rotation", [False, True])
def test_a_learned_codebook(rotation):
    """Theirs has a single mean squared error for codes and vectors, which equals our two losses with beta 1. (It cannot
    weight them separately, as in the paper.)"""
    codes = torch.randn(CODES, DIM)
    gradient = "rotation" if rotation else "straight_through"
    mine = ours("vq", codes, beta=1.0, gradient=gradient, revive_below=0.0)
    other = theirs(codes, learnable_codebook=True, ema_update=False, rotation_trick=rotation)
    z, z_other = vectors()
    z_q, tokens, losses = mine.quantize(z)
    z_q_other, tokens_other, loss_other = other(z_other)
    assert torch.equal(tokens, tokens_other)
    same(z_q, z_q_other)
    same(losses["codebook"], loss_other)
    same(losses["commitment"], loss_other)
    ((z_q * weights_like(z)).sum() + loss_of(mine, losses)).backward()
    ((z_q_other * weights_like(z)).sum() + loss_other).backward()
    same(z.grad, z_other.grad)
    same(mine.codebook.grad, other._codebook.embed.grad[0])


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_residual_codebooks(kind):
    """Ids of each level, commitments, gradients, and codebooks after a step.

    Theirs passes the output's gradient once per level, ours once in total. With the rotation trick theirs rotates each
    level, ours the vector onto the sum. Theirs updates a shared codebook at each level, ours once. (Theirs takes rows
    here, as version 1.32 fails with images.)
    """
    depth, books = 3, torch.randn(3, CODES, DIM) * torch.tensor([1, 0.5, 0.25]).reshape(3, 1, 1)
    book = {"kind": kind, "codes": CODES, "dim": DIM, "beta": 1.0, "revive_below": 0.0, "decay": 0.99}
    mine = ours("rvq", depth=depth, book=book)
    learned = {"learnable_codebook": True, "ema_update": False} if kind == "vq" else {"decay": 0.99}
    other = peers.ResidualVQ(dim=DIM, num_quantizers=depth, codebook_size=CODES, rotation_trick=False, **learned)
    levels = list(zip(mine.books, other.train().layers, books, strict=True))
    for a, b, codes in levels:
        for state in (a.codebook, b._codebook.embed[0], b._codebook.embed_avg[0], getattr(a, "sums", None)):
            if state is not None:
                state.data.copy_(codes)
        a.counts.fill_(1)
        a.started.fill_(1)
    z, z_other = vectors()
    z_q, tokens, losses = mine.quantize(z)
    z_q_other, tokens_other, losses_other = other(z_other.flatten(2).transpose(1, 2))
    z_q_other = z_q_other.transpose(1, 2).reshape(z.shape)
    assert torch.equal(torch.stack(tokens.chunk(depth, 1), -1).flatten(1, 2), tokens_other)
    same(z_q, z_q_other)
    same(losses["commitment"], losses_other.mean())
    ((z_q * weights_like(z)).sum() + loss_of(mine, losses)).backward()
    ((z_q_other * weights_like(z) / depth).sum() + losses_other.mean()).backward()
    same(z.grad, z_other.grad)
    for a, b, codes in levels:
        same(a.table(), b.codebook)
        if kind == "vq":
            same(a.codebook.grad, b._codebook.embed.grad[0])
        else:
            assert not torch.allclose(a.table(), codes, atol=1e-3)


@pytest.mark.parametrize("levels", [(8, 5, 5), (4, 3, 7, 6)])
def test_fsq(levels):
    """With the same bound, epsilon (1e-3) and digit order. Ours lacks their `preserve_symmetry` (Parker et al. 2024,
    section 3.2)."""
    mine, other = ours("fsq", levels=levels), peers.FSQ(list(levels)).train()
    z, z_other = vectors(len(levels))
    z_q, tokens, losses = mine.quantize(3 * z)
    z_q_other, tokens_other = other(3 * z_other)
    assert not losses and torch.equal(tokens, tokens_other.long())
    same(z_q, z_q_other)
    (z_q * weights_like(z)).sum().backward()
    (z_q_other * weights_like(z)).sum().backward()
    same(z.grad, z_other.grad)
    every = torch.arange(math.prod(levels)).reshape(1, 1, -1)
    same(mine.lookup(every), other.indices_to_codes(every))


def reversed_bits(tokens: Tensor, bits: int) -> Tensor:
    """Ids with reversed bits."""
    return sum((tokens >> k & 1) << (bits - 1 - k) for k in range(bits))


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_bits(name):
    """The first channel is the lowest bit of our ids and the highest of theirs. Our p(code | z) is proportional to
    exp(-|z - code|^2 / temperature), or exp(cosine / temperature) on the sphere, theirs to exp(2 z.code
    inv_temperature). Theirs clamps probabilities at 1e-5 in logarithms, hence the looser tolerance. The two parts of
    its entropy loss are compared with our two losses."""
    bits, temperature = 6, {"lfq": 3.0, "bsq": 0.3}[name]
    mine = ours(name, bits=bits, temperature=temperature, entropy=0.1, diversity=0.1, beta=0.25)
    scale = 1.0 if name == "lfq" else bits**-0.5
    other = peers.LFQ(
        codebook_size=2**bits,
        dim=bits,
        spherical=name == "bsq",
        entropy_loss_weight=0.1,
        commitment_loss_weight=0.25 / scale**2,
    ).train()
    sharpness = 1 / temperature if name == "lfq" else 1 / (2 * temperature)
    z, z_other = vectors(bits)
    z_q, tokens, losses = mine.quantize(z)
    (z_q_other, tokens_other, loss_other), parts = other(z_other, inv_temperature=sharpness, return_loss_breakdown=True)
    assert torch.equal(reversed_bits(tokens, bits), tokens_other.long())
    same(z_q, z_q_other)
    # Our commitment of bsq is in units of 1/sqrt(bits), a channel of a code, hence their weight above.
    torch.testing.assert_close(losses["commitment"], parts.commitment / scale**2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["entropy"], parts.per_sample_entropy, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["diversity"], bits * math.log(2) - parts.batch_entropy, rtol=1e-3, atol=1e-4)
    ((z_q * weights_like(z)).sum() + loss_of(mine, losses)).backward()
    ((z_q_other * weights_like(z)).sum() + loss_other).backward()
    torch.testing.assert_close(z.grad, z_other.grad, rtol=1e-3, atol=1e-4)

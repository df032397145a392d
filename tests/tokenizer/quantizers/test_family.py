"""Promises of every registered quantizer; then `vq`, `ema` and `fsq` against the papers' formulas."""

import copy
import math
from typing import Any

import pytest
import torch
from ranks import of_ranks
from small import QUANTIZERS, latents, make_quantizer, node_of, train_on
from torch import Tensor

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import nearest_codes

BUSY = {"decay": 0.5, "revive_every": 3, "revive_below": 0.5}  # codes are revived all the time
BOOK = {"kind": "ema", "codes": 32, "dim": 8}
CASES: dict[str, dict[str, Any]] = {
    **{name: node_of(name) for name in QUANTIZERS},
    "directions": {**BOOK, "kind": "vq", "normalize": True, "gradient": "rotation"},
    "index of directions": {**BOOK, "kind": "ibq", "normalize": True},
    "soft gumbel": {**node_of("gumbel"), "hard": False},
    "shared rvq": {**node_of("rvq"), "shared": True},
    "multiscale of vq": {**node_of("multiscale"), "phi": 2, "book": {**BOOK, "kind": "vq"}},
}
every_case = pytest.mark.parametrize("name", CASES)


def create(name: str, **more: Any) -> Any:
    """The quantizer of a case. more: settings of its codebook, where it has them."""
    node = dict(CASES[name])
    member = Quantizer.find(node.pop("kind"))
    place = node.get("book", node)
    fields = Quantizer.find(place.get("kind", member.name)).Config.model_fields
    settings = {**place, **{key: value for key, value in more.items() if key in fields}}
    return Quantizer.create(member.name, **({**node, "book": settings} if "book" in node else settings))


def trained(name: str) -> Any:
    """The quantizer of a case after two training batches, in eval mode."""
    quantizer = create(name).train()
    for _ in range(2):
        train_on(quantizer, latents(quantizer, 8, 4, 4))
    return quantizer.eval()


@pytest.mark.sparse
@every_case
@pytest.mark.parametrize("spatial", [(3, 5), (4,), (2, 3, 2)])
def test_lookup_inverts_quantize(name, spatial):
    quantizer = trained(name)
    z = latents(quantizer, 2, *spatial)
    z_q, tokens, _ = quantizer.quantize(z)
    shape = (59,) if quantizer.scales else (quantizer.levels * spatial[0], *spatial[1:])
    assert z_q.shape == z.shape and tokens.shape == (2, *shape)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < quantizer.vocab_size
    assert torch.equal(quantizer.lookup(tokens), z_q) and torch.equal(quantizer.encode(z), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.quantize(z)
        assert torch.equal(inside.tokens, tokens) and torch.equal(quantizer.lookup(tokens), z_q)


@every_case
def test_distinct_ids_are_distinct_codes(name):
    quantizer = trained(name)
    if quantizer.levels == 1 and not quantizer.scales:
        codes = quantizer.lookup(torch.arange(quantizer.vocab_size).reshape(1, -1))[0].t()
        assert len(codes.unique(dim=0)) == quantizer.vocab_size


@every_case
def test_a_gradient_reaches_every_channel(name):
    quantizer = trained(name).train()
    z = latents(quantizer, 4, 4, 4).requires_grad_()
    z_q, _, losses = quantizer.quantize(z)
    assert set(losses) == set(quantizer.loss_weights)
    assert all(loss.ndim == 0 and loss >= 0 for loss in losses.values())
    (z_q * torch.randn_like(z_q)).sum().backward()
    assert z.grad.isfinite().all() and (z.grad.abs().sum((0, 2, 3)) > 0).all()


@every_case
def test_it_moves_with_the_model_but_stays_float32(name):
    quantizer = trained(name)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    model = torch.nn.ModuleList([quantizer])
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        for key, value in quantizer.state_dict().items():
            assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    model.to("meta")
    assert all(tensor.is_meta for tensor in [*quantizer.parameters(), *quantizer.buffers()])


@every_case
def test_wrong_ids_and_vectors_are_refused(name):
    """Arithmetic on bits or levels would look up some code for any number."""
    quantizer = create(name).eval()
    height, width = quantizer.scales[-1] if quantizer.scales else (3, 4)
    tokens = torch.zeros(2, *quantizer.grid_shape(height, width), dtype=torch.int64)
    assert quantizer.lookup(tokens).shape == (2, quantizer.dim, height, width)
    assert quantizer.lookup(tokens[:0]).shape == (0, quantizer.dim, height, width)
    for wrong in (-1, quantizer.vocab_size, 1 << 40):
        tokens[1].flatten()[-2] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            quantizer.lookup(tokens)
    for use in (quantizer.quantize, quantizer.encode):
        with pytest.raises(ValueError, match=f"{quantizer.dim} channels, got {quantizer.dim + 1}"):
            use(torch.randn(1, quantizer.dim + 1, 2, 2))
    if not quantizer.scales:
        with pytest.raises(ValueError, match="no scales"):
            quantizer.lookup_scales(tokens, 1)


@every_case
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_vectors_that_are_not_finite_have_valid_ids(name, value):
    """A run counts the ids of a batch before it knows that the batch is not finite."""
    quantizer = create(name)
    for training in (True, False):
        tokens = quantizer.train(training).quantize(torch.full_like(latents(quantizer, 2, 3, 4), value)).tokens
        assert tokens.min() >= 0 and tokens.max() < quantizer.vocab_size


def gradients(quantizer: Any, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tokens of one training step, and the gradients of the vectors and of the parameters."""
    z = z.clone().requires_grad_()
    z_q, tokens, losses = quantizer.quantize(z)
    loss = (z_q - 1).square().mean() + sum(quantizer.loss_weights[key] * value for key, value in losses.items())
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    return tokens, list(torch.autograd.grad(loss, [z, *learned], materialize_grads=True))


@pytest.mark.parametrize("name", [name for name in CASES if "gumbel" not in name])  # each rank draws its own noise
def test_ranks_train_as_one_process_does(name):
    """Ranks hold equal codebooks to the bit. Their gradients and codebooks differ from one process's by rounding."""
    one = create(name, **BUSY).train()
    ranks = [copy.deepcopy(one) for _ in range(2)]
    for step in range(7):
        z = latents(one, 8, 4, 4) * (1 + step)
        tokens, (of_vectors, *expected) = gradients(one, z)
        found = of_ranks(2, lambda rank, z=z: gradients(ranks[rank], z.chunk(2)[rank]))
        assert torch.equal(torch.cat([part for part, _ in found]), tokens), step
        torch.testing.assert_close(torch.cat([part[0] for _, part in found]) / 2, of_vectors, rtol=1e-3, atol=1e-5)
        averaged = [torch.stack(each).mean(0) for each in zip(*(part[1:] for _, part in found), strict=True)]
        for mean, whole in zip(averaged, expected, strict=True):
            torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-5)
        for quantizer, changes in ((one, expected), (ranks[0], averaged), (ranks[1], averaged)):
            learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
            for parameter, change in zip(learned, changes, strict=True):
                parameter.data -= 0.1 * change
        for key, value in one.state_dict().items():
            mine, other = (rank.state_dict()[key] for rank in ranks)
            assert torch.equal(mine, other), key
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-3)


# Single quantizers


def test_nearest_is_the_nearest(monkeypatch):
    rows, codes = torch.randn(100, 6), torch.randn(40, 6)
    expected = torch.cdist(rows, codes).argmin(1)
    assert torch.equal(nearest_codes(rows, codes), expected)
    monkeypatch.setattr("tokenizer.quantizers.codebook.SEARCH_ELEMENTS", 400)  # several parts
    assert torch.equal(nearest_codes(rows, codes), expected)


def test_beta_is_on_the_commitment():
    """beta scales the pull on the encoder; the codebook's pull does not depend on it."""
    pulls = {}
    for beta in (0.25, 4.0):
        torch.manual_seed(0)
        quantizer = make_quantizer("vq", beta=beta, kmeans_iterations=0).train()
        z = torch.randn(2, 8, 3, 3, requires_grad=True)
        losses = quantizer.quantize(z).losses
        sum(quantizer.loss_weights[name] * loss for name, loss in losses.items()).backward()
        pulls[beta] = (z.grad.clone(), quantizer.codebook.grad.clone())
    assert torch.allclose(pulls[4.0][0], 16 * pulls[0.25][0]) and pulls[4.0][0].abs().max() > 0
    assert torch.equal(pulls[4.0][1], pulls[0.25][1]) and pulls[4.0][1].abs().max() > 0


def test_ema_is_the_running_mean():
    """One step against equations 6 and 7 of the paper."""
    quantizer = make_quantizer("ema", decay=0.9, revive_below=0.0, kmeans_iterations=0).train()
    train_on(quantizer, torch.randn(8, 8, 4, 4))
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    z = torch.randn(8, 8, 4, 4)
    tokens = train_on(quantizer, z).tokens
    rows = z.movedim(1, -1).reshape(-1, 8)
    for code in range(32):
        mine = rows[tokens.flatten() == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
        sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
    assert torch.allclose(quantizer.counts, counts, atol=1e-4) and torch.allclose(quantizer.sums, sums, atol=1e-4)


@pytest.mark.parametrize("levels", [(3,), (8, 5, 5)])
def test_fsq_reaches_all_of_its_codes(levels):
    """Its formula is tested against Cosmos, in `published`."""
    quantizer = Quantizer.create("fsq", levels=levels).eval()
    z_q, tokens, losses = quantizer.quantize(torch.rand(1, len(levels), 20_000) * 5 - 2.5)
    assert len(tokens.unique()) == math.prod(levels) == quantizer.vocab_size and losses == {}
    assert z_q.abs().max() <= 1

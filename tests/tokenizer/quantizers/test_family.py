"""Promises of every registered quantizer, and of each idea.

Covers: tokenizer/quantizers/base.py, tokenizer/quantizers/codebook.py, tokenizer/quantizers/ema.py,
tokenizer/quantizers/fsq.py, tokenizer/quantizers/vq.py.
"""

import itertools
import math

import pytest
import torch
from small import QUANTIZERS, latents, make_quantizer, train_on

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import nearest

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@pytest.mark.sparse
@every_quantizer
@pytest.mark.parametrize("spatial", [(3, 5), (4,), (2, 3, 2)])
def test_lookup_of_tokens_is_z_q(name, spatial):
    quantizer = make_quantizer(name).eval()
    z = latents(quantizer, 2, *spatial)
    z_q, tokens, _ = quantizer.quantize(z)
    shape = (59,) if quantizer.scales else (quantizer.levels * spatial[0], *spatial[1:])
    assert z_q.shape == z.shape and tokens.shape == (2, *shape)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < quantizer.vocab_size
    assert torch.equal(z_q, quantizer.lookup(tokens)) and torch.equal(quantizer.encode(z), tokens)


@pytest.mark.sparse
@every_quantizer
@pytest.mark.parametrize("wrong", [-1, "vocab_size", 1 << 40])
def test_ids_out_of_range_are_refused_in_one_line(name, wrong):
    """Arithmetic on bits or levels would look up some code for any number."""
    quantizer = make_quantizer(name).eval()
    height, width = quantizer.scales[-1] if quantizer.scales else (3, 4)
    tokens = torch.zeros(2, *quantizer.grid_shape(height, width), dtype=torch.int64)
    assert quantizer.lookup(tokens).shape == (2, quantizer.dim, height, width)
    tokens[1].flatten()[-2] = quantizer.vocab_size if wrong == "vocab_size" else wrong
    with pytest.raises(ValueError, match=rf"^token ids should lie in \[0, {quantizer.vocab_size}\), got .*$"):
        quantizer.lookup(tokens)
    assert quantizer.lookup(tokens[:0]).shape == (0, quantizer.dim, height, width)


@every_quantizer
def test_distinct_ids_are_distinct_codes(name):
    quantizer = make_quantizer(name).eval()
    if quantizer.levels == 1 and not quantizer.scales:
        codes = quantizer.lookup(torch.arange(quantizer.vocab_size).reshape(1, -1))[0].t()
        assert len(codes.unique(dim=0)) == quantizer.vocab_size


@every_quantizer
def test_a_gradient_reaches_every_channel(name):
    quantizer = make_quantizer(name).train()
    z = latents(quantizer, 4, 4, 4).requires_grad_()
    quantizer.quantize(z).z_q.square().sum().backward()
    assert (z.grad.abs().sum((0, 2, 3)) > 0).all()


@every_quantizer
def test_bf16_autocast_changes_nothing(name):
    quantizer = make_quantizer(name).eval()
    z = latents(quantizer, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.quantize(z)
    assert torch.equal(inside.tokens, quantizer.quantize(z).tokens) and inside.z_q.dtype == torch.float32


@every_quantizer
def test_weights_and_losses_have_the_same_names(name):
    quantizer = make_quantizer(name).train()
    losses = quantizer.quantize(latents(quantizer, 4, 4, 4)).losses
    assert set(losses) == set(quantizer.loss_weights)
    assert all(loss.ndim == 0 and loss >= 0 for loss in losses.values())


@every_quantizer
def test_eval_changes_nothing(name):
    quantizer = make_quantizer(name).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.quantize(latents(quantizer, 4, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


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
    with pytest.raises(ValueError, match=f"^z should have {quantizer.dim} channels, got {quantizer.dim + 1}$"):
        quantizer.quantize(torch.randn(1, quantizer.dim + 1, 2, 2))
    with pytest.raises(ValueError, match="channels"):
        quantizer.encode(torch.randn(1, quantizer.dim + 1, 2, 2))
    if not quantizer.scales:
        with pytest.raises(ValueError, match=f"^a '{name}' quantizer has no scales$"):
            quantizer.lookup_scales(torch.zeros(1, *quantizer.grid_shape(3, 4), dtype=torch.int64), 1)


def test_nearest_is_the_nearest(monkeypatch):
    rows, codes = torch.randn(100, 6), torch.randn(40, 6)
    expected = torch.cdist(rows, codes).argmin(1)
    assert torch.equal(nearest(rows, codes), expected)
    monkeypatch.setattr("tokenizer.quantizers.codebook.SEARCH_ELEMENTS", 400)  # several parts
    assert torch.equal(nearest(rows, codes), expected)


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
    """One step against equation 6-8 of the paper, written out."""
    quantizer = make_quantizer("ema", decay=0.9, revive_below=0.0, kmeans_iterations=0).train()
    train_on(quantizer, torch.randn(8, 8, 4, 4))
    counts, sums, codebook = quantizer.counts.clone(), quantizer.sums.clone(), quantizer.codebook.clone()
    z = torch.randn(8, 8, 4, 4)
    tokens = train_on(quantizer, z).tokens
    rows = z.movedim(1, -1).reshape(-1, 8)
    for code in range(32):
        mine = rows[tokens.flatten() == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
        sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
    assert torch.allclose(quantizer.counts, counts, atol=1e-4) and torch.allclose(quantizer.sums, sums, atol=1e-4)
    total = counts.sum()
    smoothed = (counts + 1e-5) / (total + 32e-5) * total
    assert torch.allclose(quantizer.codebook, sums / smoothed[:, None], atol=1e-4)
    assert not torch.equal(quantizer.codebook, codebook)


@pytest.mark.parametrize("seed", [0, 1 << 32, 1 << 64, (1 << 70) + 3])
@pytest.mark.parametrize("name", ["ema", "vq", "simvq", "ibq"])
def test_a_codebook_starts_from_few_vectors_with_any_seed(name, seed):
    quantizer = make_quantizer(name, seed=seed).train()
    tokens = train_on(quantizer, latents(quantizer, 1, 2, 2)).tokens
    assert tokens.shape == (1, 2, 2) and quantizer.started == 1 and quantizer.table().isfinite().all()


@pytest.mark.parametrize("levels", [(3,), (4,), (8, 5, 5), (4, 3, 7)])
def test_fsq_reaches_all_of_its_codes(levels):
    quantizer = Quantizer.create("fsq", levels=levels).eval()
    axes = [torch.linspace(-2.5, 2.5, 400)] * len(levels)
    z = torch.stack([axis[torch.randint(400, (20_000,))] for axis in axes])[None]
    z_q, tokens, losses = quantizer.quantize(z)
    assert len(tokens.unique()) == math.prod(levels) == quantizer.vocab_size and losses == {}
    assert z_q.abs().max() <= 1
    ids = quantizer.lookup(torch.arange(quantizer.vocab_size)[None])[0].t()
    assert len({tuple(code) for code in ids.tolist()}) == math.prod(levels)
    for channel, size in enumerate(levels):
        assert len(ids[:, channel].unique()) == size


@pytest.mark.parametrize("size", [3, 4, 5, 8, 256])
def test_fsq_keeps_zero_at_a_level_and_goes_past_the_outermost(size):
    """What its docstring says of the shift, and why its reach has 1e-3 more: the outermost levels are inside."""
    quantizer = Quantizer.create("fsq", levels=(size,)).eval()
    low, zero, high = quantizer._bound(torch.tensor([[-1e9], [0.0], [1e9]])).flatten().tolist()
    assert zero == pytest.approx(0, abs=1e-5)
    assert (size - 1) // 2 < high < (size - 1) // 2 + 0.5 and -(size // 2) - 0.5 < low < -(size // 2)


def test_fsq_ids_are_mixed_radix():
    quantizer = Quantizer.create("fsq", levels=(3, 4, 5))
    digits = list(itertools.product(range(5), range(4), range(3)))
    half = torch.tensor([1, 2, 2])
    for token, (c, b, a) in enumerate(digits):
        expected = (torch.tensor([a, b, c]) - half) / half
        assert torch.equal(quantizer.lookup(torch.tensor([[token]]))[0, :, 0], expected)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fsq", {"levels": (1, 5)}, "levels"),
        ("fsq", {"levels": (256, 256, 5)}, r"product.* at most 262144 \(got 327680\)"),
        ("fsq", {"levels": (8.5,)}, r"^fsq: levels: expected a whole number \(got 8.5\)$"),
        ("fsq", {"levels": (2,)}, r"^fsq: levels: must be >= 3 \(got 2\)$"),
        ("fsq", {"levels": ()}, r"^fsq: levels: too few values \(got \[\]\)$"),
        ("ema", {"codes": 1}, "codes"),
        ("ema", {"decay": 1.0}, "decay"),
        ("ema", {"codez": 64}, "did you mean 'codes'"),
        ("emma", {}, "ema, fsq"),
        ("vq", {"beta": "much"}, "beta"),
        ("ibq", {"gradient": "rotation"}, "gradient: must be one of 'index'"),
    ],
)
def test_bad_configurations_are_named(name, config, message):
    with pytest.raises(ValueError, match=message):
        Quantizer.create(name, **config)


@every_quantizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_have_ids_that_there_are(name, value):
    """A run counts the ids of a batch before it knows that it is not finite."""
    quantizer = make_quantizer(name, **({"levels": (8, 8, 8)} if name == "fsq" else {}))
    for mode in (True, False):
        tokens = quantizer.train(mode).quantize(torch.full_like(latents(quantizer, 2, 3, 4), value)).tokens
        assert tokens.min() >= 0 and tokens.max() < quantizer.vocab_size

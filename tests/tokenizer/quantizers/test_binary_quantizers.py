"""Signs as ids, `lfq` and `bsq`: entropies against brute force, levels, codes in use, two processes that train as one.

What needs two processes runs in two that this file starts of itself (`python test_binary_quantizers.py FOLDER`).

Covers: tokenizer/quantizers/bsq.py, tokenizer/quantizers/entropy.py, tokenizer/quantizers/lfq.py.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import fork_twice, join_group, leave_group
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer import Tokenizer
from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.entropy import bit_diversity, bit_entropy, diversity, mean_probabilities

BINARY = ["bsq", "lfq"]
TEMPERATURE = {"bsq": 0.2, "lfq": 1.5}  # soft enough that every code of 6 bits has a say
both = pytest.mark.parametrize("name", BINARY)


def make(name: str, **config: Any) -> Any:
    return Quantizer.create(name, **config).train()


def weighted(quantizer: Any, losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([quantizer.loss_weights[name] * loss for name, loss in losses.items()]).sum()


def all_codes(quantizer: Any) -> torch.Tensor:
    """(vocab_size, bits)."""
    return quantizer.lookup(torch.arange(quantizer.vocab_size).reshape(1, -1))[0].t()


def brute_force(name: str, quantizer: Any, z: torch.Tensor) -> torch.Tensor:
    """p of each code for each vector, `(n, 2^bits)` float64, as the papers write it: a softmax over all codes."""
    rows, codes = z.movedim(1, -1).flatten(0, -2).double(), all_codes(quantizer).double()
    if name == "lfq":
        return (-(rows.unsqueeze(1) - codes).square().sum(-1) / TEMPERATURE[name]).softmax(1)
    return (rows / rows.norm(dim=1, keepdim=True) @ codes.t() / TEMPERATURE[name]).softmax(1)


def entropy_of(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


# The entropies


@both
@pytest.mark.parametrize("bits", [2, 5, 6])
def test_entropies_are_those_of_all_codes(name, bits):
    """Value and gradient, against the softmax over the whole codebook; a group that holds all bits is exact."""
    quantizer = make(name, bits=bits, group=bits, temperature=TEMPERATURE[name])
    z = (torch.randn(3, bits, 8, 5) * 0.7 + torch.linspace(-0.5, 0.5, bits)[:, None, None]).requires_grad_()
    losses = quantizer.quantize(z).losses
    p = brute_force(name, quantizer, z)
    expected = {"entropy": entropy_of(p).mean(), "diversity": bits * math.log(2) - entropy_of(p.mean(0))}
    for loss, value in expected.items():
        assert value > 0.01 and torch.allclose(losses[loss].double(), value, rtol=1e-4, atol=1e-6), loss
        found = torch.autograd.grad(losses[loss], z, retain_graph=True)[0]
        wanted = torch.autograd.grad(value, z, retain_graph=True)[0]
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max() and wanted.abs().max() > 1e-4, loss


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_groups_bound_the_diversity_from_below(group):
    """H(E[p]) <= sum of the groups' entropies; what is lost is what groups say about each other."""
    logits = torch.randn(200, 6) * 3
    logits[:, 3:] = logits[:, :3] + 0.1 * torch.randn(200, 3)  # halves that say the same
    exact, found = bit_diversity(logits, 6), bit_diversity(logits, group)
    assert 0 <= found < exact - 0.1
    groups = logits.tensor_split(math.ceil(6 / group), dim=1)
    parts = [part.shape[1] * math.log(2) - entropy_of(mean_probabilities(part)) for part in groups]
    assert max(part.shape[1] for part in groups) <= group
    assert torch.allclose(found, torch.stack(parts).sum(), atol=1e-5)


def test_extremes():
    sure, unsure = torch.tensor([[1e4, -1e4, 1e4]]), torch.zeros(1, 3)
    assert bit_entropy(sure) == 0 and torch.allclose(bit_diversity(sure, 3), torch.tensor(3 * math.log(2)))
    assert torch.allclose(bit_entropy(unsure), torch.tensor(3 * math.log(2))) and abs(bit_diversity(unsure, 3)) < 1e-6
    every = torch.cartesian_prod(*[torch.tensor([-50.0, 50.0])] * 8)
    assert bit_diversity(every, 8) < 1e-6 and bit_entropy(every) < 1e-6
    assert diversity(torch.full((4,), 0.25)) == 0


@both
def test_saturated_bits_have_finite_gradients(name):
    quantizer = make(name, bits=6, temperature=1e-3)
    z = (torch.randn(2, 6, 4, 4).sign() * 300).requires_grad_()
    losses = quantizer.quantize(z).losses
    weighted(quantizer, losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and torch.isfinite(z.grad).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation puts out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@both
@pytest.mark.parametrize(("group", "held"), [(9, 32), (18, 512)])
def test_eighteen_bits_take_little_memory(name, group, held):
    """A row takes some sqrt(2^group) numbers, not 2^group, let alone 2^18; the joint of all 18 bits is feasible."""
    quantizer = make(name, bits=18, levels=2, group=group)
    z = torch.randn(4, 18, 8, 8, requires_grad=True)
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = quantizer.quantize(z).losses
        weighted(quantizer, losses).backward()
    rows = 4 * 8 * 8
    assert largest.elements <= max(rows * held, 2**group)
    assert saved < rows * held * 20 + 8 * 2**group < rows * 2**18 / 8


# Ids and levels


@both
def test_ids_are_the_bits_of_the_signs(name):
    quantizer = make(name, bits=6, levels=2).eval()
    z = torch.randn(2, 6, 3, 4)
    z_q, tokens, _ = quantizer.quantize(z)
    assert quantizer.vocab_size == 8 and tokens.shape == (2, 6, 4)
    for level in range(2):
        bits = z[:, 3 * level : 3 * level + 3] > 0
        expected = bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]
        assert torch.equal(tokens[:, 3 * level : 3 * level + 3], expected)
    size = 1.0 if name == "lfq" else 6**-0.5
    assert torch.allclose(z_q, z.sign() * size) and torch.equal(quantizer.lookup(tokens), z_q)


@both
def test_zero_is_negative(name):
    quantizer = make(name, bits=4).eval()
    z = torch.tensor([0.0, -0.0, 1e-30, 1.0]).reshape(1, 4, 1)
    z_q, tokens, _ = quantizer.quantize(z)
    assert int(tokens) == (12 if name == "lfq" else 8 + 4)
    assert torch.equal(z_q.flatten().sign(), torch.tensor([-1.0, -1.0, 1.0, 1.0]))


@both
@pytest.mark.parametrize(("bits", "levels"), [(18, 1), (18, 2), (18, 18), (256, 16)])
def test_many_bits(name, bits, levels):
    quantizer = make(name, bits=bits, levels=levels).eval()
    z = torch.randn(1, bits, 3, 2)
    z_q, tokens, losses = quantizer.quantize(z)
    assert quantizer.vocab_size == 2 ** (bits // levels) and tokens.shape == (1, 3 * levels, 2)
    assert torch.equal(quantizer.lookup(tokens), z_q) and torch.equal(z_q > 0, z > 0)
    assert all(torch.isfinite(loss) for loss in losses.values())
    shape = Tokenizer.create(
        "vqvae", image_size=(8, 8), channels=1, widths=(8,), quantizer={"kind": name, "bits": bits, "levels": levels}
    ).grid.shape
    assert shape == (2 * levels, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 10, "levels": 3}, "levels: must divide the 10 bits"),
        ({"bits": 36, "levels": 1}, "36 need more levels"),
        ({"bits": 2, "levels": 4}, "levels: must divide"),
        ({"bits": 1}, "bits"),
        ({"temperature": 0.0}, "temperature"),
        ({"group": 19}, "group"),
        ({"diversity": -1.0}, "diversity"),
    ],
)
@both
def test_bad_configurations_are_named(name, config, message):
    with pytest.raises(ValueError, match=message):
        make(name, **config)


# Gradients


@pytest.mark.sparse
@both
@pytest.mark.parametrize("bits", [6, 9, 18, 36])
@pytest.mark.parametrize("loss", ["z_q", "commitment", "entropy", "diversity"])
def test_each_loss_moves_every_channel_of_random_vectors(name, bits, loss):
    """At the default temperature, and not by traces: no channel's gradient is a tenth of the largest one's or less."""
    quantizer = make(name, bits=bits, levels=max(1, bits // 9))
    z = torch.randn(8, bits, 8, 8, requires_grad=True)
    output = quantizer.quantize(z)
    (output.z_q * torch.randn_like(z)).sum().backward() if loss == "z_q" else output.losses[loss].backward()
    strength = z.grad.square().mean((0, 2, 3)).sqrt()
    assert strength.min() > 0.1 * strength.max()
    share = (z.grad.abs() > 0.01 * z.grad.abs().max()).float().mean()
    assert share > 0.2, f"only {share:.0%} of the elements have a gradient"


def test_lfq_is_straight_through():
    quantizer, z, weight = make("lfq", bits=4), torch.randn(1, 4, 3, requires_grad=True), torch.randn(1, 4, 3)
    (quantizer.quantize(z).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_bsq_knows_directions_only():
    """Codes and losses do not depend on a vector's length, and gradients turn it without stretching it."""
    quantizer, z = make("bsq", bits=9), torch.randn(2, 9, 4, 4, requires_grad=True)
    output, longer = quantizer.quantize(z), quantizer.quantize(100 * z)
    assert torch.equal(output.tokens, longer.tokens)
    for loss in output.losses:
        assert torch.allclose(output.losses[loss], longer.losses[loss], rtol=1e-4)
    assert torch.allclose(output.z_q.norm(dim=1), torch.ones(2, 4, 4))
    (output.z_q * torch.randn_like(z)).sum().backward()
    assert (z.grad * z).sum(1).abs().max() < 1e-4 and z.grad.abs().max() > 0.1


def test_bsq_of_zeros_has_a_bounded_gradient():
    quantizer, z = make("bsq", bits=9), torch.zeros(1, 9, 2, requires_grad=True)
    output = quantizer.quantize(z)
    (output.z_q.sum() + weighted(quantizer, output.losses)).backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().max() < 1e4


def test_commitment_is_in_units_of_the_code():
    z = torch.tensor([0.6, 0.8, 0.0, 0.0]).reshape(1, 4, 1)
    codes = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert torch.allclose(make("lfq", bits=4).quantize(z).losses["commitment"], (z.flatten() - codes).square().mean())
    on_the_sphere = (z.flatten() - codes / 2).square().sum()  # the paper's |u - code|^2
    assert torch.allclose(make("bsq", bits=4).quantize(z).losses["commitment"], on_the_sphere)


# Codes in use


def usage(name: str, weight: float, offset: float) -> tuple[int, int]:
    """Codes that 64 clusters take before and after a linear encoder has learned from the quantizer's losses alone."""
    torch.manual_seed(0)
    points = torch.randn(64, 16).repeat(8, 1) + 0.05 * torch.randn(512, 16)
    quantizer, encoder = make(name, diversity=weight), nn.Linear(16, 9)
    nn.init.constant_(encoder.bias, offset)
    optimizer, used = torch.optim.Adam(encoder.parameters(), 0.03), []
    for _ in range(80):
        output = quantizer.quantize(encoder(points).t()[None])
        used.append(len(output.tokens.unique()))
        optimizer.zero_grad()
        weighted(quantizer, output.losses).backward()
        optimizer.step()
    return used[0], used[-1]


@both
def test_diversity_keeps_codes_in_use(name):
    """From an encoder whose bits are nearly all 1, and from one that has collapsed to a single code."""
    first, last = usage(name, 0.1, 1.0)
    assert first < 20 and last >= 56
    assert usage(name, 0.0, 1.0)[1] <= 8
    first, last = usage(name, 0.1, 3.0)
    assert first == 1 and last >= 32
    assert usage(name, 0.0, 3.0)[1] <= 2


# Two processes


class Encoder(nn.Module):
    """What DDP wraps: a linear encoder, its quantizer, and a decoder, which asks the codes for something as well."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(5, 9), nn.Linear(9, 5)
        self.quantizer = make(name, group=5, entropy=1.0, diversity=3.0)

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z_q, _, losses = self.quantizer.quantize(self.encoder(points).t()[None])
        error = (self.decoder(z_q[0].t()) - points).square().mean()
        return error + weighted(self.quantizer, losses), losses


def points_of_all() -> torch.Tensor:
    """64 points in order, so that half of them is unlike the other half."""
    points = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    return points[points[:, 0].argsort()]


def results(model: nn.Module, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients, averaged over parts, and the last part's losses."""
    for part in parts:
        loss, losses = model(part)
        (loss / len(parts)).backward()
    gradients = {key.removeprefix("module."): p.grad for key, p in model.named_parameters()}
    return {**gradients, **{key: value.detach() for key, value in losses.items()}}


def one_of_two(folder: Path) -> None:
    """Half of the points each; then rank 0 looks at images by itself, for which nobody may have to wait."""
    rank = join_group(folder)
    assert dist.get_world_size() == 2
    for name in BINARY:
        model = nn.parallel.DistributedDataParallel(Encoder(name))
        found = results(model, [points_of_all().chunk(2)[rank]])
        save_file(found, folder / f"{name}-{rank}.safetensors")
        if rank == 0:
            model.module.eval()(points_of_all())
    leave_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes left."""
    folder = tmp_path_factory.mktemp("pair")
    fork_twice(__file__, folder)
    return folder


@both
def test_two_processes_have_the_gradient_of_one(pair, name):
    expected = results(Encoder(name), [points_of_all()])
    halves = [load_file(pair / f"{name}-{rank}.safetensors") for rank in range(2)]
    for key in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"):
        assert torch.equal(halves[0][key], halves[1][key])
        assert torch.allclose(halves[0][key], expected[key], rtol=1e-4, atol=1e-5), key
    for half in halves:  # one E[p] for all, where the means over own vectors differ
        assert torch.allclose(half["diversity"], expected["diversity"], rtol=1e-5)
    apart = results(Encoder(name), list(points_of_all().chunk(2)))  # each half with an E[p] of its own
    difference = (apart["encoder.weight"] - expected["encoder.weight"]).abs().max()
    assert difference > 0.05 * expected["encoder.weight"].abs().max()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    one_of_two(Path(sys.argv[1]))
